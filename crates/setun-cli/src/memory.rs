//! How much memory the process has needed.
//!
//! Counted is memory of its own: pages of mapped files are the system's cache, which it takes back when it likes. The system
//! keeps no maximum of that, so a thread looks now and then.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Between two looks: memory that lives shorter may be missed. A look takes some 20 µs.
const INTERVAL: Duration = Duration::from_millis(10);

/// Watches the process's memory from its making until it is dropped.
#[derive(Debug)]
pub struct Watch {
    most: Arc<Most>,
}

#[derive(Debug, Default)]
struct Most {
    bytes: AtomicUsize,
    /// While set, nobody looks.
    aside: AtomicBool,
}

impl Watch {
    /// Starts looking. Without a thread, only [`Watch::peak`] looks.
    pub fn start() -> Self {
        let most = Arc::new(Most::default());
        let seen = Arc::downgrade(&most);
        let look = move || {
            while let (Some(most), Some(now)) = (seen.upgrade(), resident()) {
                if !most.aside.load(Relaxed) {
                    most.bytes.fetch_max(now, Relaxed);
                }
                drop(most);
                std::thread::sleep(INTERVAL);
            }
        };
        let _ = std::thread::Builder::new().name("memory".into()).spawn(look);
        Self { most }
    }

    /// Most memory that was resident at once so far, in bytes, mapped files left out; `None` where the system does not tell.
    pub fn peak(&self) -> Option<usize> {
        let now = resident()?;
        Some(self.most.bytes.fetch_max(now, Relaxed).max(now))
    }

    /// What `f` returns; the memory that it takes meanwhile, and gives back, does not count.
    pub fn aside<T>(&self, f: impl FnOnce() -> T) -> T {
        self.most.aside.store(true, Relaxed);
        let result = f();
        // A look that began meanwhile is over by then.
        std::thread::sleep(INTERVAL / 5);
        self.most.aside.store(false, Relaxed);
        result
    }
}

fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_gone_again_counts_and_untouched_memory_does_not() {
        let watch = Watch::start();
        let before = watch.peak().unwrap();
        let untouched = vec![0u8; 1 << 30];
        let mut touched = vec![1u8; 64 << 20];
        std::thread::sleep(10 * INTERVAL);
        touched[1 << 20] = 2;
        drop((touched, untouched));
        watch.aside(|| {
            let touched = vec![1u8; 1 << 30];
            std::thread::sleep(3 * INTERVAL);
            assert_eq!(touched[5], 1);
        });
        let peak = watch.peak().unwrap();
        assert!((before + (60 << 20)..before + (600 << 20)).contains(&peak), "{before} then {peak}");
    }
}

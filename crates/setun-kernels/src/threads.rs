//! The thread pool: fork and join in well under a microsecond while busy, asleep while idle.
//!
//! A token needs about a hundred forks of some tens of microseconds, so workers spin briefly between
//! them; chunks are claimed from a counter, so a thread that the system takes away delays only its own
//! chunk. A pool that is already running (a nested call, or a second caller) runs the new work inline
//! on the caller: nothing can deadlock. Without the `std` feature everything runs inline.

use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[cfg(feature = "std")]
mod workers;
#[cfg(feature = "std")]
pub use workers::{Pool, physical_cores_allowed};

/// Runs everything inline: there are no threads without an operating system.
#[cfg(not(feature = "std"))]
#[derive(Debug)]
pub struct Pool(());

#[cfg(not(feature = "std"))]
impl Pool {
    /// A pool of one thread, whatever is asked for.
    pub fn new(_threads: usize) -> Self {
        Self(())
    }

    /// Always 1.
    pub fn threads(&self) -> usize {
        1
    }

    /// Calls `f(0)`, …, `f(chunks - 1)`.
    pub fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        (0..chunks).for_each(f);
    }
}

/// A value that exactly one chunk may take.
struct Slot<T> {
    taken: AtomicBool,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: `take` hands the value to one thread only, so sharing the slot moves a `T` between threads.
unsafe impl<T: Send> Sync for Slot<T> {}

impl<T> Slot<T> {
    fn take(&self) -> Option<T> {
        if self.taken.swap(true, Ordering::Relaxed) {
            return None;
        }
        // SAFETY: the swap lets one caller through, ever; nobody else touches the cell.
        unsafe { (*self.value.get()).take() }
    }
}

/// Most threads that have a run of chunks of their own; further ones help the others.
const MOST_RUNS: usize = 64;

/// A counter on a cache line of its own.
#[repr(align(64))]
struct Counter(AtomicUsize);

impl Pool {
    /// Calls `f(0)`, …, `f(chunks - 1)`, each once, on all threads, for chunks of one stream of memory.
    ///
    /// Every thread claims chunks from a run of its own, one after the other, so that what it prefetches beyond
    /// a chunk is its next one; when its run is finished it helps with those of others.
    pub fn run_neighbours(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        let runs = self.threads().min(MOST_RUNS).min(chunks);
        let start = |run: usize| chunks * run / runs;
        let next: [Counter; MOST_RUNS] =
            core::array::from_fn(|run| Counter(AtomicUsize::new(if run < runs { start(run) } else { 0 })));
        self.run(runs, &|own| {
            for run in (own..runs).chain(0..own) {
                loop {
                    let chunk = next[run].0.fetch_add(1, Ordering::Relaxed);
                    if chunk >= start(run + 1) {
                        break;
                    }
                    f(chunk);
                }
            }
        });
    }

    /// Calls `f(i, item)` for every item, in any order, on all threads.
    ///
    /// This is how code without `unsafe` shares out mutable pieces: collect disjoint `&mut` slices.
    pub fn run_items<T: Send>(&self, items: Vec<T>, f: impl Fn(usize, T) + Sync) {
        let slots: Vec<Slot<T>> = items
            .into_iter()
            .map(|v| Slot { taken: AtomicBool::new(false), value: UnsafeCell::new(Some(v)) })
            .collect();
        self.run(slots.len(), &|i| {
            if let Some(item) = slots[i].take() {
                f(i, item);
            }
        });
    }

    /// Calls `f(i, chunk)` for every `chunk_len` elements of `data` (the last chunk may be shorter).
    ///
    /// Panics when `chunk_len` is 0.
    pub fn run_chunks_mut<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(chunk_len > 0, "chunk_len must not be 0");
        if data.len() <= chunk_len {
            if !data.is_empty() {
                f(0, data);
            }
            return;
        }
        self.run_items(data.chunks_mut(chunk_len).collect(), f);
    }
}

/// A pointer that chunks may write through, each to its own part.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: only a capability to write; each use proves that its part is disjoint.
unsafe impl<T: Send> Sync for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    pub(crate) fn as_ptr(&self) -> *mut T {
        self.0
    }
}

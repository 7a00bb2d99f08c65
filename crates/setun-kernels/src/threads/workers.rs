//! The pool's threads, and how many of them this process should have.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Looks at the gate between `pause` instructions before a waiting thread yields: some 30 µs.
const SPINS: usize = 2000;
/// Yields before an idle worker goes to sleep.
const YIELDS: usize = 20;

/// The gate counts the workers inside the current job (low half) and says which job it is (high half;
/// odd while open). One word, so that entering and closing cannot miss each other.
const ONE_JOB: u64 = 1 << 32;
const INSIDE: u64 = ONE_JOB - 1;

fn is_open(gate: u64) -> bool {
    gate & ONE_JOB != 0
}

type Task = *const (dyn Fn(usize) + Sync);

/// What the workers run: written while the gate is closed and nobody is inside.
struct Job {
    task: Option<Task>,
    chunks: usize,
}

struct Shared {
    gate: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Job>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

// SAFETY: `job` is written only by the caller that holds `Pool::busy`, while the gate is closed and the
// count inside is 0; workers read it only after entering the open gate (acquire).
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw task pointer is only used during the `run` that lent it.
unsafe impl Send for Shared {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Claims chunks until none is left. A panic is kept for the caller and ends the job early.
    fn work(&self, task: &(dyn Fn(usize) + Sync), chunks: usize) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let chunk = self.next.fetch_add(1, Ordering::Relaxed);
                if chunk >= chunks {
                    break;
                }
                task(chunk);
            }
        }));
        if let Err(payload) = outcome {
            self.next.store(chunks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// Joins the open job, unless it is the one this worker has already finished.
    fn enter(&self, done: u64) -> Option<u64> {
        let gate = self.gate.load(Ordering::SeqCst);
        let job = gate & !INSIDE;
        if !is_open(gate) || job == done {
            return None;
        }
        let entered = self.gate.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed);
        entered.ok().map(|_| job)
    }

    fn worker(&self) {
        let mut done = 0;
        while let Some(job) = self.wait(done) {
            // SAFETY: this worker is inside the gate, so the job is neither rewritten nor returned
            // from until it leaves.
            let (task, chunks) = unsafe { ((*self.job.get()).task, (*self.job.get()).chunks) };
            if let Some(task) = task {
                // SAFETY: the caller's closure outlives `run`, which waits for this worker to leave.
                self.work(unsafe { &*task }, chunks);
            }
            done = job;
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for the next job: spins, yields, then sleeps. `None` when the pool is dropped.
    fn wait(&self, done: u64) -> Option<u64> {
        let mut looks = 0;
        loop {
            if let Some(job) = self.enter(done) {
                return Some(job);
            }
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if looks < SPINS {
                std::hint::spin_loop();
            } else if looks < SPINS + YIELDS {
                std::thread::yield_now();
            } else {
                self.doze(done);
                looks = SPINS;
            }
            looks += 1;
        }
    }

    fn doze(&self, done: u64) {
        let mut guard = lock(&self.sleep);
        // Announced before the gate is looked at, as the caller opens it before it counts sleepers:
        // in one total order, one of the two sees the other.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            let gate = self.gate.load(Ordering::SeqCst);
            if is_open(gate) && gate & !INSIDE != done || self.stop.load(Ordering::SeqCst) {
                break;
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // Under the lock no sleeper is between its last look and its wait.
            let _guard = lock(&self.sleep);
            self.wake.notify_all();
        }
    }
}

/// A fixed set of threads that share out chunks of work; the calling thread is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    busy: AtomicBool,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller's included; 0 counts as 1. When the system refuses a
    /// thread, the pool has fewer: see [`Pool::threads`].
    pub fn new(threads: usize) -> Self {
        Self::named(threads, "setun-worker")
    }

    fn named(threads: usize, name: &str) -> Self {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { task: None, chunks: 0 }),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let spawn = |_| {
            let shared = Arc::clone(&shared);
            let name = name.to_owned();
            std::thread::Builder::new().name(name).spawn(move || shared.worker()).ok()
        };
        let workers = (1..threads).map_while(spawn).collect();
        Self { shared, busy: AtomicBool::new(false), workers }
    }

    /// Threads that work, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)`, …, `f(chunks - 1)`, each once, on all threads, and returns when all are done.
    ///
    /// A panic in `f` is passed on to the caller after all threads have stopped; chunks not yet begun
    /// are then skipped. When the pool is busy (called from within `f`, or by another thread at the
    /// same time) the chunks run here, one after the other.
    pub fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        let alone = self.workers.is_empty() || chunks <= 1;
        if alone || self.busy.swap(true, Ordering::Acquire) {
            return (0..chunks).for_each(f);
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the pointer is not used after this function, which waits
        // for every worker that entered.
        let task = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Task>(f) };
        // SAFETY: `busy` makes this the only caller, the gate is closed and nobody is inside.
        unsafe { *shared.job.get() = Job { task: Some(task), chunks } };
        shared.next.store(0, Ordering::Relaxed);
        shared.gate.fetch_add(ONE_JOB, Ordering::SeqCst);
        shared.wake_sleepers();
        shared.work(f, chunks);
        // Closed: nobody enters any more. Then wait for those inside.
        shared.gate.fetch_add(ONE_JOB, Ordering::SeqCst);
        let mut looks = 0;
        while shared.gate.load(Ordering::Acquire) & INSIDE != 0 {
            if looks < SPINS {
                looks += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let panicked = lock(&shared.panic).take();
        self.busy.store(false, Ordering::Release);
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_sleepers();
        for worker in self.workers.drain(..) {
            // A worker catches every panic of the work it runs, so there is nothing to pass on.
            let _ = worker.join();
        }
    }
}

/// Physical cores this process may use: its affinity mask without second threads of a core, no more
/// than its control group's processor quota, and at least 1.
pub fn physical_cores_allowed() -> usize {
    let fallback = || std::thread::available_parallelism().map_or(1, usize::from);
    let cores = affinity_cores().unwrap_or_else(fallback);
    cores.min(quota_cores().unwrap_or(usize::MAX)).max(1)
}

/// Allowed processors, counting each set of thread siblings once.
fn affinity_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let allowed = parse_list(list)?;
    let siblings = |cpu: &usize| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let text = std::fs::read_to_string(path).ok();
        text.and_then(|t| parse_list(&t)).unwrap_or_else(|| vec![*cpu])
    };
    Some(count_cores(&allowed, siblings))
}

/// A core counts when the processor is the first allowed one among its siblings.
fn count_cores(allowed: &[usize], siblings: impl Fn(&usize) -> Vec<usize>) -> usize {
    let first = |cpu: &usize| siblings(cpu).into_iter().filter(|s| allowed.contains(s)).min();
    allowed.iter().filter(|cpu| first(cpu).is_none_or(|f| f == **cpu)).count()
}

/// Processor lists as the kernel writes them: `0-3,8,10-11`.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        if to < from || to - from > 1 << 16 {
            return None;
        }
        cpus.extend(from..=to);
    }
    if cpus.is_empty() { None } else { Some(cpus) }
}

/// The smallest processor quota of the process's control group and its parents (version 2), rounded up.
fn quota_cores() -> Option<usize> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let root = std::path::Path::new("/sys/fs/cgroup");
    let group = root.join(path.trim_start_matches('/'));
    group
        .ancestors()
        .take_while(|dir| dir.starts_with(root))
        .filter_map(|dir| parse_quota(&std::fs::read_to_string(dir.join("cpu.max")).ok()?))
        .min()
}

/// `cpu.max` holds `QUOTA PERIOD` in microseconds, or `max PERIOD`.
fn parse_quota(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (usize, usize) = (quota.parse().ok()?, period.parse().ok()?);
    if period == 0 { None } else { Some(quota.div_ceil(period).max(1)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_chunk_runs_exactly_once_on_any_thread_count() {
        for threads in 0..5 {
            let pool = Pool::new(threads);
            for chunks in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..20 {
                    let count = |i: usize| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    };
                    pool.run(chunks, &count);
                    pool.run_neighbours(chunks, &count);
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 40));
            }
        }
    }

    #[test]
    fn many_short_runs_and_sleeping_workers_lose_nothing() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        for round in 0..20_000 {
            if round % 4000 == 0 {
                std::thread::sleep(Duration::from_millis(20));
            }
            pool.run(3, &|i| {
                sum.fetch_add(i + 1, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 6 * 20_000);
    }

    /// Processor time of this process's pool threads, in nanoseconds.
    #[cfg(target_os = "linux")]
    fn workers_time(name: &str) -> u64 {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let of = |file: &str, task: &std::fs::DirEntry| std::fs::read_to_string(task.path().join(file));
        let own = tasks.filter(|task| of("comm", task).is_ok_and(|comm| comm.trim() == name));
        let spent = own.map(|task| of("schedstat", &task).unwrap_or_default());
        spent.filter_map(|text| text.split(' ').next()?.parse::<u64>().ok()).sum()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn idle_workers_take_no_processor_time() {
        let pool = Pool::named(3, "setun-idle");
        pool.run(100, &|_| std::thread::sleep(Duration::from_micros(100)));
        std::thread::sleep(Duration::from_millis(50)); // Spinning and yielding are over long since.
        let before = workers_time("setun-idle");
        assert!(before > 0, "the workers are found, and have worked");
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(workers_time("setun-idle"), before);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_works_on() {
        let pool = Pool::new(4);
        for bad in [0, 5, 99] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|i| assert!(i != bad, "chunk {i} fails on purpose"));
            }));
            assert!(outcome.is_err());
            let count = AtomicUsize::new(0);
            pool.run(50, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 50);
        }
    }

    #[test]
    fn nested_and_concurrent_runs_finish() {
        let pool = Pool::new(3);
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(4, &|_| {
                            pool.run(5, &|_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 3 * 50 * 4 * 5);
    }

    #[test]
    fn chunks_of_a_slice_are_disjoint_and_complete() {
        let pool = Pool::new(3);
        for len in [0, 1, 9, 10, 11, 1000] {
            let mut data = vec![0usize; len];
            pool.run_chunks_mut(&mut data, 10, |chunk, part| {
                for (i, x) in part.iter_mut().enumerate() {
                    *x += chunk * 10 + i + 1;
                }
            });
            assert!(data.iter().enumerate().all(|(i, &x)| x == i + 1));
        }
    }

    #[test]
    fn processor_lists_and_quotas_are_understood() {
        assert_eq!(parse_list("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_list(" 5"), Some(vec![5]));
        assert_eq!(parse_list("3-1"), None);
        assert_eq!(parse_list("x"), None);
        assert_eq!(parse_quota("150000 100000\n"), Some(2));
        assert_eq!(parse_quota("max 100000"), None);
        // Two threads to a core, numbered i and i + 4; one of the second core's is not allowed.
        let siblings = |cpu: &usize| vec![cpu % 4, cpu % 4 + 4];
        assert_eq!(count_cores(&[0, 4, 5, 2, 6], siblings), 3);
        assert!(physical_cores_allowed() >= 1);
    }
}

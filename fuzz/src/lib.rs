//! What every fuzz target shares: the allocator that ends a run which takes too much memory.
//!
//! The bound holds for everything that is alive at once, not only for single allocations: twice the input's
//! size plus 64 MiB. An allocation beyond it fails, which aborts the process at the place that asked for it.
//! Not counted: maps (the file itself, stacks, huge-page buffers of packed weights, which are proportional to tensors).

pub mod drive;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);
static REFUSED: AtomicUsize = AtomicUsize::new(0);

/// Counts `more` bytes if they are within the limit.
fn take(more: usize) -> bool {
    let live = LIVE.fetch_add(more, Relaxed).saturating_add(more);
    if live > LIMIT.load(Relaxed) {
        LIVE.fetch_sub(more, Relaxed);
        REFUSED.store(more, Relaxed);
        return false;
    }
    true
}

// SAFETY: every call goes to `System` with the layout it came with; a refusal is a null pointer, as the trait allows.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout.
        if take(layout.size()) { unsafe { System.alloc(layout) } } else { std::ptr::null_mut() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout.
        if take(layout.size()) { unsafe { System.alloc_zeroed(layout) } } else { std::ptr::null_mut() }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's block and layout.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > layout.size() && !take(size - layout.size()) {
            return std::ptr::null_mut();
        }
        if size < layout.size() {
            LIVE.fetch_sub(layout.size() - size, Relaxed);
        }
        // SAFETY: the caller's block, layout and size.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Undoes libFuzzer's abort at every panic: what the library catches, because a crate it uses panics on bad vocabularies, is no
/// finding. Panics that leave the target still end the run.
pub fn allow_caught_panics() {
    drop(std::panic::take_hook());
}

/// Runs `target` on `data` under the bound.
pub fn within_bounds(data: &[u8], target: fn(&[u8]) -> bool) {
    let limit = LIVE.load(Relaxed) + 2 * data.len() + (64 << 20);
    LIMIT.store(limit, Relaxed);
    target(data);
    LIMIT.store(usize::MAX, Relaxed);
    // `try_reserve` turns a refusal into an error instead of an abort.
    let refused = REFUSED.swap(0, Relaxed);
    assert_eq!(refused, 0, "{refused} bytes were asked for beyond the bound");
}

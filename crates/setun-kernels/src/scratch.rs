//! Memory that tasks of the pool work in: reusable aligned buffers, and one output that many tasks fill.

use crate::lanes::{Chunk, LANES};
use std::cell::RefCell;
use std::marker::PhantomData;

/// A chunk on its own cache line, so that no 512-bit load crosses two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line(Chunk);

thread_local! {
    // A stack, because a task may be run by a thread that already works on something.
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `chunks` aligned chunks of this thread's memory, which hold whatever was left there. A
/// buffer is kept for the next call: decoding a token must not allocate (and clear) hundreds of them.
pub(crate) fn with_scratch<T>(chunks: usize, f: impl FnOnce(&mut [Chunk]) -> T) -> T {
    let mut lines = FREE.with(|free| free.borrow_mut().pop()).unwrap_or_default();
    if lines.len() < chunks {
        lines.resize(chunks, Line([0.0; LANES]));
    }
    // SAFETY: `Line` is `repr(C)` around one chunk and exactly as large, so the chunks follow one another.
    let buffer = unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<Chunk>(), chunks) };
    let result = f(buffer);
    FREE.with(|free| free.borrow_mut().push(lines));
    result
}

const _: () = assert!(size_of::<Line>() == size_of::<Chunk>());

/// An output of which each task writes its own, non-contiguous part.
pub(crate) struct Parts<'a> {
    start: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only access is `get`, whose caller promises that no two tasks touch one element.
unsafe impl Sync for Parts<'_> {}

impl<'a> Parts<'a> {
    pub(crate) fn new(out: &'a mut [f32]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len(), borrow: PhantomData }
    }

    /// Elements `at..at + len`. Panics outside of the slice.
    ///
    /// # Safety
    /// No part handed out while this one lives overlaps it.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn get(&self, at: usize, len: usize) -> &mut [f32] {
        assert!(at <= self.len && len <= self.len - at, "part outside of the output");
        // SAFETY: within the borrowed slice; the caller rules out overlap.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

/// Types of which every bit pattern is a value, without padding.
///
/// # Safety
/// Exactly that.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY (all): plain numbers and arrays of them.
unsafe impl Plain for u8 {}
unsafe impl Plain for i16 {}
unsafe impl Plain for f32 {}
unsafe impl Plain for half::f16 {}
unsafe impl Plain for half::bf16 {}
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// The same memory as elements of another type. Panics unless it is aligned for them and holds a whole number.
pub(crate) fn cast<T: Plain, U: Plain>(from: &[T]) -> &[U] {
    let bytes = size_of_val(from);
    assert!(
        bytes.is_multiple_of(size_of::<U>()) && from.as_ptr().cast::<U>().is_aligned(),
        "cast: does not fit"
    );
    // SAFETY: aligned, as many whole elements as there are bytes for, and any bits are a value of `U`.
    unsafe { std::slice::from_raw_parts(from.as_ptr().cast(), bytes / size_of::<U>()) }
}

/// [`cast`] for memory to be written.
pub(crate) fn cast_mut<T: Plain, U: Plain>(from: &mut [T]) -> &mut [U] {
    let bytes = size_of_val(from);
    assert!(
        bytes.is_multiple_of(size_of::<U>()) && from.as_ptr().cast::<U>().is_aligned(),
        "cast: does not fit"
    );
    // SAFETY: as in `cast`; the borrow is exclusive, and any bits of `U` are a value of `T`.
    unsafe { std::slice::from_raw_parts_mut(from.as_mut_ptr().cast(), bytes / size_of::<U>()) }
}

//! What every operation of the trainer runs on: threads, an instruction set, and buffers that are used again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use setun_kernels::{Kernels, Pool};

/// Threads, kernels and buffers of one run.
#[derive(Debug)]
pub struct Engine {
    /// The threads.
    pub pool: Pool,
    /// The instruction set of the integer products and of the float steps shared with inference.
    pub kernels: &'static Kernels,
    shelf: Arc<Shelf>,
}

/// Buffers that nobody uses, by length: fresh memory costs a page fault per 4 KiB, at every step.
#[derive(Debug, Default)]
struct Shelf(Mutex<HashMap<usize, Vec<Vec<f32>>>>);

impl Shelf {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Vec<Vec<f32>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Floats that go back to their engine's shelf when dropped.
#[derive(Debug)]
pub struct Floats {
    data: Vec<f32>,
    shelf: Arc<Shelf>,
}

impl Drop for Floats {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        self.shelf.lock().entry(data.len()).or_default().push(data);
    }
}

impl std::ops::Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl std::ops::DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Engine {
    /// An engine with `threads` threads and the fastest kernels of this CPU.
    pub fn new(threads: usize) -> Self {
        Self { pool: Pool::new(threads), kernels: Kernels::best(), shelf: Arc::default() }
    }

    /// `len` floats with arbitrary contents, to be overwritten.
    pub fn scratch(&self, len: usize) -> Floats {
        let used = self.shelf.lock().get_mut(&len).and_then(Vec::pop);
        Floats { data: used.unwrap_or_else(|| vec![0.0; len]), shelf: self.shelf.clone() }
    }

    /// `len` zeros.
    pub fn zeros(&self, len: usize) -> Floats {
        let mut floats = self.scratch(len);
        self.pool.run_chunks_mut(&mut floats, CHUNK, |_, chunk| chunk.fill(0.0));
        floats
    }

    /// A copy.
    pub fn copy(&self, values: &[f32]) -> Floats {
        let mut floats = self.scratch(values.len());
        self.pool.run_chunks_mut(&mut floats, CHUNK, |i, chunk| {
            chunk.copy_from_slice(&values[i * CHUNK..][..chunk.len()]);
        });
        floats
    }

    /// Frees the buffers that nobody uses.
    pub fn clear(&self) {
        self.shelf.lock().clear();
    }
}

/// Elements that one thread takes at a time where rows do not matter.
pub(crate) const CHUNK: usize = 1 << 15;

/// Rows of `width` that one thread takes at a time. Depends on the width alone, so that sums over rows do too.
pub(crate) fn rows_per_chunk(width: usize) -> usize {
    CHUNK.div_ceil(width.max(1))
}

/// Runs `f` compiled for the widest vectors of this CPU; loops inside it are vectorised by the compiler.
///
/// The closure and what it calls must be `#[inline(always)]`, else they keep the baseline instruction set: write loops,
/// not `for_each`.
#[inline(always)]
pub(crate) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// `sum += x`, element by element.
pub(crate) fn add_assign(sum: &mut [f32], x: &[f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (sum, x) in sum.iter_mut().zip(x) {
                *sum += x;
            }
        },
    );
}

/// `x -= by`, inside [`vectorised`].
#[inline(always)]
pub(crate) fn subtract(x: &mut [f32], by: f32) {
    for x in x {
        *x -= by;
    }
}

/// `x *= by`, inside [`vectorised`].
#[inline(always)]
pub(crate) fn multiply(x: &mut [f32], by: f32) {
    for x in x {
        *x *= by;
    }
}

/// Lanes of a reduction: its order is fixed, whatever the hardware's width.
pub(crate) const LANES: usize = 16;

/// `Σ f(a, b)` in 16 lanes, folded 8 + 8, 4 + 4, 2 + 2, 1 + 1.
#[inline(always)]
pub(crate) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += f(*a, *b);
    }
    fold(lanes)
}

/// The sum of the lanes, as a tree.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; LANES]) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

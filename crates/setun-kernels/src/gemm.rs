//! Dense f32 products for training: the `gemm` crate behind checked views, shared out over our pool.
//!
//! A product is cut into tiles that depend on its shape alone, and each tile is computed by one thread, so the result has
//! the same bits for any number of threads. Across instruction sets it has not: the crate's inner loops differ.

use crate::threads::{Pool, SharedMut};
use alloc::vec::Vec;

/// A matrix to read: `rows × cols`, any strides.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// Elements that a strided matrix spans.
fn span(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 }
}

impl<'a> View<'a> {
    /// Row-major `[rows, cols]` whose rows start `row_stride` elements apart.
    ///
    /// Panics when `data` is shorter than that.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(
            data.len() >= span(rows, cols, row_stride, 1),
            "view of {rows}x{cols} exceeds {} elements",
            data.len()
        );
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix to write: row-major, rows `row_stride` elements apart.
#[derive(Debug)]
pub struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> ViewMut<'a> {
    /// Row-major `[rows, cols]` whose rows start `row_stride` elements apart.
    ///
    /// Panics when `data` is shorter than that, or rows overlap.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(
            data.len() >= span(rows, cols, row_stride, 1),
            "view of {rows}x{cols} exceeds {} elements",
            data.len()
        );
        assert!(row_stride >= cols, "rows of {cols} columns overlap at stride {row_stride}");
        Self { data, rows, cols, row_stride }
    }
}

/// What happens to the values already there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// They are replaced, and never read.
    Set,
    /// The product is added to them.
    Add,
}

/// `c = alpha · a · b` or `c += alpha · a · b`, on this thread.
///
/// Panics when the shapes do not fit together.
pub fn gemm(c: ViewMut, into: Into, alpha: f32, a: View, b: View) {
    check(&c, a, b);
    let tile = Tile { row: 0, rows: c.rows, col: 0, cols: c.cols };
    let (out, stride) = (SharedMut::new(c.data), c.row_stride);
    // SAFETY: `c` is borrowed mutably here and the one tile is all of it.
    unsafe { product(&out, stride, tile, into, alpha, a, b) };
}

/// [`gemm`] on all threads of `pool`.
pub fn gemm_on(pool: &Pool, c: ViewMut, into: Into, alpha: f32, a: View, b: View) {
    check(&c, a, b);
    let tiles = tiles(c.rows, c.cols, a.cols);
    let (out, stride) = (SharedMut::new(c.data), c.row_stride);
    pool.run(tiles.len(), &|i| {
        // SAFETY: `c` is borrowed mutably until `run` returns, and the tiles are disjoint parts of it.
        unsafe { product(&out, stride, tiles[i], into, alpha, a, b) }
    });
}

fn check(c: &ViewMut, a: View, b: View) {
    assert!(
        a.cols == b.rows && c.rows == a.rows && c.cols == b.cols,
        "product of {}x{} and {}x{} does not fit {}x{}",
        a.rows,
        a.cols,
        b.rows,
        b.cols,
        c.rows,
        c.cols
    );
}

#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
}

/// Cuts the longer side into at most [`PIECES`] strips, none with less than [`WORK`] multiplications.
fn tiles(rows: usize, cols: usize, depth: usize) -> Vec<Tile> {
    let side = rows.max(cols);
    let across = rows.min(cols) * depth;
    let step = side.div_ceil(PIECES).max(WORK.div_ceil(across.max(1))).next_multiple_of(STEP);
    (0..side)
        .step_by(step)
        .map(|start| {
            let len = step.min(side - start);
            if rows >= cols {
                Tile { row: start, rows: len, col: 0, cols }
            } else {
                Tile { row: 0, rows, col: start, cols: len }
            }
        })
        .collect()
}

const PIECES: usize = 8;
const WORK: usize = 1 << 20;
/// A multiple of the inner kernels' tile sizes.
const STEP: usize = 48;

/// # Safety
/// `out` points to the whole of a checked `c`, and nobody else touches the tile.
unsafe fn product(out: &SharedMut<f32>, stride: usize, tile: Tile, into: Into, alpha: f32, a: View, b: View) {
    if tile.rows == 0 || tile.cols == 0 {
        return;
    }
    let (a, b) = (
        &a.data.get(tile.row * a.row_stride..).map_or(a, |data| View { data, ..a }),
        &b.data.get(tile.col * b.col_stride..).map_or(b, |data| View { data, ..b }),
    );
    // SAFETY: the tile lies inside `c`, whose span was checked when the view was made.
    let dst = unsafe { out.as_ptr().add(tile.row * stride + tile.col) };
    // SAFETY: shapes and spans of `a`, `b` and `c` were checked; strides fit because slices are at most isize::MAX long.
    unsafe {
        gemm::gemm(
            tile.rows,
            tile.cols,
            a.cols,
            dst,
            1,
            stride as isize,
            into == Into::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

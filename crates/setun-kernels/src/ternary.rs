//! Ternary × int8 matrix products: the work of every `BitLinear` layer.
//!
//! [`PackedMatrix`] holds a matrix in the layout of one kernel set. The vector layouts cut the rows into
//! panels (64 rows for AVX-512, 32 for AVX2, 16 for NEON). A panel is a sequence of tiles of 16 columns: four bytes
//! for each row, row after row, so that a 32-bit lane is a row and no horizontal sum is ever needed.
//! Field `j` (two bits) of byte `b` holds the code of column `4j + b`: masking a field of a whole vector
//! gives four consecutive columns, ready for the four activations that one instruction multiplies.
//!
//! A few tokens multiply the packed weights directly (decoding waits for memory); many tokens unpack a
//! panel to bytes once and reuse it from the second-level cache (prompts wait for arithmetic).
//!
//! Sums are `i32` and exact. The floats after them are defined operation by operation, so that all
//! kernels give the same bits; see [`PackedMatrix::matmul`].

use alloc::vec::Vec;
use core::ops::Range;

use crate::buffer::Buffer;
use crate::kernels::{Kernels, Products};
use crate::matrix::{Scales, TernaryMatrix};
use crate::quant::Activations;
use crate::threads::{Pool, SharedMut};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neondot;
#[cfg(target_arch = "aarch64")]
mod neoni8mm;
mod pack_tiles;
pub mod scalar;

/// Columns of a tile.
const TILE_COLS: usize = 16;
/// Most rows of a panel and most tokens of one call of a kernel.
const MAX_ROWS: usize = 64;
const MAX_TOKENS: usize = 6;
/// Tiles whose sums are taken in one go: 2^18 columns, so that the highest field, which counts 64-fold
/// until it is shifted down, stays below 2^16 · 64 · 2 · 128 = 2^30.
const MAX_TILES: usize = (1 << 18) / TILE_COLS;

/// `(tiles, count of tiles, activations of each token, sums)`.
type Dot = unsafe fn(*const u8, usize, &[*const i8], &mut Sums);

/// The vector kernels of one instruction set. All take valid pointers as documented and need the
/// instruction set: whoever calls them holds a [`Kernels`] of it.
pub(crate) struct TileKernels {
    /// Rows of a panel.
    rows: usize,
    /// `sums[t][row] = Σ code · activation` for 1 to `direct_tokens` tokens, from packed tiles.
    direct: Dot,
    direct_tokens: usize,
    /// Packed tiles to one byte for each code, as `unpacked` reads them: `[columns / 4][rows][4]` but for i8mm.
    unpack: unsafe fn(*const u8, usize, *mut u8),
    /// As `direct`, for 1 to `unpacked_tokens` tokens from unpacked tiles.
    unpacked: Dot,
    unpacked_tokens: usize,
    /// More tokens than this are worth unpacking a panel for.
    direct_limit: usize,
    /// `y[row] = fma(sum[row] - correction, scale[row], y[row])`, all as long as `scale`.
    fold: unsafe fn(&[i32], i32, &[f32], &mut [f32]),
    /// `out[row] = (sum[row] - correction) · factor`, as long as `out`.
    finish: unsafe fn(&[i32], i32, Factor, &mut [f32]),
}

/// What an integer sum is multiplied with.
#[derive(Clone, Copy)]
enum Factor<'a> {
    Tensor(f32),
    /// A row's scale times the token's inverse.
    Row(&'a [f32], f32),
}

/// Sums of a panel for the tokens of a call.
type Sums = [[i32; MAX_ROWS]; MAX_TOKENS];

fn tile_kernels(products: Products) -> Option<&'static TileKernels> {
    match products {
        #[cfg(target_arch = "x86_64")]
        Products::Avx512 => Some(&avx512::KERNELS),
        #[cfg(target_arch = "x86_64")]
        Products::Avx2 => Some(&avx2::KERNELS),
        #[cfg(target_arch = "aarch64")]
        Products::NeonI8mm => Some(&neoni8mm::KERNELS),
        #[cfg(target_arch = "aarch64")]
        Products::NeonDot => Some(&neondot::KERNELS),
        #[cfg(target_arch = "aarch64")]
        Products::Neon => Some(&neon::KERNELS),
        Products::Scalar => None,
    }
}

/// How columns fall into scale blocks. Every block starts on a tile.
#[derive(Debug, Clone, Copy)]
struct Columns {
    cols: usize,
    /// Columns of a scale block; all columns when a row has one scale.
    block: usize,
}

impl Columns {
    fn new(cols: usize, scales: &Scales) -> Self {
        match scales {
            Scales::Block { cols: block, .. } => Self { cols, block: (*block).min(cols.max(1)) },
            _ => Self { cols, block: cols.max(1) },
        }
    }

    fn blocks(self) -> usize {
        self.cols.div_ceil(self.block)
    }

    /// Columns of block `b`.
    fn range(self, b: usize) -> Range<usize> {
        b * self.block..self.cols.min((b + 1) * self.block)
    }

    /// Tiles of block `b` within a panel.
    fn tiles(self, b: usize) -> Range<usize> {
        let first = b * self.block.div_ceil(TILE_COLS);
        first..first + self.range(b).len().div_ceil(TILE_COLS)
    }

    /// Tiles of a panel.
    fn all_tiles(self) -> usize {
        self.blocks().checked_sub(1).map_or(0, |last| self.tiles(last).end)
    }

    /// Whether tile `i` holds columns `16i..`, without gaps between blocks.
    fn contiguous(self) -> bool {
        self.blocks() <= 1 || self.block.is_multiple_of(TILE_COLS)
    }
}

/// A ternary matrix in the layout of one kernel set.
#[derive(Debug)]
pub struct PackedMatrix {
    rows: usize,
    kernels: &'static Kernels,
    columns: Columns,
    bytes: Buffer,
    scales: Scales,
    /// For block scales on vector kernels: `[panel][block][row of the panel]`.
    panel_scales: Vec<f32>,
}

/// Rows that the scalar kernel treats as a panel.
const SCALAR_ROWS: usize = 16;

impl PackedMatrix {
    /// Copies `matrix` into the layout of `kernels`.
    pub fn pack(matrix: &TernaryMatrix, kernels: &'static Kernels, pool: &Pool) -> Self {
        let columns = Columns::new(matrix.cols(), matrix.scales());
        let rows = matrix.rows();
        let len = match tile_kernels(kernels.products) {
            Some(k) => rows.div_ceil(k.rows) * columns.all_tiles() * k.rows * 4,
            None => matrix.codes().len(),
        };
        let bytes = Buffer::zeroed(len);
        let scales = Scales::Tensor(0.0);
        let mut this = Self { rows, kernels, columns, bytes, scales, panel_scales: Vec::new() };
        this.repack(matrix, pool);
        this
    }

    /// Packs another matrix of the same shape and kind of scales into the same memory.
    ///
    /// Panics when the shape or the scale blocks differ.
    pub fn repack(&mut self, matrix: &TernaryMatrix, pool: &Pool) {
        let columns = Columns::new(matrix.cols(), matrix.scales());
        let same = (self.rows, self.columns.cols, self.columns.block)
            == (matrix.rows(), columns.cols, columns.block);
        assert!(same, "repack of another shape or other scale blocks");
        self.scales = matrix.scales().clone();
        let Some(k) = tile_kernels(self.kernels.products) else {
            self.bytes.copy_from_slice(matrix.codes());
            return;
        };
        let panel_bytes = columns.all_tiles() * k.rows * 4;
        if panel_bytes > 0 {
            pool.run_chunks_mut(&mut self.bytes, panel_bytes, |panel, tiles| {
                pack_tiles::pack_panel(matrix, columns, panel * k.rows, k.rows, tiles);
            });
        }
        self.panel_scales.clear();
        if matches!(self.scales, Scales::Block { .. }) {
            for panel in 0..self.rows.div_ceil(k.rows) {
                for block in 0..columns.blocks() {
                    let col = columns.range(block).start;
                    for row in panel * k.rows..(panel + 1) * k.rows {
                        let row = row.min(self.rows - 1); // Padding rows are never written out.
                        self.panel_scales.push(self.scales.at(row, col, columns.cols));
                    }
                }
            }
        }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.columns.cols
    }

    /// Bytes that a product reads: packed codes and scales.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::Tensor(_) => 1,
            Scales::Row(values) => values.len(),
            Scales::Block { values, .. } => values.len().max(self.panel_scales.len()),
        };
        self.bytes.len() + scales * size_of::<f32>()
    }

    /// The kernel set it is packed for.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// The scales, as they were given.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// The canonical form again.
    pub fn unpack(&self) -> TernaryMatrix {
        let codes = match tile_kernels(self.kernels.products) {
            None => self.bytes.to_vec(),
            Some(k) => pack_tiles::unpack_panels(self.rows, self.columns, k.rows, &self.bytes),
        };
        TernaryMatrix::new(self.rows, self.columns.cols, codes, self.scales.clone())
            .expect("a packed matrix holds the codes and scales of a checked one")
    }

    /// `out[t, r] = Σ_c W[r, c] · x[t, c]` for the activations `x` that `acts` stand for; `out` is
    /// `[tokens, rows]`.
    ///
    /// With a scale per tensor or row, `y = acc as f32 · (scale · inverse)`. With scale blocks,
    /// `y = fma(acc_b as f32, scale_b, y)` over the column blocks `b` in order, from `y = 0`, and
    /// last `y · inverse`. `acc` is the exact integer sum of the row, or of the block's columns.
    ///
    /// Panics when `acts` or `out` do not fit the matrix.
    pub fn matmul(&self, acts: &Activations, out: &mut [f32], pool: &Pool) {
        Self::matmul_group(&[self], acts, &mut [out], pool);
    }

    /// Several products of the same activations, shared out among the threads as one piece of work:
    /// query, key and value, or gate and up. Bit for bit as [`PackedMatrix::matmul`] one by one.
    ///
    /// Panics when lengths do not fit.
    pub fn matmul_group(mats: &[&PackedMatrix], acts: &Activations, outs: &mut [&mut [f32]], pool: &Pool) {
        assert_eq!(mats.len(), outs.len(), "outputs of a group of products");
        let jobs: Vec<Job> = mats
            .iter()
            .zip(outs)
            .map(|(matrix, out)| Job::new(matrix, acts, out.len(), Out::F32(SharedMut::new(out))))
            .collect();
        run(&jobs, pool);
    }

    /// The integer sums without any scale, `[tokens, rows]`.
    ///
    /// Panics when `acts` or `out` do not fit the matrix.
    pub fn matmul_i32(&self, acts: &Activations, out: &mut [i32], pool: &Pool) {
        run(&[Job::new(self, acts, out.len(), Out::I32(SharedMut::new(out)))], pool);
    }
}

#[derive(Clone, Copy)]
enum Out {
    F32(SharedMut<f32>),
    I32(SharedMut<i32>),
}

/// One product, with what all its chunks need.
struct Job<'a> {
    matrix: &'a PackedMatrix,
    acts: &'a Activations,
    /// Rows of activations with every block on a tile, where those of `acts` are not.
    relaid: Vec<i8>,
    /// Sums of the activations of each block, `[tokens, blocks]`: with codes `w + 1`,
    /// `Σ w·a = Σ code·a - Σ a`.
    block_sums: Vec<i32>,
    /// Whether every block of columns has its own scale to apply.
    by_block: bool,
    out: Out,
}

impl<'a> Job<'a> {
    fn new(matrix: &'a PackedMatrix, acts: &'a Activations, out_len: usize, out: Out) -> Self {
        let (tokens, columns) = (acts.tokens(), matrix.columns);
        assert_eq!(acts.cols(), columns.cols, "columns of activations and matrix");
        assert_eq!(Some(out_len), tokens.checked_mul(matrix.rows), "output of a matrix product");
        let (mut relaid, mut block_sums) = (Vec::new(), Vec::new());
        let by_block = matches!((&matrix.scales, out), (Scales::Block { .. }, Out::F32(_)));
        if tile_kernels(matrix.kernels.products).is_some() {
            if !columns.contiguous() {
                let stride = columns.all_tiles() * TILE_COLS;
                relaid.resize(tokens * stride, 0);
                for t in 0..tokens {
                    for b in 0..columns.blocks() {
                        let from = columns.range(b);
                        let to = t * stride + columns.tiles(b).start * TILE_COLS;
                        relaid[to..to + from.len()].copy_from_slice(&acts.row(t)[from]);
                    }
                }
            }
            if by_block {
                for t in 0..tokens {
                    let blocks = acts.row(t).chunks(columns.block);
                    let sum = |block: &[i8]| block.iter().map(|&a| i32::from(a)).sum::<i32>();
                    block_sums.extend(blocks.map(sum));
                }
            }
        }
        Self { matrix, acts, relaid, block_sums, by_block, out }
    }

    /// The activations of token `t` as the tiles expect them: 16 for every tile.
    fn tile_row(&self, t: usize) -> &[i8] {
        let len = self.matrix.columns.all_tiles() * TILE_COLS;
        if self.relaid.is_empty() { &self.acts.padded_row(t)[..len] } else { &self.relaid[t * len..][..len] }
    }

    fn panel_rows(&self) -> usize {
        tile_kernels(self.matrix.kernels.products).map_or(SCALAR_ROWS, |k| k.rows)
    }

    /// Whether packed weights are used as they are.
    fn direct(&self) -> bool {
        let kernels = tile_kernels(self.matrix.kernels.products);
        kernels.is_none_or(|k| self.acts.tokens() <= k.direct_limit)
    }

    /// How the product is cut up: panels, and tokens, of a chunk.
    fn cut(&self, threads: usize) -> (usize, usize) {
        let panels = self.matrix.rows.div_ceil(self.panel_rows());
        let tokens = self.acts.tokens();
        if self.direct() {
            // Neighbouring panels stay together: prefetching runs ahead from one into the next.
            let pieces = if threads == 1 { 1 } else { threads * 8 };
            return (panels.div_ceil(pieces).clamp(1, 8), tokens);
        }
        // A panel is unpacked once for each chunk, which a few dozen tokens pay for.
        let pieces = if threads == 1 { 1 } else { (threads * 4).div_ceil(panels.max(1)) };
        let tokens_per_chunk = tokens.div_ceil(pieces).max(48);
        (1, tokens_per_chunk.next_multiple_of(MAX_TOKENS))
    }

    fn chunks(&self, threads: usize) -> usize {
        let (panels, tokens) = self.cut(threads);
        let all_panels = self.matrix.rows.div_ceil(self.panel_rows());
        all_panels.div_ceil(panels) * self.acts.tokens().div_ceil(tokens.max(1))
    }

    fn run_chunk(&self, chunk: usize, threads: usize) {
        let (panels, tokens) = self.cut(threads);
        let all_panels = self.matrix.rows.div_ceil(self.panel_rows());
        let columns_of_chunks = all_panels.div_ceil(panels);
        let first_panel = chunk % columns_of_chunks * panels;
        let first_token = chunk / columns_of_chunks * tokens;
        let tokens = first_token..self.acts.tokens().min(first_token + tokens);
        let zero = [[0; MAX_ROWS]; MAX_TOKENS];
        let mut work = Work { total: zero, part: zero, folded: [[0.0; MAX_ROWS]; MAX_TOKENS] };
        for panel in first_panel..all_panels.min(first_panel + panels) {
            match tile_kernels(self.matrix.kernels.products) {
                Some(k) => self.run_panel(k, &mut work, panel, tokens.clone()),
                None => self.run_scalar(panel, tokens.clone()),
            }
        }
    }

    fn run_scalar(&self, panel: usize, tokens: Range<usize>) {
        let m = self.matrix;
        let row_bytes = m.columns.cols.div_ceil(4);
        let rows = panel * SCALAR_ROWS..m.rows.min((panel + 1) * SCALAR_ROWS);
        for r in rows {
            let codes = &m.bytes[r * row_bytes..][..row_bytes];
            for t in tokens.clone() {
                let acts = self.acts.row(t);
                let at = t * m.rows + r;
                match self.out {
                    // SAFETY: element (t, r) of the output belongs to this chunk alone.
                    Out::I32(out) => unsafe {
                        *out.as_ptr().add(at) = scalar::dot(codes, acts);
                    },
                    // SAFETY: as above.
                    Out::F32(out) => unsafe {
                        let inverse = self.acts.inverse(t);
                        *out.as_ptr().add(at) = scalar::row(codes, &m.scales, r, acts, inverse);
                    },
                }
            }
        }
    }

    fn run_panel(&self, k: &TileKernels, work: &mut Work, panel: usize, tokens: Range<usize>) {
        let m = self.matrix;
        let tile_bytes = k.rows * 4;
        let tiles = m.columns.all_tiles();
        let packed = &m.bytes[panel * tiles * tile_bytes..][..tiles * tile_bytes];
        if self.direct() {
            let weights = Weights { bytes: packed, tile_bytes, dot: k.direct };
            for group in even_groups(tokens, k.direct_tokens) {
                // SAFETY: `packed` is `tiles` tiles, and `k` belongs to the matrix's kernel set.
                unsafe { self.run_group(k, weights, work, panel, group) };
            }
        } else {
            with_scratch(tiles * tile_bytes * 4, |bytes| {
                // SAFETY: four bytes come from each packed one, and there is room for them.
                unsafe { (k.unpack)(packed.as_ptr(), tiles, bytes.as_mut_ptr()) };
                let weights = Weights { bytes, tile_bytes: tile_bytes * 4, dot: k.unpacked };
                for group in even_groups(tokens, k.unpacked_tokens) {
                    // SAFETY: `bytes` is `tiles` unpacked tiles; `k` as above.
                    unsafe { self.run_group(k, weights, work, panel, group) };
                }
            });
        }
    }

    /// One panel for as many tokens as its kernel takes at once.
    ///
    /// # Safety
    /// `weights` holds the panel's tiles as its `dot` reads them; the CPU has the instructions of `k`.
    unsafe fn run_group(
        &self,
        k: &TileKernels,
        weights: Weights,
        work: &mut Work,
        panel: usize,
        tokens: Range<usize>,
    ) {
        let m = self.matrix;
        let blocks = m.columns.blocks();
        let count = tokens.len();
        let mut rows = [core::ptr::null::<i8>(); MAX_TOKENS];
        for (row, t) in rows.iter_mut().zip(tokens.clone()) {
            *row = self.tile_row(t).as_ptr();
        }
        if self.by_block {
            work.folded[..count].fill([0.0; MAX_ROWS]);
        }
        if blocks == 0 {
            work.total[..count].fill([0; MAX_ROWS]);
        }
        for b in 0..blocks {
            let mut tiles = m.columns.tiles(b);
            let mut fresh = self.by_block || b == 0;
            while !tiles.is_empty() {
                let n = tiles.len().min(MAX_TILES);
                let mut acts = rows;
                for a in &mut acts[..count] {
                    // SAFETY: each row holds 16 activations for every tile of the panel.
                    *a = unsafe { a.add(tiles.start * TILE_COLS) };
                }
                let from = weights.bytes[tiles.start * weights.tile_bytes..].as_ptr();
                let to = if fresh { &mut work.total } else { &mut work.part };
                // SAFETY: `n` tiles of weights and activations start there; the rest is the caller's.
                unsafe { (weights.dot)(from, n, &acts[..count], to) };
                if !fresh {
                    for (total, part) in work.total[..count].iter_mut().zip(&work.part) {
                        for (sum, part) in total.iter_mut().zip(part).take(k.rows) {
                            *sum = sum.wrapping_add(*part);
                        }
                    }
                }
                fresh = false;
                tiles.start += n;
            }
            if self.by_block {
                let scales = &m.panel_scales[(panel * blocks + b) * k.rows..][..k.rows];
                for (i, t) in tokens.clone().enumerate() {
                    let correction = self.block_sums[t * blocks + b];
                    // SAFETY: the caller vouches for the instruction set.
                    unsafe { (k.fold)(&work.total[i], correction, scales, &mut work.folded[i]) };
                }
            }
        }
        let first = panel * k.rows;
        let valid = k.rows.min(m.rows - first);
        for (i, t) in tokens.enumerate() {
            let at = t * m.rows + first;
            let (inverse, correction) = (self.acts.inverse(t), self.acts.sum(t));
            let total = &work.total[i][..valid];
            let out = match self.out {
                Out::I32(out) => {
                    // SAFETY: these rows of token `t` belong to this chunk alone.
                    let out = unsafe { core::slice::from_raw_parts_mut(out.as_ptr().add(at), valid) };
                    for (y, sum) in out.iter_mut().zip(total) {
                        *y = sum.wrapping_sub(correction);
                    }
                    continue;
                }
                // SAFETY: as above.
                Out::F32(out) => unsafe { core::slice::from_raw_parts_mut(out.as_ptr().add(at), valid) },
            };
            let factor = match &m.scales {
                Scales::Tensor(scale) => Factor::Tensor(scale * inverse),
                Scales::Row(scales) => Factor::Row(&scales[first..first + valid], inverse),
                Scales::Block { .. } => {
                    for (y, folded) in out.iter_mut().zip(&work.folded[i]) {
                        *y = folded * inverse;
                    }
                    continue;
                }
            };
            // SAFETY: the caller vouches for the instruction set.
            unsafe { (k.finish)(total, correction, factor, out) };
        }
    }
}

/// A panel's weights in one of the two forms that kernels read.
#[derive(Clone, Copy)]
struct Weights<'a> {
    bytes: &'a [u8],
    tile_bytes: usize,
    dot: Dot,
}

/// Where the sums of a group of tokens are kept, made once for each chunk.
struct Work {
    total: Sums,
    part: Sums,
    folded: [[f32; MAX_ROWS]; MAX_TOKENS],
}

/// Cuts tokens into as few groups of at most `most` as possible, of nearly the same size.
fn even_groups(tokens: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let groups = tokens.len().div_ceil(most);
    let at = move |g: usize| tokens.start + tokens.len() * g / groups;
    (0..groups).map(move |g| at(g)..at(g + 1))
}

fn run(jobs: &[Job], pool: &Pool) {
    let threads = pool.threads();
    let total: usize = jobs.iter().map(|job| job.chunks(threads)).sum();
    pool.run(total, &|mut chunk| {
        for job in jobs {
            let own = job.chunks(threads);
            if chunk < own {
                return job.run_chunk(chunk, threads);
            }
            chunk -= own;
        }
    });
}

/// Room for one unpacked panel, kept by each thread from one panel to the next.
#[cfg(feature = "std")]
fn with_scratch(len: usize, f: impl FnOnce(&mut [u8])) {
    use std::cell::RefCell;
    std::thread_local! {
        static SCRATCH: RefCell<Buffer> = RefCell::new(Buffer::zeroed(0));
    }
    SCRATCH.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            *buffer = Buffer::zeroed(len);
        }
        f(&mut buffer[..len]);
    });
}

#[cfg(not(feature = "std"))]
fn with_scratch(len: usize, f: impl FnOnce(&mut [u8])) {
    f(&mut Buffer::zeroed(len));
}

/// The body of [`TileKernels::fold`], compiled for each instruction set.
#[inline(always)]
fn fold_generic(sums: &[i32], correction: i32, scales: &[f32], y: &mut [f32]) {
    for ((y, &sum), &scale) in y.iter_mut().zip(sums).zip(scales) {
        *y = scalar::mul_add(sum.wrapping_sub(correction) as f32, scale, *y);
    }
}

/// The body of [`TileKernels::finish`], compiled for each instruction set.
#[inline(always)]
fn finish_generic(sums: &[i32], correction: i32, factor: Factor, out: &mut [f32]) {
    match factor {
        Factor::Tensor(factor) => {
            for (y, &sum) in out.iter_mut().zip(sums) {
                *y = sum.wrapping_sub(correction) as f32 * factor;
            }
        }
        Factor::Row(scales, inverse) => {
            for ((y, &sum), scale) in out.iter_mut().zip(sums).zip(scales) {
                *y = sum.wrapping_sub(correction) as f32 * (scale * inverse);
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Ternary × int8 matrix products: the work of every `BitLinear` layer.
//!
//! [`PackedMatrix`] holds a matrix in the layout of one kernel set. The vector layouts cut the rows into
//! panels (64 rows for AVX-512, 32 for AVX2 and AVX-VNNI, 16 for NEON). A panel is a sequence of tiles: four bytes for each row, row
//! after row, so that a 32-bit lane is a row and no horizontal sum is ever needed. A byte holds four codes
//! of two bits (tiles of 16 columns), or five that a table turns into fields of two bits (20 columns).
//! Field `j` of byte `b` holds the code of column `4j + b`: masking a field of a whole vector gives four
//! consecutive columns, ready for the four activations that one instruction multiplies.
//!
//! A few tokens multiply the packed weights directly (decoding waits for memory); many tokens unpack a
//! panel to bytes once and reuse it from the second-level cache (prompts wait for arithmetic).
//!
//! Sums are `i32` and exact. The floats after them are defined operation by operation, so that all
//! kernels give the same bits; see [`PackedMatrix::matmul`].

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use half::f16;

use crate::buffer::Buffer;
use crate::kernels::{Kernels, Products};
use crate::matrix::{Scales, TernaryMatrix};
use crate::quant::Activations;
use crate::threads::{Pool, SharedMut};

/// Evaluates the body for as many tokens as there are rows of activations, with their number as a constant, and with the vectors
/// that are taken at once as another, where that depends on it.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! for_each_count {
    ($acts:expr, $t:ident, $v:ident => $body:expr; $($count:literal of $vectors:literal),*) => {
        match $acts.len() {
            $($count => {
                const $t: usize = $count;
                const $v: usize = $vectors;
                $body
            })*
            _ => unreachable!("more tokens than a kernel takes"),
        }
    };
    ($acts:expr, $t:ident => $body:expr; $($count:literal),*) => {
        match $acts.len() {
            $($count => {
                const $t: usize = $count;
                $body
            })*
            _ => unreachable!("more tokens than a kernel takes"),
        }
    };
}

/// The rows of activations, which are as many as counted.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn counted<const T: usize>(acts: &[*const i8]) -> [*const i8; T] {
    *acts.first_chunk().expect("as many as counted")
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_vbmi;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
mod columns;
mod job;
#[cfg(target_arch = "x86_64")]
mod lut;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neondot;
#[cfg(target_arch = "aarch64")]
mod neoni8mm;
mod pack_tiles;
pub mod scalar;

use columns::{Columns, Span};
use job::{Job, Out, Plan, Prepared, run};

/// Columns of a tile of two-bit codes.
const TILE_COLS: usize = 16;
/// Columns of a tile of bytes that hold five weights.
const TILE_COLS_5: usize = 20;
/// Most rows of a panel and most tokens of one call of a kernel.
const MAX_ROWS: usize = 64;
const MAX_TOKENS: usize = 12;
/// Most of them where blocks are folded, which needs registers of its own.
const MAX_FOLDED_TOKENS: usize = 8;
/// Columns whose sums are taken in one go: the highest field counts 64-fold until it is shifted down, and
/// stays below 2^18 / 4 · 64 · 2 · 128 = 2^32 / 4 with four fields to a byte. With five, two fields count
/// 64-fold, and both together stay below 2^18 / 5 · 64 · 2 · 128 · 2 < 2^31.
const MAX_COLUMNS: usize = 1 << 18;

/// Products that are shared out as one piece of work: query, key and value, and one to spare.
const MOST_JOBS: usize = 4;

/// `(tiles, count of tiles, activations of each token, sums)`.
type Dot = unsafe fn(*const u8, usize, &[*const i8], &mut Sums);

/// `(codes, words of a panel from the row's first on)`, to the number of tiles packed.
type PackRow = unsafe fn(&[u8], &mut [[u8; 4]]) -> usize;

/// `(blocks, activations of each token, their sums by block, y)`: for all blocks `b` in order,
/// `y[t][row] = fma(Σ code · activation - sum[b], scale[b][row], y[t][row])`.
type BlockDot = unsafe fn(&Blocks, &[*const i8], &[&[i32]], &mut [[f32; MAX_ROWS]; MAX_TOKENS]);

/// All scale blocks of a panel.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // Other sets take them one by one.
struct Blocks<'a> {
    /// Tiles, or units of unpacked columns, from number 0 on.
    weights: *const u8,
    spans: &'a [Span],
    /// `[block][row]`
    scales: BlockScales<'a>,
}

/// The vector kernels of one instruction set. All take valid pointers as documented and need the
/// instruction set: whoever calls them holds a [`Kernels`] of it.
pub(crate) struct TileKernels {
    /// Rows of a panel.
    rows: usize,
    /// Columns of a tile: [`TILE_COLS`] or [`TILE_COLS_5`].
    tile_cols: usize,
    /// Columns that `unpacked` counts in, 4 or 16. Scale blocks are padded to whole units.
    unit: usize,
    /// Packs the first tiles of a row, as many as it takes, from its codes without gaps, to every `rows`-th
    /// word from the first on. `None`: by plain code.
    pack_row: Option<PackRow>,
    /// `sums[t][row] = Σ code · activation` for 1 to `direct_tokens` tokens, from packed tiles.
    direct: Dot,
    direct_tokens: usize,
    /// Packed tiles to one byte for each code, as `unpacked` reads them: `[columns / 4][rows][4]` but for i8mm.
    unpack: unsafe fn(*const u8, usize, *mut u8),
    /// As `direct`, for 1 to `unpacked_tokens` tokens from unpacked units.
    unpacked: Dot,
    unpacked_tokens: usize,
    /// More tokens than this are worth unpacking a panel for.
    direct_limit: usize,
    /// The same where blocks have their own scales.
    block_limit: usize,
    /// `direct` and `unpacked` for all scale blocks of a panel, with `fold` while sums are in registers;
    /// `None`: block by block.
    direct_blocks: Option<BlockDot>,
    unpacked_blocks: Option<BlockDot>,
    /// `y[row] = fma(sum[row] - correction, scale[row], y[row])`, all as long as the scales.
    fold: unsafe fn(&[i32], i32, BlockScales, &mut [f32]),
    /// `out[row] = y[row] · factor`, as long as `out`.
    scale: unsafe fn(&[f32], f32, &mut [f32]),
    /// `out[row] = (sum[row] - correction) · factor`, as long as `out`.
    finish: unsafe fn(&[i32], i32, Factor, &mut [f32]),
}

/// Scales of one panel's rows, block after block, as they are stored.
#[derive(Debug, Clone, Copy)]
enum BlockScales<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

impl BlockScales<'_> {
    fn rows(self, first: usize, count: usize) -> Self {
        match self {
            Self::F32(scales) => Self::F32(&scales[first..first + count]),
            Self::F16(scales) => Self::F16(&scales[first..first + count]),
        }
    }
}

/// Block scales in the order of panels, `[panel][block][row of the panel]`: as halves when that loses
/// nothing, as with all files that hold halves.
#[derive(Debug)]
enum PanelScales {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl PanelScales {
    fn pack(matrix: &TernaryMatrix, columns: Columns, rows: usize, pool: &Pool) -> Self {
        let Scales::Block { values, .. } = matrix.scales() else { return Self::F32(Vec::new()) };
        let exact = AtomicBool::new(true);
        let chunks = values.chunks(1 << 16);
        pool.run(chunks.len(), &|i| {
            if exact.load(Ordering::Relaxed) && !chunks.clone().nth(i).is_some_and(|c| c.iter().all(is_half))
            {
                exact.store(false, Ordering::Relaxed);
            }
        });
        if exact.into_inner() {
            Self::F16(panel_scales(matrix, columns, rows, pool, f16::from_f32))
        } else {
            Self::F32(panel_scales(matrix, columns, rows, pool, |s| s))
        }
    }

    /// The scales from `first` on, `count` of them.
    fn rows(&self, first: usize, count: usize) -> BlockScales<'_> {
        match self {
            Self::F32(scales) => BlockScales::F32(scales).rows(first, count),
            Self::F16(scales) => BlockScales::F16(scales).rows(first, count),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(scales) => size_of_val(&scales[..]),
            Self::F16(scales) => size_of_val(&scales[..]),
        }
    }
}

/// Whether a half holds this finite value.
fn is_half(value: &f32) -> bool {
    let (bits, exponent) = (value.to_bits(), value.to_bits() >> 23 & 0xff);
    // Normal halves have exponents from -14 to 15 and ten bits of mantissa.
    let normal = (127 - 14..=127 + 15).contains(&exponent) && bits & 0x1fff == 0;
    normal || value.is_finite() && bits == f16::from_f32(*value).to_f32().to_bits()
}

fn panel_scales<T: Copy + Default + Send>(
    matrix: &TernaryMatrix,
    columns: Columns,
    rows: usize,
    pool: &Pool,
    convert: impl Fn(f32) -> T + Sync,
) -> Vec<T> {
    let Scales::Block { rows: block_rows, values, .. } = matrix.scales() else { return Vec::new() };
    let blocks = columns.blocks();
    let mut all = alloc::vec![T::default(); matrix.rows().div_ceil(rows) * rows * blocks];
    if !all.is_empty() {
        pool.run_chunks_mut(&mut all, blocks * rows, |panel, scales| {
            for (i, row) in (panel * rows..matrix.rows()).take(rows).enumerate() {
                let from = &values[row / block_rows * blocks..][..blocks];
                for (to, &scale) in scales[i..].iter_mut().step_by(rows).zip(from) {
                    *to = convert(scale);
                }
            }
        });
    }
    all
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
        Products::Avx512Vbmi => Some(&avx512_vbmi::KERNELS),
        #[cfg(target_arch = "x86_64")]
        Products::Avx512 => Some(&avx512::KERNELS),
        #[cfg(target_arch = "x86_64")]
        Products::AvxVnni => Some(&avx_vnni::KERNELS),
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

/// A ternary matrix in the layout of one kernel set.
#[derive(Debug)]
pub struct PackedMatrix {
    rows: usize,
    kernels: &'static Kernels,
    columns: Columns,
    bytes: Buffer,
    scales: Scales,
    /// For block scales on vector kernels, as are the spans.
    block_scales: PanelScales,
    spans: Vec<Span>,
}

impl PackedMatrix {
    /// Copies `matrix` into the layout of `kernels`.
    pub fn pack(matrix: &TernaryMatrix, kernels: &'static Kernels, pool: &Pool) -> Self {
        let k = tile_kernels(kernels.products);
        let (tile, unit) = k.map_or((TILE_COLS, TILE_COLS), |k| (k.tile_cols, k.unit));
        let columns = Columns::new(matrix.cols(), matrix.scales(), tile, unit);
        let rows = matrix.rows();
        let len = match k {
            Some(k) => rows.div_ceil(k.rows) * columns.tiles() * k.rows * 4,
            None => matrix.codes().len(),
        };
        let by_block = k.is_some() && matches!(matrix.scales(), Scales::Block { .. });
        let mut this = Self {
            rows,
            kernels,
            columns,
            bytes: Buffer::zeroed(len),
            scales: Scales::Tensor(0.0),
            block_scales: PanelScales::F32(Vec::new()),
            spans: if by_block { columns.spans() } else { Vec::new() },
        };
        this.repack(matrix, pool);
        this
    }

    /// Packs another matrix of the same shape and kind of scales into the same memory.
    ///
    /// Panics when the shape or the scale blocks differ.
    pub fn repack(&mut self, matrix: &TernaryMatrix, pool: &Pool) {
        let columns = Columns::new(matrix.cols(), matrix.scales(), self.columns.tile, self.columns.unit);
        let same = (self.rows, self.columns) == (matrix.rows(), columns);
        let by_block = |scales: &Scales| matches!(scales, Scales::Block { .. });
        let same_kind = self.spans.is_empty() || by_block(matrix.scales());
        assert!(same && same_kind, "repack of another shape or other scale blocks");
        self.scales = matrix.scales().clone();
        let Some(k) = tile_kernels(self.kernels.products) else {
            self.bytes.copy_from_slice(matrix.codes());
            return;
        };
        let panel_bytes = columns.tiles() * k.rows * 4;
        if panel_bytes > 0 {
            pool.run_chunks_mut(&mut self.bytes, panel_bytes, |panel, tiles| {
                pack_tiles::pack_panel(matrix, columns, panel * k.rows, k, tiles);
            });
        }
        self.block_scales = PanelScales::pack(matrix, columns, k.rows, pool);
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
            Scales::Tensor(_) => size_of::<f32>(),
            Scales::Row(values) => size_of_val(&values[..]),
            Scales::Block { values, .. } if self.spans.is_empty() => size_of_val(&values[..]),
            Scales::Block { .. } => self.block_scales.bytes(),
        };
        self.bytes.len() + scales
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
        for (matrix, out) in mats.iter().zip(&*outs) {
            matrix.check(acts, out.len());
        }
        let mut prepared: Vec<Prepared> = Vec::new();
        for matrix in mats {
            let plan = Plan::new(matrix, acts, true);
            if plan.needs_preparation() && prepared.iter().all(|p| p.plan != plan) {
                prepared.push(Prepared::new(plan, acts, matrix.kernels, pool));
            }
        }
        // On the stack: decoding a token calls this a hundred times and should not allocate.
        for (mats, outs) in mats.chunks(MOST_JOBS).zip(outs.chunks_mut(MOST_JOBS)) {
            let mut jobs = [const { None }; MOST_JOBS];
            for ((job, matrix), out) in jobs.iter_mut().zip(mats).zip(outs) {
                let (plan, out) = (Plan::new(matrix, acts, true), Out::F32(SharedMut::new(out)));
                *job = Some(Job::new(matrix, acts, plan, &prepared, out, pool.threads()));
            }
            run(&jobs, pool);
        }
    }

    /// The integer sums without any scale, `[tokens, rows]`.
    ///
    /// Panics when `acts` or `out` do not fit the matrix.
    pub fn matmul_i32(&self, acts: &Activations, out: &mut [i32], pool: &Pool) {
        self.check(acts, out.len());
        let plan = Plan::new(self, acts, false);
        let prepared = [Prepared::new(plan, acts, self.kernels, pool)];
        let out = Out::I32(SharedMut::new(out));
        run(&[Some(Job::new(self, acts, plan, &prepared, out, pool.threads()))], pool);
    }

    fn check(&self, acts: &Activations, out_len: usize) {
        assert_eq!(acts.cols(), self.columns.cols, "columns of activations and matrix");
        assert_eq!(Some(out_len), acts.tokens().checked_mul(self.rows), "output of a matrix product");
    }
}

/// The body of [`TileKernels::fold`], compiled for each instruction set.
#[inline(always)]
fn fold_generic(sums: &[i32], correction: i32, scales: BlockScales, y: &mut [f32]) {
    let fold = |(y, &sum): (&mut f32, &i32), scale: f32| {
        *y = scalar::mul_add(sum.wrapping_sub(correction) as f32, scale, *y);
    };
    match scales {
        BlockScales::F32(scales) => y.iter_mut().zip(sums).zip(scales).for_each(|(at, &s)| fold(at, s)),
        BlockScales::F16(scales) => {
            y.iter_mut().zip(sums).zip(scales).for_each(|(at, &s)| fold(at, widen(s)));
        }
    }
}

/// A finite half, exactly: exponents move by a multiplication that is exact for subnormal numbers too.
#[inline(always)]
fn widen(half: f16) -> f32 {
    let bits = u32::from(half.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// The body of [`TileKernels::scale`], compiled for each instruction set.
#[inline(always)]
fn scale_generic(y: &[f32], factor: f32, out: &mut [f32]) {
    out.iter_mut().zip(y).for_each(|(out, y)| *out = y * factor);
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

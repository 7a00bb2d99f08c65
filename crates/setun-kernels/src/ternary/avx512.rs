//! AVX-512 with VNNI: 16 rows to a vector, four vectors to a panel.
//!
//! For one token the fields are masked, not shifted: field `j` then counts 4^j-fold, each in its own
//! accumulator, and one exact shift at the end puts that right. That leaves one `and` and one
//! `vpdpbusd` for 64 weights, the least that these instructions allow.
//!
//! The loops serve weights of two bits and, through [`Trits`], five to a byte (`avx512_vbmi`). They are
//! inlined into functions that have the instructions.

use core::arch::x86_64::*;

mod tiles;

use super::columns::Span;
use super::{BlockScales, Blocks, Factor, MAX_ROWS, MAX_TOKENS, Sums, TILE_COLS, TileKernels, counted};
use tiles::{
    Form, Packed, Panel, TILE_BYTES, TwoBits, Unpacked, VECTORS, field, packed_span, prefetch, store,
};
pub(super) use tiles::{Trits, UNIT};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: MAX_ROWS,
    tile_cols: TILE_COLS,
    unit: UNIT,
    pack_row: None,
    direct,
    direct_tokens: 12,
    direct_limit: usize::MAX,
    block_limit: 64,
    unpack,
    unpacked,
    unpacked_tokens: 6,
    direct_blocks: Some(direct_blocks),
    unpacked_blocks: Some(unpacked_blocks),
    fold,
    scale,
    finish,
};

/// Scales ahead of the current block's that are fetched: those of some 8 blocks.
const SCALES_AHEAD: usize = 8 * MAX_ROWS;

/// `y[t][row] = fma(sum - block sum, scale, y)` for the rows of block `b` from `first` on.
///
/// # Safety
/// There are `T` block sums and rows of `y`, and the CPU has AVX-512.
#[inline(always)]
unsafe fn fold_block<const T: usize, const V: usize>(
    panel: Panel<T, V>,
    b: usize,
    first: usize,
    block_sums: &[*const i32; T],
    scales: BlockScales,
    y: *mut f32,
) {
    // SAFETY: the caller's promise; 64 rows have scales in every block.
    unsafe {
        // Behind an opaque pointer, or sums would be moved between registers and stack around every block.
        let y = core::hint::black_box(y.add(first));
        let mut scale = [_mm512_setzero_ps(); V];
        match scales {
            BlockScales::F32(from) => {
                let from = from.as_ptr().add(b * MAX_ROWS + first);
                for (v, scale) in scale.iter_mut().enumerate() {
                    *scale = _mm512_loadu_ps(from.add(v * 16));
                }
            }
            BlockScales::F16(from) => {
                let from = from.as_ptr().add(b * MAX_ROWS + first);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SCALES_AHEAD).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SCALES_AHEAD + 32).cast());
                for (v, scale) in scale.iter_mut().enumerate() {
                    *scale = _mm512_cvtph_ps(_mm256_loadu_si256(from.add(v * 16).cast()));
                }
            }
        }
        for t in 0..T {
            let correction = _mm512_set1_epi32(*block_sums[t].add(b));
            for v in 0..V {
                let y = y.add(t * MAX_ROWS + v * 16);
                let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(panel[t][v], correction));
                _mm512_storeu_ps(y, _mm512_fmadd_ps(sum, scale[v], _mm512_loadu_ps(y)));
            }
        }
    }
}

/// Folds all blocks.
///
/// # Safety
/// As [`TileKernels::direct_blocks`], for `T` tokens.
#[inline(always)]
unsafe fn fold_blocks<const T: usize, const V: usize>(
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
    form: impl Form<T, V>,
) {
    let acts = &counted::<T>(acts);
    let mut sums = [core::ptr::null::<i32>(); T];
    for (to, from) in sums.iter_mut().zip(block_sums) {
        *to = from[..blocks.spans.len()].as_ptr();
    }
    assert!(block_sums.len() >= T, "block sums of every token");
    let y = y.as_mut_ptr().cast::<f32>();
    for (b, span) in blocks.spans.iter().enumerate() {
        for part in 0..VECTORS / V {
            // SAFETY: the caller's promise: spans lie within the weights and the activations.
            unsafe {
                let zero = [[_mm512_setzero_si512(); V]; T];
                let panel = form.add(blocks.weights, part * V * 64, *span, acts, zero);
                fold_block(panel, b, part * V * 16, &sums, blocks.scales, y);
            }
        }
    }
}

/// The body of [`TileKernels::direct`].
///
/// # Safety
/// As there, in a function that has the instructions of `trits`.
#[inline(always)]
pub(super) unsafe fn direct_body<const F: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    tiles: usize,
    acts: &[*const i8],
    sums: &mut Sums,
) {
    for_each_count!(acts, T, V => {
        let acts = &counted::<T>(acts);
        for part in 0..VECTORS / V {
            // SAFETY: the caller's promise.
            unsafe {
                let zero = [[_mm512_setzero_si512(); V]; T];
                let span = Span { first: 0, count: tiles * F };
                let panel = packed_span(trits, weights, part * V * 64, span, acts, zero);
                store(panel, part * V * 16, sums);
            }
        }
    }; 1 of 4, 2 of 4, 3 of 4, 4 of 4, 5 of 4, 6 of 4, 7 of 2, 8 of 2, 9 of 2,
        10 of 2, 11 of 2, 12 of 2)
}

/// The body of [`TileKernels::direct_blocks`].
///
/// # Safety
/// As there, in a function that has the instructions of `trits`.
#[inline(always)]
pub(super) unsafe fn direct_blocks_body<const F: usize>(
    trits: impl Trits<F>,
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    for_each_count!(acts, T, V => {
        // SAFETY: the caller's promise.
        unsafe { fold_blocks::<T, V>(blocks, acts, block_sums, y, Packed::<F, _>(trits)) }
    }; 1 of 4, 2 of 4, 3 of 4, 4 of 4, 5 of 2, 6 of 2, 7 of 2, 8 of 2)
}

/// The body of [`TileKernels::unpack`].
///
/// # Safety
/// As there, in a function that has the instructions of `trits`.
#[inline(always)]
pub(super) unsafe fn unpack_body<const F: usize>(
    trits: impl Trits<F>,
    packed: *const u8,
    tiles: usize,
    out: *mut u8,
) {
    for tile in 0..tiles {
        let from = packed.wrapping_add(tile * TILE_BYTES);
        prefetch(from);
        for v in 0..VECTORS {
            // SAFETY: vector `v` of the tile, and of each of the groups of columns it becomes.
            unsafe {
                let x = _mm512_loadu_si512(from.add(v * 64).cast());
                let low = trits.low(x);
                let to = out.add(tile * TILE_BYTES * F + v * 64);
                _mm512_storeu_si512(to.cast(), field::<0>(low));
                _mm512_storeu_si512(to.add(TILE_BYTES).cast(), field::<2>(low));
                _mm512_storeu_si512(to.add(TILE_BYTES * 2).cast(), field::<4>(low));
                _mm512_storeu_si512(to.add(TILE_BYTES * 3).cast(), field::<6>(low));
                if F == 5 {
                    _mm512_storeu_si512(to.add(TILE_BYTES * 4).cast(), field::<6>(trits.high(x)));
                }
            }
        }
    }
}

/// # Safety
/// As [`TileKernels::direct`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe { direct_body(TwoBits, weights, tiles, acts, sums) }
}

/// # Safety
/// As [`TileKernels::direct_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct_blocks(
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    // SAFETY: the caller's promise.
    unsafe { direct_blocks_body(TwoBits, blocks, acts, block_sums, y) }
}

/// # Safety
/// As [`TileKernels::unpack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { unpack_body(TwoBits, packed, tiles, out) }
}

/// # Safety
/// As [`TileKernels::unpacked`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn unpacked(panel: *const u8, units: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY: the caller's promise.
    for_each_count!(acts, T, V => {
        let acts = &counted::<T>(acts);
        let zero: Panel<T, V> = [[_mm512_setzero_si512(); V]; T];
        // SAFETY: the caller's promise.
        store(unsafe { Unpacked.add(panel, 0, Span { first: 0, count: units }, acts, zero) }, 0, sums);
    }; 1 of 4, 2 of 4, 3 of 4, 4 of 4, 5 of 4, 6 of 4)
}

/// # Safety
/// As [`TileKernels::unpacked_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn unpacked_blocks(
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    for_each_count!(acts, T, V => {
        // SAFETY: the caller's promise.
        unsafe { fold_blocks::<T, V>(blocks, acts, block_sums, y, Unpacked) }
    }; 1 of 4, 2 of 4, 3 of 4, 4 of 4, 5 of 4, 6 of 4)
}

/// See [`TileKernels::fold`].
#[target_feature(enable = "avx512f,fma")]
pub(super) fn fold(sums: &[i32], correction: i32, scales: BlockScales, y: &mut [f32]) {
    super::fold_generic(sums, correction, scales, y);
}

/// See [`TileKernels::scale`].
#[target_feature(enable = "avx512f,fma")]
pub(super) fn scale(y: &[f32], factor: f32, out: &mut [f32]) {
    super::scale_generic(y, factor, out);
}

/// See [`TileKernels::finish`].
#[target_feature(enable = "avx512f,fma")]
pub(super) fn finish(sums: &[i32], correction: i32, factor: Factor, out: &mut [f32]) {
    super::finish_generic(sums, correction, factor, out);
}

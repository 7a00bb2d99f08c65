//! NEON, as every 64-bit ARM has it: 4 rows to a vector, four vectors to a panel.
//!
//! Products of codes and activations are at most 256 and gather in 16 bits: 124 steps (31 744, below the
//! 32 768 where they would wrap) before two columns at a time are added into 32 bits. A vector of weights
//! makes two of products, with two rows of four columns each.

use core::arch::aarch64::*;

use super::{BlockScales, Factor, MAX_ROWS, Sums, TILE_COLS, TileKernels, counted};
use crate::kernels::{prefetch_far, prefetch_near};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: ROWS,
    tile_cols: TILE_COLS,
    unit: TILE_COLS,
    pack_row: None,
    direct,
    direct_tokens: 2,
    direct_limit: 8,
    block_limit: 8,
    unpack,
    unpacked,
    unpacked_tokens: 2,
    direct_blocks: None,
    unpacked_blocks: None,
    fold,
    scale,
    finish,
};

/// Vectors of a tile, all three kernel sets of this architecture having the same tiles.
pub(super) const VECTORS: usize = 4;
pub(super) const ROWS: usize = VECTORS * 4;
pub(super) const TILE_BYTES: usize = VECTORS * 16;
/// Tiles (of four steps) whose sums fit in 16 bits.
const TILES_IN_16_BITS: usize = 31;
/// As for AVX-512; a tile is a line.
const NEAR: usize = 2 << 10;
const FAR: usize = 32 << 10;

/// For every token and vector, products of the first two rows and of the last two.
type Accumulators<const T: usize> = [[[int16x8_t; 2]; VECTORS]; T];

#[inline]
pub(super) fn prefetch(tile: *const u8) {
    prefetch_near(tile.wrapping_add(NEAR));
    prefetch_far(tile.wrapping_add(FAR));
}

/// The codes of field `F` of a byte.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn field<const F: usize>(x: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(match F {
        0 => vandq_u8(x, vdupq_n_u8(3)),
        1 => vandq_u8(vshrq_n_u8::<2>(x), vdupq_n_u8(3)),
        2 => vandq_u8(vshrq_n_u8::<4>(x), vdupq_n_u8(3)),
        _ => vshrq_n_u8::<6>(x),
    })
}

/// # Safety
/// 64 bytes are readable at `from`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn load(from: *const u8) -> [uint8x16_t; VECTORS] {
    // SAFETY: the caller's promise.
    core::array::from_fn(|v| unsafe { vld1q_u8(from.add(v * 16)) })
}

/// # Safety
/// 16 activations are readable at `offset` of each of `acts`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn activations<const T: usize>(acts: &[*const i8; T], offset: usize) -> [int8x16_t; T] {
    // SAFETY: the caller's promise.
    core::array::from_fn(|t| unsafe { vld1q_s8(acts[t].add(offset)) })
}

/// `acc[t][v] += codes[v] · activations 4L to 4L + 3 of token t`, each product in its own lane.
#[inline]
#[target_feature(enable = "neon")]
fn step<const L: i32, const T: usize>(
    acc: &mut Accumulators<T>,
    codes: [int8x16_t; VECTORS],
    acts: &[int8x16_t; T],
) {
    for (acc, &a) in acc.iter_mut().zip(acts) {
        let a = vreinterpretq_s8_s32(vdupq_laneq_s32::<L>(vreinterpretq_s32_s8(a)));
        for (acc, &w) in acc.iter_mut().zip(&codes) {
            acc[0] = vmlal_s8(acc[0], vget_low_s8(w), vget_low_s8(a));
            acc[1] = vmlal_high_s8(acc[1], w, a);
        }
    }
}

/// Adds the four products of a row to its 32-bit sum.
#[inline]
#[target_feature(enable = "neon")]
fn widen<const T: usize>(acc: &Accumulators<T>, sums: &mut Sums) {
    for (acc, sums) in acc.iter().zip(sums) {
        for ([low, high], to) in acc.iter().zip(sums.as_chunks_mut::<4>().0) {
            let rows = vpaddq_s32(vpaddlq_s16(*low), vpaddlq_s16(*high));
            // SAFETY: four lanes of room.
            unsafe { vst1q_s32(to.as_mut_ptr(), vaddq_s32(vld1q_s32(to.as_ptr()), rows)) };
        }
    }
}

/// # Safety
/// As [`TileKernels::direct`]: `tiles` tiles at `weights`, `16 · tiles` activations at each of `acts`.
#[target_feature(enable = "neon")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe { for_each_count!(acts, T => direct_many::<T>(weights, tiles, counted(acts), sums); 1, 2) }
}

/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn direct_many<const T: usize>(
    weights: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    sums[..T].fill([0; MAX_ROWS]);
    let mut first = 0;
    while first < tiles {
        let end = tiles.min(first + TILES_IN_16_BITS);
        let mut acc = [[[vdupq_n_s16(0); 2]; VECTORS]; T];
        for tile in first..end {
            let w = weights.wrapping_add(tile * TILE_BYTES);
            prefetch(w);
            // SAFETY: a tile of weights and one of activations, within what the caller promised.
            let (x, a) = unsafe { (load(w), activations(&acts, tile * TILE_COLS)) };
            step::<0, T>(&mut acc, x.map(|x| field::<0>(x)), &a);
            step::<1, T>(&mut acc, x.map(|x| field::<1>(x)), &a);
            step::<2, T>(&mut acc, x.map(|x| field::<2>(x)), &a);
            step::<3, T>(&mut acc, x.map(|x| field::<3>(x)), &a);
        }
        widen(&acc, sums);
        first = end;
    }
}

/// # Safety
/// As [`TileKernels::unpack`]: `tiles` tiles at `packed`, room for four times as much at `out`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
    for tile in 0..tiles {
        for v in 0..VECTORS {
            // SAFETY: vector `v` of the tile, and of each of the four groups of columns it becomes.
            unsafe {
                let x = vld1q_u8(packed.add(tile * TILE_BYTES + v * 16));
                let to = out.add(tile * TILE_BYTES * 4 + v * 16).cast();
                vst1q_s8(to, field::<0>(x));
                vst1q_s8(to.add(TILE_BYTES), field::<1>(x));
                vst1q_s8(to.add(TILE_BYTES * 2), field::<2>(x));
                vst1q_s8(to.add(TILE_BYTES * 3), field::<3>(x));
            }
        }
    }
}

/// # Safety
/// As [`TileKernels::unpacked`].
#[target_feature(enable = "neon")]
unsafe fn unpacked(panel: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe { for_each_count!(acts, T => unpacked_many::<T>(panel, tiles, counted(acts), sums); 1, 2) }
}

/// # Safety
/// As [`unpacked`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn unpacked_many<const T: usize>(
    panel: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    sums[..T].fill([0; MAX_ROWS]);
    let mut first = 0;
    while first < tiles {
        let end = tiles.min(first + TILES_IN_16_BITS);
        let mut acc = [[[vdupq_n_s16(0); 2]; VECTORS]; T];
        for tile in first..end {
            let w = panel.wrapping_add(tile * TILE_BYTES * 4);
            // SAFETY: an unpacked tile and one of activations, within what the caller promised.
            unsafe {
                let codes = |four: usize| load(w.add(four * TILE_BYTES)).map(|w| vreinterpretq_s8_u8(w));
                let a = activations(&acts, tile * TILE_COLS);
                step::<0, T>(&mut acc, codes(0), &a);
                step::<1, T>(&mut acc, codes(1), &a);
                step::<2, T>(&mut acc, codes(2), &a);
                step::<3, T>(&mut acc, codes(3), &a);
            }
        }
        widen(&acc, sums);
        first = end;
    }
}

/// See [`TileKernels::fold`].
pub(super) unsafe fn fold(sums: &[i32], correction: i32, scales: BlockScales, y: &mut [f32]) {
    super::fold_generic(sums, correction, scales, y);
}

/// See [`TileKernels::scale`].
pub(super) unsafe fn scale(y: &[f32], factor: f32, out: &mut [f32]) {
    super::scale_generic(y, factor, out);
}

/// See [`TileKernels::finish`].
pub(super) unsafe fn finish(sums: &[i32], correction: i32, factor: Factor, out: &mut [f32]) {
    super::finish_generic(sums, correction, factor, out);
}

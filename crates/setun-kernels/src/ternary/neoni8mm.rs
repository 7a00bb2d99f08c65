//! NEON with 8-bit matrix products (FEAT_I8MM, beside FEAT_DotProd).
//!
//! One token: `usdot` takes the weights unsigned, so that all four fields are masked where they are.
//! Unpacked weights: `smmla` multiplies two rows of eight columns by two tokens, 32 products at once; a
//! panel is unpacked to eight columns of a row side by side. A last token without a partner is its own.

use core::arch::aarch64::*;
use core::arch::asm;

use super::neon::{self, ROWS, TILE_BYTES, VECTORS, activations, field, load, prefetch};
use super::neondot::{self, one_token};
use super::{Sums, TILE_COLS, TileKernels};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: ROWS,
    tile_cols: TILE_COLS,
    unit: TILE_COLS,
    pack_row: None,
    direct,
    direct_tokens: 4,
    direct_limit: 8,
    block_limit: 8,
    unpack,
    unpacked,
    unpacked_tokens: 6,
    direct_blocks: None,
    unpacked_blocks: None,
    fold: neon::fold,
    scale: neon::scale,
    finish: neon::finish,
};

/// Vectors of eight columns of a panel: two rows in each.
const PAIRS: usize = ROWS / 2;

/// `acc[r] + Σ w[4r + i] · a[4L + i]`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usdot<const L: usize>(mut acc: int32x4_t, w: uint8x16_t, a: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes these registers only; the function's feature has the instruction.
    unsafe {
        asm!(
            "usdot {acc:v}.4s, {w:v}.16b, {a:v}.4b[{lane}]",
            acc = inout(vreg) acc, w = in(vreg) w, a = in(vreg) a, lane = const L,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// `acc[2r + t] + Σ w[8r + i] · a[8t + i]`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut acc: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes these registers only; the function's feature has the instruction.
    unsafe {
        asm!(
            "smmla {acc:v}.4s, {w:v}.16b, {a:v}.16b",
            acc = inout(vreg) acc, w = in(vreg) w, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn direct_one(weights: *const u8, tiles: usize, acts: *const i8, sums: &mut Sums) {
    let masked = |mask: u8| move |x| vandq_u8(x, vdupq_n_u8(mask));
    one_token!(
        weights,
        tiles,
        acts,
        sums,
        (0, usdot, 0, masked(3)),
        (1, usdot, 2, masked(3 << 2)),
        (2, usdot, 4, masked(3 << 4)),
        (3, usdot, 6, masked(3 << 6))
    );
}

/// # Safety
/// As [`TileKernels::direct`]: `tiles` tiles at `weights`, `16 · tiles` activations at each of `acts`.
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (both): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => direct_one(weights, tiles, a, sums),
            _ => neondot::direct(weights, tiles, acts, sums),
        }
    }
}

/// Packed tiles to `[columns / 8][rows][8]`.
///
/// # Safety
/// As [`TileKernels::unpack`]: `tiles` tiles at `packed`, room for four times as much at `out`.
#[target_feature(enable = "neon")]
unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
    for tile in 0..tiles {
        for v in 0..VECTORS {
            // SAFETY: vector `v` of the tile, and both pairs of rows in the two groups of columns it becomes.
            unsafe {
                let x = vld1q_u8(packed.add(tile * TILE_BYTES + v * 16));
                let to = out.add(tile * TILE_BYTES * 4 + v * 32);
                store_rows(to, field::<0>(x), field::<1>(x));
                store_rows(to.add(TILE_BYTES * 2), field::<2>(x), field::<3>(x));
            }
        }
    }
}

/// Puts four columns of a row beside the next four, for four rows.
///
/// # Safety
/// 32 bytes are writable at `to`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store_rows(to: *mut u8, first: int8x16_t, second: int8x16_t) {
    let to: *mut i32 = to.cast();
    let (first, second) = (vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second));
    // SAFETY: the caller's promise.
    unsafe {
        vst1q_s32(to, vzip1q_s32(first, second));
        vst1q_s32(to.add(4), vzip2q_s32(first, second));
    }
}

/// # Safety
/// As [`TileKernels::unpacked`].
#[target_feature(enable = "neon,i8mm")]
unsafe fn unpacked(panel: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => unpacked_many(panel, tiles, [[a, a]], sums),
            [a, b] => unpacked_many(panel, tiles, [[a, b]], sums),
            [a, b, c] => unpacked_many(panel, tiles, [[a, b], [c, c]], sums),
            [a, b, c, d] => unpacked_many(panel, tiles, [[a, b], [c, d]], sums),
            [a, b, c, d, e] => unpacked_many(panel, tiles, [[a, b], [c, d], [e, e]], sums),
            [a, b, c, d, e, f] => unpacked_many(panel, tiles, [[a, b], [c, d], [e, f]], sums),
            _ => unreachable!("one to six tokens"),
        }
    }
}

/// Writes both sums of every pair, of which a caller with an odd number of tokens ignores the last.
///
/// # Safety
/// As [`unpacked`].
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn unpacked_many<const P: usize>(
    panel: *const u8,
    tiles: usize,
    acts: [[*const i8; 2]; P],
    sums: &mut Sums,
) {
    let mut acc = [[vdupq_n_s32(0); P]; PAIRS];
    for eight in 0..tiles * 2 {
        // SAFETY: eight columns of weights and activations, within what the caller promised.
        unsafe {
            let pair =
                |[a, b]: [*const i8; 2]| vcombine_s8(vld1_s8(a.add(eight * 8)), vld1_s8(b.add(eight * 8)));
            let acts = acts.map(pair);
            for (v, acc) in acc.iter_mut().enumerate() {
                let w = vld1q_s8(panel.add(eight * ROWS * 8 + v * 16).cast());
                for (acc, &a) in acc.iter_mut().zip(&acts) {
                    *acc = smmla(*acc, w, a);
                }
            }
        }
    }
    for (p, sums) in sums.as_chunks_mut::<2>().0.iter_mut().take(P).enumerate() {
        let [first, second] = sums.each_mut().map(|sums| sums.as_chunks_mut::<4>().0);
        for (v, [low, high]) in acc.as_chunks::<2>().0.iter().enumerate() {
            // SAFETY (both): four lanes of room.
            unsafe {
                vst1q_s32(first[v].as_mut_ptr(), vuzp1q_s32(low[p], high[p]));
                vst1q_s32(second[v].as_mut_ptr(), vuzp2q_s32(low[p], high[p]));
            }
        }
    }
}

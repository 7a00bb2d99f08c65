//! NEON: 4 rows to a vector, 16 vectors to a tile, taken some at a time from the first-level cache. With dot products, `sdot`
//! adds four columns of four rows; without, products of single columns are added in 16 bits.

use core::arch::aarch64::*;

use super::{Bytes, ROWS, Sums, TILE_BYTES, TILE_COLS, add_panel};
use crate::ternary::neondot::sdot;

/// Vectors of one round over the tiles: sums of high and low bytes fill half of the registers.
const BY_DOTS: usize = 8;
const PLAIN: usize = 4;
/// Tiles whose products, two for each sum, fit in 16 bits: 8 · 2 · 15 · 128 = 30 720.
const TILES_IN_16_BITS: usize = 8;

add_panel!(
    #[target_feature(enable = "dotprod")]
    add_panel_by_dots,
    by_dots
);
add_panel!(
    #[target_feature(enable = "neon")]
    add_panel,
    plain
);

/// Low and high codes of four rows.
///
/// # Safety
/// 16 bytes are readable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn codes(from: *const u8) -> [int8x16_t; 2] {
    // SAFETY: the caller's promise.
    let x = unsafe { vld1q_u8(from) };
    [vandq_u8(x, vdupq_n_u8(15)), vshrq_n_u8::<4>(x)].map(|codes| vreinterpretq_s8_u8(codes))
}

/// # Safety
/// `count` tiles and eight bytes of inputs for each are readable; the CPU has dot products.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn by_dots<const T: usize>(tiles: *const u8, count: usize, inputs: Bytes<T>, sums: &mut Sums<T>) {
    for (inputs, sums) in inputs.iter().zip(sums) {
        for (round, sums) in sums.chunks_exact_mut(BY_DOTS * 4).enumerate() {
            let mut acc = [[vdupq_n_s32(0); BY_DOTS]; 2];
            for tile in 0..count {
                // SAFETY: this tile's eight bytes of each.
                let [high, low] = inputs.map(|input| unsafe { vld1_s8(input.add(tile * TILE_COLS)) });
                let x = vcombine_s8(high, low);
                for v in 0..BY_DOTS {
                    // SAFETY: a vector of the tile.
                    let [even, odd] =
                        unsafe { codes(tiles.add(tile * TILE_BYTES + (round * BY_DOTS + v) * 16)) };
                    acc[0][v] = sdot::<1>(sdot::<0>(acc[0][v], even, x), odd, x);
                    acc[1][v] = sdot::<3>(sdot::<2>(acc[1][v], even, x), odd, x);
                }
            }
            for (v, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let sum = vaddq_s32(vshlq_n_s32::<8>(acc[0][v]), acc[1][v]);
                // SAFETY: four lanes of room.
                unsafe { vst1q_s32(sums.as_mut_ptr(), sum) };
            }
        }
    }
}

/// # Safety
/// `count` tiles and eight bytes of inputs for each are readable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn plain<const T: usize>(tiles: *const u8, count: usize, inputs: Bytes<T>, sums: &mut Sums<T>) {
    *sums = [[0; ROWS]; T];
    for (inputs, sums) in inputs.iter().zip(sums) {
        for first in (0..count).step_by(TILES_IN_16_BITS) {
            let some = first..count.min(first + TILES_IN_16_BITS);
            for (round, sums) in sums.chunks_exact_mut(PLAIN * 4).enumerate() {
                // Two rows to a vector: the first two of four, and the others.
                let mut acc = [[[vdupq_n_s16(0); 2]; PLAIN]; 2];
                for tile in some.clone() {
                    // The same four bytes twice, for columns 0 to 3 and 4 to 7.
                    let x = inputs.map(|input| {
                        // SAFETY: this tile's eight bytes.
                        let eight = vreinterpret_s32_s8(unsafe { vld1_s8(input.add(tile * TILE_COLS)) });
                        [vdup_lane_s32::<0>(eight), vdup_lane_s32::<1>(eight)].map(|x| vreinterpret_s8_s32(x))
                    });
                    for v in 0..PLAIN {
                        // SAFETY: a vector of the tile.
                        let codes = unsafe { codes(tiles.add(tile * TILE_BYTES + (round * PLAIN + v) * 16)) };
                        for (acc, x) in acc.iter_mut().zip(x) {
                            for (codes, x) in codes.iter().zip(x) {
                                acc[v][0] = vmlal_s8(acc[v][0], vget_low_s8(*codes), x);
                                acc[v][1] = vmlal_s8(acc[v][1], vget_high_s8(*codes), x);
                            }
                        }
                    }
                }
                let [high, low] = acc.map(|acc| acc.map(|[a, b]| vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b))));
                for (v, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let sum = vaddq_s32(vshlq_n_s32::<8>(high[v]), low[v]);
                    // SAFETY (both): four lanes.
                    let before = unsafe { vld1q_s32(sums.as_ptr()) };
                    unsafe { vst1q_s32(sums.as_mut_ptr(), vaddq_s32(before, sum)) };
                }
            }
        }
    }
}

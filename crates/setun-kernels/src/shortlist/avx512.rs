//! AVX-512 with VNNI: 16 rows to a vector, four vectors to a tile.

use core::arch::x86_64::*;

use super::{Sums, TILE_BYTES, TILE_COLS};

/// Vectors of a tile.
const VECTORS: usize = 4;
/// As in the ternary products.
const NEAR: usize = 2 << 10;
const FAR: usize = 32 << 10;

/// # Safety
/// As [`super::Dot`], with AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn dot(tiles: *const u8, count: usize, inputs: &[[*const i8; 2]], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `inputs` holds.
    unsafe {
        match *inputs {
            [a] => many(tiles, count, [a], sums),
            [a, b] => many(tiles, count, [a, b], sums),
            [a, b, c] => many(tiles, count, [a, b, c], sums),
            _ => unreachable!("one to three tokens"),
        }
    }
}

/// # Safety
/// As [`dot`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn many<const T: usize>(tiles: *const u8, count: usize, inputs: [[*const i8; 2]; T], sums: &mut Sums) {
    let low = _mm512_set1_epi8(15);
    // High and low bytes of every token.
    let mut acc = [[[_mm512_setzero_si512(); VECTORS]; 2]; T];
    for tile in 0..count {
        let w = tiles.wrapping_add(tile * TILE_BYTES);
        for line in 0..VECTORS {
            // Prefetching never faults, wherever the address points.
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(NEAR + line * 64).cast());
            _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(FAR + line * 64).cast());
        }
        // SAFETY: one tile, within what the caller promised.
        let x: [__m512i; VECTORS] =
            core::array::from_fn(|v| unsafe { _mm512_loadu_si512(w.add(v * 64).cast()) });
        let codes = [
            x.map(|x| _mm512_and_si512(x, low)),
            x.map(|x| _mm512_and_si512(_mm512_srli_epi32::<4>(x), low)),
        ];
        for (acc, inputs) in acc.iter_mut().zip(&inputs) {
            for (acc, input) in acc.iter_mut().zip(inputs) {
                for (half, codes) in codes.iter().enumerate() {
                    // SAFETY: four of this tile's eight bytes of inputs.
                    let four =
                        unsafe { input.add(tile * TILE_COLS + half * 4).cast::<i32>().read_unaligned() };
                    let four = _mm512_set1_epi32(four);
                    for v in 0..VECTORS {
                        acc[v] = _mm512_dpbusd_epi32(acc[v], codes[v], four);
                    }
                }
            }
        }
    }
    for ([high, low], sums) in acc.iter().zip(sums) {
        for v in 0..VECTORS {
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high[v]), low[v]);
            // SAFETY: 16 of the 64 lanes of room.
            unsafe { _mm512_storeu_si512(sums.as_mut_ptr().add(16 * v).cast(), sum) };
        }
    }
}

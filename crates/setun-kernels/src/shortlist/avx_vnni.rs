//! AVX-VNNI: as AVX2, with four columns of eight rows to an instruction, and sums in 32 bits from the start.

use core::arch::x86_64::*;

use super::avx2::{prefetch, rounds};
use super::{Bytes, ROWS, STEP_BYTES, Sums, TILE_BYTES, TILE_COLS, add_panel};

/// Vectors of one round over the tiles: with high and low bytes eight sums, enough for two instructions a cycle.
const VECTORS: usize = 4;

add_panel!(
    #[target_feature(enable = "avx2,avxvnni,fma")]
    add_panel,
    dot
);

rounds!(#[target_feature(enable = "avx2,avxvnni")]);

/// # Safety
/// As [`dot`], for tiles from one of their vectors on; `sums` has 32 lanes.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn rows_of(tiles: *const u8, count: usize, inputs: [*const i8; 2], stream: bool, sums: &mut [i32]) {
    let low = _mm256_set1_epi8(15);
    let mut acc = [[_mm256_setzero_si256(); VECTORS]; 2];
    for tile in 0..count {
        let w = tiles.wrapping_add(tile * TILE_BYTES);
        if stream {
            for line in 0..VECTORS / 2 {
                prefetch(w.wrapping_add(line * 64));
            }
        }
        for half in 0..2 {
            let codes: [__m256i; VECTORS] = core::array::from_fn(|v| {
                // SAFETY: a vector of the tile, within what the caller promised.
                let x = unsafe { _mm256_loadu_si256(w.add(v * 32).cast()) };
                _mm256_and_si256(if half == 0 { x } else { _mm256_srli_epi32::<4>(x) }, low)
            });
            for (acc, input) in acc.iter_mut().zip(inputs) {
                // SAFETY: four of this tile's eight bytes of inputs.
                let four = unsafe { input.add(tile * TILE_COLS + half * 4).cast::<i32>().read_unaligned() };
                let four = _mm256_set1_epi32(four);
                for v in 0..VECTORS {
                    acc[v] = _mm256_dpbusd_avx_epi32(acc[v], codes[v], four);
                }
            }
        }
    }
    let [high, low] = acc;
    for (v, sums) in sums.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let sum = _mm256_add_epi32(_mm256_slli_epi32::<8>(high[v]), low[v]);
        // SAFETY: eight lanes of room.
        unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), sum) };
    }
}

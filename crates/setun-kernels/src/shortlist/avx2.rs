//! AVX2: 8 rows to a vector, eight vectors to a tile, taken two at a time from the first-level cache.
//!
//! `vpmaddubsw` adds two products into 16 bits: |pair| ≤ 2 · 15 · 128 = 3840, so the eight of four tiles stay within 30 720.

use core::arch::x86_64::*;

use super::{AHEAD, Bytes, ROWS, STEP_BYTES, Sums, TILE_BYTES, TILE_COLS, add_panel};

/// Tiles whose sums fit in 16 bits.
const TILES_IN_16_BITS: usize = 4;
/// Vectors of one round over the tiles.
const VECTORS: usize = 2;

/// Never faults, wherever that points.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn prefetch(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
}

add_panel!(
    #[target_feature(enable = "avx2,fma")]
    add_panel,
    dot
);

/// Declares `dot`: rounds over the tiles, `VECTORS` of each at a time, by `rows_of`.
///
/// Its callers see that `count` tiles and eight bytes of inputs for each are readable, and that the CPU has the features.
macro_rules! rounds {
    (#[$features:meta]) => {
        /// # Safety
        /// As [`rounds`](super::avx2) says.
        #[inline]
        #[$features]
        unsafe fn dot<const T: usize>(tiles: *const u8, count: usize, inputs: Bytes<T>, sums: &mut Sums<T>) {
            // The steps before the tiles belong to the stream, though nothing here reads them.
            for line in 0..STEP_BYTES / 64 {
                prefetch(tiles.wrapping_sub(STEP_BYTES - line * 64));
            }
            for (t, (inputs, sums)) in inputs.iter().zip(sums).enumerate() {
                for first in (0..ROWS / 8).step_by(VECTORS) {
                    // Some lines of each tile are read now, and the same ones of tiles ahead are wanted soon.
                    let rows = &mut sums[first * 8..(first + VECTORS) * 8];
                    // SAFETY: the caller's promise; these vectors lie within the tile.
                    unsafe { rows_of(tiles.add(first * 32), count, *inputs, t == 0, rows) };
                }
            }
        }
    };
}
pub(super) use rounds;

rounds!(#[target_feature(enable = "avx2")]);

/// # Safety
/// As [`dot`], for tiles from one of their vectors on; `sums` has 16 lanes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn rows_of(tiles: *const u8, count: usize, inputs: [*const i8; 2], stream: bool, sums: &mut [i32]) {
    let (low, one) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let mut wide = [[_mm256_setzero_si256(); VECTORS]; 2];
    let mut first = 0;
    while first < count {
        let end = count.min(first + TILES_IN_16_BITS);
        let mut acc = [[_mm256_setzero_si256(); VECTORS]; 2];
        for tile in first..end {
            let w = tiles.wrapping_add(tile * TILE_BYTES);
            if stream {
                prefetch(w);
            }
            for v in 0..VECTORS {
                // SAFETY: a vector of the tile, within what the caller promised.
                let x = unsafe { _mm256_loadu_si256(w.add(v * 32).cast()) };
                let codes = [_mm256_and_si256(x, low), _mm256_and_si256(_mm256_srli_epi16::<4>(x), low)];
                for (acc, input) in acc.iter_mut().zip(inputs) {
                    for (half, codes) in codes.iter().enumerate() {
                        // SAFETY: four of this tile's eight bytes of inputs.
                        let four =
                            unsafe { input.add(tile * TILE_COLS + half * 4).cast::<i32>().read_unaligned() };
                        let pairs = _mm256_maddubs_epi16(*codes, _mm256_set1_epi32(four));
                        acc[v] = _mm256_add_epi16(acc[v], pairs);
                    }
                }
            }
        }
        for (wide, acc) in wide.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
            *wide = _mm256_add_epi32(*wide, _mm256_madd_epi16(*acc, one));
        }
        first = end;
    }
    let [high, low] = wide;
    for (v, sums) in sums.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let sum = _mm256_add_epi32(_mm256_slli_epi32::<8>(high[v]), low[v]);
        // SAFETY: eight lanes of room.
        unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), sum) };
    }
}

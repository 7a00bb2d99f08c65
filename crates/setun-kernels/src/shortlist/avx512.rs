//! AVX-512 with VNNI: 16 rows to a vector, four vectors to a tile.

use core::arch::x86_64::*;

use super::{AHEAD, Bytes, STEP_BYTES, Sums, TILE_BYTES, TILE_COLS, add_panel};

/// Vectors of a tile.
const VECTORS: usize = 4;
/// Never faults, wherever that points.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
}

add_panel!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    add_panel,
    dot
);

/// # Safety
/// `count` tiles and eight bytes of inputs for each are readable; the CPU has AVX-512 F, BW and VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn dot<const T: usize>(tiles: *const u8, count: usize, inputs: Bytes<T>, sums: &mut Sums<T>) {
    let low = _mm512_set1_epi8(15);
    // The steps before the tiles belong to the stream, though nothing here reads them.
    for line in 0..STEP_BYTES / 64 {
        prefetch(tiles.wrapping_sub(STEP_BYTES - line * 64));
    }
    // High and low bytes of every token.
    let mut acc = [[[_mm512_setzero_si512(); VECTORS]; 2]; T];
    for tile in 0..count {
        let w = tiles.wrapping_add(tile * TILE_BYTES);
        for line in 0..VECTORS {
            prefetch(w.wrapping_add(line * 64));
        }
        for half in 0..2 {
            let codes: [__m512i; VECTORS] = core::array::from_fn(|v| {
                // SAFETY: a vector of the tile, within what the caller promised.
                let x = unsafe { _mm512_loadu_si512(w.add(v * 64).cast()) };
                _mm512_and_si512(if half == 0 { x } else { _mm512_srli_epi32::<4>(x) }, low)
            });
            for (acc, inputs) in acc.iter_mut().zip(&inputs) {
                for (acc, input) in acc.iter_mut().zip(inputs) {
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

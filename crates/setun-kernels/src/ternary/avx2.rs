//! AVX2: 8 rows to a vector, four vectors to a panel.
//!
//! `vpmaddubsw` adds two products into 16 bits: |pair| ≤ 2 · 2 · 128 = 512. Sums stay in 16 bits for 60
//! such steps (30 720, below the 32 767 where it would saturate), then widen to 32.

use core::arch::x86_64::*;

use super::{BlockScales, Factor, MAX_ROWS, Sums, TILE_COLS, TileKernels};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: 32,
    tile_cols: TILE_COLS,
    unit: TILE_COLS,
    pack_row: None,
    direct,
    direct_tokens: 2,
    direct_limit: 8,
    unpack,
    unpacked,
    unpacked_tokens: 2,
    direct_blocks: None,
    unpacked_blocks: None,
    fold,
    finish,
};

/// Vectors of a tile.
const VECTORS: usize = 4;
const TILE_BYTES: usize = VECTORS * 32;
/// Tiles (of four steps) whose sums fit in 16 bits.
const TILES_IN_16_BITS: usize = 15;
/// As for AVX-512.
const NEAR: usize = 2 << 10;
const FAR: usize = 32 << 10;

type Accumulators<const T: usize> = [[__m256i; VECTORS]; T];

/// `acc[t][v] += codes[v] · four activations of token t`, in pairs of 16 bits.
///
/// # Safety
/// Four activations are readable at `offset` of each of `acts`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn step<const T: usize>(
    acc: &mut Accumulators<T>,
    codes: [__m256i; VECTORS],
    acts: &[*const i8; T],
    offset: usize,
) {
    for t in 0..T {
        // SAFETY: the caller's promise.
        let a = unsafe { acts[t].add(offset).cast::<i32>().read_unaligned() };
        let a = _mm256_set1_epi32(a);
        for v in 0..VECTORS {
            acc[t][v] = _mm256_add_epi16(acc[t][v], _mm256_maddubs_epi16(codes[v], a));
        }
    }
}

/// Adds the 16-bit pairs to the 32-bit sums.
#[inline]
#[target_feature(enable = "avx2")]
fn widen<const T: usize>(acc: &Accumulators<T>, sums: &mut Sums) {
    for (acc, sums) in acc.iter().zip(sums) {
        for (pairs, to) in acc.iter().zip(sums.as_chunks_mut::<8>().0) {
            let to = to.as_mut_ptr().cast();
            // SAFETY: eight lanes of room.
            unsafe {
                let wide = _mm256_madd_epi16(*pairs, _mm256_set1_epi16(1));
                _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), wide));
            }
        }
    }
}

/// Field `F` of every byte, as a code.
#[inline]
#[target_feature(enable = "avx2")]
fn field<const F: i32>(x: __m256i) -> __m256i {
    _mm256_and_si256(_mm256_srli_epi32::<F>(x), _mm256_set1_epi8(3))
}

/// # Safety
/// 128 bytes are readable at `from`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(from: *const u8) -> [__m256i; VECTORS] {
    // SAFETY: the caller's promise.
    core::array::from_fn(|v| unsafe { _mm256_loadu_si256(from.add(v * 32).cast()) })
}

/// # Safety
/// As [`TileKernels::direct`]: `tiles` tiles at `weights`, `16 · tiles` activations at each of `acts`.
#[target_feature(enable = "avx2")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => direct_many(weights, tiles, [a], sums),
            [a, b] => direct_many(weights, tiles, [a, b], sums),
            _ => unreachable!("one or two tokens"),
        }
    }
}

/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "avx2")]
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
        let mut acc = [[_mm256_setzero_si256(); VECTORS]; T];
        for tile in first..end {
            // SAFETY: a tile of weights and one of activations, within what the caller promised.
            unsafe {
                let w = weights.add(tile * TILE_BYTES);
                for line in [0, 64] {
                    // Prefetching never faults, wherever the address points.
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(NEAR + line).cast());
                    _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(FAR + line).cast());
                }
                let x = load(w);
                let at = tile * TILE_COLS;
                step(&mut acc, x.map(|x| field::<0>(x)), &acts, at);
                step(&mut acc, x.map(|x| field::<2>(x)), &acts, at + 4);
                step(&mut acc, x.map(|x| field::<4>(x)), &acts, at + 8);
                step(&mut acc, x.map(|x| field::<6>(x)), &acts, at + 12);
            }
        }
        widen(&acc, sums);
        first = end;
    }
}

/// # Safety
/// As [`TileKernels::unpack`]: `tiles` tiles at `packed`, room for four times as much at `out`.
#[target_feature(enable = "avx2")]
unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
    for tile in 0..tiles {
        for v in 0..VECTORS {
            // SAFETY: vector `v` of the tile, and of each of the four groups of columns it becomes.
            unsafe {
                let x = _mm256_loadu_si256(packed.add(tile * TILE_BYTES + v * 32).cast());
                let to = out.add(tile * TILE_BYTES * 4 + v * 32);
                _mm256_storeu_si256(to.cast(), field::<0>(x));
                _mm256_storeu_si256(to.add(TILE_BYTES).cast(), field::<2>(x));
                _mm256_storeu_si256(to.add(TILE_BYTES * 2).cast(), field::<4>(x));
                _mm256_storeu_si256(to.add(TILE_BYTES * 3).cast(), field::<6>(x));
            }
        }
    }
}

/// # Safety
/// As [`TileKernels::unpacked`].
#[target_feature(enable = "avx2")]
unsafe fn unpacked(panel: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => unpacked_many(panel, tiles, [a], sums),
            [a, b] => unpacked_many(panel, tiles, [a, b], sums),
            _ => unreachable!("one or two tokens"),
        }
    }
}

/// # Safety
/// As [`unpacked`].
#[inline]
#[target_feature(enable = "avx2")]
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
        let mut acc = [[_mm256_setzero_si256(); VECTORS]; T];
        for four in first * 4..end * 4 {
            // SAFETY: four columns of weights and activations, within what the caller promised.
            unsafe { step(&mut acc, load(panel.add(four * TILE_BYTES)), &acts, four * 4) };
        }
        widen(&acc, sums);
        first = end;
    }
}

/// See [`TileKernels::fold`].
#[target_feature(enable = "avx2,fma")]
fn fold(sums: &[i32], correction: i32, scales: BlockScales, y: &mut [f32]) {
    super::fold_generic(sums, correction, scales, y);
}

/// See [`TileKernels::finish`].
#[target_feature(enable = "avx2,fma")]
fn finish(sums: &[i32], correction: i32, factor: Factor, out: &mut [f32]) {
    super::finish_generic(sums, correction, factor, out);
}

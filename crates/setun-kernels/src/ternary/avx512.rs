//! AVX-512 with VNNI: 16 rows to a vector, four vectors to a panel.
//!
//! For one token the fields are masked, not shifted: field `j` then counts 4^j-fold, each in its own
//! accumulator, and one exact shift at the end puts that right. That leaves one `and` and one
//! `vpdpbusd` for 64 weights, the least that these instructions allow.

use core::arch::x86_64::*;

use super::{Factor, MAX_ROWS, Sums, TILE_COLS, TileKernels};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: MAX_ROWS,
    direct,
    direct_tokens: 6,
    direct_limit: 24,
    unpack,
    unpacked,
    unpacked_tokens: 6,
    fold,
    finish,
};

/// Vectors of a tile.
const VECTORS: usize = 4;
const TILE_BYTES: usize = VECTORS * 64;
/// Bytes ahead of the current tile that are fetched into the first- and second-level cache. The
/// arithmetic fills the reorder window, so hardware prefetching alone leaves half the bandwidth unused.
const NEAR: usize = 2 << 10;
const FAR: usize = 32 << 10;

/// Four activations in every lane.
///
/// # Safety
/// Four bytes are readable at `acts`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(acts: *const i8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { acts.cast::<i32>().read_unaligned() })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(tile: *const u8) {
    for line in 0..VECTORS {
        // Prefetching never faults, wherever the address points.
        _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(NEAR + line * 64).cast());
        _mm_prefetch::<_MM_HINT_T1>(tile.wrapping_add(FAR + line * 64).cast());
    }
}

/// # Safety
/// As [`TileKernels::direct`]: `tiles` tiles at `weights`, `16 · tiles` activations at each of `acts`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => direct_one(weights, tiles, a, sums),
            [a, b] => direct_many(weights, tiles, [a, b], sums),
            [a, b, c] => direct_many(weights, tiles, [a, b, c], sums),
            [a, b, c, d] => direct_many(weights, tiles, [a, b, c, d], sums),
            [a, b, c, d, e] => direct_many(weights, tiles, [a, b, c, d, e], sums),
            [a, b, c, d, e, f] => direct_many(weights, tiles, [a, b, c, d, e, f], sums),
            _ => unreachable!("one to six tokens"),
        }
    }
}

/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct_one(weights: *const u8, tiles: usize, acts: *const i8, sums: &mut Sums) {
    let fields: [__m512i; 4] = core::array::from_fn(|f| _mm512_set1_epi8((3u8 << (2 * f)) as i8));
    let mut acc = [[_mm512_setzero_si512(); 4]; VECTORS];
    for tile in 0..tiles {
        // SAFETY: a tile of weights and one of activations, within what the caller promised.
        unsafe {
            let w = weights.add(tile * TILE_BYTES);
            prefetch(w);
            let a = acts.add(tile * TILE_COLS);
            let a = [broadcast(a), broadcast(a.add(4)), broadcast(a.add(8)), broadcast(a.add(12))];
            for (v, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_loadu_si512(w.add(v * 64).cast());
                for f in 0..4 {
                    acc[f] = _mm512_dpbusd_epi32(acc[f], _mm512_and_si512(x, fields[f]), a[f]);
                }
            }
        }
    }
    for (v, [f0, f1, f2, f3]) in acc.into_iter().enumerate() {
        let low = _mm512_add_epi32(f0, _mm512_srai_epi32::<2>(f1));
        let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(f2), _mm512_srai_epi32::<6>(f3));
        store(sums, 0, v, _mm512_add_epi32(low, high));
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(sums: &mut Sums, token: usize, vector: usize, value: __m512i) {
    let to = &mut sums[token].as_chunks_mut::<16>().0[vector];
    // SAFETY: 16 lanes of room.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), value) };
}

/// Field `F` of every byte, as a code.
#[inline]
#[target_feature(enable = "avx512f")]
fn field<const F: u32>(x: __m512i) -> __m512i {
    _mm512_and_si512(_mm512_srli_epi32::<F>(x), _mm512_set1_epi8(3))
}

/// `acc[t][v] += codes[v] · four activations of token t`.
///
/// # Safety
/// Four activations are readable at `offset` of each of `acts`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn step<const T: usize>(
    acc: &mut [[__m512i; VECTORS]; T],
    codes: [__m512i; VECTORS],
    acts: &[*const i8; T],
    offset: usize,
) {
    for t in 0..T {
        // SAFETY: the caller's promise.
        let a = unsafe { broadcast(acts[t].add(offset)) };
        for v in 0..VECTORS {
            acc[t][v] = _mm512_dpbusd_epi32(acc[t][v], codes[v], a);
        }
    }
}

/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct_many<const T: usize>(
    weights: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    let mut acc = [[_mm512_setzero_si512(); VECTORS]; T];
    for tile in 0..tiles {
        // SAFETY: a tile of weights and one of activations, within what the caller promised.
        unsafe {
            let w = weights.add(tile * TILE_BYTES);
            prefetch(w);
            let x = load(w);
            let at = tile * TILE_COLS;
            step(&mut acc, x.map(|x| field::<0>(x)), &acts, at);
            step(&mut acc, x.map(|x| field::<2>(x)), &acts, at + 4);
            step(&mut acc, x.map(|x| field::<4>(x)), &acts, at + 8);
            step(&mut acc, x.map(|x| field::<6>(x)), &acts, at + 12);
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (v, sum) in acc.into_iter().enumerate() {
            store(sums, t, v, sum);
        }
    }
}

/// # Safety
/// 256 bytes are readable at `from`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const u8) -> [__m512i; VECTORS] {
    // SAFETY: the caller's promise.
    core::array::from_fn(|v| unsafe { _mm512_loadu_si512(from.add(v * 64).cast()) })
}

/// # Safety
/// As [`TileKernels::unpack`]: `tiles` tiles at `packed`, room for four times as much at `out`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
    for tile in 0..tiles {
        for v in 0..VECTORS {
            // SAFETY: vector `v` of the tile, and of each of the four groups of columns it becomes.
            unsafe {
                let from = packed.add(tile * TILE_BYTES + v * 64);
                prefetch_vector(from);
                let x = _mm512_loadu_si512(from.cast());
                let to = out.add(tile * TILE_BYTES * 4 + v * 64);
                _mm512_storeu_si512(to.cast(), field::<0>(x));
                _mm512_storeu_si512(to.add(TILE_BYTES).cast(), field::<2>(x));
                _mm512_storeu_si512(to.add(TILE_BYTES * 2).cast(), field::<4>(x));
                _mm512_storeu_si512(to.add(TILE_BYTES * 3).cast(), field::<6>(x));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_vector(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(NEAR).cast());
}

/// # Safety
/// As [`TileKernels::unpacked`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn unpacked(panel: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => unpacked_many(panel, tiles, [a], sums),
            [a, b] => unpacked_many(panel, tiles, [a, b], sums),
            [a, b, c] => unpacked_many(panel, tiles, [a, b, c], sums),
            [a, b, c, d] => unpacked_many(panel, tiles, [a, b, c, d], sums),
            [a, b, c, d, e] => unpacked_many(panel, tiles, [a, b, c, d, e], sums),
            [a, b, c, d, e, f] => unpacked_many(panel, tiles, [a, b, c, d, e, f], sums),
            _ => unreachable!("one to six tokens"),
        }
    }
}

/// # Safety
/// As [`unpacked`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn unpacked_many<const T: usize>(
    panel: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    let mut acc = [[_mm512_setzero_si512(); VECTORS]; T];
    for four in 0..tiles * 4 {
        // SAFETY: four columns of weights and activations, within what the caller promised.
        unsafe { step(&mut acc, load(panel.add(four * TILE_BYTES)), &acts, four * 4) };
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (v, sum) in acc.into_iter().enumerate() {
            store(sums, t, v, sum);
        }
    }
}

/// See [`TileKernels::fold`].
#[target_feature(enable = "avx512f,fma")]
fn fold(sums: &[i32], correction: i32, scales: &[f32], y: &mut [f32]) {
    super::fold_generic(sums, correction, scales, y);
}

/// See [`TileKernels::finish`].
#[target_feature(enable = "avx512f,fma")]
fn finish(sums: &[i32], correction: i32, factor: Factor, out: &mut [f32]) {
    super::finish_generic(sums, correction, factor, out);
}

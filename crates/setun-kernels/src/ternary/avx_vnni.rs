//! AVX-VNNI: `vpdpbusd` on 256-bit vectors, for machines that have no AVX-512. The panel is that of AVX2, 8 rows
//! to a vector, four vectors to a panel.
//!
//! Sixteen registers have no room for four sums of every vector, as the one-token kernel of AVX-512 keeps them. Two
//! fit: fields 0 and 1 are masked where they stand, fields 2 and 3 after one shift by four bits, so that the second
//! sum counts fourfold until the end. Many tokens are looked up (see `lut`).

use core::arch::x86_64::*;

use super::avx2::{self, TILE_BYTES, VECTORS, broadcast, field};
use super::{Blocks, MAX_ROWS, MAX_TOKENS, Sums, TILE_COLS, TileKernels, counted};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: VECTORS * 8,
    tile_cols: TILE_COLS,
    unit: TILE_COLS,
    pack_row: None,
    direct,
    direct_tokens: 6,
    direct_limit: 24,
    block_limit: 24,
    unpack: avx2::unpack,
    unpacked,
    unpacked_tokens: 6,
    direct_blocks: Some(direct_blocks),
    unpacked_blocks: None,
    fold: avx2::fold,
    scale: avx2::scale,
    finish: avx2::finish,
};

/// # Safety
/// As [`TileKernels::direct`]: `tiles` tiles at `weights`, `16 · tiles` activations at each of `acts`.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => direct_one(weights, tiles, a, sums),
            _ => for_each_count!(acts, T, V => direct_many::<T, V>(weights, tiles, counted(acts), sums);
                2 of 4, 3 of 2, 4 of 2, 5 of 2, 6 of 2),
        }
    }
}

/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn direct_one(weights: *const u8, tiles: usize, acts: *const i8, sums: &mut Sums) {
    let (even, odd) = (_mm256_set1_epi8(3), _mm256_set1_epi8(12));
    let mut acc = [[_mm256_setzero_si256(); 2]; VECTORS];
    for tile in 0..tiles {
        // SAFETY: a tile of weights and one of activations, within what the caller promised.
        unsafe {
            let w = weights.add(tile * TILE_BYTES);
            avx2::prefetch(w);
            let a = acts.add(tile * TILE_COLS);
            let a = [broadcast(a), broadcast(a.add(4)), broadcast(a.add(8)), broadcast(a.add(12))];
            for (v, [one, four]) in acc.iter_mut().enumerate() {
                let x = _mm256_loadu_si256(w.add(v * 32).cast());
                *one = _mm256_dpbusd_avx_epi32(*one, _mm256_and_si256(x, even), a[0]);
                *four = _mm256_dpbusd_avx_epi32(*four, _mm256_and_si256(x, odd), a[1]);
                let x = _mm256_srli_epi32::<4>(x);
                *one = _mm256_dpbusd_avx_epi32(*one, _mm256_and_si256(x, even), a[2]);
                *four = _mm256_dpbusd_avx_epi32(*four, _mm256_and_si256(x, odd), a[3]);
            }
        }
    }
    for (v, [one, four]) in acc.into_iter().enumerate() {
        store(sums, 0, v, _mm256_add_epi32(one, _mm256_srai_epi32::<2>(four)));
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(sums: &mut Sums, token: usize, vector: usize, value: __m256i) {
    let to = &mut sums[token].as_chunks_mut::<8>().0[vector];
    // SAFETY: eight lanes of room.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) };
}

/// `acc[t][v] += codes[v] · four activations of token t`.
///
/// # Safety
/// Four activations are readable at `offset` of each of `acts`.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn step<const T: usize, const V: usize>(
    acc: &mut [[__m256i; V]; T],
    codes: [__m256i; V],
    acts: &[*const i8; T],
    offset: usize,
) {
    for t in 0..T {
        // SAFETY: the caller's promise.
        let a = unsafe { broadcast(acts[t].add(offset)) };
        for v in 0..V {
            acc[t][v] = _mm256_dpbusd_avx_epi32(acc[t][v], codes[v], a);
        }
    }
}

/// `V` vectors of the panel at a time, so that all sums stay in registers: the tiles come from the nearest caches
/// when they are read again.
///
/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn direct_many<const T: usize, const V: usize>(
    weights: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    for part in 0..VECTORS / V {
        let mut acc = [[_mm256_setzero_si256(); V]; T];
        for tile in 0..tiles {
            // SAFETY: a tile of weights and one of activations, within what the caller promised.
            unsafe {
                let w = weights.add(tile * TILE_BYTES);
                if part == 0 {
                    avx2::prefetch(w);
                }
                let x = avx2::load::<V>(w.add(part * V * 32));
                let at = tile * TILE_COLS;
                step(&mut acc, x.map(|x| field::<0>(x)), &acts, at);
                step(&mut acc, x.map(|x| field::<2>(x)), &acts, at + 4);
                step(&mut acc, x.map(|x| field::<4>(x)), &acts, at + 8);
                step(&mut acc, x.map(|x| field::<6>(x)), &acts, at + 12);
            }
        }
        for (t, acc) in acc.into_iter().enumerate() {
            for (v, sum) in acc.into_iter().enumerate() {
                store(sums, t, part * V + v, sum);
            }
        }
    }
}

/// # Safety
/// As [`TileKernels::unpacked`].
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn unpacked(panel: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        for_each_count!(acts, T => unpacked_many::<T>(panel, tiles, counted(acts), sums); 1, 2, 3, 4, 5, 6)
    }
}

/// # Safety
/// As [`unpacked`].
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn unpacked_many<const T: usize>(
    panel: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    const V: usize = 2;
    for part in 0..VECTORS / V {
        let mut acc = [[_mm256_setzero_si256(); V]; T];
        for four in 0..tiles * 4 {
            // SAFETY: four columns of weights and activations, within what the caller promised.
            unsafe {
                let codes = avx2::load::<V>(panel.add(four * TILE_BYTES + part * V * 32));
                step(&mut acc, codes, &acts, four * 4);
            }
        }
        for (t, acc) in acc.into_iter().enumerate() {
            for (v, sum) in acc.into_iter().enumerate() {
                store(sums, t, part * V + v, sum);
            }
        }
    }
}

/// # Safety
/// As [`TileKernels::direct_blocks`].
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn direct_blocks(
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    let mut sums = [[0; MAX_ROWS]; MAX_TOKENS];
    for (b, span) in blocks.spans.iter().enumerate() {
        // SAFETY: the block's tiles and activations, within what the caller promised.
        unsafe {
            let at = avx2::at_tile(acts, span.first);
            direct(blocks.weights.add(span.first * TILE_BYTES), span.count, &at[..acts.len()], &mut sums);
        }
        avx2::fold_block(blocks.scales, b, block_sums, &sums, y);
    }
}

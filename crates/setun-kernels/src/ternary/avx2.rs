//! AVX2: 8 rows to a vector, four vectors to a panel.
//!
//! `vpmaddubsw` adds two products into 16 bits: |pair| ≤ 2 · 2 · 128 = 512. Sums stay in 16 bits for 60
//! such steps (30 720, below the 32 767 where it would saturate), then widen to 32.

use core::arch::x86_64::*;

use super::{BlockScales, Blocks, Factor, MAX_ROWS, MAX_TOKENS, Sums, TILE_COLS, TileKernels, counted};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: 32,
    tile_cols: TILE_COLS,
    unit: TILE_COLS,
    pack_row: None,
    direct,
    direct_tokens: 4,
    direct_limit: 24,
    block_limit: 24,
    unpack,
    unpacked,
    unpacked_tokens: 2,
    direct_blocks: Some(direct_blocks),
    unpacked_blocks: None,
    fold,
    scale,
    finish,
};

/// Vectors of a tile.
pub(super) const VECTORS: usize = 4;
pub(super) const TILE_BYTES: usize = VECTORS * 32;
/// Tiles (of four steps) whose sums fit in 16 bits.
const TILES_IN_16_BITS: usize = 15;
/// As for AVX-512.
const AHEAD: usize = 8 << 10;

/// Scales ahead of the current block's that are fetched: those of 16 blocks.
const SCALES_AHEAD: usize = 16 * VECTORS * 8;

type Accumulators<const T: usize, const V: usize> = [[__m256i; V]; T];

/// Four activations in every lane.
///
/// # Safety
/// Four bytes are readable at `acts`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn broadcast(acts: *const i8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { acts.cast::<i32>().read_unaligned() })
}

/// `acc[t][v] += codes[v] · four activations of token t`, in pairs of 16 bits.
///
/// # Safety
/// Four activations are readable at `offset` of each of `acts`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn step<const T: usize, const V: usize>(
    acc: &mut Accumulators<T, V>,
    codes: [__m256i; V],
    acts: &[*const i8; T],
    offset: usize,
) {
    for t in 0..T {
        // SAFETY: the caller's promise.
        let a = unsafe { broadcast(acts[t].add(offset)) };
        for v in 0..V {
            acc[t][v] = _mm256_add_epi16(acc[t][v], _mm256_maddubs_epi16(codes[v], a));
        }
    }
}

/// Fetches what comes after the tile at `tile`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn prefetch(tile: *const u8) {
    for line in [0, 64] {
        // Prefetching never faults, wherever the address points.
        _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(AHEAD + line).cast());
    }
}

/// Adds the 16-bit pairs to the 32-bit sums of the rows from `first` on.
#[inline]
#[target_feature(enable = "avx2")]
fn widen<const T: usize, const V: usize>(acc: &Accumulators<T, V>, sums: &mut Sums, first: usize) {
    for (acc, sums) in acc.iter().zip(sums) {
        for (pairs, to) in acc.iter().zip(sums[first..].as_chunks_mut::<8>().0) {
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
pub(super) fn field<const F: i32>(x: __m256i) -> __m256i {
    _mm256_and_si256(_mm256_srli_epi32::<F>(x), _mm256_set1_epi8(3))
}

/// # Safety
/// `V` vectors are readable at `from`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn load<const V: usize>(from: *const u8) -> [__m256i; V] {
    // SAFETY: the caller's promise.
    core::array::from_fn(|v| unsafe { _mm256_loadu_si256(from.add(v * 32).cast()) })
}

/// # Safety
/// As [`TileKernels::direct`]: `tiles` tiles at `weights`, `16 · tiles` activations at each of `acts`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => direct_one(weights, tiles, a, sums),
            _ => for_each_count!(acts, T, V => direct_many::<T, V>(weights, tiles, counted(acts), sums);
                2 of 4, 3 of 2, 4 of 2),
        }
    }
}

/// One token: fields 0 and 1 are masked where they stand, fields 2 and 3 after one shift by four bits, which saves
/// two of three shifts. Fields 1 and 3 then count fourfold: |pair| ≤ 2 · 8 · 128 = 2048, two to a tile, so that
/// eight tiles (from -32 768 to 16 · 2032) are put right, exactly, before sixteen bits are full, and twice as many
/// are widened together.
///
/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn direct_one(weights: *const u8, tiles: usize, acts: *const i8, sums: &mut Sums) {
    const TILES: usize = 8;
    let (even, odd) = (_mm256_set1_epi8(3), _mm256_set1_epi8(12));
    sums[0][..VECTORS * 8].fill(0);
    let mut first = 0;
    while first < tiles {
        let mut one = [[_mm256_setzero_si256(); VECTORS]];
        for _ in 0..2 {
            let end = tiles.min(first + TILES);
            let mut four = [[_mm256_setzero_si256(); VECTORS]];
            for tile in first..end {
                // SAFETY: a tile of weights and one of activations, within what the caller promised.
                unsafe {
                    let w = weights.add(tile * TILE_BYTES);
                    prefetch(w);
                    let a = acts.add(tile * TILE_COLS);
                    let a = [broadcast(a), broadcast(a.add(4)), broadcast(a.add(8)), broadcast(a.add(12))];
                    for v in 0..VECTORS {
                        let x = _mm256_loadu_si256(w.add(v * 32).cast());
                        let y = _mm256_srli_epi32::<4>(x);
                        let (x0, x2) = (_mm256_and_si256(x, even), _mm256_and_si256(y, even));
                        let (x1, x3) = (_mm256_and_si256(x, odd), _mm256_and_si256(y, odd));
                        one[0][v] = _mm256_add_epi16(one[0][v], _mm256_maddubs_epi16(x0, a[0]));
                        four[0][v] = _mm256_add_epi16(four[0][v], _mm256_maddubs_epi16(x1, a[1]));
                        one[0][v] = _mm256_add_epi16(one[0][v], _mm256_maddubs_epi16(x2, a[2]));
                        four[0][v] = _mm256_add_epi16(four[0][v], _mm256_maddubs_epi16(x3, a[3]));
                    }
                }
            }
            for v in 0..VECTORS {
                one[0][v] = _mm256_add_epi16(one[0][v], _mm256_srai_epi16::<2>(four[0][v]));
            }
            first = end;
        }
        widen(&one, sums, 0);
    }
}

/// `V` vectors of the panel at a time, so that all sums stay in registers: the tiles come from the nearest caches
/// when they are read again.
///
/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn direct_many<const T: usize, const V: usize>(
    weights: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    sums[..T].fill([0; MAX_ROWS]);
    for part in 0..VECTORS / V {
        let mut first = 0;
        while first < tiles {
            let end = tiles.min(first + TILES_IN_16_BITS);
            let mut acc = [[_mm256_setzero_si256(); V]; T];
            for tile in first..end {
                // SAFETY: a tile of weights and one of activations, within what the caller promised.
                unsafe {
                    let w = weights.add(tile * TILE_BYTES);
                    if part == 0 {
                        prefetch(w);
                    }
                    let x = load::<V>(w.add(part * V * 32));
                    let at = tile * TILE_COLS;
                    step(&mut acc, x.map(|x| field::<0>(x)), &acts, at);
                    step(&mut acc, x.map(|x| field::<2>(x)), &acts, at + 4);
                    step(&mut acc, x.map(|x| field::<4>(x)), &acts, at + 8);
                    step(&mut acc, x.map(|x| field::<6>(x)), &acts, at + 12);
                }
            }
            widen(&acc, sums, part * V * 8);
            first = end;
        }
    }
}

/// # Safety
/// As [`TileKernels::unpack`]: `tiles` tiles at `packed`, room for four times as much at `out`.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
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
    unsafe { for_each_count!(acts, T => unpacked_many::<T>(panel, tiles, counted(acts), sums); 1, 2) }
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
        let mut acc: Accumulators<T, VECTORS> = [[_mm256_setzero_si256(); VECTORS]; T];
        for four in first * 4..end * 4 {
            // SAFETY: four columns of weights and activations, within what the caller promised.
            unsafe { step(&mut acc, load(panel.add(four * TILE_BYTES)), &acts, four * 4) };
        }
        widen(&acc, sums, 0);
        first = end;
    }
}

/// # Safety
/// As [`TileKernels::direct_blocks`].
#[target_feature(enable = "avx2,fma,f16c")]
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
            let at = at_tile(acts, span.first);
            direct(blocks.weights.add(span.first * TILE_BYTES), span.count, &at[..acts.len()], &mut sums);
        }
        fold_block(blocks.scales, b, block_sums, &sums, y);
    }
}

/// The activations of every token from a tile on.
///
/// # Safety
/// There are so many.
#[inline]
pub(super) unsafe fn at_tile(acts: &[*const i8], tile: usize) -> [*const i8; MAX_TOKENS] {
    let mut at = [core::ptr::null(); MAX_TOKENS];
    for (at, acts) in at.iter_mut().zip(acts) {
        // SAFETY: the caller's promise.
        *at = unsafe { acts.add(tile * TILE_COLS) };
    }
    at
}

/// `y[t][row] = fma(sums[t][row] - block_sums[t][b], scale[b][row], y[t][row])` for the tokens that have block sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn fold_block(
    scales: BlockScales,
    b: usize,
    block_sums: &[&[i32]],
    sums: &Sums,
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    const ROWS: usize = VECTORS * 8;
    let mut scale = [_mm256_setzero_ps(); VECTORS];
    // SAFETY (both): eight values each.
    match scales.rows(b * ROWS, ROWS) {
        BlockScales::F32(from) => {
            for (scale, from) in scale.iter_mut().zip(from.as_chunks::<8>().0) {
                *scale = unsafe { _mm256_loadu_ps(from.as_ptr()) };
            }
        }
        BlockScales::F16(from) => {
            _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(SCALES_AHEAD).cast());
            for (scale, from) in scale.iter_mut().zip(from.as_chunks::<8>().0) {
                *scale = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.as_ptr().cast()) });
            }
        }
    }
    for ((y, sums), block_sums) in y.iter_mut().zip(sums).zip(block_sums) {
        let correction = _mm256_set1_epi32(block_sums[b]);
        let rows = y.as_chunks_mut::<8>().0.iter_mut().zip(sums.as_chunks::<8>().0);
        for ((y, sum), scale) in rows.zip(scale) {
            // SAFETY: eight lanes each.
            unsafe {
                let sum = _mm256_sub_epi32(_mm256_loadu_si256(sum.as_ptr().cast()), correction);
                let folded = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(y.as_ptr()));
                _mm256_storeu_ps(y.as_mut_ptr(), folded);
            }
        }
    }
}

/// See [`TileKernels::fold`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn fold(sums: &[i32], correction: i32, scales: BlockScales, y: &mut [f32]) {
    super::fold_generic(sums, correction, scales, y);
}

/// See [`TileKernels::scale`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn scale(y: &[f32], factor: f32, out: &mut [f32]) {
    super::scale_generic(y, factor, out);
}

/// See [`TileKernels::finish`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn finish(sums: &[i32], correction: i32, factor: Factor, out: &mut [f32]) {
    super::finish_generic(sums, correction, factor, out);
}

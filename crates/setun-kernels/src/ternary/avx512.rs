//! AVX-512 with VNNI: 16 rows to a vector, four vectors to a panel.
//!
//! For one token the fields are masked, not shifted: field `j` then counts 4^j-fold, each in its own
//! accumulator, and one exact shift at the end puts that right. That leaves one `and` and one
//! `vpdpbusd` for 64 weights, the least that these instructions allow.
//!
//! The loops serve weights of two bits and, through [`Trits`], five to a byte (`avx512_vbmi`). They are
//! inlined into functions that have the instructions.

use core::arch::x86_64::*;

use super::columns::Span;
use super::{BlockScales, Factor, MAX_ROWS, MAX_TOKENS, Sums, TILE_COLS, TileKernels};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: MAX_ROWS,
    tile_cols: TILE_COLS,
    unit: UNIT,
    direct,
    direct_tokens: 6,
    direct_limit: 8,
    unpack,
    unpacked,
    unpacked_tokens: 6,
    direct_blocks: Some(direct_blocks),
    unpacked_blocks: Some(unpacked_blocks),
    fold,
    finish,
};

/// Vectors of a tile.
const VECTORS: usize = 4;
const TILE_BYTES: usize = VECTORS * 64;
/// Columns that one `vpdpbusd` takes.
pub(super) const UNIT: usize = 4;
/// Bytes ahead of the current tile that are fetched into the first- and second-level cache. The
/// arithmetic fills the reorder window, so hardware prefetching alone leaves half the bandwidth unused.
const NEAR: usize = 2 << 10;
const FAR: usize = 32 << 10;

/// Sums of a panel for `T` tokens.
type Panel<const T: usize> = [[__m512i; VECTORS]; T];

/// What a byte of weights holds: `F` codes, as fields of two bits.
pub(super) trait Trits<const F: usize>: Copy {
    /// Fields 0 to 3 of every byte.
    ///
    /// # Safety (both)
    /// The CPU has the instructions of the kernel set.
    unsafe fn low(self, x: __m512i) -> __m512i;
    /// Field 4 of every byte, where field 3 is in `low`.
    unsafe fn high(self, x: __m512i) -> __m512i;
}

#[derive(Clone, Copy)]
struct TwoBits;

impl Trits<4> for TwoBits {
    #[inline(always)]
    unsafe fn low(self, x: __m512i) -> __m512i {
        x
    }

    #[inline(always)]
    unsafe fn high(self, x: __m512i) -> __m512i {
        x
    }
}

/// Four activations in every lane.
///
/// # Safety
/// Four bytes are readable at `acts`.
#[inline(always)]
unsafe fn broadcast(acts: *const i8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_set1_epi32(acts.cast::<i32>().read_unaligned()) }
}

#[inline(always)]
fn prefetch(tile: *const u8) {
    for line in 0..VECTORS {
        // SAFETY: prefetching never faults, wherever the address points.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(NEAR + line * 64).cast());
            _mm_prefetch::<_MM_HINT_T1>(tile.wrapping_add(FAR + line * 64).cast());
        }
    }
}

/// Field `SHIFT / 2` of every byte, as a code.
#[inline(always)]
unsafe fn field<const SHIFT: u32>(x: __m512i) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_and_si512(_mm512_srli_epi32::<SHIFT>(x), _mm512_set1_epi8(3)) }
}

/// # Safety
/// 256 bytes are readable at `from`.
#[inline(always)]
unsafe fn load(from: *const u8) -> [__m512i; VECTORS] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm512_loadu_si512(from.cast()),
            _mm512_loadu_si512(from.add(64).cast()),
            _mm512_loadu_si512(from.add(128).cast()),
            _mm512_loadu_si512(from.add(192).cast()),
        ]
    }
}

/// Sums of `tiles` packed tiles for `T` tokens.
///
/// # Safety
/// `tiles` tiles at `weights`, `4 · F · tiles` activations at each of `acts`; the CPU has the instructions
/// of the kernel set.
#[inline(always)]
unsafe fn packed_sums<const F: usize, const T: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    tiles: usize,
    acts: [*const i8; T],
) -> Panel<T> {
    // SAFETY (all): the caller's promise.
    unsafe {
        if T == 1 {
            [packed_one(trits, weights, tiles, acts[0]); T]
        } else {
            packed_many(trits, weights, tiles, acts)
        }
    }
}

/// # Safety
/// As [`packed_sums`].
#[inline(always)]
unsafe fn packed_one<const F: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    tiles: usize,
    acts: *const i8,
) -> [__m512i; VECTORS] {
    // SAFETY: tiles of weights and of activations, within what the caller promised.
    unsafe {
        let masks = [3, 12, 48, -64i8, -64].map(|mask| _mm512_set1_epi8(mask));
        let mut acc = [[_mm512_setzero_si512(); F]; VECTORS];
        for tile in 0..tiles {
            let w = weights.add(tile * TILE_BYTES);
            prefetch(w);
            let a = acts.add(tile * F * UNIT);
            for (v, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_loadu_si512(w.add(v * 64).cast());
                let (low, high) = (trits.low(x), trits.high(x));
                for (f, acc) in acc.iter_mut().enumerate() {
                    let codes = _mm512_and_si512(if f < 4 { low } else { high }, masks[f]);
                    *acc = _mm512_dpbusd_epi32(*acc, codes, broadcast(a.add(f * UNIT)));
                }
            }
        }
        let mut sums = [_mm512_setzero_si512(); VECTORS];
        for (sum, acc) in sums.iter_mut().zip(&acc) {
            let top = if F == 5 { _mm512_add_epi32(acc[3], acc[F - 1]) } else { acc[3] };
            let low = _mm512_add_epi32(acc[0], _mm512_srai_epi32::<2>(acc[1]));
            let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(acc[2]), _mm512_srai_epi32::<6>(top));
            *sum = _mm512_add_epi32(low, high);
        }
        sums
    }
}

/// `acc[t][v] += codes[v] · four activations of token t`.
///
/// # Safety
/// Four activations are readable at `offset` of each of `acts`.
#[inline(always)]
unsafe fn step<const T: usize>(
    acc: &mut Panel<T>,
    codes: [__m512i; VECTORS],
    acts: &[*const i8; T],
    offset: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for (acc, acts) in acc.iter_mut().zip(acts) {
            let a = broadcast(acts.add(offset));
            for (acc, codes) in acc.iter_mut().zip(codes) {
                *acc = _mm512_dpbusd_epi32(*acc, codes, a);
            }
        }
    }
}

/// # Safety
/// As [`packed_sums`].
#[inline(always)]
unsafe fn packed_many<const F: usize, const T: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    tiles: usize,
    acts: [*const i8; T],
) -> Panel<T> {
    // SAFETY: tiles of weights and of activations, within what the caller promised.
    unsafe {
        let mut acc = [[_mm512_setzero_si512(); VECTORS]; T];
        for tile in 0..tiles {
            let w = weights.add(tile * TILE_BYTES);
            prefetch(w);
            let [a, b, c, d] = load(w);
            let [a, b, c, d] = [trits.low(a), trits.low(b), trits.low(c), trits.low(d)];
            let at = tile * F * UNIT;
            step(&mut acc, [field::<0>(a), field::<0>(b), field::<0>(c), field::<0>(d)], &acts, at);
            step(&mut acc, [field::<2>(a), field::<2>(b), field::<2>(c), field::<2>(d)], &acts, at + 4);
            step(&mut acc, [field::<4>(a), field::<4>(b), field::<4>(c), field::<4>(d)], &acts, at + 8);
            step(&mut acc, [field::<6>(a), field::<6>(b), field::<6>(c), field::<6>(d)], &acts, at + 12);
            if F == 5 {
                let [a, b, c, d] = load(w);
                let [a, b, c, d] = [trits.high(a), trits.high(b), trits.high(c), trits.high(d)];
                step(&mut acc, [field::<6>(a), field::<6>(b), field::<6>(c), field::<6>(d)], &acts, at + 16);
            }
        }
        acc
    }
}

/// Sums of `units` unpacked units for `T` tokens.
///
/// # Safety
/// `units` units at `weights`, four activations for each at each of `acts`; the CPU has AVX-512 with VNNI.
#[inline(always)]
unsafe fn unpacked_sums<const T: usize>(weights: *const u8, units: usize, acts: [*const i8; T]) -> Panel<T> {
    // SAFETY: units of weights and of activations, within what the caller promised.
    unsafe {
        let mut acc = [[_mm512_setzero_si512(); VECTORS]; T];
        for unit in 0..units {
            step(&mut acc, load(weights.add(unit * TILE_BYTES)), &acts, unit * UNIT);
        }
        acc
    }
}

/// Stores the sums of `T` tokens.
#[inline(always)]
fn store<const T: usize>(panel: Panel<T>, sums: &mut Sums) {
    for (panel, sums) in panel.iter().zip(sums) {
        for (sum, to) in panel.iter().zip(sums.as_chunks_mut::<16>().0) {
            // SAFETY: 16 lanes of room, and the caller has AVX-512.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), *sum) };
        }
    }
}

/// `y[t][row] = fma(sum - correction, scale, y)` for the scales of block `b`.
#[inline(always)]
fn fold_block<const T: usize>(
    panel: Panel<T>,
    b: usize,
    block_sums: &[&[i32]; T],
    scales: BlockScales,
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    // SAFETY: loads and stores are of arrays of 16; the caller has AVX-512.
    unsafe {
        let mut scale = [_mm512_setzero_ps(); VECTORS];
        match scales.rows(b * MAX_ROWS, MAX_ROWS) {
            BlockScales::F32(from) => {
                for (scale, from) in scale.iter_mut().zip(from.as_chunks::<16>().0) {
                    *scale = _mm512_loadu_ps(from.as_ptr());
                }
            }
            BlockScales::F16(from) => {
                for (scale, from) in scale.iter_mut().zip(from.as_chunks::<16>().0) {
                    *scale = _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()));
                }
            }
        }
        for ((panel, y), sums) in panel.iter().zip(y).zip(block_sums) {
            let correction = _mm512_set1_epi32(sums[b]);
            for ((sum, y), scale) in panel.iter().zip(y.as_chunks_mut::<16>().0).zip(scale) {
                let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(*sum, correction));
                _mm512_storeu_ps(y.as_mut_ptr(), _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(y.as_ptr())));
            }
        }
    }
}

/// Evaluates the body for as many tokens as there are rows of activations, which it gets as an array.
macro_rules! for_each_count {
    ($acts:expr, $a:ident => $body:expr) => {
        match *$acts {
            [a] => {
                let $a = [a];
                $body
            }
            [a, b] => {
                let $a = [a, b];
                $body
            }
            [a, b, c] => {
                let $a = [a, b, c];
                $body
            }
            [a, b, c, d] => {
                let $a = [a, b, c, d];
                $body
            }
            [a, b, c, d, e] => {
                let $a = [a, b, c, d, e];
                $body
            }
            [a, b, c, d, e, f] => {
                let $a = [a, b, c, d, e, f];
                $body
            }
            _ => unreachable!("one to six tokens"),
        }
    };
}

/// The body of [`TileKernels::direct`].
///
/// # Safety
/// As there, in a function that has the instructions of `trits`.
#[inline(always)]
pub(super) unsafe fn direct_body<const F: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    tiles: usize,
    acts: &[*const i8],
    sums: &mut Sums,
) {
    // SAFETY: the caller's promise.
    for_each_count!(acts, a => store(unsafe { packed_sums(trits, weights, tiles, a) }, sums))
}

/// The body of [`TileKernels::direct_blocks`].
///
/// # Safety
/// As there, in a function that has the instructions of `trits`.
#[inline(always)]
pub(super) unsafe fn direct_blocks_body<const F: usize>(
    trits: impl Trits<F>,
    (weights, spans): (*const u8, &[Span]),
    acts: &[*const i8],
    block_sums: &[&[i32]],
    scales: BlockScales,
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    for_each_count!(acts, a => {
        let block_sums = block_sums.first_chunk().expect("block sums of every token");
        for (b, span) in spans.iter().enumerate() {
            // SAFETY: the caller's promise: spans lie within the weights and the activations.
            unsafe {
                let sums = packed_sums(trits, weights.add(span.first * TILE_BYTES), span.count, a.map(|a| a.add(span.acts)));
                fold_block(sums, b, block_sums, scales, y);
            }
        }
    })
}

/// The body of [`TileKernels::unpack`].
///
/// # Safety
/// As there, in a function that has the instructions of `trits`.
#[inline(always)]
pub(super) unsafe fn unpack_body<const F: usize>(
    trits: impl Trits<F>,
    packed: *const u8,
    tiles: usize,
    out: *mut u8,
) {
    for tile in 0..tiles {
        let from = packed.wrapping_add(tile * TILE_BYTES);
        prefetch(from);
        for v in 0..VECTORS {
            // SAFETY: vector `v` of the tile, and of each of the groups of columns it becomes.
            unsafe {
                let x = _mm512_loadu_si512(from.add(v * 64).cast());
                let low = trits.low(x);
                let to = out.add(tile * TILE_BYTES * F + v * 64);
                _mm512_storeu_si512(to.cast(), field::<0>(low));
                _mm512_storeu_si512(to.add(TILE_BYTES).cast(), field::<2>(low));
                _mm512_storeu_si512(to.add(TILE_BYTES * 2).cast(), field::<4>(low));
                _mm512_storeu_si512(to.add(TILE_BYTES * 3).cast(), field::<6>(low));
                if F == 5 {
                    _mm512_storeu_si512(to.add(TILE_BYTES * 4).cast(), field::<6>(trits.high(x)));
                }
            }
        }
    }
}

/// # Safety
/// As [`TileKernels::direct`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe { direct_body(TwoBits, weights, tiles, acts, sums) }
}

/// # Safety
/// As [`TileKernels::direct_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct_blocks(
    weights: (*const u8, &[Span]),
    acts: &[*const i8],
    block_sums: &[&[i32]],
    scales: BlockScales,
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    // SAFETY: the caller's promise.
    unsafe { direct_blocks_body(TwoBits, weights, acts, block_sums, scales, y) }
}

/// # Safety
/// As [`TileKernels::unpack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { unpack_body(TwoBits, packed, tiles, out) }
}

/// # Safety
/// As [`TileKernels::unpacked`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn unpacked(panel: *const u8, units: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY: the caller's promise.
    for_each_count!(acts, a => store(unsafe { unpacked_sums(panel, units, a) }, sums))
}

/// # Safety
/// As [`TileKernels::unpacked_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn unpacked_blocks(
    (panel, spans): (*const u8, &[Span]),
    acts: &[*const i8],
    block_sums: &[&[i32]],
    scales: BlockScales,
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    for_each_count!(acts, a => {
        let block_sums = block_sums.first_chunk().expect("block sums of every token");
        for (b, span) in spans.iter().enumerate() {
            // SAFETY: the caller's promise: spans lie within the weights and the activations.
            unsafe {
                let sums = unpacked_sums(panel.add(span.first * TILE_BYTES), span.count, a.map(|a| a.add(span.acts)));
                fold_block(sums, b, block_sums, scales, y);
            }
        }
    })
}

/// See [`TileKernels::fold`].
#[target_feature(enable = "avx512f,fma")]
pub(super) fn fold(sums: &[i32], correction: i32, scales: BlockScales, y: &mut [f32]) {
    super::fold_generic(sums, correction, scales, y);
}

/// See [`TileKernels::finish`].
#[target_feature(enable = "avx512f,fma")]
pub(super) fn finish(sums: &[i32], correction: i32, factor: Factor, out: &mut [f32]) {
    super::finish_generic(sums, correction, factor, out);
}

//! AVX-512 with VNNI: 16 rows to a vector, four vectors to a panel.
//!
//! For one token the fields are masked, not shifted: field `j` then counts 4^j-fold, each in its own
//! accumulator, and one exact shift at the end puts that right. That leaves one `and` and one
//! `vpdpbusd` for 64 weights, the least that these instructions allow.
//!
//! The loops serve weights of two bits and, through [`Trits`], five to a byte (`avx512_vbmi`). They are
//! inlined into functions that have the instructions.

use core::arch::x86_64::*;

use super::{BlockScales, Blocks, Factor, MAX_ROWS, MAX_TOKENS, Sums, TILE_COLS, TileKernels};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: MAX_ROWS,
    tile_cols: TILE_COLS,
    unit: UNIT,
    pack_row: None,
    direct,
    direct_tokens: 6,
    direct_limit: 64,
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
/// Bytes ahead of the current tile that are fetched. The arithmetic fills the reorder window, so hardware
/// prefetching alone leaves a fifth of the bandwidth unused.
const AHEAD: usize = 8 << 10;
/// Scales ahead of the current block's that are fetched: those of some 8 blocks.
const SCALES_AHEAD: usize = 8 * MAX_ROWS;

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
        unsafe { _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(AHEAD + line * 64).cast()) };
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
        let masks = [3, 12, 48, -64].map(|mask| _mm512_set1_epi8(mask));
        let mut acc = [[_mm512_setzero_si512(); 4]; VECTORS];
        for tile in 0..tiles {
            let w = weights.add(tile * TILE_BYTES);
            prefetch(w);
            let a = acts.add(tile * F * UNIT);
            for (v, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_loadu_si512(w.add(v * 64).cast());
                let low = trits.low(x);
                for (f, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_dpbusd_epi32(
                        *acc,
                        _mm512_and_si512(low, masks[f]),
                        broadcast(a.add(f * UNIT)),
                    );
                }
                if F == 5 {
                    // It stands where field 3 does, and counts as much.
                    let high = _mm512_and_si512(trits.high(x), masks[3]);
                    acc[3] = _mm512_dpbusd_epi32(acc[3], high, broadcast(a.add(4 * UNIT)));
                }
            }
        }
        let mut sums = [_mm512_setzero_si512(); VECTORS];
        for (sum, [f0, f1, f2, f3]) in sums.iter_mut().zip(acc) {
            let low = _mm512_add_epi32(f0, _mm512_srai_epi32::<2>(f1));
            *sum = _mm512_add_epi32(
                low,
                _mm512_add_epi32(_mm512_srai_epi32::<4>(f2), _mm512_srai_epi32::<6>(f3)),
            );
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

/// `y[t][row] = fma(sum - block sum, scale, y)` for block `b`.
///
/// # Safety
/// There are `T` block sums and rows of `y`, and the CPU has AVX-512.
#[inline(always)]
unsafe fn fold_block<const T: usize>(
    panel: Panel<T>,
    b: usize,
    block_sums: &[*const i32; T],
    scales: BlockScales,
    y: *mut f32,
) {
    // SAFETY: the caller's promise; 64 rows have scales in every block.
    unsafe {
        // Behind an opaque pointer, or sums would be moved between registers and stack around every block.
        let y = core::hint::black_box(y);
        let mut scale = [_mm512_setzero_ps(); VECTORS];
        match scales {
            BlockScales::F32(from) => {
                let from = from.as_ptr().add(b * MAX_ROWS);
                for (v, scale) in scale.iter_mut().enumerate() {
                    *scale = _mm512_loadu_ps(from.add(v * 16));
                }
            }
            BlockScales::F16(from) => {
                let from = from.as_ptr().add(b * MAX_ROWS);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SCALES_AHEAD).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SCALES_AHEAD + 32).cast());
                for (v, scale) in scale.iter_mut().enumerate() {
                    *scale = _mm512_cvtph_ps(_mm256_loadu_si256(from.add(v * 16).cast()));
                }
            }
        }
        for t in 0..T {
            let correction = _mm512_set1_epi32(*block_sums[t].add(b));
            for v in 0..VECTORS {
                let y = y.add(t * MAX_ROWS + v * 16);
                let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(panel[t][v], correction));
                _mm512_storeu_ps(y, _mm512_fmadd_ps(sum, scale[v], _mm512_loadu_ps(y)));
            }
        }
    }
}

/// Folds all blocks, whose sums `dot` gives.
///
/// # Safety
/// As [`TileKernels::direct_blocks`], for `T` tokens.
#[inline(always)]
unsafe fn fold_blocks<const T: usize>(
    blocks: &Blocks,
    acts: [*const i8; T],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
    dot: impl Fn(*const u8, usize, [*const i8; T]) -> Panel<T>,
) {
    let mut sums = [core::ptr::null(); T];
    for (to, from) in sums.iter_mut().zip(block_sums) {
        *to = from[..blocks.spans.len()].as_ptr();
    }
    assert!(block_sums.len() >= T, "block sums of every token");
    let y = y.as_mut_ptr().cast::<f32>();
    for (b, span) in blocks.spans.iter().enumerate() {
        // SAFETY: the caller's promise: spans lie within the weights and the activations.
        unsafe {
            let weights = blocks.weights.add(span.first * TILE_BYTES);
            let mut at = acts;
            for a in &mut at {
                *a = a.add(span.acts);
            }
            fold_block(dot(weights, span.count, at), b, &sums, blocks.scales, y);
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
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    for_each_count!(acts, a => {
        // SAFETY (both): the caller's promise.
        let dot = |weights, tiles, a| unsafe { packed_sums(trits, weights, tiles, a) };
        unsafe { fold_blocks(blocks, a, block_sums, y, dot) }
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
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    // SAFETY: the caller's promise.
    unsafe { direct_blocks_body(TwoBits, blocks, acts, block_sums, y) }
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
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    for_each_count!(acts, a => {
        // SAFETY (both): the caller's promise.
        let dot = |weights, units, a| unsafe { unpacked_sums(weights, units, a) };
        unsafe { fold_blocks(blocks, a, block_sums, y, dot) }
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

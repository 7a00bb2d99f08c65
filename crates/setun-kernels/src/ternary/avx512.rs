//! AVX-512 with VNNI: 16 rows to a vector, four vectors to a panel.
//!
//! For one token the fields are masked, not shifted: field `j` then counts 4^j-fold, each in its own
//! accumulator, and one exact shift at the end puts that right. That leaves one `and` and one
//! `vpdpbusd` for 64 weights, the least that these instructions allow.
//!
//! The loops serve weights of two bits and, through [`Trits`], five to a byte (`avx512_vbmi`). They are
//! inlined into functions that have the instructions.

use core::arch::x86_64::*;
use core::ops::Range;

use super::columns::Span;
use super::{BlockScales, Blocks, Factor, MAX_ROWS, MAX_TOKENS, Sums, TILE_COLS, TileKernels};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: MAX_ROWS,
    tile_cols: TILE_COLS,
    unit: UNIT,
    pack_row: None,
    direct,
    direct_tokens: 12,
    direct_limit: usize::MAX,
    block_limit: 64,
    unpack,
    unpacked,
    unpacked_tokens: 6,
    direct_blocks: Some(direct_blocks),
    unpacked_blocks: Some(unpacked_blocks),
    fold,
    scale,
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

/// Sums of `V` vectors of a panel for `T` tokens.
type Panel<const T: usize, const V: usize> = [[__m512i; V]; T];

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
/// `V` vectors are readable at `from`.
#[inline(always)]
unsafe fn load<const V: usize>(from: *const u8) -> [__m512i; V] {
    // SAFETY: the caller's promise, and AVX-512.
    unsafe {
        let mut all = [_mm512_setzero_si512(); V];
        for (v, x) in all.iter_mut().enumerate() {
            *x = _mm512_loadu_si512(from.add(v * 64).cast());
        }
        all
    }
}

/// Sums of one token: every field has its own, field 4 shares that of field 3.
type Masked = [[__m512i; 4]; VECTORS];

/// Adds some of the fields of one tile. The others are multiplied with zero: a branch would cost more.
///
/// # Safety
/// A tile at `tile`, `4 · F` activations at `acts`; the CPU has the instructions of the kernel set.
#[inline(always)]
unsafe fn add_one<const F: usize>(
    acc: &mut Masked,
    trits: impl Trits<F>,
    tile: *const u8,
    acts: *const i8,
    some: Range<usize>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut a = [_mm512_setzero_si512(); F];
        for (f, a) in a.iter_mut().enumerate() {
            let keep = if f >= some.start && f < some.end { !0 } else { 0 };
            *a = _mm512_maskz_mov_epi32(keep, broadcast(acts.add(f * UNIT)));
        }
        let masks = [3, 12, 48, -64].map(|mask| _mm512_set1_epi8(mask));
        for (v, acc) in acc.iter_mut().enumerate() {
            let x = _mm512_loadu_si512(tile.add(v * 64).cast());
            let low = trits.low(x);
            for (f, acc) in acc.iter_mut().enumerate() {
                *acc = _mm512_dpbusd_epi32(*acc, _mm512_and_si512(low, masks[f]), a[f]);
            }
            if F == 5 {
                // It stands where field 3 does, and counts as much.
                acc[3] = _mm512_dpbusd_epi32(acc[3], _mm512_and_si512(trits.high(x), masks[3]), a[4]);
            }
        }
    }
}

/// The sums of the units of `span` for one token.
///
/// # Safety
/// As [`packed_span`], for all columns of the tiles that hold the units.
#[inline(always)]
unsafe fn packed_one<const F: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    span: Span,
    acts: *const i8,
) -> [__m512i; VECTORS] {
    let (first, end) = (span.first, span.first + span.count);
    // SAFETY: tiles of weights and of activations, within what the caller promised.
    unsafe {
        let mut acc = [[_mm512_setzero_si512(); 4]; VECTORS];
        let mut tile = first / F;
        if first % F > 0 {
            let some = first % F..F.min(end - tile * F);
            add_one(&mut acc, trits, weights.add(tile * TILE_BYTES), acts.add(tile * F * UNIT), some);
            tile += 1;
        }
        while tile < end / F {
            let w = weights.add(tile * TILE_BYTES);
            prefetch(w);
            add_one(&mut acc, trits, w, acts.add(tile * F * UNIT), 0..F);
            tile += 1;
        }
        if tile * F < end {
            let w = weights.add(tile * TILE_BYTES);
            prefetch(w);
            add_one(&mut acc, trits, w, acts.add(tile * F * UNIT), 0..end % F);
        }
        let mut sums = [_mm512_setzero_si512(); VECTORS];
        for (sum, [f0, f1, f2, f3]) in sums.iter_mut().zip(acc) {
            let low = _mm512_add_epi32(f0, _mm512_srai_epi32::<2>(f1));
            let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(f2), _mm512_srai_epi32::<6>(f3));
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
unsafe fn step<const T: usize, const V: usize>(
    acc: &mut Panel<T, V>,
    codes: [__m512i; V],
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

/// Field `SHIFT / 2` of all vectors.
#[inline(always)]
unsafe fn fields<const SHIFT: u32, const V: usize>(mut all: [__m512i; V]) -> [__m512i; V] {
    for x in &mut all {
        // SAFETY: the caller has AVX-512.
        *x = unsafe { field::<SHIFT>(*x) };
    }
    all
}

/// The parts of bytes that [`Trits`] gives.
#[inline(always)]
unsafe fn decode<const F: usize, const V: usize, const HIGH: bool>(
    trits: impl Trits<F>,
    mut all: [__m512i; V],
) -> [__m512i; V] {
    for x in &mut all {
        // SAFETY: the caller has the instructions.
        *x = unsafe { if HIGH { trits.high(*x) } else { trits.low(*x) } };
    }
    all
}

/// Adds `tiles` of `V` vectors from byte `at` of each tile on to `acc`. Whoever reads a tile first, at byte 0,
/// fetches one further on.
///
/// # Safety
/// Weights hold the tiles, each of `acts` `4 · F` activations for each; the CPU has the instructions of the
/// kernel set.
#[inline(always)]
unsafe fn packed_many<const F: usize, const T: usize, const V: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    at: usize,
    tiles: Range<usize>,
    acts: &[*const i8; T],
    mut acc: Panel<T, V>,
) -> Panel<T, V> {
    // SAFETY: tiles of weights and of activations, within what the caller promised.
    unsafe {
        for tile in tiles {
            let w = weights.add(tile * TILE_BYTES);
            if at == 0 {
                prefetch(w);
            }
            let a = tile * F * UNIT;
            let low = decode::<F, V, false>(trits, load(w.add(at)));
            step(&mut acc, fields::<0, V>(low), acts, a);
            step(&mut acc, fields::<2, V>(low), acts, a + 4);
            step(&mut acc, fields::<4, V>(low), acts, a + 8);
            step(&mut acc, fields::<6, V>(low), acts, a + 12);
            if F == 5 {
                let high = decode::<F, V, true>(trits, load(w.add(at)));
                step(&mut acc, fields::<6, V>(high), acts, a + 16);
            }
        }
        acc
    }
}

/// Adds some of the fields of one tile to `acc`: what a block has of a tile that it shares.
///
/// # Safety
/// As [`packed_many`], for these fields of tile `tile`.
#[inline(always)]
unsafe fn packed_fields<const F: usize, const T: usize, const V: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    at: usize,
    tile: usize,
    some: Range<usize>,
    acts: &[*const i8; T],
    mut acc: Panel<T, V>,
) -> Panel<T, V> {
    // SAFETY: the caller's promise.
    unsafe {
        let from = weights.add(tile * TILE_BYTES + at);
        let first = tile * F * UNIT;
        let low = decode::<F, V, false>(trits, load(from));
        for f in some.start..some.end.min(4) {
            let count = _mm_cvtsi32_si128(2 * f as i32);
            let mut codes = low;
            for x in &mut codes {
                *x = _mm512_and_si512(_mm512_srl_epi32(*x, count), _mm512_set1_epi8(3));
            }
            step(&mut acc, codes, acts, first + f * UNIT);
        }
        if F == 5 && some.end == 5 {
            let high = decode::<F, V, true>(trits, load(from));
            step(&mut acc, fields::<6, V>(high), acts, first + 4 * UNIT);
        }
        acc
    }
}

/// How the weights of a panel are stored. A trait and not a closure: closures do not inherit the instruction set.
trait Form<const T: usize, const V: usize>: Copy {
    /// Adds the units of `span` to `acc`, of the `V` vectors from byte `at` of each tile on.
    ///
    /// # Safety
    /// Weights hold the units, each of `acts` four activations for each; the CPU has the instructions of the
    /// kernel set.
    unsafe fn add(
        self,
        weights: *const u8,
        at: usize,
        span: Span,
        acts: &[*const i8; T],
        acc: Panel<T, V>,
    ) -> Panel<T, V>;
}

/// Tiles, as they are packed.
#[derive(Clone, Copy)]
struct Packed<const F: usize, W>(W);

impl<const F: usize, const T: usize, const V: usize, W: Trits<F>> Form<T, V> for Packed<F, W> {
    #[inline(always)]
    unsafe fn add(
        self,
        weights: *const u8,
        at: usize,
        span: Span,
        acts: &[*const i8; T],
        acc: Panel<T, V>,
    ) -> Panel<T, V> {
        // SAFETY: the caller's promise.
        unsafe { packed_span(self.0, weights, at, span, acts, acc) }
    }
}

/// A byte for each code.
#[derive(Clone, Copy)]
struct Unpacked;

impl<const T: usize, const V: usize> Form<T, V> for Unpacked {
    #[inline(always)]
    unsafe fn add(
        self,
        weights: *const u8,
        at: usize,
        span: Span,
        acts: &[*const i8; T],
        mut acc: Panel<T, V>,
    ) -> Panel<T, V> {
        for unit in span.first..span.first + span.count {
            // SAFETY: units of weights and of activations, within what the caller promised.
            unsafe { step(&mut acc, load(weights.add(unit * TILE_BYTES + at)), acts, unit * UNIT) };
        }
        acc
    }
}

/// Adds the units of `span`, which may begin and end within a tile, to `acc`, which is zero.
///
/// # Safety
/// As [`packed_many`], for these units.
#[inline(always)]
unsafe fn packed_span<const F: usize, const T: usize, const V: usize>(
    trits: impl Trits<F>,
    weights: *const u8,
    at: usize,
    span: Span,
    acts: &[*const i8; T],
    mut acc: Panel<T, V>,
) -> Panel<T, V> {
    let (first, end) = (span.first, span.first + span.count);
    let tiles = first.div_ceil(F)..end / F;
    // SAFETY (all): the caller's promise, of which these are parts.
    unsafe {
        if T == 1 && V == VECTORS {
            acc[0].copy_from_slice(&packed_one(trits, weights, span, acts[0]));
            return acc;
        }
        if tiles.start > tiles.end {
            return packed_fields(trits, weights, at, tiles.end, first % F..end % F, acts, acc);
        }
        if first % F > 0 {
            acc = packed_fields(trits, weights, at, tiles.start - 1, first % F..F, acts, acc);
        }
        let after = tiles.end;
        acc = packed_many(trits, weights, at, tiles, acts, acc);
        if end % F > 0 {
            acc = packed_fields(trits, weights, at, after, 0..end % F, acts, acc);
        }
        acc
    }
}

/// Stores the sums of `T` tokens from row `first` on.
#[inline(always)]
fn store<const T: usize, const V: usize>(panel: Panel<T, V>, first: usize, sums: &mut Sums) {
    for (panel, sums) in panel.iter().zip(sums) {
        for (sum, to) in panel.iter().zip(sums[first..].as_chunks_mut::<16>().0) {
            // SAFETY: 16 lanes of room, and the caller has AVX-512.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), *sum) };
        }
    }
}

/// `y[t][row] = fma(sum - block sum, scale, y)` for the rows of block `b` from `first` on.
///
/// # Safety
/// There are `T` block sums and rows of `y`, and the CPU has AVX-512.
#[inline(always)]
unsafe fn fold_block<const T: usize, const V: usize>(
    panel: Panel<T, V>,
    b: usize,
    first: usize,
    block_sums: &[*const i32; T],
    scales: BlockScales,
    y: *mut f32,
) {
    // SAFETY: the caller's promise; 64 rows have scales in every block.
    unsafe {
        // Behind an opaque pointer, or sums would be moved between registers and stack around every block.
        let y = core::hint::black_box(y.add(first));
        let mut scale = [_mm512_setzero_ps(); V];
        match scales {
            BlockScales::F32(from) => {
                let from = from.as_ptr().add(b * MAX_ROWS + first);
                for (v, scale) in scale.iter_mut().enumerate() {
                    *scale = _mm512_loadu_ps(from.add(v * 16));
                }
            }
            BlockScales::F16(from) => {
                let from = from.as_ptr().add(b * MAX_ROWS + first);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SCALES_AHEAD).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SCALES_AHEAD + 32).cast());
                for (v, scale) in scale.iter_mut().enumerate() {
                    *scale = _mm512_cvtph_ps(_mm256_loadu_si256(from.add(v * 16).cast()));
                }
            }
        }
        for t in 0..T {
            let correction = _mm512_set1_epi32(*block_sums[t].add(b));
            for v in 0..V {
                let y = y.add(t * MAX_ROWS + v * 16);
                let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(panel[t][v], correction));
                _mm512_storeu_ps(y, _mm512_fmadd_ps(sum, scale[v], _mm512_loadu_ps(y)));
            }
        }
    }
}

/// Folds all blocks.
///
/// # Safety
/// As [`TileKernels::direct_blocks`], for `T` tokens.
#[inline(always)]
unsafe fn fold_blocks<const T: usize, const V: usize>(
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
    form: impl Form<T, V>,
) {
    let acts = acts.first_chunk().expect("activations of every token");
    let mut sums = [core::ptr::null::<i32>(); T];
    for (to, from) in sums.iter_mut().zip(block_sums) {
        *to = from[..blocks.spans.len()].as_ptr();
    }
    assert!(block_sums.len() >= T, "block sums of every token");
    let y = y.as_mut_ptr().cast::<f32>();
    for (b, span) in blocks.spans.iter().enumerate() {
        for part in 0..VECTORS / V {
            // SAFETY: the caller's promise: spans lie within the weights and the activations.
            unsafe {
                let zero = [[_mm512_setzero_si512(); V]; T];
                let panel = form.add(blocks.weights, part * V * 64, *span, acts, zero);
                fold_block(panel, b, part * V * 16, &sums, blocks.scales, y);
            }
        }
    }
}

/// Evaluates the body for as many tokens as there are rows of activations, with their number and the vectors that
/// are taken at once as constants.
macro_rules! for_each_count {
    ($acts:expr, $t:ident, $v:ident => $body:expr; $($count:literal of $vectors:literal),*) => {
        match $acts.len() {
            $($count => {
                const $t: usize = $count;
                const $v: usize = $vectors;
                $body
            })*
            _ => unreachable!("more tokens than a kernel takes"),
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
    for_each_count!(acts, T, V => {
        let acts: &[*const i8; T] = acts.first_chunk().expect("as many as counted");
        for part in 0..VECTORS / V {
            // SAFETY: the caller's promise.
            unsafe {
                let zero = [[_mm512_setzero_si512(); V]; T];
                let span = Span { first: 0, count: tiles * F };
                let panel = packed_span(trits, weights, part * V * 64, span, acts, zero);
                store(panel, part * V * 16, sums);
            }
        }
    }; 1 of 4, 2 of 4, 3 of 4, 4 of 4, 5 of 4, 6 of 4, 7 of 2, 8 of 2, 9 of 2,
        10 of 2, 11 of 2, 12 of 2)
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
    for_each_count!(acts, T, V => {
        // SAFETY: the caller's promise.
        unsafe { fold_blocks::<T, V>(blocks, acts, block_sums, y, Packed::<F, _>(trits)) }
    }; 1 of 4, 2 of 4, 3 of 4, 4 of 4, 5 of 2, 6 of 2, 7 of 2, 8 of 2)
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
    for_each_count!(acts, T, V => {
        let acts: &[*const i8; T] = acts.first_chunk().expect("as many as counted");
        let zero: Panel<T, V> = [[_mm512_setzero_si512(); V]; T];
        // SAFETY: the caller's promise.
        store(unsafe { Unpacked.add(panel, 0, Span { first: 0, count: units }, acts, zero) }, 0, sums);
    }; 1 of 4, 2 of 4, 3 of 4, 4 of 4, 5 of 4, 6 of 4)
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
    for_each_count!(acts, T, V => {
        // SAFETY: the caller's promise.
        unsafe { fold_blocks::<T, V>(blocks, acts, block_sums, y, Unpacked) }
    }; 1 of 4, 2 of 4, 3 of 4, 4 of 4, 5 of 4, 6 of 4)
}

/// See [`TileKernels::fold`].
#[target_feature(enable = "avx512f,fma")]
pub(super) fn fold(sums: &[i32], correction: i32, scales: BlockScales, y: &mut [f32]) {
    super::fold_generic(sums, correction, scales, y);
}

/// See [`TileKernels::scale`].
#[target_feature(enable = "avx512f,fma")]
pub(super) fn scale(y: &[f32], factor: f32, out: &mut [f32]) {
    super::scale_generic(y, factor, out);
}

/// See [`TileKernels::finish`].
#[target_feature(enable = "avx512f,fma")]
pub(super) fn finish(sums: &[i32], correction: i32, factor: Factor, out: &mut [f32]) {
    super::finish_generic(sums, correction, factor, out);
}

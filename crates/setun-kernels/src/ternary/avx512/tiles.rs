//! The loops over tiles: what is added for some tokens, from weights in any of their forms.

use core::arch::x86_64::*;
use core::ops::Range;

use super::super::Sums;
use super::super::columns::Span;

/// Vectors of a tile.
pub(super) const VECTORS: usize = 4;
pub(super) const TILE_BYTES: usize = VECTORS * 64;
/// Columns that one `vpdpbusd` takes.
pub(in super::super) const UNIT: usize = 4;
/// Bytes ahead of the current tile that are fetched. The arithmetic fills the reorder window, so hardware
/// prefetching alone leaves a fifth of the bandwidth unused.
const AHEAD: usize = 8 << 10;

/// Sums of `V` vectors of a panel for `T` tokens.
pub(super) type Panel<const T: usize, const V: usize> = [[__m512i; V]; T];

/// What a byte of weights holds: `F` codes, as fields of two bits.
pub(in super::super) trait Trits<const F: usize>: Copy {
    /// Fields 0 to 3 of every byte.
    ///
    /// # Safety (both)
    /// The CPU has the instructions of the kernel set.
    unsafe fn low(self, x: __m512i) -> __m512i;
    /// Field 4 of every byte, where field 3 is in `low`.
    unsafe fn high(self, x: __m512i) -> __m512i;
}

#[derive(Clone, Copy)]
pub(super) struct TwoBits;

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
pub(super) fn prefetch(tile: *const u8) {
    for line in 0..VECTORS {
        // SAFETY: prefetching never faults, wherever the address points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(AHEAD + line * 64).cast()) };
    }
}

/// Field `SHIFT / 2` of every byte, as a code.
#[inline(always)]
pub(super) unsafe fn field<const SHIFT: u32>(x: __m512i) -> __m512i {
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
pub(super) trait Form<const T: usize, const V: usize>: Copy {
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
pub(super) struct Packed<const F: usize, W>(pub(super) W);

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
pub(super) struct Unpacked;

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
pub(super) unsafe fn packed_span<const F: usize, const T: usize, const V: usize>(
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
pub(super) fn store<const T: usize, const V: usize>(panel: Panel<T, V>, first: usize, sums: &mut Sums) {
    for (panel, sums) in panel.iter().zip(sums) {
        for (sum, to) in panel.iter().zip(sums[first..].as_chunks_mut::<16>().0) {
            // SAFETY: 16 lanes of room, and the caller has AVX-512.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), *sum) };
        }
    }
}

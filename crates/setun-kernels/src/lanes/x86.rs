//! Sixteen lanes in the registers of x86-64.
//!
//! SAFETY of every block below, unless said otherwise: the token `self` exists only in functions that
//! enable these instructions, called after the CPU check; pointers come from references to arrays of
//! exactly the bytes read or written, and none of the instructions asks for alignment.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::pairs::{self, Codes};
use super::{Arithmetic, Chunk, LANES, Lanes};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// One 512-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(super) ());

/// Two 256-bit registers: lanes 0–7 and 8–15.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub(super) ());

macro_rules! elementwise {
    ($($name:ident: $wide:ident, $half:ident);*) => {
        elementwise!(@impl Avx512, __m512, |x| unsafe { _mm512_set1_ps(x) },
            |a, b, c| unsafe { _mm512_fmadd_ps(a, b, c) },
            |v| unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(v))) },
            $($name, |a, b| unsafe { $wide(a, b) });*);
        elementwise!(@impl Avx2, [__m256; 2], |x| unsafe { [_mm256_set1_ps(x); 2] },
            |a, b, c| unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] },
            |v| unsafe { [shift(v[0]), shift(v[1])] },
            $($name, |a, b| unsafe { [$half(a[0], b[0]), $half(a[1], b[1])] });*);
    };
    (@impl $token:ty, $v:ty, |$x:ident| $splat:expr, |$fa:ident, $fb:ident, $fc:ident| $fma:expr,
        |$s:ident| $shift:expr, $($name:ident, |$a:ident, $b:ident| $op:expr);*) => {
        impl Arithmetic for $token {
            type V = $v;
            #[inline(always)]
            fn splat(self, $x: f32) -> $v { $splat }
            #[inline(always)]
            fn fma(self, $fa: $v, $fb: $v, $fc: $v) -> $v { $fma }
            #[inline(always)]
            fn shift_to_exponent(self, $s: $v) -> $v { $shift }
            $(#[inline(always)]
            fn $name(self, $a: $v, $b: $v) -> $v { $op })*
        }
    };
}
elementwise! {
    add: _mm512_add_ps, _mm256_add_ps;
    sub: _mm512_sub_ps, _mm256_sub_ps;
    mul: _mm512_mul_ps, _mm256_mul_ps;
    div: _mm512_div_ps, _mm256_div_ps;
    max: _mm512_max_ps, _mm256_max_ps;
    min: _mm512_min_ps, _mm256_min_ps
}

#[inline(always)]
unsafe fn shift(v: __m256) -> __m256 {
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(v))) }
}

/// The last three steps of the fold.
#[inline(always)]
unsafe fn fold8(v: __m256) -> f32 {
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

/// The same for the largest.
#[inline(always)]
unsafe fn max8(v: __m256) -> f32 {
    unsafe {
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

impl Lanes for Avx512 {
    const WIDE: bool = true;
    #[inline(always)]
    fn load(self, p: &Chunk) -> __m512 {
        unsafe { _mm512_loadu_ps(p.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: __m512, p: &mut Chunk) {
        unsafe { _mm512_storeu_ps(p.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn load_f16(self, p: &[f16; LANES]) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_bf16(self, p: &[bf16; LANES]) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn load_i8(self, p: &[i8; LANES]) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.as_ptr().cast()))) }
    }
    // Spread first: moving one half float into a register waits for what was there before.
    #[inline(always)]
    fn splat_f16(self, x: f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(x.to_bits().cast_signed())) }
    }
    #[inline(always)]
    fn load_nibbles(self, p: &[u8; LANES], scale: __m512) -> [__m512; 2] {
        unsafe {
            // The permutation looks at the lowest four bits of an index only.
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.as_ptr().cast()));
            let steps = _mm512_setr_ps(
                -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0,
            );
            let values = _mm512_mul_ps(steps, scale);
            [
                _mm512_permutexvar_ps(bytes, values),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), values),
            ]
        }
    }
    #[inline(always)]
    fn load_trits(self, codes: u32) -> __m512 {
        unsafe {
            let shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let codes = _mm512_srlv_epi32(_mm512_set1_epi32(codes.cast_signed()), shifts);
            // The permutation looks at the lowest two bits of an index only.
            _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_setr_ps(-1.0, 0.0, 1.0, 2.0)), codes)
        }
    }
    #[inline(always)]
    fn widen(self, x: f16) -> f32 {
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(x.to_bits())))) }
    }
    #[inline(always)]
    fn store_f16(self, v: __m512, p: &mut [f16; LANES]) {
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(p.as_mut_ptr().cast(), half);
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // A prefetch never faults, so `p` need not be valid.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn load_i32(self, p: &[i32; LANES]) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(p.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_i16(self, v: __m512, p: &mut [i16; LANES]) {
        unsafe { _mm256_storeu_si256(p.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v))) }
    }
    #[inline(always)]
    fn dot_pairs<const BITS: usize, const R: usize, const C: usize>(
        self,
        a: [&[[i16; 2]]; R],
        b: &[u8],
        stride: usize,
    ) -> [[[i32; LANES]; C]; R] {
        unsafe { pairs::dot_avx512(a, Codes::<BITS>::new(b, stride, a[0].len(), C)) }
    }
    #[inline(always)]
    fn widen_pairs<const BITS: usize>(self, from: &[u8], to: &mut [[i16; 2]; LANES]) {
        unsafe { pairs::widen_avx512::<BITS>(from, to) }
    }
    #[inline(always)]
    fn fold(self, v: __m512) -> f32 {
        unsafe { fold8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))) }
    }
    #[inline(always)]
    fn fold_max(self, v: __m512) -> f32 {
        unsafe { max8(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))) }
    }
}

// The closures of `map` and `from_fn` are functions of their own, without these instructions; spelled out
// halves are certain to be compiled with them.

#[inline(always)]
unsafe fn widen_f16(p: *const f16) -> __m256 {
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
}

#[inline(always)]
unsafe fn widen_bf16(p: *const bf16) -> __m256 {
    unsafe {
        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
}

#[inline(always)]
unsafe fn widen_i8(p: *const i8) -> __m256 {
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
}

/// Sixteen signed bytes times `scale`.
#[inline(always)]
unsafe fn scaled_i8(bytes: __m128i, scale: __m256) -> [__m256; 2] {
    unsafe {
        let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        let high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
        [_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)]
    }
}

impl Lanes for Avx2 {
    const WIDE: bool = false;
    #[inline(always)]
    fn load(self, p: &Chunk) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(p.as_ptr()), _mm256_loadu_ps(p[8..].as_ptr())] }
    }
    #[inline(always)]
    fn store(self, v: [__m256; 2], p: &mut Chunk) {
        unsafe {
            _mm256_storeu_ps(p.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(p[8..].as_mut_ptr(), v[1]);
        }
    }
    #[inline(always)]
    fn load_f16(self, p: &[f16; LANES]) -> [__m256; 2] {
        unsafe { [widen_f16(p.as_ptr()), widen_f16(p[8..].as_ptr())] }
    }
    #[inline(always)]
    fn load_bf16(self, p: &[bf16; LANES]) -> [__m256; 2] {
        unsafe { [widen_bf16(p.as_ptr()), widen_bf16(p[8..].as_ptr())] }
    }
    #[inline(always)]
    fn load_i8(self, p: &[i8; LANES]) -> [__m256; 2] {
        unsafe { [widen_i8(p.as_ptr()), widen_i8(p[8..].as_ptr())] }
    }
    #[inline(always)]
    fn splat_f16(self, x: f16) -> [__m256; 2] {
        unsafe { [_mm256_cvtph_ps(_mm_set1_epi16(x.to_bits().cast_signed())); 2] }
    }
    #[inline(always)]
    fn load_nibbles(self, p: &[u8; LANES], scale: [__m256; 2]) -> [[__m256; 2]; 2] {
        unsafe {
            let bytes = _mm_loadu_si128(p.as_ptr().cast());
            let (nibble, eight) = (_mm_set1_epi8(15), _mm_set1_epi8(8));
            let low = _mm_sub_epi8(_mm_and_si128(bytes, nibble), eight);
            let high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble), eight);
            [scaled_i8(low, scale[0]), scaled_i8(high, scale[0])]
        }
    }
    #[inline(always)]
    fn load_trits(self, codes: u32) -> [__m256; 2] {
        unsafe {
            let codes = _mm256_set1_epi32(codes.cast_signed());
            // The permutation looks at the lowest two bits of an index only.
            let values = _mm256_setr_ps(-1.0, 0.0, 1.0, 2.0, -1.0, 0.0, 1.0, 2.0);
            let low = _mm256_srlv_epi32(codes, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
            let high = _mm256_srlv_epi32(codes, _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30));
            [_mm256_permutevar_ps(values, low), _mm256_permutevar_ps(values, high)]
        }
    }
    #[inline(always)]
    fn widen(self, x: f16) -> f32 {
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(x.to_bits())))) }
    }
    #[inline(always)]
    fn store_f16(self, v: [__m256; 2], p: &mut [f16; LANES]) {
        unsafe {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]);
            _mm_storeu_si128(p.as_mut_ptr().cast(), low);
            _mm_storeu_si128(p[8..].as_mut_ptr().cast(), high);
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // A prefetch never faults, so `p` need not be valid.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn load_i32(self, p: &[i32; LANES]) -> [__m256; 2] {
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_loadu_si256(p.as_ptr().cast())),
                _mm256_cvtepi32_ps(_mm256_loadu_si256(p[8..].as_ptr().cast())),
            ]
        }
    }
    #[inline(always)]
    fn store_i16(self, v: [__m256; 2], p: &mut [i16; LANES]) {
        unsafe {
            let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
            // Packing works within halves: put the quarters in order.
            _mm256_storeu_si256(p.as_mut_ptr().cast(), _mm256_permute4x64_epi64::<0xD8>(packed))
        }
    }
    #[inline(always)]
    fn dot_pairs<const BITS: usize, const R: usize, const C: usize>(
        self,
        a: [&[[i16; 2]]; R],
        b: &[u8],
        stride: usize,
    ) -> [[[i32; LANES]; C]; R] {
        unsafe { pairs::dot_avx2(a, Codes::<BITS>::new(b, stride, a[0].len(), C)) }
    }
    #[inline(always)]
    fn widen_pairs<const BITS: usize>(self, from: &[u8], to: &mut [[i16; 2]; LANES]) {
        unsafe { pairs::widen_avx2::<BITS>(from, to) }
    }
    #[inline(always)]
    fn fold(self, v: [__m256; 2]) -> f32 {
        unsafe { fold8(_mm256_add_ps(v[0], v[1])) }
    }
    #[inline(always)]
    fn fold_max(self, v: [__m256; 2]) -> f32 {
        unsafe { max8(_mm256_max_ps(v[0], v[1])) }
    }
}

//! Sixteen float lanes: the vocabulary in which every float kernel is written, once.
//!
//! The order of every float operation is part of a kernel's definition (same bits everywhere). So a kernel
//! is one generic body over [`Lanes`], and an instruction set only says how sixteen lanes are added: as one
//! 512-bit register, two of 256 bits, or an array. All operations here round as IEEE 754 demands, fused
//! multiply-add included, hence equal bits. Only the payload of a NaN may differ.
//!
//! A value of [`Avx512`] or [`Avx2`] exists only inside [`Kernels::lanes`], after the CPU check: holding one
//! is the proof that makes the methods safe.

use crate::kernels::{Isa, Kernels};
use half::{bf16, f16};

/// Lanes of every reduction, whatever the hardware's width.
pub(crate) const LANES: usize = 16;
/// Sixteen consecutive floats.
pub(crate) type Chunk = [f32; LANES];

/// Elementwise arithmetic on some number of lanes.
pub(crate) trait Arithmetic: Copy {
    /// The lanes.
    type V: Copy;
    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`: `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The bit patterns shifted left by 23: an integer in the lowest bits becomes an exponent.
    fn shift_to_exponent(self, v: Self::V) -> Self::V;
}

/// Arithmetic on exactly sixteen lanes, with memory and the fixed fold.
pub(crate) trait Lanes: Arithmetic {
    /// Whether 32 registers hold sixteen lanes each, so that a tile of 24 accumulators stays in registers.
    const WIDE: bool;
    fn load(self, p: &Chunk) -> Self::V;
    fn store(self, v: Self::V, p: &mut Chunk);
    fn load_f16(self, p: &[f16; LANES]) -> Self::V;
    fn load_bf16(self, p: &[bf16; LANES]) -> Self::V;
    fn load_i8(self, p: &[i8; LANES]) -> Self::V;
    /// One half float, exactly.
    fn widen(self, x: f16) -> f32;
    /// Rounds to nearest, ties to even; beyond 65504 + half a step becomes infinity.
    fn store_f16(self, v: Self::V, p: &mut [f16; LANES]);
    /// Asks for the cache line at `p`, which may be any address.
    fn prefetch<T>(self, p: *const T);
    /// The sum of the lanes: 8 + 8, then 4 + 4, 2 + 2, 1 + 1.
    fn fold(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        fold_array(lanes, |a, b| a + b)
    }
    /// Sixteen folds at once: lane `i` of the result is `fold(v[i])`.
    fn fold_each(self, v: &[Self::V; LANES]) -> Self::V {
        let sums = v.map(|v| self.fold(v));
        self.load(&sums)
    }
    /// The largest lane. NaN never wins, unless all are.
    #[inline(always)]
    fn fold_max(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        fold_array(lanes, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }
}

/// The fixed tree: 8 with 8, 4 with 4, 2 with 2, 1 with 1.
#[inline(always)]
fn fold_array(mut v: Chunk, op: impl Fn(f32, f32) -> f32) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            v[i] = op(v[i], v[i + width]);
        }
    }
    v[0]
}

/// The chunks of a slice; the last one padded with zeros.
#[inline(always)]
pub(crate) fn chunk_at(x: &[f32], i: usize) -> Chunk {
    let mut chunk = [0.0; LANES];
    let part = &x[i * LANES..x.len().min((i + 1) * LANES)];
    chunk[..part.len()].copy_from_slice(part);
    chunk
}

/// A kernel body, generic over how sixteen lanes are computed. `run` must be `#[inline(always)]`, as must
/// all that it calls with lanes: only then is it compiled with the instruction set it runs on.
pub(crate) trait Job {
    type Out;
    fn run<S: Lanes>(self, s: S) -> Self::Out;
}

/// Declares a [`Job`]: its inputs, its result and its body over lanes `s`.
macro_rules! job {
    ($name:ident { $($field:ident: $type:ty),* $(,)? } -> $out:ty, |$s:ident| $body:block) => {
        struct $name<'a> { $($field: $type),* }
        impl<'a> $crate::lanes::Job for $name<'a> {
            type Out = $out;
            #[inline(always)]
            fn run<S: $crate::lanes::Lanes>(self, $s: S) -> $out {
                let Self { $($field),* } = self;
                $body
            }
        }
    };
}
pub(crate) use job;

impl Kernels {
    /// Runs a job on this instruction set.
    #[inline]
    pub(crate) fn lanes<J: Job>(&self, job: J) -> J::Out {
        match self.isa {
            // SAFETY (both): a `Kernels` is handed out only after the CPU was seen to have these features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { run_avx512(job) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { run_avx2(job) },
            Isa::Scalar => job.run(Scalar),
        }
    }
}

/// # Safety
/// The CPU has the enabled features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn run_avx512<J: Job>(job: J) -> J::Out {
    job.run(Avx512(()))
}

/// # Safety
/// The CPU has the enabled features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<J: Job>(job: J) -> J::Out {
    job.run(Avx2(()))
}

/// One lane: for single values that must have the bits of the vector kernels.
#[derive(Clone, Copy)]
pub(crate) struct One;

impl Arithmetic for One {
    type V = f32;
    #[inline(always)]
    fn splat(self, x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    fn div(self, a: f32, b: f32) -> f32 {
        a / b
    }
    #[inline(always)]
    fn fma(self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn max(self, a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }
    #[inline(always)]
    fn min(self, a: f32, b: f32) -> f32 {
        if a < b { a } else { b }
    }
    #[inline(always)]
    fn shift_to_exponent(self, v: f32) -> f32 {
        f32::from_bits(v.to_bits() << 23)
    }
}

/// An array of sixteen: the reference, and what other architectures run.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn zip(a: Chunk, b: Chunk, op: impl Fn(f32, f32) -> f32) -> Chunk {
    std::array::from_fn(|i| op(a[i], b[i]))
}

impl Arithmetic for Scalar {
    type V = Chunk;
    #[inline(always)]
    fn splat(self, x: f32) -> Chunk {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: Chunk, b: Chunk) -> Chunk {
        zip(a, b, |a, b| One.add(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Chunk, b: Chunk) -> Chunk {
        zip(a, b, |a, b| One.sub(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Chunk, b: Chunk) -> Chunk {
        zip(a, b, |a, b| One.mul(a, b))
    }
    #[inline(always)]
    fn div(self, a: Chunk, b: Chunk) -> Chunk {
        zip(a, b, |a, b| One.div(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Chunk, b: Chunk, c: Chunk) -> Chunk {
        std::array::from_fn(|i| One.fma(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Chunk, b: Chunk) -> Chunk {
        zip(a, b, |a, b| One.max(a, b))
    }
    #[inline(always)]
    fn min(self, a: Chunk, b: Chunk) -> Chunk {
        zip(a, b, |a, b| One.min(a, b))
    }
    #[inline(always)]
    fn shift_to_exponent(self, v: Chunk) -> Chunk {
        v.map(|v| One.shift_to_exponent(v))
    }
}

impl Lanes for Scalar {
    const WIDE: bool = false;
    #[inline(always)]
    fn load(self, p: &Chunk) -> Chunk {
        *p
    }
    #[inline(always)]
    fn store(self, v: Chunk, p: &mut Chunk) {
        *p = v;
    }
    // The `const` conversions of `half` are plain integer code: no CPU detection per value.
    #[inline(always)]
    fn load_f16(self, p: &[f16; LANES]) -> Chunk {
        p.map(f16::to_f32_const)
    }
    #[inline(always)]
    fn load_bf16(self, p: &[bf16; LANES]) -> Chunk {
        p.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }
    #[inline(always)]
    fn load_i8(self, p: &[i8; LANES]) -> Chunk {
        p.map(f32::from)
    }
    #[inline(always)]
    fn widen(self, x: f16) -> f32 {
        x.to_f32_const()
    }
    #[inline(always)]
    fn store_f16(self, v: Chunk, p: &mut [f16; LANES]) {
        *p = v.map(f16::from_f32_const);
    }
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! SAFETY of every block below, unless said otherwise: the token `self` exists only in functions that
    //! enable these instructions, called after the CPU check; pointers come from references to arrays of
    //! exactly the bytes read or written, and none of the instructions asks for alignment.
    #![allow(clippy::undocumented_unsafe_blocks)]

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
        fn fold(self, v: __m512) -> f32 {
            unsafe {
                fold8(_mm256_add_ps(
                    _mm512_castps512_ps256(v),
                    _mm512_extractf32x8_ps::<1>(v),
                ))
            }
        }
        #[inline(always)]
        fn fold_each(self, v: &[__m512; LANES]) -> __m512 {
            unsafe {
                let a = wide_to_two(v, 0);
                let b = wide_to_two(v, 2);
                _mm512_add_ps(
                    _mm512_shuffle_ps::<0x88>(a, b),
                    _mm512_shuffle_ps::<0xDD>(a, b),
                )
            }
        }
    }

    // The four steps of the fold on several registers at once: each takes two registers, lines up the halves
    // that belong together, and adds. Inputs are taken in an order that leaves the sums sorted.

    /// `a` and `b` folded to eight lanes each.
    #[inline(always)]
    unsafe fn wide_to_eight(a: __m512, b: __m512) -> __m512 {
        unsafe {
            _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x44>(a, b),
                _mm512_shuffle_f32x4::<0xEE>(a, b),
            )
        }
    }

    /// Four lanes of each of four inputs: `i` and every fourth after it.
    #[inline(always)]
    unsafe fn wide_to_four(v: &[__m512; LANES], i: usize) -> __m512 {
        unsafe {
            let a = wide_to_eight(v[i], v[i + 4]);
            let b = wide_to_eight(v[i + 8], v[i + 12]);
            _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x88>(a, b),
                _mm512_shuffle_f32x4::<0xDD>(a, b),
            )
        }
    }

    /// Two lanes of each of eight inputs: `i` and `i + 1`, each with every fourth after it.
    #[inline(always)]
    unsafe fn wide_to_two(v: &[__m512; LANES], i: usize) -> __m512 {
        unsafe {
            let (a, b) = (wide_to_four(v, i), wide_to_four(v, i + 1));
            _mm512_add_ps(
                _mm512_shuffle_ps::<0x44>(a, b),
                _mm512_shuffle_ps::<0xEE>(a, b),
            )
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

    /// `a` and `b` folded to four lanes each: `a` in the lower half.
    #[inline(always)]
    unsafe fn fold_to_four(a: [__m256; 2], b: [__m256; 2]) -> __m256 {
        unsafe {
            let (a, b) = (_mm256_add_ps(a[0], a[1]), _mm256_add_ps(b[0], b[1]));
            _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(a, b),
                _mm256_permute2f128_ps::<0x31>(a, b),
            )
        }
    }

    /// Within each half: the first two lanes from `a`, the others from `b`, two lanes folded to one pair.
    #[inline(always)]
    unsafe fn fold_to_two(a: __m256, b: __m256) -> __m256 {
        unsafe {
            _mm256_add_ps(
                _mm256_shuffle_ps::<0x44>(a, b),
                _mm256_shuffle_ps::<0xEE>(a, b),
            )
        }
    }

    /// Eight sums: of `v[at]` to `v[at + 7]`, in this order because lower halves take the first four.
    #[inline(always)]
    unsafe fn fold_eight(v: &[[__m256; 2]; LANES], at: usize) -> __m256 {
        unsafe {
            let a = fold_to_two(
                fold_to_four(v[at], v[at + 4]),
                fold_to_four(v[at + 1], v[at + 5]),
            );
            let b = fold_to_two(
                fold_to_four(v[at + 2], v[at + 6]),
                fold_to_four(v[at + 3], v[at + 7]),
            );
            _mm256_add_ps(
                _mm256_shuffle_ps::<0x88>(a, b),
                _mm256_shuffle_ps::<0xDD>(a, b),
            )
        }
    }

    impl Lanes for Avx2 {
        const WIDE: bool = false;
        #[inline(always)]
        fn load(self, p: &Chunk) -> [__m256; 2] {
            unsafe {
                [
                    _mm256_loadu_ps(p.as_ptr()),
                    _mm256_loadu_ps(p[8..].as_ptr()),
                ]
            }
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
        fn fold(self, v: [__m256; 2]) -> f32 {
            unsafe { fold8(_mm256_add_ps(v[0], v[1])) }
        }
        #[inline(always)]
        fn fold_each(self, v: &[[__m256; 2]; LANES]) -> [__m256; 2] {
            unsafe { [fold_eight(v, 0), fold_eight(v, 8)] }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernels;

    job!(Folds { rows: &'a [Chunk; LANES] } -> (Chunk, Chunk), |s| {
        let vectors = rows.each_ref().map(|r| s.load(r));
        let mut together = [0.0; LANES];
        s.store(s.fold_each(&vectors), &mut together);
        (together, vectors.map(|v| s.fold(v)))
    });

    #[test]
    fn folds_follow_the_fixed_tree_on_every_instruction_set() {
        // Values of very different size: any other order of addition gives other bits.
        let mut state = 1u32;
        let rows: [Chunk; LANES] = std::array::from_fn(|_| {
            std::array::from_fn(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state as i32 as f32) * 2f32.powi((state % 23) as i32 - 40)
            })
        });
        let tree = |v: &Chunk| {
            let eight: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
            let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
            (four[0] + four[2]) + (four[1] + four[3])
        };
        let expected = rows.each_ref().map(tree).map(f32::to_bits);
        for k in Kernels::available() {
            let (together, alone) = k.lanes(Folds { rows: &rows });
            assert_eq!(together.map(f32::to_bits), expected, "{}", k.name());
            assert_eq!(alone.map(f32::to_bits), expected, "{}", k.name());
        }
    }
}

//! Sixteen float lanes: the vocabulary in which every float kernel is written, once.
//!
//! The order of every float operation is part of a kernel's definition (same bits everywhere). So a kernel
//! is one generic body over [`Lanes`], and an instruction set only says how sixteen lanes are added: as one
//! 512-bit register, two of 256 bits, four of 128 bits, or an array. All operations here round as IEEE 754 demands, fused
//! multiply-add included, hence equal bits. Only the payload of a NaN may differ.
//!
//! A value of [`Avx512`] or [`Avx2`] exists only inside [`Kernels::lanes`], after the CPU check: holding one
//! is the proof that makes the methods safe. `Neon` needs no proof: every 64-bit ARM has its instructions.

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
    /// `widen` in every lane.
    #[inline(always)]
    fn splat_f16(self, x: f16) -> Self::V {
        self.splat(self.widen(x))
    }
    /// Nibbles `q` as `scale · (q − 8)`: of the low halves, then of the high ones.
    #[inline(always)]
    fn load_nibbles(self, p: &[u8; LANES], scale: Self::V) -> [Self::V; 2] {
        let (low, high) = (p.map(|b| (b & 15) as i8 - 8), p.map(|b| (b >> 4) as i8 - 8));
        [self.mul(scale, self.load_i8(&low)), self.mul(scale, self.load_i8(&high))]
    }
    /// Lane `i` is the two-bit code at bit `2i`, less 1.
    fn load_trits(self, codes: u32) -> Self::V;
    /// One half float, exactly.
    fn widen(self, x: f16) -> f32;
    /// Rounds to nearest, ties to even; beyond 65504 + half a step becomes infinity.
    fn store_f16(self, v: Self::V, p: &mut [f16; LANES]);
    /// Asks for the cache line at `p`, which may be any address.
    fn prefetch<T>(self, p: *const T);
    /// Sixteen integers, rounded to nearest, ties to even.
    #[inline(always)]
    fn load_i32(self, p: &[i32; LANES]) -> Self::V {
        self.load(&p.map(|x| x as f32))
    }
    /// Rounds to nearest, ties to even. For magnitudes up to 32767; anything else gives any integer.
    #[inline(always)]
    fn store_i16(self, v: Self::V, p: &mut [i16; LANES]) {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        *p = lanes.map(|x| x.round_ties_even() as i16);
    }
    /// Exact sums of products of pairs: `out[r][c][l] = Σ_k Σ_i a[r][k][i] * b[k][c][l][i]`, where `b[k]` are `C` chunks of
    /// sixteen pairs of codes of `BITS` (16, 8 or 4) bits, from chunk `k * stride` on. Sums must fit i32.
    ///
    /// Panics where rows of `a` differ in length or `b` is too short.
    #[inline(always)]
    fn dot_pairs<const BITS: usize, const R: usize, const C: usize>(
        self,
        a: [&[[i16; 2]]; R],
        b: &[u8],
        stride: usize,
    ) -> [[[i32; LANES]; C]; R] {
        pairs::dot(a, pairs::Codes::<BITS>::new(b, stride, a[0].len(), C))
    }
    /// Sixteen pairs of codes of `BITS` bits, widened.
    #[inline(always)]
    fn widen_pairs<const BITS: usize>(self, from: &[u8], to: &mut [[i16; 2]; LANES]) {
        *to = pairs::widen::<BITS>(from);
    }
    /// The sum of the lanes: 8 + 8, then 4 + 4, 2 + 2, 1 + 1.
    fn fold(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        fold_array(lanes, |a, b| a + b)
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
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => job.run(neon::Neon),
            Isa::Scalar => job.run(Scalar),
        }
    }
}

/// # Safety
/// The CPU has the enabled features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
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
    fn load_trits(self, codes: u32) -> Chunk {
        std::array::from_fn(|i| f32::from((codes >> (2 * i) & 3) as i8 - 1))
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

mod pairs;

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernels;

    job!(Folds { lanes: &'a Chunk } -> (f32, f32), |s| { (s.fold(s.load(lanes)), s.fold_max(s.load(lanes))) });

    #[test]
    fn folds_follow_the_fixed_tree_on_every_instruction_set() {
        // Values of very different size: any other order of addition gives other bits.
        let mut state = 1u32;
        for nan in 0..=LANES {
            let mut lanes: Chunk = std::array::from_fn(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state as i32 as f32) * 2f32.powi((state % 23) as i32 - 40)
            });
            let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
            let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
            let expected = (four[0] + four[2]) + (four[1] + four[3]);
            for k in Kernels::available() {
                let (sum, max) = k.lanes(Folds { lanes: &lanes });
                assert_eq!(sum.to_bits(), expected.to_bits(), "{}", k.name());
                assert_eq!(max, lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{}", k.name());
            }
            // And where some lane is NaN, the same lane is the largest on all.
            if let Some(lane) = lanes.get_mut(nan) {
                *lane = f32::NAN;
                let found: Vec<u32> =
                    Kernels::available().map(|k| k.lanes(Folds { lanes: &lanes }).1.to_bits()).collect();
                assert!(found.iter().all(|&bits| bits == found[0]), "{found:?}");
            }
        }
    }
}

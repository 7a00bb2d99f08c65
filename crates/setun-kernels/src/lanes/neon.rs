//! Sixteen lanes in the registers of 64-bit ARM.
//!
//! SAFETY of every block below, unless said otherwise: pointers come from references to arrays of exactly
//! the bytes read or written, and none of the instructions asks for alignment. The instructions themselves
//! belong to the architecture, conversions of half floats included; a new process rounds to nearest and
//! keeps subnormal numbers.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::{Arithmetic, Chunk, LANES, Lanes};
use core::arch::aarch64::*;
use half::{bf16, f16};

/// Four 128-bit registers.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

type V = [float32x4_t; 4];

#[inline(always)]
fn zip(a: V, b: V, op: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> V {
    [op(a[0], b[0]), op(a[1], b[1]), op(a[2], b[2]), op(a[3], b[3])]
}

impl Arithmetic for Neon {
    type V = V;
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vdivq_f32(a, b) })
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        unsafe {
            [
                vfmaq_f32(c[0], a[0], b[0]),
                vfmaq_f32(c[1], a[1], b[1]),
                vfmaq_f32(c[2], a[2], b[2]),
                vfmaq_f32(c[3], a[3], b[3]),
            ]
        }
    }
    // The instructions `fmax` and `fmin` treat NaNs and signed zeros otherwise: compared, then selected.
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }
    #[inline(always)]
    fn shift_to_exponent(self, v: V) -> V {
        v.map(|v| unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(v))) })
    }
}

/// Lanes `4i` to `4i + 3` of a load of trits.
#[inline(always)]
fn trits(codes: uint32x4_t, i: usize) -> float32x4_t {
    // A negative shift goes right.
    let shifts: [i32; 4] = [0, -2, -4, -6].map(|s| s - 8 * i as i32);
    unsafe {
        let codes = vandq_u32(vshlq_u32(codes, vld1q_s32(shifts.as_ptr())), vdupq_n_u32(3));
        vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(codes), vdupq_n_s32(1)))
    }
}

/// The fold's first two steps: sixteen lanes to four.
#[inline(always)]
fn fold_to_four(v: V) -> float32x4_t {
    unsafe { vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3])) }
}

impl Lanes for Neon {
    const WIDE: bool = false;
    #[inline(always)]
    fn load(self, p: &Chunk) -> V {
        let at = |i: usize| unsafe { vld1q_f32(p[4 * i..].as_ptr()) };
        [at(0), at(1), at(2), at(3)]
    }
    #[inline(always)]
    fn store(self, v: V, p: &mut Chunk) {
        for (four, v) in p.as_chunks_mut::<4>().0.iter_mut().zip(v) {
            unsafe { vst1q_f32(four.as_mut_ptr(), v) };
        }
    }
    #[inline(always)]
    fn load_f16(self, p: &[f16; LANES]) -> V {
        let at =
            |i: usize| unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p[4 * i..].as_ptr().cast()))) };
        [at(0), at(1), at(2), at(3)]
    }
    #[inline(always)]
    fn load_bf16(self, p: &[bf16; LANES]) -> V {
        let at = |i: usize| unsafe {
            let half = vld1_u16(p[4 * i..].as_ptr().cast());
            vreinterpretq_f32_u32(vshll_n_u16::<16>(half))
        };
        [at(0), at(1), at(2), at(3)]
    }
    #[inline(always)]
    fn load_i8(self, p: &[i8; LANES]) -> V {
        unsafe {
            let bytes = vld1q_s8(p.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            let wide = [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ];
            wide.map(|v| vcvtq_f32_s32(v))
        }
    }
    #[inline(always)]
    fn load_trits(self, codes: u32) -> V {
        let codes = unsafe { vdupq_n_u32(codes) };
        [trits(codes, 0), trits(codes, 1), trits(codes, 2), trits(codes, 3)]
    }
    #[inline(always)]
    fn widen(self, x: f16) -> f32 {
        unsafe { vgetq_lane_f32::<0>(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x.to_bits())))) }
    }
    #[inline(always)]
    fn store_f16(self, v: V, p: &mut [f16; LANES]) {
        for (half, v) in p.as_chunks_mut::<4>().0.iter_mut().zip(v) {
            unsafe { vst1_u16(half.as_mut_ptr().cast(), vreinterpret_u16_f16(vcvt_f16_f32(v))) };
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        crate::kernels::prefetch_near(p.cast());
    }
    #[inline(always)]
    fn fold(self, v: V) -> f32 {
        unsafe {
            let four = fold_to_four(v);
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }
}

//! What this machine can do at most: the denominators of every share that a benchmark prints.
//!
//! Memory is read with the widest loads; arithmetic runs on registers alone. Each figure is the best of
//! several passes and takes under a second.

use std::hint::black_box;
use std::time::Instant;

use crate::buffer::Buffer;
use crate::kernels::{Isa, Kernels, Products};
use crate::threads::Pool;

/// Well above any cache that a few threads have to themselves.
const READ_BYTES: usize = 384 << 20;
const READ_CHUNK: usize = 1 << 20;
const PASSES: usize = 5;

/// The shortest of several runs, in seconds.
fn best_seconds(mut f: impl FnMut()) -> f64 {
    let time = |_| {
        let started = Instant::now();
        f();
        started.elapsed().as_secs_f64()
    };
    (0..PASSES).map(time).fold(f64::INFINITY, f64::min)
}

/// Bytes per second that all threads of `pool` together read from memory: the best of small pieces and one
/// long run for each thread, with and without prefetching by hand, since which is fastest differs from
/// machine to machine, and from hour to hour on a shared one.
pub fn read_bandwidth(pool: &Pool) -> f64 {
    let mut buffer = Buffer::zeroed(READ_BYTES);
    // Every page is written once: untouched ones would all be the same page of zeros.
    pool.run_chunks_mut(&mut buffer, READ_CHUNK, |chunk, bytes| bytes.fill(chunk as u8));
    let isa = Kernels::best().isa;
    let run = (READ_BYTES / pool.threads()).next_multiple_of(READ_CHUNK);
    let pass = |piece: usize, ahead: usize| {
        let pieces: Vec<&[u8]> = buffer.chunks(piece).collect();
        best_seconds(|| {
            pool.run(pieces.len(), &|i| {
                match isa {
                    // SAFETY: a `Kernels` exists only when its instruction set was found.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => black_box(unsafe { fold_avx512(pieces[i], ahead) }),
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => black_box(unsafe { fold_avx2(pieces[i], ahead) }),
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon => black_box(fold_words(pieces[i], ahead)),
                    Isa::Scalar => black_box(fold_words(pieces[i], ahead)),
                };
            });
        })
    };
    let ways = [(READ_CHUNK, 0), (READ_CHUNK, 8 << 10), (run, 0), (run, 8 << 10)];
    READ_BYTES as f64
        / ways.map(|(piece, ahead)| pass(piece, ahead)).into_iter().fold(f64::INFINITY, f64::min)
}

/// Exclusive or of all words: the compiler makes it the widest loads there are. Fetches `ahead` bytes ahead,
/// unless that is 0.
#[inline(always)]
fn fold_words(bytes: &[u8], ahead: usize) -> u64 {
    let mut lanes = [0u64; 64];
    for block in bytes.as_chunks::<512>().0 {
        #[cfg(target_arch = "x86_64")]
        if ahead > 0 {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            for line in 0..8 {
                // SAFETY: prefetching never faults, wherever the address points.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(ahead + line * 64).cast()) };
            }
        }
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            *lane ^= u64::from_ne_bytes(*word);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ahead;
    lanes.iter().fold(0, |a, b| a ^ b)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fold_avx512(bytes: &[u8], ahead: usize) -> u64 {
    fold_words(bytes, ahead)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fold_avx2(bytes: &[u8], ahead: usize) -> u64 {
    fold_words(bytes, ahead)
}

/// Runs `work(rounds)` on every thread at once and returns rounds per second of all together.
fn rounds_per_second(pool: &Pool, work: &(dyn Fn(usize) + Sync)) -> f64 {
    const ROUNDS: usize = 1 << 14;
    let pieces = pool.threads() * 32;
    (pieces * ROUNDS) as f64 / best_seconds(|| pool.run(pieces, &|_| work(ROUNDS)))
}

/// Int8 multiply-adds per second of all threads of `pool` together, from registers.
///
/// `vpdpbusd` for AVX-512 and AVX-VNNI; `vpmaddubsw` with its 16-bit addition for AVX2, the cheapest that
/// multiplies (products of many tokens that look sums up in place of multiplying, on AVX2 and AVX-VNNI, may
/// exceed it, up to twofold); `smmla`, `sdot` or the 16-bit `smlal` for NEON; the 32-bit multiply-adds that
/// the compiler makes of plain code for `scalar`.
pub fn int8_peak(kernels: &'static Kernels, pool: &Pool) -> f64 {
    match kernels.products {
        #[cfg(target_arch = "x86_64")]
        Products::Avx512Vbmi | Products::Avx512 => {
            // SAFETY: a `Kernels` exists only when its instruction set was found.
            let work = |n| unsafe { x86::vnni(n) };
            rounds_per_second(pool, &work) * (x86::ACCUMULATORS * 64) as f64
        }
        #[cfg(target_arch = "x86_64")]
        Products::AvxVnni => {
            // SAFETY: as above.
            let work = |n| unsafe { x86::avx_vnni(n) };
            rounds_per_second(pool, &work) * (x86::ACCUMULATORS_AVX2 * 32) as f64
        }
        #[cfg(target_arch = "x86_64")]
        Products::Avx2 => {
            // SAFETY: as above.
            let work = |n| unsafe { x86::maddubs(n) };
            rounds_per_second(pool, &work) * (x86::ACCUMULATORS_AVX2 * 32) as f64
        }
        #[cfg(target_arch = "aarch64")]
        Products::NeonI8mm => {
            // SAFETY: as above.
            let work = |n| unsafe { arm::smmla(n) };
            rounds_per_second(pool, &work) * (arm::ACCUMULATORS * 32) as f64
        }
        #[cfg(target_arch = "aarch64")]
        Products::NeonDot => {
            // SAFETY: as above.
            let work = |n| unsafe { arm::sdot(n) };
            rounds_per_second(pool, &work) * (arm::ACCUMULATORS * 16) as f64
        }
        #[cfg(target_arch = "aarch64")]
        Products::Neon => {
            // SAFETY: as above.
            let work = |n| unsafe { arm::smlal(n) };
            rounds_per_second(pool, &work) * (arm::ACCUMULATORS * 8) as f64
        }
        Products::Scalar => rounds_per_second(pool, &scalar_int) * 16.0,
    }
}

/// Float operations (two for a multiply-add) per second of all threads of `pool` together.
pub fn float_peak(kernels: &'static Kernels, pool: &Pool) -> f64 {
    match kernels.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            // SAFETY: a `Kernels` exists only when its instruction set was found.
            let work = |n| unsafe { x86::fma_avx512(n) };
            rounds_per_second(pool, &work) * (x86::ACCUMULATORS * 32) as f64
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: as above.
            let work = |n| unsafe { x86::fma_avx2(n) };
            rounds_per_second(pool, &work) * (x86::ACCUMULATORS_AVX2 * 16) as f64
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => {
            // SAFETY: as above.
            let work = |n| unsafe { arm::fma(n) };
            rounds_per_second(pool, &work) * (arm::ACCUMULATORS * 8) as f64
        }
        Isa::Scalar => rounds_per_second(pool, &scalar_float) * 32.0,
    }
}

fn scalar_int(rounds: usize) {
    let (a, b) = (black_box([3i32; 16]), black_box([5i32; 16]));
    let mut acc = [0i32; 16];
    for _ in 0..rounds {
        for ((acc, a), b) in acc.iter_mut().zip(&a).zip(&b) {
            *acc = acc.wrapping_mul(*a).wrapping_add(*b);
        }
    }
    black_box(acc);
}

fn scalar_float(rounds: usize) {
    let (a, b) = (black_box([0.5f32; 16]), black_box([0.25f32; 16]));
    let mut acc = [0f32; 16];
    for _ in 0..rounds {
        for ((acc, a), b) in acc.iter_mut().zip(&a).zip(&b) {
            *acc = *acc * a + b;
        }
    }
    black_box(acc);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::*;
    use std::hint::black_box;

    /// Enough independent sums to hide the latency of two units, and no more than registers hold.
    pub(super) const ACCUMULATORS: usize = 24;
    pub(super) const ACCUMULATORS_AVX2: usize = 12;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn vnni(rounds: usize) {
        let (a, b) = black_box((_mm512_set1_epi8(1), _mm512_set1_epi8(2)));
        let mut acc = [_mm512_setzero_si512(); ACCUMULATORS];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avxvnni,avx2")]
    pub(super) fn avx_vnni(rounds: usize) {
        let (a, b) = black_box((_mm256_set1_epi8(1), _mm256_set1_epi8(2)));
        let mut acc = [_mm256_setzero_si256(); ACCUMULATORS_AVX2];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm256_dpbusd_avx_epi32(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn maddubs(rounds: usize) {
        let b = black_box(_mm256_set1_epi8(2));
        let mut acc = [_mm256_setzero_si256(); ACCUMULATORS_AVX2];
        for _ in 0..rounds {
            for acc in &mut acc {
                // The product depends on the sum, or it would be the same in every round.
                *acc = _mm256_add_epi16(*acc, _mm256_maddubs_epi16(*acc, b));
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma_avx512(rounds: usize) {
        let (a, b) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(0.25)));
        let mut acc = [_mm512_setzero_ps(); ACCUMULATORS];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma_avx2(rounds: usize) {
        let (a, b) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(0.25)));
        let mut acc = [_mm256_setzero_ps(); ACCUMULATORS_AVX2];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use core::arch::aarch64::*;
    use core::arch::asm;
    use std::hint::black_box;

    pub(super) const ACCUMULATORS: usize = 24;

    /// A loop of one instruction that adds a product of two registers to each of its sums.
    macro_rules! rounds {
        ($name:ident, $instruction:literal, $feature:literal) => {
            #[target_feature(enable = $feature)]
            pub(super) fn $name(rounds: usize) {
                let (a, b) = black_box((vdupq_n_s8(1), vdupq_n_s8(2)));
                let mut acc = [vdupq_n_s32(0); ACCUMULATORS];
                for _ in 0..rounds {
                    for acc in &mut acc {
                        // SAFETY: changes this register only; the function's feature has the instruction.
                        unsafe {
                            asm!($instruction, acc = inout(vreg) *acc, a = in(vreg) a, b = in(vreg) b,
                                options(pure, nomem, nostack, preserves_flags));
                        }
                    }
                }
                black_box(acc);
            }
        };
    }
    rounds!(smmla, "smmla {acc:v}.4s, {a:v}.16b, {b:v}.16b", "neon,i8mm");
    rounds!(sdot, "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b", "dotprod");
    rounds!(smlal, "smlal {acc:v}.8h, {a:v}.8b, {b:v}.8b", "neon");

    #[target_feature(enable = "neon")]
    pub(super) fn fma(rounds: usize) {
        let (a, b) = black_box((vdupq_n_f32(0.5), vdupq_n_f32(0.25)));
        let mut acc = [vdupq_n_f32(0.0); ACCUMULATORS];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = vfmaq_f32(b, *acc, a);
            }
        }
        black_box(acc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_a_finite_positive_peak() {
        let pool = Pool::new(2);
        for k in Kernels::available() {
            for peak in [int8_peak(k, &pool), float_peak(k, &pool)] {
                assert!(peak.is_finite() && peak > 1e6, "{}: {peak}", k.name());
            }
        }
    }

    #[test]
    fn folding_words_sees_every_byte() {
        let mut bytes = vec![0u8; 2048];
        bytes[1999] = 9;
        for ahead in [0, 4096] {
            assert_eq!(fold_words(&bytes, ahead), u64::from_ne_bytes([0, 0, 0, 0, 0, 0, 0, 9]));
        }
    }
}

//! Exact integer products of pairs: 16-bit factors broadcast to all lanes, times codes of 16, 8 or 4 bits.
//!
//! One instruction multiplies and adds a pair per 32-bit lane, so codes lie in pairs; tiles of sums stay in registers.

// Tiles are written by index: rows, columns and lanes then look the same on both sides of an assignment.
#![allow(clippy::needless_range_loop)]

use super::LANES;

/// Bytes ahead of a stream of narrow codes, which come from memory, that are asked for into the first- and second-level cache.
#[cfg(target_arch = "x86_64")]
const AHEAD: [usize; 2] = [2 << 10, 16 << 10];

/// Codes of `BITS` bits, sixteen pairs to a chunk, checked to hold all that a product reads.
pub(super) struct Codes<'a, const BITS: usize> {
    bytes: &'a [u8],
    stride: usize,
    len: usize,
}

impl<'a, const BITS: usize> Codes<'a, BITS> {
    /// Bytes of a chunk.
    const CHUNK: usize = 2 * LANES * BITS / 8;

    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], stride: usize, len: usize, columns: usize) -> Self {
        const { assert!(BITS == 16 || BITS == 8 || BITS == 4) };
        assert!(len == 0 || bytes.len() >= ((len - 1) * stride + columns) * Self::CHUNK, "codes: too short");
        Self { bytes, stride, len }
    }
}

/// One chunk as pairs of 16 bits.
#[inline(always)]
pub(super) fn widen<const BITS: usize>(chunk: &[u8]) -> [[i16; 2]; LANES] {
    std::array::from_fn(|lane| {
        std::array::from_fn(|i| {
            let at = 2 * lane + i;
            match BITS {
                16 => i16::from_ne_bytes([chunk[2 * at], chunk[2 * at + 1]]),
                8 => i16::from(chunk[at].cast_signed()),
                _ => i16::from(chunk[lane] >> (4 * i) & 0xF) - 8,
            }
        })
    })
}

#[inline(always)]
pub(super) fn dot<const BITS: usize, const R: usize, const C: usize>(
    a: [&[[i16; 2]]; R],
    b: Codes<BITS>,
) -> [[[i32; LANES]; C]; R] {
    assert!(a.iter().all(|a| a.len() == b.len), "dot_pairs: rows differ");
    let mut sums = [[[0i32; LANES]; C]; R];
    for k in 0..b.len {
        for c in 0..C {
            let codes = widen::<BITS>(&b.bytes[(k * b.stride + c) * Codes::<BITS>::CHUNK..]);
            for r in 0..R {
                let [x, y] = a[r][k].map(i32::from);
                for (sum, code) in sums[r][c].iter_mut().zip(&codes) {
                    *sum += x * i32::from(code[0]) + y * i32::from(code[1]);
                }
            }
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{dot_avx2, dot_avx512, widen_avx2, widen_avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{AHEAD, Codes, LANES};
    use std::arch::x86_64::*;

    /// # Safety
    /// A chunk of codes lies at `p`, and the CPU has AVX-512 F and BW.
    #[inline(always)]
    unsafe fn wide<const BITS: usize>(p: *const u8) -> __m512i {
        // SAFETY: the caller's promise; no alignment is asked for.
        unsafe {
            match BITS {
                16 => _mm512_loadu_si512(p.cast()),
                8 => _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())),
                _ => {
                    let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
                    let both = _mm512_or_si512(bytes, _mm512_slli_epi32::<12>(bytes));
                    let codes = _mm512_and_si512(both, _mm512_set1_epi16(0xF));
                    _mm512_sub_epi16(codes, _mm512_set1_epi16(8))
                }
            }
        }
    }

    /// Half a chunk: eight pairs.
    ///
    /// # Safety
    /// Half a chunk of codes lies at `p`, and the CPU has AVX2.
    #[inline(always)]
    unsafe fn half<const BITS: usize>(p: *const u8) -> __m256i {
        // SAFETY: as above.
        unsafe {
            match BITS {
                16 => _mm256_loadu_si256(p.cast()),
                8 => _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())),
                _ => {
                    let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
                    let both = _mm256_or_si256(bytes, _mm256_slli_epi32::<12>(bytes));
                    let codes = _mm256_and_si256(both, _mm256_set1_epi16(0xF));
                    _mm256_sub_epi16(codes, _mm256_set1_epi16(8))
                }
            }
        }
    }

    /// # Safety
    /// The CPU has AVX-512 F and BW.
    #[inline(always)]
    pub(in super::super) unsafe fn widen_avx512<const BITS: usize>(from: &[u8], to: &mut [[i16; 2]; LANES]) {
        assert!(from.len() >= Codes::<BITS>::CHUNK, "codes: too short");
        // SAFETY: a chunk is there, and 64 bytes to write.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), wide::<BITS>(from.as_ptr())) }
    }

    /// # Safety
    /// The CPU has AVX2.
    #[inline(always)]
    pub(in super::super) unsafe fn widen_avx2<const BITS: usize>(from: &[u8], to: &mut [[i16; 2]; LANES]) {
        assert!(from.len() >= Codes::<BITS>::CHUNK, "codes: too short");
        let second = from[Codes::<BITS>::CHUNK / 2..].as_ptr();
        // SAFETY: two halves of a chunk are there, and twice 32 bytes to write.
        unsafe {
            _mm256_storeu_si256(to.as_mut_ptr().cast(), half::<BITS>(from.as_ptr()));
            _mm256_storeu_si256(to[LANES / 2..].as_mut_ptr().cast(), half::<BITS>(second));
        }
    }

    /// # Safety
    /// The CPU has AVX-512 F, BW and VNNI.
    #[inline(always)]
    pub(in super::super) unsafe fn dot_avx512<const BITS: usize, const R: usize, const C: usize>(
        a: [&[[i16; 2]]; R],
        b: Codes<BITS>,
    ) -> [[[i32; LANES]; C]; R] {
        assert!(a.iter().all(|a| a.len() == b.len), "dot_pairs: rows differ");
        let mut out = [[[0i32; LANES]; C]; R];
        // SAFETY: rows of `a` have `b.len` pairs, `Codes` was checked for all chunks read; a prefetch may be of any address.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); C]; R];
            for k in 0..b.len {
                let row = b.bytes.as_ptr().add(k * b.stride * Codes::<BITS>::CHUNK);
                let mut codes = [_mm512_setzero_si512(); C];
                for c in 0..C {
                    let at = row.add(c * Codes::<BITS>::CHUNK);
                    if BITS < 16 && (c * Codes::<BITS>::CHUNK).is_multiple_of(64) {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD[0]).cast());
                        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD[1]).cast());
                    }
                    codes[c] = wide::<BITS>(at);
                }
                for r in 0..R {
                    let x = _mm512_set1_epi32(a[r].as_ptr().add(k).cast::<i32>().read_unaligned());
                    for c in 0..C {
                        sums[r][c] = _mm512_dpwssd_epi32(sums[r][c], x, codes[c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    _mm512_storeu_si512(out[r][c].as_mut_ptr().cast(), sums[r][c]);
                }
            }
        }
        out
    }

    /// # Safety
    /// The CPU has AVX2.
    #[inline(always)]
    pub(in super::super) unsafe fn dot_avx2<const BITS: usize, const R: usize, const C: usize>(
        a: [&[[i16; 2]]; R],
        b: Codes<BITS>,
    ) -> [[[i32; LANES]; C]; R] {
        assert!(a.iter().all(|a| a.len() == b.len), "dot_pairs: rows differ");
        let mut out = [[[0i32; LANES]; C]; R];
        // SAFETY: as in `dot_avx512`.
        unsafe {
            let mut sums = [[[_mm256_setzero_si256(); 2]; C]; R];
            for k in 0..b.len {
                let row = b.bytes.as_ptr().add(k * b.stride * Codes::<BITS>::CHUNK);
                let mut codes = [[_mm256_setzero_si256(); 2]; C];
                for c in 0..C {
                    let at = row.add(c * Codes::<BITS>::CHUNK);
                    if BITS < 16 {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD[0]).cast());
                        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD[1]).cast());
                    }
                    codes[c] = [half::<BITS>(at), half::<BITS>(at.add(Codes::<BITS>::CHUNK / 2))];
                }
                for r in 0..R {
                    let x = _mm256_set1_epi32(a[r].as_ptr().add(k).cast::<i32>().read_unaligned());
                    for c in 0..C {
                        for h in 0..2 {
                            sums[r][c][h] =
                                _mm256_add_epi32(sums[r][c][h], _mm256_madd_epi16(x, codes[c][h]));
                        }
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    for h in 0..2 {
                        _mm256_storeu_si256(out[r][c][8 * h..].as_mut_ptr().cast(), sums[r][c][h]);
                    }
                }
            }
        }
        out
    }
}

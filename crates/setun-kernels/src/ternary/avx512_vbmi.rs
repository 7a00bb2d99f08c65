//! AVX-512 with VNNI and byte permutations (VBMI): five weights to a byte, 1.6 bits each.
//!
//! A byte holds `i = t0 + 3 t1 + 9 t2 + 27 t3` and `t4`. Where `i < 64` it is `t4 << 6 | i`, so that `t4`
//! stands where a field of two bits is wanted and a 64-byte table turns the rest into four such fields.
//! The 51 other cases are bytes from `0xc0` on, which two masked permutations put right.

use core::arch::x86_64::*;

use super::avx512::{self, Trits, UNIT, direct_blocks_body, direct_body, unpack_body};
use super::columns::Span;
use super::pack_tiles::{ESCAPE, fields_of_five};
use super::{BlockScales, MAX_ROWS, MAX_TOKENS, Sums, TILE_COLS_5, TileKernels};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: MAX_ROWS,
    tile_cols: TILE_COLS_5,
    unit: UNIT,
    direct,
    direct_tokens: 6,
    direct_limit: 8,
    unpack,
    unpacked: avx512::unpacked,
    unpacked_tokens: 6,
    direct_blocks: Some(direct_blocks),
    unpacked_blocks: Some(avx512::unpacked_blocks),
    fold: avx512::fold,
    finish: avx512::finish,
};

/// What permutations look the low six bits of a byte up in: its fields 0 to 3 below the escape, those from
/// the escape on, and field 4 from the escape on.
struct Tables([u8; 64], [u8; 64], [u8; 64]);

static TABLES: Tables = {
    let mut tables = Tables([0; 64], [0; 64], [0; 64]);
    let mut i = 0;
    while i < 64 {
        tables.0[i] = fields_of_five(i as u8).0;
        let (low, high) = fields_of_five(ESCAPE + i as u8);
        (tables.1[i], tables.2[i]) = (low, high << 6);
        i += 1;
    }
    tables
};

#[derive(Clone, Copy)]
struct FiveTrits {
    plain: __m512i,
    escaped: __m512i,
    top: __m512i,
}

impl FiveTrits {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        // SAFETY: 64 bytes each.
        let load = |table: &[u8; 64]| unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
        Self { plain: load(&TABLES.0), escaped: load(&TABLES.1), top: load(&TABLES.2) }
    }
}

/// Bytes from the escape on.
#[inline(always)]
unsafe fn is_escaped(x: __m512i) -> __mmask64 {
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_cmpge_epu8_mask(x, _mm512_set1_epi8(ESCAPE as i8)) }
}

impl Trits<5> for FiveTrits {
    #[inline(always)]
    unsafe fn low(self, x: __m512i) -> __m512i {
        // SAFETY: the caller has VBMI.
        unsafe {
            let plain = _mm512_permutexvar_epi8(x, self.plain);
            _mm512_mask_permutexvar_epi8(plain, is_escaped(x), x, self.escaped)
        }
    }

    #[inline(always)]
    unsafe fn high(self, x: __m512i) -> __m512i {
        // SAFETY: the caller has VBMI.
        unsafe { _mm512_mask_permutexvar_epi8(x, is_escaped(x), x, self.top) }
    }
}

/// # Safety
/// As [`TileKernels::direct`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe { direct_body(FiveTrits::new(), weights, tiles, acts, sums) }
}

/// # Safety
/// As [`TileKernels::direct_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn direct_blocks(
    weights: (*const u8, &[Span]),
    acts: &[*const i8],
    block_sums: &[&[i32]],
    scales: BlockScales,
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    // SAFETY: the caller's promise.
    unsafe { direct_blocks_body(FiveTrits::new(), weights, acts, block_sums, scales, y) }
}

/// # Safety
/// As [`TileKernels::unpack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { unpack_body(FiveTrits::new(), packed, tiles, out) }
}

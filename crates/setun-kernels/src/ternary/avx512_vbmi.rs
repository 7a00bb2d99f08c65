//! AVX-512 with VNNI and byte permutations (VBMI): five weights to a byte, 1.6 bits each.
//!
//! A byte holds `i = t0 + 3 t1 + 9 t2 + 27 t3` and `t4`. Where `i < 64` it is `t4 << 6 | i`, so that `t4`
//! stands where a field of two bits is wanted and a 64-byte table turns the rest into four such fields.
//! The 51 other cases are bytes from `0xc0` on, which two masked permutations put right.

use core::arch::x86_64::*;

use super::avx512::{self, Trits, UNIT, direct_blocks_body, direct_body, unpack_body};
use super::pack_tiles::{ESCAPE, fields_of_five};
use super::{Blocks, MAX_ROWS, MAX_TOKENS, Sums, TILE_COLS_5, TileKernels};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: MAX_ROWS,
    tile_cols: TILE_COLS_5,
    unit: UNIT,
    pack_row: Some(pack_row),
    direct,
    direct_tokens: 12,
    direct_limit: 64,
    block_limit: 32,
    unpack,
    unpacked: avx512::unpacked,
    unpacked_tokens: 6,
    direct_blocks: Some(direct_blocks),
    unpacked_blocks: Some(avx512::unpacked_blocks),
    fold: avx512::fold,
    scale: avx512::scale,
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
    blocks: &Blocks,
    acts: &[*const i8],
    block_sums: &[&[i32]],
    y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
) {
    // SAFETY: the caller's promise.
    unsafe { direct_blocks_body(FiveTrits::new(), blocks, acts, block_sums, y) }
}

/// # Safety
/// As [`TileKernels::unpack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn unpack(packed: *const u8, tiles: usize, out: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { unpack_body(FiveTrits::new(), packed, tiles, out) }
}

/// Tiles of which `pack_row` takes the codes of a row at once, 80 bytes of them.
const TILES_AT_ONCE: usize = 16;

/// # Safety
/// As [`TileKernels::pack_row`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn pack_row(codes: &[u8], lanes: &mut [[u8; 4]]) -> usize {
    // Bytes of a lane: of tile `i`, bytes 5 i to 5 i + 3, and four times byte 5 i + 4. The last tiles are taken
    // from 16 bytes further on.
    let index = |extra: [usize; 4], split: usize| {
        let byte = |i: usize| i / 4 * 5 + extra[i % 4] - if i / 4 >= split { 16 } else { 0 };
        let bytes: [u8; 64] = core::array::from_fn(|i| byte(i) as u8);
        // SAFETY: 64 bytes.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    };
    let (first4, fifth) = (index([0, 1, 2, 3], 13), index([4; 4], 12));
    // Field `b` of byte `b` of a lane down to its lowest bits.
    let down = _mm512_set1_epi64(0x3e34_2a20_1e14_0a00);
    let pairs = |table: [u8; 16]| {
        // SAFETY: 16 bytes.
        _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
    };
    let low_pair = pairs([0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 0, 0, 0, 0]);
    let high_pair = pairs([0, 9, 18, 0, 27, 36, 45, 0, 54, 63, 72, 0, 0, 0, 0, 0]);
    let (nibble, three) = (_mm512_set1_epi8(15), _mm512_set1_epi8(3));
    let blocks = codes.len() / (TILES_AT_ONCE * 5);
    for block in 0..blocks {
        let mut words = [[0u8; 4]; TILES_AT_ONCE];
        // SAFETY: 80 bytes of codes, and 64 of words.
        unsafe {
            let from = codes.as_ptr().add(block * TILES_AT_ONCE * 5);
            let (x, y) = (_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(16).cast()));
            let take =
                |index, last| _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(index, x), last, index, y);
            let p = take(first4, !0 << 52);
            let t4 = _mm512_and_si512(_mm512_multishift_epi64_epi8(down, take(fifth, !0 << 48)), three);
            // The transposition of `pack_tiles`.
            let t = _mm512_xor_si512(p, _mm512_srli_epi32::<6>(p));
            let t = _mm512_and_si512(t, _mm512_set1_epi32(0x00cc_00cc));
            let p = _mm512_xor_si512(p, _mm512_xor_si512(t, _mm512_slli_epi32::<6>(t)));
            let t = _mm512_xor_si512(p, _mm512_srli_epi32::<12>(p));
            let t = _mm512_and_si512(t, _mm512_set1_epi32(0x0000_f0f0));
            let p = _mm512_xor_si512(p, _mm512_xor_si512(t, _mm512_slli_epi32::<12>(t)));
            let high = _mm512_and_si512(_mm512_srli_epi32::<4>(p), nibble);
            let i = _mm512_add_epi8(
                _mm512_shuffle_epi8(low_pair, _mm512_and_si512(p, nibble)),
                _mm512_shuffle_epi8(high_pair, high),
            );
            let plain = _mm512_or_si512(i, _mm512_slli_epi32::<6>(t4));
            // 0xc0 + 3 (i - 64) + t4
            let escaped = _mm512_add_epi8(_mm512_add_epi8(i, i), _mm512_add_epi8(i, t4));
            let bytes =
                _mm512_mask_blend_epi8(_mm512_cmpge_epu8_mask(i, _mm512_set1_epi8(64)), plain, escaped);
            _mm512_storeu_si512(words.as_mut_ptr().cast(), bytes);
        }
        let tiles = lanes[block * TILES_AT_ONCE * MAX_ROWS..].iter_mut().step_by(MAX_ROWS);
        tiles.zip(words).for_each(|(lane, word)| *lane = word);
    }
    blocks * TILES_AT_ONCE
}

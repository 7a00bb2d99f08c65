//! Blocks of 256 weights in sub-blocks of 16 or 32 with small integer scales: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K.
//!
//! A weight is `d · s · q`, less `dmin · m` in the types with minima (Q2_K, Q4_K, Q5_K); `s` and `m` are the
//! sub-block's. Products of the f16 `d` with a scale are exact in f32, so a weight is rounded once per operation.

use super::f16_at;

/// Scales in the low halves of 16 bytes, minima in the high ones; 64 bytes of two-bit numbers; f16 d, f16 dmin.
///
/// Weight `128h + 32k + l` is at bits `2k` of byte `32h + l`.
pub(super) fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, stored) = (&block[..16], &block[16..80]);
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (scale, least) = (d * f32::from(scales[sub] & 15), dmin * f32::from(scales[sub] >> 4));
        let (bytes, shift) = two_bits(stored, sub);
        for (out, byte) in out.iter_mut().zip(bytes) {
            *out = scale * f32::from(byte >> shift & 3) - least;
        }
    }
}

/// 32 bytes of third bits, 64 bytes of two-bit numbers as in Q2_K, 12 bytes of scales, f16 d: `d · (s − 32) · q`.
///
/// The third bit of weight `128h + 32k + l` is bit `4h + k` of byte `l`; where it is 0, 4 is subtracted.
pub(super) fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (third, stored, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = f16_at(block, 108);
    for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = packed[sub % 8] >> (sub / 8 * 4) & 15;
        let high = packed[8 + sub % 4] >> (sub / 4 * 2) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        let (bytes, shift) = two_bits(stored, sub);
        for (l, (out, byte)) in out.iter_mut().zip(bytes).enumerate() {
            let lacking = third[sub % 2 * 16 + l] >> (sub / 2) & 1 == 0;
            *out = scale * (f32::from(byte >> shift & 3) - if lacking { 4.0 } else { 0.0 });
        }
    }
}

/// The 16 bytes and the shift at which the two-bit numbers of sub-block `sub` lie.
fn two_bits(stored: &[u8], sub: usize) -> (&[u8], usize) {
    (&stored[sub / 8 * 32 + sub % 2 * 16..][..16], sub % 8 / 2 * 2)
}

/// Scale and minimum of sub-block `j` of eight: six bits each in 12 bytes.
fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (packed[j] & 63, packed[j + 4] & 63);
    }
    let low = packed[j + 4];
    (low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4)
}

/// f16 d, f16 dmin, 12 bytes of scales and minima, 128 bytes of nibbles.
///
/// Nibbles of bytes `32g …` are weights `64g …` in their low halves and `64g + 32 …` in their high ones.
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    q45_k(block, &block[4..16], None, &block[16..], out);
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit `j` of byte `l` belongs to weight `l` of sub-block `j`.
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    q45_k(block, &block[4..16], Some(&block[16..48]), &block[48..], out);
}

fn q45_k(block: &[u8], packed: &[u8], fifth: Option<&[u8]>, nibbles: &[u8], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, least) = scale_and_min(packed, j);
        let (scale, least) = (d * f32::from(scale), dmin * f32::from(least));
        for (l, (out, byte)) in out.iter_mut().zip(&nibbles[j / 2 * 32..]).enumerate() {
            let bit = fifth.map_or(0, |fifth| (fifth[l] >> j & 1) << 4);
            *out = scale * f32::from(byte >> (j % 2 * 4) & 15 | bit) - least;
        }
    }
}

/// 128 bytes of low halves, 64 bytes of upper two bits, 16 signed scales, f16 d: `d · s · (q − 32)`.
///
/// In half `h`, weight `32k + l` has its low four bits in byte `64h + 32·(k mod 2) + l`, low half for k < 2, and its
/// upper two at bits `2k` of byte `32h + l`.
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, upper, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = f16_at(block, 208);
    for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, k, first) = (sub / 8, sub % 8 / 2, sub % 2 * 16);
        let low = &low[64 * half + 32 * (k % 2) + first..];
        let upper = &upper[32 * half + first..];
        let scale = d * f32::from(scales[sub] as i8);
        for (out, (low, upper)) in out.iter_mut().zip(low.iter().zip(upper)) {
            let q = low >> (k / 2 * 4) & 15 | (upper >> (2 * k) & 3) << 4;
            *out = scale * (f32::from(q) - 32.0);
        }
    }
}

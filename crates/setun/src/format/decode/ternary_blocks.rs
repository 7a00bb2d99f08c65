//! Ternary types whose weights share a scale by block or by row: TQ1_0, TQ2_0, Q2_0, PQ2_0, PTQ1_0, IQ1_BN, IQ2_BN
//! and the binary Q1_0; and the codes of I2_S, which has one scale for all.
//!
//! Every type is turned into canonical bytes, four codes `weight + 1` each, lowest bits first. Types of two bits
//! differ only in which four weights share a byte; in all but the row-interleaved one, four consecutive weights lie
//! at one shift in four consecutive bytes, or already in one.

use super::{f16_at, gather};
use crate::format::Encoding;

/// The weights that share a scale, and how a type lays them out. Their number is a multiple of 4.
pub(super) struct Unit {
    /// How many weights they are.
    pub(super) weights: usize,
    /// The bytes they take, their scale included.
    pub(super) bytes: usize,
    /// What they are, for messages.
    pub(super) name: &'static str,
    scale: Scale,
    codes: Codes,
}

/// Writes the canonical codes of a unit, scale left out.
type Codes = fn(&[u8], &mut [u8]);

/// Where in a unit its scale is.
enum Scale {
    FirstF16,
    FirstF32,
    LastF16,
}

impl Unit {
    /// The units of a type in rows of `cols` weights; `None` if it is no type of this kind.
    pub(super) fn of(encoding: &Encoding, cols: usize) -> Option<Self> {
        let (scale, codes): (Scale, Codes) = match encoding {
            Encoding::Q1_0 => (Scale::FirstF16, signs),
            Encoding::Q2_0G64 | Encoding::Q2_0G128 | Encoding::PQ2_0 => (Scale::FirstF16, canonical),
            Encoding::PTQ1_0 => (Scale::LastF16, ptq1_0),
            Encoding::TQ1_0 => (Scale::LastF16, tq1_0),
            Encoding::TQ2_0 => (Scale::LastF16, tq2_0),
            Encoding::IQ1BN => (Scale::FirstF16, iq1_bn),
            Encoding::IQ2BN => (Scale::FirstF32, iq2_bn),
            _ => return None,
        };
        let (name, weights, bytes) = match encoding.block() {
            Some((weights, bytes)) => ("block", weights, bytes),
            None => ("row", cols, encoding.byte_len(&[1, cols])?),
        };
        Some(Self { weights, bytes, name, scale, codes })
    }

    /// Writes the canonical codes of one unit and returns its scale.
    pub(super) fn read(&self, unit: &[u8], out: &mut [u8]) -> f32 {
        let (codes, scale) = match self.scale {
            Scale::FirstF16 => (&unit[2..], f16_at(unit, 0)),
            Scale::FirstF32 => (&unit[4..], f32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]])),
            Scale::LastF16 => (&unit[..unit.len() - 2], f16_at(unit, unit.len() - 2)),
        };
        (self.codes)(codes, out);
        scale
    }
}

/// Canonical bytes of four times as many weights as there are bytes, whose quarter `q` sits at bit `shifts[q]`.
fn quarters(stored: &[u8], shifts: [usize; 4], out: &mut [u8]) {
    for (shift, out) in shifts.into_iter().zip(out.chunks_exact_mut((stored.len() / 4).max(1))) {
        for (&four, out) in stored.as_chunks::<4>().0.iter().zip(out) {
            *out = gather(four, shift);
        }
    }
}

/// [`quarters`] of one group of bytes after another.
fn grouped<const BYTES: usize>(stored: &[u8], shifts: [usize; 4], out: &mut [u8]) {
    for (stored, out) in stored.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BYTES>().0) {
        quarters(stored, shifts, out);
    }
}

/// Q2_0, PQ2_0: four consecutive weights in a byte.
fn canonical(stored: &[u8], out: &mut [u8]) {
    out.copy_from_slice(stored);
}

/// TQ2_0: weight 128g + 32n + m at bits 2n of byte 32g + m.
fn tq2_0(stored: &[u8], out: &mut [u8]) {
    grouped::<32>(stored, [0, 2, 4, 6], out);
}

/// IQ2_BN: weight 64b + 16n + m at bits 2n of byte 16b + m.
fn iq2_bn(stored: &[u8], out: &mut [u8]) {
    grouped::<16>(stored, [0, 2, 4, 6], out);
}

/// I2_S as published: weight 128b + 32n + m at bits 6 − 2n of byte 32b + m.
pub(super) fn i2_s(stored: &[u8], out: &mut [u8]) {
    grouped::<32>(stored, [6, 4, 2, 0], out);
}

/// I2_S of later ARM builds: weight 64b + 16n + m at bits 6 − 2n of byte 16b + m.
pub(super) fn i2_s_neon(stored: &[u8], out: &mut [u8]) {
    grouped::<16>(stored, [6, 4, 2, 0], out);
}

/// I2_S with rows interleaved: row 4g + n, column c at bits 6 − 2n of byte g · cols + c.
pub(super) fn i2_s_rows4(stored: &[u8], cols: usize, out: &mut [u8]) {
    let row_bytes = cols.div_ceil(4).max(1);
    let groups = stored.chunks_exact(cols.max(1)).zip(out.chunks_exact_mut(4 * row_bytes));
    for (stored, out) in groups {
        for (n, out) in out.chunks_exact_mut(row_bytes).enumerate() {
            super::gather_row(stored, 6 - 2 * n, out);
        }
    }
}

/// Q1_0: weight 8m + i is bit i of byte m, 0 for −1 and 1 for +1.
fn signs(stored: &[u8], out: &mut [u8]) {
    let codes = |bits: u8| (0..4).fold(0, |byte, i| byte | (bits >> i & 1) << (2 * i + 1));
    for (&byte, out) in stored.iter().zip(out.as_chunks_mut::<2>().0) {
        *out = [codes(byte), codes(byte >> 4)];
    }
}

/// A stretch of bytes of base-3 digits, most significant first: digit n of byte m is weight `first + bytes · n + m`.
struct Digits {
    bytes: usize,
    digits: usize,
    first: usize,
}

/// Canonical bytes of base-3 bytes. Each is a fixed-point fraction of 1 whose digits are the codes.
fn base3<const WEIGHTS: usize>(stored: &[u8], stretches: [Digits; 3], out: &mut [u8]) {
    let mut codes = [0u8; WEIGHTS];
    let mut rest = stored;
    for Digits { bytes, digits, first } in stretches {
        let (stretch, after) = rest.split_at(bytes);
        for (m, &byte) in stretch.iter().enumerate() {
            let mut fraction = byte;
            for n in 0..digits {
                codes[first + bytes * n + m] = ((u16::from(fraction) * 3) >> 8) as u8;
                fraction = fraction.wrapping_mul(3);
            }
        }
        rest = after;
    }
    pack(&codes, out);
}

/// Four codes to a canonical byte.
fn pack(codes: &[u8], out: &mut [u8]) {
    for (four, out) in codes.as_chunks::<4>().0.iter().zip(out) {
        *out = four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6;
    }
}

fn tq1_0(stored: &[u8], out: &mut [u8]) {
    let stretches = [
        Digits { bytes: 32, digits: 5, first: 0 },
        Digits { bytes: 16, digits: 5, first: 160 },
        Digits { bytes: 4, digits: 4, first: 240 },
    ];
    base3::<256>(stored, stretches, out);
}

fn ptq1_0(stored: &[u8], out: &mut [u8]) {
    let stretches = [
        Digits { bytes: 16, digits: 5, first: 0 },
        Digits { bytes: 8, digits: 5, first: 80 },
        Digits { bytes: 2, digits: 4, first: 120 },
    ];
    base3::<128>(stored, stretches, out);
}

/// IQ1_BN: 13 bytes hold 64 weights, in four groups of 16: three bytes of five base-3 digits, least significant first;
/// the sixteenth weight of group g is digit g of the last byte.
fn iq1_bn(stored: &[u8], out: &mut [u8]) {
    let digit = |byte: u8, n: usize| ((u16::from(byte.wrapping_mul([81, 27, 9, 3, 1][n])) * 3) >> 8) as u8;
    for (stored, out) in stored.as_chunks::<13>().0.iter().zip(out.as_chunks_mut::<16>().0) {
        let mut codes = [0u8; 64];
        for (group, codes) in codes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            for (l, code) in codes.iter_mut().enumerate() {
                *code = match l {
                    15 => digit(stored[12], group),
                    _ => digit(stored[3 * group + l / 5], l % 5),
                };
            }
        }
        pack(&codes, out);
    }
}

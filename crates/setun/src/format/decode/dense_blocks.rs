//! Blocks of 32 weights with a scale of their own: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL and MXFP4.
//!
//! Nibble `l` of 16 bytes is weight `l` in its low half and weight `l + 16` in its high half. The `_0` types
//! are centred, `d · (q − middle)`; the `_1` types have a least value, `d · q + m`.

use super::f16_at;

/// Writes `weight(q)` for 32 four-bit numbers and the fifth bit of each (0 where the type has none).
fn nibbles(stored: &[u8], fifth: u32, out: &mut [f32; 32], weight: impl Fn(u8) -> f32) {
    let bit = |e: usize| ((fifth >> e & 1) as u8) << 4;
    for (l, &byte) in stored.iter().enumerate() {
        out[l] = weight(byte & 15 | bit(l));
        out[l + 16] = weight(byte >> 4 | bit(l + 16));
    }
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// f16 d, 16 bytes of nibbles: `d · (q − 8)`.
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    nibbles(&block[2..], 0, out, |q| d * (f32::from(q) - 8.0));
}

/// f16 d, f16 m, 16 bytes of nibbles: `d · q + m`.
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    nibbles(&block[4..], 0, out, |q| d * f32::from(q) + m);
}

/// f16 d, 32 fifth bits, 16 bytes of nibbles: `d · (q − 16)`.
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    nibbles(&block[6..], u32_at(block, 2), out, |q| d * (f32::from(q) - 16.0));
}

/// f16 d, f16 m, 32 fifth bits, 16 bytes of nibbles: `d · q + m`.
pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    nibbles(&block[8..], u32_at(block, 4), out, |q| d * f32::from(q) + m);
}

/// f16 d, 16 bytes of nibbles: `d · STEPS[q]`.
pub(super) fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    /// The type's steps: finer around 0, where weights are dense.
    const STEPS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
    let d = f16_at(block, 0);
    nibbles(&block[2..], 0, out, |q| d * f32::from(STEPS[usize::from(q)]));
}

/// A power of two as the exponent byte of an f32, 16 bytes of nibbles: sign, two bits of exponent, one of fraction.
pub(super) fn mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    /// Twice the magnitudes, so that they are whole; the power is halved for it, 2^(e − 128), which f32 always holds.
    const TWICE: [f32; 8] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];
    let d = match block[0] {
        e @ 0..2 => f32::from_bits(0x0020_0000 << e), // Subnormal.
        e => f32::from_bits(u32::from(e - 1) << 23),
    };
    nibbles(&block[1..], 0, out, |q| {
        d * if q < 8 { TWICE[usize::from(q)] } else { -TWICE[usize::from(q - 8)] }
    });
}

/// f16 d, 32 signed bytes: `d · q`.
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    out.iter_mut().zip(&block[2..]).for_each(|(out, &q)| *out = d * f32::from(q as i8));
}

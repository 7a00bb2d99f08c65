//! Rounding blocks of floats to few bits: Q8_0, Q4_0 and Q6_K. The layouts are described in `decode`.
//!
//! Every function takes finite numbers and gives `None` where the block's f16 scale would be infinite.

use half::f16;

/// The value of largest size, with its sign; the first of several.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m: f32, &v| if v.abs() > m.abs() { v } else { m })
}

/// `1 / d`, or 0 for 0.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn finite_f16(d: f32) -> Option<f16> {
    Some(f16::from_f32(d)).filter(|d| d.is_finite())
}

/// `d = max|x| / 127`; ties away from zero: what the type's reference quantiser does.
pub(super) fn q8_0(block: &[f32; 32]) -> Option<[u8; 34]> {
    let d = extreme(block).abs() / 127.0;
    let mut out = [0; 34];
    out[..2].copy_from_slice(&finite_f16(d)?.to_le_bytes());
    let inverse = inverse(d);
    // The casts here and below saturate, which matters only for subnormal blocks whose inverse overflows.
    out[2..].iter_mut().zip(block).for_each(|(q, v)| *q = (v * inverse).round() as i8 as u8);
    Some(out)
}

/// `d = x / −8` for the x of largest size, which so gets the number 0 of 0 … 15; halves are rounded up, as the
/// type's reference quantiser does.
pub(super) fn q4_0(block: &[f32; 32]) -> Option<[u8; 18]> {
    let d = extreme(block) / -8.0;
    let mut out = [0; 18];
    out[..2].copy_from_slice(&finite_f16(d)?.to_le_bytes());
    let inverse = inverse(d);
    let number = |v: f32| ((v * inverse + 8.5) as u8).min(15);
    let (low, high) = block.split_at(16);
    for (byte, (&low, &high)) in out[2..].iter_mut().zip(low.iter().zip(high)) {
        *byte = number(low) | number(high) << 4;
    }
    Some(out)
}

/// A scale for each 16 values that makes their squared error small, rounded to 8-bit multiples of a common `d`;
/// then the nearest of 64 numbers for each value.
pub(super) fn q6_k(block: &[f32; 256]) -> Option<[u8; 210]> {
    let (subs, _) = block.as_chunks::<16>();
    let mut scales = [0.0f32; 16];
    scales.iter_mut().zip(subs).for_each(|(scale, sub)| *scale = q6_scale(sub));
    let d = finite_f16(extreme(&scales) / -128.0)?;
    let mut out = [0; 210];
    out[208..].copy_from_slice(&d.to_le_bytes());
    let (d, inverse_d) = (d.to_f32(), inverse(d.to_f32()));
    for (sub, (values, scale)) in subs.iter().zip(scales).enumerate() {
        let scale = (scale * inverse_d).round() as i8;
        out[192 + sub] = scale as u8;
        let inverse = inverse(d * f32::from(scale));
        let (half, k, first) = (sub / 8, sub % 8 / 2, sub % 2 * 16);
        for (l, &value) in (first..).zip(values) {
            let number = ((value * inverse).round().clamp(-32.0, 31.0) + 32.0) as u8;
            out[64 * half + 32 * (k % 2) + l] |= (number & 15) << (k / 2 * 4);
            out[128 + 32 * half + l] |= (number >> 4) << (2 * k);
        }
    }
    Some(out)
}

/// The scale `s` with the least `Σ (x − s·q)²` among those found by trying factors around `−32 / x` for the x of
/// largest size: for given numbers q = −32 … 31 the best scale is `Σ x·q / Σ q²`, and it takes `(Σ x·q)² / Σ q²` off the error.
fn q6_scale(values: &[f32; 16]) -> f32 {
    let extreme = extreme(values);
    let (mut best, mut scale) = (0.0, 0.0);
    for step in -9i8..=9 {
        let factor = -(32.0 + 0.1 * f32::from(step)) * inverse(extreme);
        let (mut products, mut squares) = (0.0f32, 0.0f32);
        for &x in values {
            let q = (x * factor).round().clamp(-32.0, 31.0);
            products += x * q;
            squares += q * q;
        }
        let gain = products * products * inverse(squares);
        if gain > best {
            (best, scale) = (gain, products / squares);
        }
    }
    scale
}

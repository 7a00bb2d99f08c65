//! The reference: the definition of a correct product. Kept obvious, never optimised.

use crate::matrix::Scales;

/// `Σ w·a` of one row of codes. `acts` has one value for each column.
pub fn dot(codes: &[u8], acts: &[i8]) -> i32 {
    dot_from(codes, 0, acts)
}

/// `Σ w·a` over the columns from `first` on, as many as there are activations.
fn dot_from(codes: &[u8], first: usize, acts: &[i8]) -> i32 {
    let weight = |c: usize| i32::from((codes[c / 4] >> (2 * (c % 4))) & 3) - 1;
    acts.iter().enumerate().map(|(i, &a)| weight(first + i) * i32::from(a)).sum()
}

/// Row `r` of a product with its scales, for activations with dequantisation factor `inverse`.
/// See [`PackedMatrix::matmul`](super::PackedMatrix::matmul) for the order of the operations.
pub fn row(codes: &[u8], scales: &Scales, r: usize, acts: &[i8], inverse: f32) -> f32 {
    match scales {
        Scales::Block { cols: block, .. } => {
            let mut y = 0.0;
            for (b, part) in acts.chunks(*block).enumerate() {
                let first = b * block;
                let scale = scales.at(r, first, acts.len());
                y = mul_add(dot_from(codes, first, part) as f32, scale, y);
            }
            y * inverse
        }
        _ => dot(codes, acts) as f32 * (scales.at(r, 0, acts.len()) * inverse),
    }
}

/// `a · b + c`, rounded once.
#[cfg(feature = "std")]
#[inline(always)]
pub(crate) fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

/// `a · b + c`, rounded once.
#[cfg(not(feature = "std"))]
#[inline(always)]
pub(crate) fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    libm::fmaf(a, b, c)
}

//! Masters of a ternary matrix whose own are lost: weights that the absmean quantiser rounds back to the same trits and scale.
//!
//! With `t·γ` itself the scale would shrink: its mean magnitude is `γ·ρ`, `ρ` being the share of weights that are not zero.
//! So a non-zero weight becomes `t·γ/ρ`. No f32 equals `γ/ρ`; two neighbours of it are mixed so that their mean, summed in f64 as
//! the quantiser does, rounds to `γ` (docs/numerics.md). Zeros stay in the middle of their interval.

use setun_kernels::TernaryMatrix;
use setun_kernels::matrix::Scales;
use setun_kernels::quant::absmean_scale;

use setun::error::ModelError;

/// Full-precision weights, `[rows, cols]`, whose ternary form by [`TernaryMatrix::quantize`] is `matrix`: the same trits and the
/// same scale, to the bit. (A matrix of zeros gets the quantiser's smallest scale, which multiplies nothing.)
///
/// # Errors
/// When `matrix` has several different scales or one below the quantiser's floor of 1e-5: no masters of this kind exist.
pub fn masters_of(name: &str, matrix: &TernaryMatrix) -> Result<Vec<f32>, ModelError> {
    let refuse = |what: String| ModelError::Tensor { name: name.to_owned(), what };
    let scale = one_scale(name, matrix)?;
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut trits = vec![0i8; cols];
    let mut weights = Vec::with_capacity(rows * cols);
    for r in 0..rows {
        matrix.row_trits(r, &mut trits);
        weights.extend(trits.iter().map(|&t| f32::from(t)));
    }
    let nonzero = weights.iter().filter(|&&w| w != 0.0).count();
    if nonzero == 0 {
        return Ok(weights);
    }
    let exact = f64::from(scale) * weights.len() as f64 / nonzero as f64;
    // The neighbours of `exact`, and how many weights take the upper one.
    let nearest = exact as f32;
    let low = if f64::from(nearest) > exact { nearest.next_down() } else { nearest };
    let high = low.next_up();
    let share = (exact - f64::from(low)) / (f64::from(high) - f64::from(low));
    let mut upper = (share * nonzero as f64).round() as usize;
    for w in weights.iter_mut().filter(|w| **w != 0.0) {
        *w *= if upper > 0 { high } else { low };
        upper = upper.saturating_sub(1);
    }
    match absmean_scale(&weights) {
        found if found == scale => Ok(weights),
        found => Err(refuse(format!(
            "its scale is {scale:e}, but masters of it are rounded with {found:e}: scales below 1e-5 cannot be trained"
        ))),
    }
}

/// The scale of the whole matrix.
///
/// # Errors
/// When there are several: what is trained here has one.
pub(crate) fn one_scale(name: &str, matrix: &TernaryMatrix) -> Result<f32, ModelError> {
    let (kind, values) = match matrix.scales() {
        Scales::Tensor(scale) => return Ok(*scale),
        Scales::Row(values) => ("row".to_owned(), values),
        Scales::Block { rows, cols, values } => (format!("block of {rows} × {cols}"), values),
    };
    match values.first() {
        Some(first) if values.iter().all(|v| v == first) => Ok(*first),
        _ => Err(ModelError::Tensor {
            name: name.to_owned(),
            what: format!(
                "it has a scale for each {kind}, but what is trained here has one for the whole matrix (BitNet): models with \
                 several cannot be fine-tuned by this version"
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_kernels::{Kernels, Pool};

    fn matrix(rows: usize, cols: usize, zeros_in: usize, scale: f32) -> TernaryMatrix {
        let mut state = 5u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) as usize
        };
        let trits: Vec<i8> =
            (0..rows * cols).map(|_| if next() % zeros_in > 0 { [1, -1][next() % 2] } else { 0 }).collect();
        TernaryMatrix::from_trits(rows, cols, &trits, Scales::Tensor(scale)).unwrap()
    }

    #[test]
    fn rounding_the_masters_gives_the_trits_and_the_scale_back_to_the_bit() {
        let (kernels, pool) = (Kernels::best(), Pool::new(2));
        // Scales all over their mantissa, densities from one in two to all, sizes below and above the quantiser's chunks.
        for (n, zeros_in) in [2, 3, 5, 1000].into_iter().enumerate() {
            for step in 0..40 {
                let scale = 0.004f32 * 1.37f32.powi(step) * (1.0 + n as f32 * 1e-3);
                for (rows, cols) in [(3, 7), (96, 64), (150, 200)] {
                    let original = matrix(rows, cols, zeros_in, scale);
                    let masters = masters_of("m", &original).unwrap();
                    let again = TernaryMatrix::quantize(kernels, &masters, rows, cols, &pool).unwrap();
                    assert_eq!(again, original, "{rows} × {cols}, scale {scale}");
                }
            }
        }
    }

    #[test]
    fn only_zeros_stay_zeros_and_scales_below_the_floor_are_refused() {
        let zeros = TernaryMatrix::from_trits(2, 4, &[0; 8], Scales::Tensor(0.3)).unwrap();
        assert_eq!(masters_of("m", &zeros).unwrap(), [0.0; 8]);
        let error = masters_of("m", &matrix(4, 4, 3, 1e-7)).unwrap_err().to_string();
        assert!(error.contains("`m`") && error.contains("1e-5"), "{error}");
    }

    #[test]
    fn several_scales_are_refused_unless_they_are_one() {
        let with = |values: Vec<f32>| {
            let rows = Scales::Row(values);
            masters_of("m", &TernaryMatrix::from_trits(2, 2, &[1, 0, 1, -1], rows).unwrap())
        };
        assert!(with(vec![0.5, 0.25]).unwrap_err().to_string().contains("a scale for each row"));
        let same = with(vec![0.5, 0.5]).unwrap();
        assert_eq!(absmean_scale(&same), 0.5);
    }
}

//! Matrices as a trainer wants them: full-precision masters where the file has them.

use setun_kernels::matrix::TernaryMatrix;

use super::{Weight, Weights, expect_shape};
use crate::config::{Numerics, Storage, Ternary};
use crate::error::ModelError;
use crate::model::Role;

/// A matrix to go on training from.
#[derive(Debug, Clone)]
pub enum Master {
    /// Full precision, `[rows, cols]`: a float layer, or the masters of a ternary one.
    Float(Vec<f32>),
    /// Only what a ternary layer was rounded to.
    Ternary(TernaryMatrix),
}

impl Weights<'_> {
    /// The matrix `name`, unrounded where the file holds it so.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn master(&self, name: &str, rows: usize, cols: usize, role: Role) -> Result<Master, ModelError> {
        let masters =
            matches!(&self.config.numerics, Numerics::Ternary(Ternary { storage: Storage::Masters, .. }));
        if masters && role == Role::Ternary {
            let tensor = self.file.tensor(&self.stored_name(name))?;
            expect_shape(&tensor, &[rows, cols])?;
            let values = tensor.to_f32()?;
            self.file.release(&tensor.info);
            return Ok(Master::Float(values));
        }
        Ok(match self.matrix(name, rows, cols, role)? {
            Weight::Ternary(matrix) => Master::Ternary(matrix),
            Weight::Dense(matrix) => {
                let mut values = vec![0.0; rows * cols];
                for (r, row) in values.chunks_exact_mut(cols.max(1)).enumerate() {
                    matrix.row_f32(r, row);
                }
                Master::Float(values)
            }
        })
    }
}

//! Which tensors a model has, and as what each is written.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::format::{Checkpoint, Encoding, TensorSpec};
use crate::model::{Model, Role, Source};
use crate::weights::Weights;
use crate::weights::experts::is_router;

/// A tensor of the model, by its canonical name, before a place for it is chosen.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub name: String,
    /// `[rows, cols]`, or `[len]`.
    pub shape: Vec<usize>,
    /// `None` for vectors: norms and biases.
    pub role: Option<Role>,
    /// Whether it is read as ternary.
    pub ternary: bool,
    /// The type its floats have in the file; F32 where a reader makes them up.
    pub stored: Encoding,
    /// Bytes it takes in the file.
    pub bytes: usize,
}

impl Planned {
    /// A linear layer inside a block, as against the embedding, the head, routers and vectors.
    pub(super) fn is_block_linear(&self) -> bool {
        matches!(self.role, Some(Role::Ternary | Role::Float))
            && self.name.starts_with("model.layers.")
            && !self.is_router()
    }

    /// The matrix that chooses experts, which no program stores in few bits.
    pub(super) fn is_router(&self) -> bool {
        is_router(&self.name)
    }

    /// The type that keeps its floats: its own where containers have it, F32 otherwise.
    pub(super) fn own_float(&self) -> Encoding {
        match &self.stored {
            own @ (Encoding::F16 | Encoding::BF16) => own.clone(),
            _ => Encoding::F32,
        }
    }

    /// The narrowest type that keeps its ternary values as floats: F16 where its scales are f16.
    pub(super) fn copy_type(&self) -> Encoding {
        match &self.stored {
            Encoding::Q1_0 | Encoding::Q2_0G64 | Encoding::Q2_0G128 | Encoding::PQ2_0 | Encoding::PTQ1_0 => {
                Encoding::F16
            }
            Encoding::TQ1_0 | Encoding::TQ2_0 | Encoding::IQ1BN => Encoding::F16,
            _ => self.own_float(),
        }
    }
}

/// Every tensor that `config` asks for, in the order of the forward pass. [`Model::build`] is the one table of them.
pub(super) fn tensors(file: &Checkpoint, config: &ModelConfig) -> Result<Vec<Planned>, ModelError> {
    let mut collector = Collector { file, weights: Weights::new(file, config), planned: Vec::new() };
    Model::build(config.clone(), &mut collector)?;
    Ok(collector.planned)
}

struct Collector<'a> {
    file: &'a Checkpoint,
    weights: Weights<'a>,
    planned: Vec<Planned>,
}

impl Collector<'_> {
    fn note(&mut self, name: &str, shape: Vec<usize>, role: Option<Role>) {
        let info = self.file.info(&self.weights.stored_name(name));
        let ternary = role.is_some_and(|role| self.weights.is_ternary(name, role));
        let stored = match (info, role) {
            // MLX's words of codes are floats in the type of the scales beside them.
            (Some(info), Some(role)) if ternary && matches!(info.encoding, Encoding::Other(_)) => {
                let beside = self.weights.companions(name, role);
                beside.first().and_then(|scales| self.file.info(scales))
            }
            _ => info,
        };
        self.planned.push(Planned {
            name: name.to_owned(),
            shape,
            role,
            ternary,
            stored: stored.map_or(Encoding::F32, |i| i.encoding.clone()),
            bytes: self.weights.stored_bytes(name),
        });
    }
}

impl Source for Collector<'_> {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<(), ModelError> {
        self.note(name, vec![rows, cols], Some(role));
        Ok(())
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<(), ModelError> {
        self.note(name, vec![len], None);
        Ok(())
    }
}

/// What the bytes of an output tensor are made from.
#[derive(Debug, Clone)]
pub(super) enum Part {
    /// The planned tensor at this index.
    Tensor(usize),
    /// The planned matrices at these indices, one after another.
    Stack(Vec<usize>),
    /// The planned tensors at these indices, which are one in the input, byte for byte.
    Verbatim(Vec<usize>),
    /// Four codes to a byte of the planned tensor at this index, whose scale is stored in this type.
    Packed(usize, Encoding),
    /// The `weight_scale` beside the packed tensor at this index.
    Scale(usize),
    /// Values that no input tensor holds.
    Given(Vec<f32>),
}

impl Part {
    /// The planned tensors that are written.
    pub(super) fn planned(&self) -> &[usize] {
        match self {
            Self::Tensor(index) | Self::Packed(index, _) => std::slice::from_ref(index),
            Self::Stack(indices) | Self::Verbatim(indices) => indices,
            Self::Scale(_) | Self::Given(_) => &[],
        }
    }
}

/// One tensor of the output.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub spec: TensorSpec,
    pub part: Part,
    /// Heads whose rows go into neighbouring-pair order.
    pub interleave: Option<usize>,
}

/// Puts the rows of each head from split halves into neighbouring pairs: of the `rotary` rows that rotate, `j` and
/// `j + rotary/2` become `2j` and `2j + 1`. `tail` bytes after the rows stay where they are.
pub(super) fn interleave(bytes: &[u8], rows: usize, heads: usize, rotary: usize, tail: usize) -> Vec<u8> {
    let row_bytes = (bytes.len() - tail) / rows;
    let d = rows / heads;
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, at) = (row / d, row % d);
        let from = head * d + if at < rotary { at / 2 + at % 2 * (rotary / 2) } else { at };
        out.extend_from_slice(&bytes[from * row_bytes..][..row_bytes]);
    }
    out.extend_from_slice(&bytes[rows * row_bytes..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::split_pair_rows;

    #[test]
    fn interleaving_is_undone_by_the_reader_of_gguf() {
        let (heads, rows, width) = (3, 24, 2);
        let bytes: Vec<u8> = (0..rows * width + 5).map(|i| i as u8).collect();
        for rotary in [8, 4] {
            let stored = interleave(&bytes, rows, heads, rotary, 5);
            let back: Vec<u8> = split_pair_rows(heads, rotary, rows)
                .flat_map(|row| &stored[row * width..][..width])
                .copied()
                .collect();
            assert_eq!(back, bytes[..rows * width]);
            assert_eq!(stored[rows * width..], bytes[rows * width..]);
            assert_ne!(stored, bytes);
        }
    }
}

//! What a model file holds: every tensor a model uses, how it is stored, how many of its weights are zero, and what in
//! the file fits nothing.

use std::collections::{BTreeMap, HashSet};

use setun_kernels::matrix::Scales;

use crate::config::{ModelConfig, Numerics, Storage};
use crate::error::ModelError;
use crate::format::{Checkpoint, Encoding};
use crate::model::{Model, Role, Source};
use crate::weights::{Weight, Weights};

/// A part of a model, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Token embedding, which a tied model's head shares.
    Embedding,
    /// Linear layers of the blocks, with their scales and biases.
    Blocks,
    /// Norms, inside and outside the blocks.
    Norms,
    /// Output head of an untied model.
    Head,
}

/// What the used tensors of one kind of storage have in common.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Group {
    /// Tensors.
    pub tensors: usize,
    /// Their elements.
    pub elements: usize,
    /// Their bytes in the file, scales in tensors of their own included.
    pub bytes: usize,
    /// Of ternary weights: how many are 0.
    pub zeros: Option<usize>,
    /// Of ternary weights: `tensor`, `row` or `block 1x256`; several where matrices differ.
    pub scales: Vec<String>,
}

/// Everything [`survey`] found.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Survey {
    /// Bytes in the file by part of the model.
    pub bytes: BTreeMap<Part, usize>,
    /// Matrices by how they are stored: `TQ2_0`, `packed U8`, `BF16 masters`, `F16`.
    pub packing: BTreeMap<String, Group>,
    /// Smallest and largest scale of all ternary matrices.
    pub scale_range: Option<(f32, f32)>,
    /// Share of ternary weights that are 0.
    pub zero_fraction: Option<f64>,
    /// Names of tensors that hold NaN or infinite values.
    pub not_finite: Vec<String>,
    /// Names of tensors in the file that the model does not use.
    pub unused: Vec<String>,
}

/// Reads every tensor that `config` asks for, one after another.
///
/// # Errors
/// When a tensor is missing, has another shape, or cannot be decoded: then the model cannot be run either.
pub fn survey(file: &Checkpoint, config: &ModelConfig) -> Result<Survey, ModelError> {
    let mut reader = Reader {
        file,
        config,
        weights: Weights::new(file, config),
        used: HashSet::new(),
        ternary_weights: 0,
        found: Survey {
            bytes: BTreeMap::new(),
            packing: BTreeMap::new(),
            scale_range: None,
            zero_fraction: None,
            not_finite: Vec::new(),
            unused: Vec::new(),
        },
    };
    Model::build(config.clone(), &mut reader)?;
    let Reader { weights, ternary_weights, mut found, .. } = reader;
    found.unused = weights.unused()?.into_iter().map(str::to_owned).collect();
    let zeros: usize = found.packing.values().filter_map(|group| group.zeros).sum();
    found.zero_fraction = (ternary_weights > 0).then(|| zeros as f64 / ternary_weights as f64);
    Ok(found)
}

struct Reader<'a> {
    file: &'a Checkpoint,
    config: &'a ModelConfig,
    weights: Weights<'a>,
    used: HashSet<String>,
    ternary_weights: usize,
    found: Survey,
}

impl Reader<'_> {
    /// Counts the tensor `stored` towards `part` and returns its bytes; 0 if the file does not have it.
    fn take(&mut self, stored: &str, part: Part) -> usize {
        let Some(info) = self.file.info(stored) else { return 0 };
        let bytes = info.stored_bytes();
        if self.used.insert(stored.to_owned()) {
            *self.found.bytes.entry(part).or_default() += bytes;
        }
        bytes
    }
}

impl Source for Reader<'_> {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<(), ModelError> {
        let weight = self.weights.matrix(name, rows, cols, role)?;
        let stored = self.weights.stored_name(name);
        let encoding = self.file.info(&stored).map_or(Encoding::F32, |info| info.encoding.clone());
        let part = match name {
            "model.embed_tokens.weight" => Part::Embedding,
            "lm_head.weight" => Part::Head,
            _ => Part::Blocks,
        };
        let mut bytes = self.take(&stored, part);
        for companion in self.weights.companions(name, role) {
            bytes += self.take(&companion, part);
        }
        let ternary = matches!(weight, Weight::Ternary(_));
        let group = self.found.packing.entry(packing(&encoding, ternary, self.config)).or_default();
        group.tensors += 1;
        group.elements += rows * cols;
        group.bytes += bytes;
        let matrix = match weight {
            Weight::Ternary(matrix) => matrix,
            Weight::Dense(matrix) => {
                let mut row = vec![0.0; cols];
                let bad = (0..rows).any(|r| {
                    matrix.row_f32(r, &mut row);
                    row.iter().any(|v| !v.is_finite())
                });
                self.found.not_finite.extend(bad.then_some(stored));
                return Ok(());
            }
        };
        let zeros = (matrix.zero_fraction() * (rows * cols) as f64).round() as usize;
        *group.zeros.get_or_insert(0) += zeros;
        let (kind, values) = match matrix.scales() {
            Scales::Tensor(scale) => ("tensor".to_owned(), std::slice::from_ref(scale)),
            Scales::Row(values) => ("row".to_owned(), &values[..]),
            Scales::Block { rows, cols, values } => (format!("block {rows}x{cols}"), &values[..]),
        };
        if !group.scales.contains(&kind) {
            group.scales.push(kind);
        }
        self.ternary_weights += rows * cols;
        // A group without weights other than 0 has the scale 0, which says nothing.
        for &scale in values.iter().filter(|scale| **scale != 0.0) {
            let (low, high) = self.found.scale_range.unwrap_or((scale, scale));
            self.found.scale_range = Some((low.min(scale), high.max(scale)));
        }
        Ok(())
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<(), ModelError> {
        let values = self.weights.vector(name, len)?;
        let stored = self.weights.stored_name(name);
        if values.iter().any(|v| !v.is_finite()) {
            self.found.not_finite.push(stored.clone());
        }
        let part = if name.ends_with(".bias") { Part::Blocks } else { Part::Norms };
        self.take(&stored, part);
        Ok(())
    }
}

/// How a matrix is stored, in words.
fn packing(encoding: &Encoding, ternary: bool, config: &ModelConfig) -> String {
    let masters = matches!(&config.numerics, Numerics::Ternary(t) if t.storage == Storage::Masters);
    match (ternary, encoding) {
        (true, Encoding::U8) => "packed U8".to_owned(),
        (true, Encoding::Other(_)) => "MLX 2-bit".to_owned(),
        (true, Encoding::Trit2) => "packed 2-bit".to_owned(),
        (true, e) if e.is_ternary() => e.to_string(),
        (true, e) if masters => format!("{e} masters"),
        (true, e) => format!("{e} holding ternary values"),
        (false, e) => e.to_string(),
    }
}

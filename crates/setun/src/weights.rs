//! The tensors of a model by their canonical (Hugging Face) names, whatever container holds them.
//!
//! Here GGUF's names and row order, aliases of sub-norm names and the two scale conventions end: everything after this module
//! sees a [`TernaryMatrix`], a [`DenseMatrix`] or a plain vector in the order that half-split RoPE expects.

mod stream;

use std::collections::HashSet;

use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::{Scales, TernaryMatrix};

use crate::config::{ActivationType, ModelConfig, Numerics, RopeScaling, Storage};
use crate::error::ModelError;
use crate::format::{Checkpoint, Llama2cKind, ScaleConvention, Tensor, hf_packed_to_ternary};
use crate::model::{Model, Role, Source};

/// A linear layer's weights as the file defines them.
#[derive(Debug, Clone)]
pub enum Weight {
    /// −1, 0 and +1 with scales.
    Ternary(TernaryMatrix),
    /// Floating point, in the type the file stores where a kernel reads it.
    Dense(DenseMatrix),
}

/// A checkpoint read as the model that `config` describes.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    file: &'a Checkpoint,
    config: &'a ModelConfig,
}

impl<'a> Weights<'a> {
    /// Tensors of `file` for a model of shape `config`.
    pub fn new(file: &'a Checkpoint, config: &'a ModelConfig) -> Self {
        Self { file, config }
    }

    /// The model's shape and numerics.
    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// The matrix called `name` (`model.layers.0.mlp.up_proj.weight`), `[rows, cols]`.
    ///
    /// # Errors
    /// When it is absent, has another shape, or its values do not suit `role`.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize, role: Role) -> Result<Weight, ModelError> {
        let stored = self.stored_name(name);
        let tensor = self.file.tensor(&stored)?;
        let weight = match (role, &self.config.numerics) {
            (Role::Ternary, Numerics::Ternary(ternary)) => {
                self.ternary(&tensor, name, rows, cols, ternary.storage)?
            }
            _ => {
                expect_shape(&tensor, &[rows, cols])?;
                if !tensor.info.encoding.is_ternary() {
                    Weight::Dense(tensor.to_dense()?)
                } else if self.config.activations() == ActivationType::Float {
                    Weight::Ternary(tensor.to_ternary()?)
                } else {
                    // A float layer by definition, whose values happen to be stored in few bits.
                    let dense = DenseMatrix::new(rows, cols, DenseData::F32(tensor.to_f32()?));
                    Weight::Dense(dense.map_err(|e| ModelError::tensor(name, e.to_string()))?)
                }
            }
        };
        self.file.release(&tensor.info);
        Ok(match self.interleaved_heads(name) {
            None => weight,
            Some(heads) => split_pairs(weight, heads, self.config.rope.rotary_dim),
        })
    }

    /// The vector called `name`, as f32.
    ///
    /// # Errors
    /// When it is absent, has another length, or is not a float type.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        if let Some(width) = self.llama2c_norm(name) {
            return Ok(vec![1.0 / width as f32; width]);
        }
        let tensor = self.file.tensor(&self.stored_name(name))?;
        expect_shape(&tensor, &[len])?;
        let mut values = tensor.to_f32()?;
        if let Some(heads) = self.interleaved_heads(name) {
            let rows = split_pair_rows(heads, self.config.rope.rotary_dim, len, 1);
            values = rows.map(|row| values[row]).collect();
        }
        if let Some(scale) = self.bias_scale(name)? {
            values.iter_mut().for_each(|v| *v *= scale);
        }
        Ok(values)
    }

    /// Whether [`Weights::matrix`] gives `name` as ternary; decided without reading its data.
    pub(crate) fn is_ternary(&self, name: &str, role: Role) -> bool {
        let stored = self.stored_name(name);
        let by_type = self.file.info(&stored).is_some_and(|info| info.encoding.is_ternary());
        let (Role::Ternary, Numerics::Ternary(ternary)) = (role, &self.config.numerics) else {
            return by_type && self.config.activations() == ActivationType::Float;
        };
        let scale = format!("{}.scale", stored.trim_end_matches(".weight"));
        ternary.storage != Storage::SelfDescribed
            || self.config.sub_norms
            || by_type
            || self.file.info(&scale).is_some()
    }

    fn ternary(
        &self,
        tensor: &Tensor,
        name: &str,
        rows: usize,
        cols: usize,
        storage: Storage,
    ) -> Result<Weight, ModelError> {
        let convention = match storage {
            Storage::Masters => {
                expect_shape(tensor, &[rows, cols])?;
                return stream::masters(tensor, rows, cols);
            }
            Storage::SelfDescribed => {
                expect_shape(tensor, &[rows, cols])?;
                let extra = self.gguf_scale(tensor.name())?;
                if tensor.info.encoding.is_ternary() {
                    let matrix = tensor.to_ternary()?;
                    return Ok(Weight::Ternary(rescale(matrix, extra, name)?));
                }
                // A plain Llama may leave some layers in float; a BitNet holds copies of ternary values.
                if !self.config.sub_norms && extra.is_none() {
                    return Ok(Weight::Dense(tensor.to_dense()?));
                }
                return Self::recognise(tensor, extra);
            }
            Storage::Divide => ScaleConvention::Divide,
            Storage::Multiply => ScaleConvention::Multiply,
        };
        let scale = self.file.tensor(&format!("{name}_scale"))?;
        if tensor.info.encoding == crate::format::Encoding::U8 {
            return hf_packed_to_ternary(tensor, &scale, convention, rows, cols).map(Weight::Ternary);
        }
        // Packed or not is decided by the stored shape in `transformers` too: full-size floats hold the codes themselves.
        expect_shape(tensor, &[rows, cols])?;
        Self::recognise(tensor, Some(scale_value(&scale, convention)?))
    }

    /// Float copies of ternary values: every weight is 0 or ± one number.
    fn recognise(tensor: &Tensor, extra: Option<f32>) -> Result<Weight, ModelError> {
        let hint = "a ternary layer is expected, whose weights are 0 or ± one scale; float masters need \
                    `quantization_mode: online` in a config.json";
        let matrix = tensor.recognise_ternary().map_err(|error| match error {
            ModelError::Tensor { name, what } => ModelError::Tensor { name, what: format!("{what}: {hint}") },
            other => other,
        })?;
        match matrix.scales() {
            Scales::Tensor(_) => rescale(matrix, extra, tensor.name()).map(Weight::Ternary),
            _ => Err(ModelError::tensor(tensor.name(), format!("it has more than one scale: {hint}"))),
        }
    }

    /// Names of tensors that no part of the model asks for, in file order.
    ///
    /// # Errors
    /// None that a configuration which was checked can cause.
    pub fn unused(&self) -> Result<Vec<&'a str>, ModelError> {
        let mut asked = Asked { weights: *self, names: HashSet::new() };
        Model::build(self.config.clone(), &mut asked)?;
        // The configuration's own tensor, which no layer asks for.
        if let RopeScaling::Divisors(_) = self.config.rope.scaling {
            asked.names.insert("rope_freqs.weight".to_owned());
        }
        Ok(self.file.tensors().map(|t| t.name.as_str()).filter(|name| !asked.names.contains(*name)).collect())
    }

    /// Refuses a file with tensors that look like a part of the model and are none: a model computed without a bias, a
    /// norm or a layer that its file has would be another one.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] with the first such tensor and their number.
    pub fn check_all_used(&self) -> Result<(), ModelError> {
        const PARTS: [&str; 7] =
            ["blk.", "model.", "token_embd", "output", "rope_", "lm_head", "transformer."];
        // Derived from the configuration by every reader, or a copy of the embedding.
        let harmless = |name: &str| {
            name.ends_with(".rotary_emb.inv_freq") || self.config.tied && name == "lm_head.weight"
        };
        let unused = self.unused()?;
        let missed: Vec<&str> = unused
            .into_iter()
            .filter(|name| PARTS.iter().any(|part| name.starts_with(part)) && !harmless(name))
            .collect();
        let Some(first) = missed.first() else { return Ok(()) };
        let more = match missed.len() {
            1 => String::new(),
            n => format!(" and {} more", n - 1),
        };
        let what = format!(
            "tensor `{first}`{more} belongs to no part of the model that its configuration describes ({} layers), so running \
             without it would give other results: correct the configuration, or use a version that knows this kind of model",
            self.config.num_layers
        );
        Err(ModelError::unsupported(self.file.path(), what))
    }

    /// The name under which the file holds what the model calls `name`.
    pub(crate) fn stored_name(&self, name: &str) -> String {
        if self.file.gguf_metadata().is_some() {
            return gguf_name(name);
        }
        // 1bitLLM's names for the sub-norms.
        let older = name
            .replace("self_attn.attn_sub_norm.", "self_attn.inner_attn_ln.")
            .replace("mlp.ffn_sub_norm.", "mlp.ffn_layernorm.");
        match self.file.info(name).is_none() && self.file.info(&older).is_some() {
            true => older,
            false => name.to_owned(),
        }
    }

    /// Heads of a tensor whose rows GGUF keeps in neighbouring-pair order.
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        if self.file.gguf_metadata().is_none() || !self.config.gguf_interleaves_rotary_pairs() {
            return None;
        }
        match name {
            _ if name.contains("self_attn.q_proj.") && !name.contains("rms_norm") => Some(self.config.heads),
            _ if name.contains("self_attn.k_proj.") && !name.contains("rms_norm") => {
                Some(self.config.kv_heads)
            }
            _ => None,
        }
    }

    /// The optional scalar that older BitNet conversions keep beside a matrix of ±1 and 0 (`blk.N.attn_q.scale`).
    fn gguf_scale(&self, stored: &str) -> Result<Option<f32>, ModelError> {
        let name = format!("{}.scale", stored.trim_end_matches(".weight"));
        let Some(scale) = self.file.find(&name)? else { return Ok(None) };
        match scale.to_f32()?[..] {
            [one] if one.is_finite() && one > 0.0 => Ok(Some(one)),
            ref other => {
                Err(ModelError::tensor(&name, format!("one positive scale is expected, found {other:?}")))
            }
        }
    }

    /// `autobitlinear` adds the bias before it multiplies by the scale, so the bias is scaled here.
    fn bias_scale(&self, name: &str) -> Result<Option<f32>, ModelError> {
        let multiplies =
            matches!(&self.config.numerics, Numerics::Ternary(t) if t.storage == Storage::Multiply);
        match name.strip_suffix(".bias") {
            Some(module) if multiplies && self.config.is_ternary(module) => {
                let scale = self.file.tensor(&format!("{module}.weight_scale"))?;
                scale_value(&scale, ScaleConvention::Multiply).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Ternary llama2.c-style checkpoints have no norm weights: each linear layer divides its input by rms · width.
    fn llama2c_norm(&self, name: &str) -> Option<usize> {
        let ternary = self.file.llama2c().is_some_and(|facts| facts.kind == Llama2cKind::Ternary);
        match name {
            _ if !ternary || name == "model.norm.weight" => None,
            _ if name.contains("attn_sub_norm") => Some(self.config.heads * self.config.head_dim),
            _ if name.contains("ffn_sub_norm") => Some(self.config.intermediate_size),
            _ => Some(self.config.hidden_size),
        }
    }
}

/// Collects the names under which a model's tensors are stored.
struct Asked<'a> {
    weights: Weights<'a>,
    names: HashSet<String>,
}

impl Source for Asked<'_> {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, name: &str, _: usize, _: usize, role: Role) -> Result<(), ModelError> {
        let stored = self.weights.stored_name(name);
        // Scales count only where they are applied.
        if let (Role::Ternary, Numerics::Ternary(ternary)) = (role, &self.weights.config.numerics) {
            self.names.extend(match ternary.storage {
                Storage::Masters => None,
                Storage::Divide | Storage::Multiply => Some(format!("{name}_scale")),
                Storage::SelfDescribed => Some(format!("{}.scale", stored.trim_end_matches(".weight"))),
            });
        }
        self.names.insert(stored);
        Ok(())
    }

    fn vector(&mut self, name: &str, _: usize) -> Result<(), ModelError> {
        self.names.insert(self.weights.stored_name(name));
        Ok(())
    }
}

/// GGUF's name of a tensor that Hugging Face calls `name`.
pub(crate) fn gguf_name(name: &str) -> String {
    const WHOLE: &[(&str, &str)] =
        &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
    const IN_LAYER: &[(&str, &str)] = &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.attn_sub_norm", "attn_sub_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.ffn_sub_norm", "ffn_sub_norm"),
    ];
    let renamed = |rest: &str, table: &[(&str, &str)]| {
        table.iter().find_map(|(from, to)| {
            rest.strip_prefix(from).filter(|tail| tail.starts_with('.')).map(|tail| format!("{to}{tail}"))
        })
    };
    let in_layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    match in_layer {
        Some((n, rest)) => renamed(rest, IN_LAYER).map(|rest| format!("blk.{n}.{rest}")),
        None => renamed(name, WHOLE),
    }
    .unwrap_or_else(|| name.to_owned())
}

fn expect_shape(tensor: &Tensor, expected: &[usize]) -> Result<(), ModelError> {
    match tensor.shape() == expected {
        true => Ok(()),
        false => Err(ModelError::Shape {
            name: tensor.name().to_owned(),
            expected: expected.to_vec(),
            found: tensor.shape().to_vec(),
        }),
    }
}

fn scale_value(scale: &Tensor, convention: ScaleConvention) -> Result<f32, ModelError> {
    match scale.to_f32()?[..] {
        [one] if one.is_finite() && one > 0.0 => Ok(match convention {
            ScaleConvention::Multiply => one,
            ScaleConvention::Divide => 1.0 / one,
        }),
        ref other => {
            Err(ModelError::tensor(scale.name(), format!("one positive scale is expected, found {other:?}")))
        }
    }
}

fn rescale(matrix: TernaryMatrix, extra: Option<f32>, name: &str) -> Result<TernaryMatrix, ModelError> {
    let Some(extra) = extra else { return Ok(matrix) };
    let times = |values: &[f32]| values.iter().map(|v| v * extra).collect();
    let scales = match matrix.scales() {
        Scales::Tensor(scale) => Scales::Tensor(scale * extra),
        Scales::Row(values) => Scales::Row(times(values)),
        Scales::Block { rows, cols, values } => {
            Scales::Block { rows: *rows, cols: *cols, values: times(values) }
        }
    };
    TernaryMatrix::new(matrix.rows(), matrix.cols(), matrix.codes().to_vec(), scales)
        .map_err(|e| ModelError::tensor(name, e.to_string()))
}

/// For each row in half-split order, the row that holds it in neighbouring-pair order: inside a head of `d` rows, pair `j`
/// is rows `2j` and `2j + 1` there, `j` and `j + r/2` here, `r` being the `rotary` rows that rotate; the rest stay.
pub(crate) fn split_pair_rows(
    heads: usize,
    rotary: usize,
    rows: usize,
    width: usize,
) -> impl Iterator<Item = usize> {
    let d = rows / heads.max(1);
    (0..rows).flat_map(move |row| {
        let (head, at) = (row / d, row % d);
        let half = rotary.min(d) / 2;
        let from = match at {
            _ if at < half => 2 * at,
            _ if at < 2 * half => 2 * (at - half) + 1,
            _ => at,
        };
        let from = head * d + from;
        from * width..(from + 1) * width
    })
}

fn split_pairs(weight: Weight, heads: usize, rotary: usize) -> Weight {
    let split = |rows, width| split_pair_rows(heads, rotary, rows, width);
    match weight {
        Weight::Dense(matrix) => {
            let (rows, cols) = (matrix.rows(), matrix.cols());
            let elements = || split(rows, cols);
            let data = match matrix.data() {
                DenseData::F32(values) => DenseData::F32(elements().map(|i| values[i]).collect()),
                DenseData::F16(values) => DenseData::F16(elements().map(|i| values[i]).collect()),
                DenseData::BF16(values) => DenseData::BF16(elements().map(|i| values[i]).collect()),
                DenseData::Q8_0(bytes) => {
                    let row_bytes = bytes.len() / rows.max(1);
                    DenseData::Q8_0(split(rows, row_bytes).map(|i| bytes[i]).collect())
                }
            };
            Weight::Dense(DenseMatrix::new(rows, cols, data).expect("rows are only reordered"))
        }
        Weight::Ternary(matrix) => {
            let rows = matrix.rows();
            let codes = split(rows, matrix.row_bytes()).map(|i| matrix.codes()[i]).collect();
            let scales = match matrix.scales() {
                Scales::Tensor(scale) => Scales::Tensor(*scale),
                Scales::Row(values) => Scales::Row(split(rows, 1).map(|r| values[r]).collect()),
                Scales::Block { rows: 1, cols, values } => {
                    let per_row = matrix.cols().div_ceil(*cols);
                    let values = split(rows, per_row).map(|i| values[i]).collect();
                    Scales::Block { rows: 1, cols: *cols, values }
                }
                // Blocks of several rows could only be reordered whole; no reader makes them for these families.
                block @ Scales::Block { .. } => block.clone(),
            };
            let matrix = TernaryMatrix::new(rows, matrix.cols(), codes, scales);
            Weight::Ternary(matrix.expect("rows are only reordered"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_canonical_name_has_its_gguf_twin() {
        for (name, gguf) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.11.self_attn.q_proj.bias", "blk.11.attn_q.bias"),
            ("model.layers.0.mlp.ffn_sub_norm.weight", "blk.0.ffn_sub_norm.weight"),
            ("model.layers.2.self_attn.k_norm.weight", "blk.2.attn_k_norm.weight"),
            ("model.layers.3.mlp.up_proj.rms_norm.weight", "blk.3.ffn_up.rms_norm.weight"),
        ] {
            assert_eq!(gguf_name(name), gguf);
        }
    }

    #[test]
    fn pairs_are_split_inside_each_head() {
        assert_eq!(split_pair_rows(2, 4, 8, 1).collect::<Vec<_>>(), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(split_pair_rows(1, 4, 4, 2).collect::<Vec<_>>(), [0, 1, 4, 5, 2, 3, 6, 7]);
    }

    #[test]
    fn rows_that_do_not_rotate_stay_where_they_are() {
        let rows: Vec<usize> = split_pair_rows(2, 4, 12, 1).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]);
    }
}

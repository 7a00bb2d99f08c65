//! The tensors of a model by their canonical (Hugging Face) names, whatever container holds them.
//!
//! Here GGUF's names and row order, aliases of sub-norm names and the two scale conventions end: everything after this module
//! sees a [`TernaryMatrix`], a [`DenseMatrix`] or a plain vector in the order that half-split RoPE expects.

pub(crate) mod experts;
mod masters;
mod names;
mod order;
mod stream;

use std::collections::HashSet;

use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::{Scales, TernaryMatrix};
use setun_kernels::threads::Pool;

use crate::config::{ActivationType, HeadOrder, ModelConfig, Numerics, RopeScaling, Storage, Ternary};
use crate::error::ModelError;
use crate::format::{
    Checkpoint, Encoding, Llama2cKind, Sample, ScaleConvention, Tensor, TensorInfo, hf_packed_to_ternary,
    mlx_to_ternary,
};
use crate::model::{Model, Role, Source};
pub use masters::Master;
pub(crate) use names::{gguf_name, gguf_name_in, stored_name, vector_shape};
use order::{Moved, pick_columns, pick_rows};

/// A linear layer's weights as the file defines them.
#[derive(Debug, Clone)]
pub enum Weight {
    /// −1, 0 and +1 with scales.
    Ternary(TernaryMatrix),
    /// Floating point, in the type the file stores where a kernel reads it.
    Dense(DenseMatrix),
}

impl Weight {
    fn cols(&self) -> usize {
        match self {
            Self::Ternary(matrix) => matrix.cols(),
            Self::Dense(matrix) => matrix.cols(),
        }
    }
}

/// A checkpoint read as the model that `config` describes.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    file: &'a Checkpoint,
    config: &'a ModelConfig,
    pool: Option<&'a Pool>,
}

impl<'a> Weights<'a> {
    /// Tensors of `file` for a model of shape `config`.
    pub fn new(file: &'a Checkpoint, config: &'a ModelConfig) -> Self {
        Self { file, config, pool: None }
    }

    /// The same, decoded on all threads of `pool`.
    pub fn on(self, pool: &'a Pool) -> Self {
        Self { pool: Some(pool), ..self }
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
        let whole = self.file.tensor(&self.stored_name(name))?;
        let expert = self.expert(&whole, name, rows, cols, role)?;
        let tensor = expert.as_ref().unwrap_or(&whole);
        let weight = match (role, &self.config.numerics) {
            (_, Numerics::Ternary(Ternary { storage: Storage::FloatCopies, .. }))
                if self.is_ternary(name, role) =>
            {
                expect_shape(tensor, &[rows, cols])?;
                Weight::Ternary(tensor.recognise_ternary().map_err(|error| {
                    let hint =
                        "its other rows suggest ternary weights: --weights float runs all matrices as floats";
                    explained(error, hint)
                })?)
            }
            (_, Numerics::Ternary(Ternary { storage: Storage::Mlx { group }, .. }))
                if is_mlx(&tensor.info) =>
            {
                self.mlx(tensor, rows, cols, *group)?
            }
            (Role::Ternary, Numerics::Ternary(ternary)) => {
                self.ternary(tensor, name, rows, cols, ternary.storage)?
            }
            _ => {
                expect_shape(tensor, &[rows, cols])?;
                if !tensor.info.encoding.is_ternary() {
                    Weight::Dense(self.dense(tensor)?)
                } else if self.config.activations() == ActivationType::Float {
                    Weight::Ternary(self.ternary_blocks(tensor)?)
                } else {
                    // A float layer by definition, whose values happen to be stored in few bits.
                    let dense = DenseMatrix::new(rows, cols, DenseData::F32(tensor.to_f32()?));
                    Weight::Dense(dense.map_err(|e| ModelError::tensor(name, e.to_string()))?)
                }
            }
        };
        self.file.release(&tensor.info);
        if let Some(heads) = self.interleaved_heads(name) {
            let from: Vec<usize> = split_pair_rows(heads, self.config.rope.rotary_dim, rows).collect();
            return Ok(pick_rows(weight, &from));
        }
        Ok(match self.value_heads(name) {
            None => weight,
            Some(Moved::Rows(from)) => pick_rows(weight, &from),
            Some(Moved::Columns(from)) => pick_columns(weight, &from, whole.name())?,
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
        let shape = vector_shape(self.config, name, len);
        match (&shape[..], self.file.gguf_metadata()) {
            // A convolution over one dimension has its inputs per group, of which there is one, in between.
            (&[channels, taps], None) => expect_shape(&tensor, &[channels, 1, taps])?,
            _ => expect_shape(&tensor, &shape)?,
        }
        let mut values = tensor.to_f32()?;
        if let Some(Moved::Rows(from)) = self.value_heads(name) {
            let width = len / from.len();
            values = from.iter().flat_map(|&row| values[row * width..(row + 1) * width].to_vec()).collect();
        }
        self.unfold(name, &mut values);
        if name.ends_with("linear_attn.A_log")
            && let Some(rate) = values.iter().find(|rate| !rate.is_finite() || **rate > 0.0)
        {
            let what = format!(
                "holds the decay {rate}, but −exp(A_log) is expected, which is below 0: another form was written"
            );
            return Err(ModelError::tensor(tensor.name(), what));
        }
        if let Some(heads) = self.interleaved_heads(name) {
            let rows = split_pair_rows(heads, self.config.rope.rotary_dim, len);
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
        match &self.config.numerics {
            // An embedding or a head is ternary by its own values alone.
            Numerics::Ternary(Ternary { storage: Storage::FloatCopies, .. }) => {
                return role == Role::Ternary || self.looks_ternary(&stored);
            }
            Numerics::Ternary(Ternary { storage: Storage::Mlx { .. }, .. }) => {
                return self.file.info(&stored).is_some_and(is_mlx);
            }
            _ => {}
        }
        let (Role::Ternary, Numerics::Ternary(ternary)) = (role, &self.config.numerics) else {
            return by_type && self.config.activations() == ActivationType::Float;
        };
        let scale = format!("{}.scale", stored.trim_end_matches(".weight"));
        ternary.storage != Storage::SelfDescribed
            || self.config.sub_norms
            || by_type
            || self.file.info(&scale).is_some()
    }

    /// Whether a few rows of a float matrix hold ternary values.
    fn looks_ternary(&self, stored: &str) -> bool {
        let float = self.file.info(stored).is_some_and(|info| info.encoding.is_float());
        let sample = || self.file.tensor(stored).ok()?.sample_ternary().ok();
        float && sample() == Some(Sample::Ternary)
    }

    fn mlx(&self, packed: &Tensor, rows: usize, cols: usize, group: usize) -> Result<Weight, ModelError> {
        if cols.is_multiple_of(16) {
            expect_shape(packed, &[rows, cols / 16])?;
        }
        let [scales, biases] = mlx_companions(packed.name());
        let matrix = mlx_to_ternary(packed, &self.file.tensor(&scales)?, &self.file.tensor(&biases)?, group)?;
        match (matrix.rows(), matrix.cols()) == (rows, cols) {
            true => Ok(Weight::Ternary(matrix)),
            false => Err(ModelError::Shape {
                name: packed.name().to_owned(),
                expected: vec![rows, cols.div_ceil(16)],
                found: packed.shape().to_vec(),
            }),
        }
    }

    /// Names of the tensors that belong to the matrix `name` beside its own, should they be there.
    pub(crate) fn companions(&self, name: &str, role: Role) -> Vec<String> {
        let Numerics::Ternary(ternary) = &self.config.numerics else { return Vec::new() };
        let stored = self.stored_name(name);
        // Scales count only where they are applied.
        match (ternary.storage, role) {
            (Storage::Mlx { .. }, _) if self.file.info(&stored).is_some_and(is_mlx) => {
                mlx_companions(&stored).into()
            }
            (Storage::Divide | Storage::Multiply, Role::Ternary) => vec![format!("{name}_scale")],
            (Storage::SelfDescribed, Role::Ternary) => {
                vec![format!("{}.scale", stored.trim_end_matches(".weight"))]
            }
            _ => Vec::new(),
        }
    }

    fn dense(&self, tensor: &Tensor) -> Result<DenseMatrix, ModelError> {
        self.pool.map_or_else(|| tensor.to_dense(), |pool| tensor.to_dense_on(pool))
    }

    fn ternary_blocks(&self, tensor: &Tensor) -> Result<TernaryMatrix, ModelError> {
        self.pool.map_or_else(|| tensor.to_ternary(), |pool| tensor.to_ternary_on(pool))
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
                let extra = self.gguf_scale(&self.stored_name(name))?;
                if tensor.info.encoding.is_ternary() {
                    let matrix = self.ternary_blocks(tensor)?;
                    return Ok(Weight::Ternary(rescale(matrix, extra, name)?));
                }
                // A plain Llama may leave some layers in float; a BitNet holds copies of ternary values.
                if !self.config.sub_norms && extra.is_none() {
                    return Ok(Weight::Dense(self.dense(tensor)?));
                }
                return Self::recognise(tensor, extra);
            }
            // MLX leaves some layers as they are.
            Storage::FloatCopies | Storage::Mlx { .. } => {
                expect_shape(tensor, &[rows, cols])?;
                return Ok(Weight::Dense(tensor.to_dense()?));
            }
            Storage::Divide => ScaleConvention::Divide,
            Storage::Multiply => ScaleConvention::Multiply,
        };
        let scale = self.file.tensor(&format!("{name}_scale"))?;
        if tensor.info.encoding == Encoding::U8 {
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
        let matrix = tensor.recognise_ternary().map_err(|error| explained(error, hint))?;
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
        const PARTS: [&str; 8] =
            ["blk.", "model.", "layers.", "token_embd", "output", "rope_", "lm_head", "transformer."];
        if self.config.tied && self.config.pooling.is_none() && self.file.info("lm_head.weight").is_some() {
            self.check_tied_copy()?;
        }
        // Derived from the configuration by every reader, or a copy of the embedding.
        let harmless = |name: &str| {
            name.ends_with(".rotary_emb.inv_freq") || name == "lm_head.weight" || self.is_draft(name)
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

    fn check_tied_copy(&self) -> Result<(), ModelError> {
        let (head, embedding) =
            (self.file.tensor("lm_head.weight")?, self.file.tensor("model.embed_tokens.weight")?);
        if head.info.encoding == embedding.info.encoding && head.data == embedding.data {
            return Ok(());
        }
        let what = "differs from the embedding, but the configuration says that the two are one \
                    (`tie_word_embeddings`): set it to false if this head belongs to the model, else remove the tensor";
        Err(ModelError::tensor("lm_head.weight", what))
    }

    /// Refuses packed scales that make sense only under the other convention: a language model's weights are well below 1,
    /// so scales of 30 that would multiply were made to divide, and the reverse. Decided over all of them, in the middle.
    ///
    /// # Errors
    /// When the scales contradict `quantization_config.linear_class`.
    pub fn check_scale_convention(&self) -> Result<(), ModelError> {
        const LARGEST: f32 = 8.0;
        let (declared, other, convention) = match &self.config.numerics {
            Numerics::Ternary(t) if t.storage == Storage::Divide => {
                ("bitlinear", "autobitlinear", ScaleConvention::Divide)
            }
            Numerics::Ternary(t) if t.storage == Storage::Multiply => {
                ("autobitlinear", "bitlinear", ScaleConvention::Multiply)
            }
            _ => return Ok(()),
        };
        let names =
            self.file.tensors().map(|t| t.name.as_str()).filter(|name| name.ends_with(".weight_scale"));
        // A scale that is none is reported where its matrix is read.
        let mut scales: Vec<f32> =
            names.filter_map(|name| scale_value(&self.file.tensor(name).ok()?, convention).ok()).collect();
        scales.sort_by(f32::total_cmp);
        let Some(&middle) = scales.get(scales.len() / 2).filter(|&&scale| scale > LARGEST) else {
            return Ok(());
        };
        let found = format!("{declared}, by which weights are 0 or ± {middle}");
        let expected = format!(
            "`{other}`, by which they are 0 or ± {}: no language model has weights above {LARGEST}, so correct config.json",
            1.0 / middle
        );
        Err(ModelError::ConfigValue { field: "quantization_config.linear_class".into(), found, expected })
    }

    /// Whether `name` belongs to a block that only drafts tokens, which nothing here runs.
    fn is_draft(&self, name: &str) -> bool {
        let Some(hybrid) = &self.config.hybrid else { return false };
        let block = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        let first = self.config.num_layers;
        block.is_some_and(|n| (first..first + hybrid.draft_layers).contains(&n))
    }

    /// The name under which the file holds what the model calls `name`.
    pub(crate) fn stored_name(&self, name: &str) -> String {
        self.fused_name(name).unwrap_or_else(|| stored_name(self.file, self.config.hybrid.is_some(), name))
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

    /// Where the file has the rows or columns of a gated DeltaNet's tensor that belong to value heads, if not in the order that the
    /// model is run in.
    fn value_heads(&self, name: &str) -> Option<Moved> {
        let hybrid = self.config.hybrid.as_ref()?;
        let gguf = self.file.gguf_metadata().is_some();
        let stored = if gguf { HeadOrder::Tiled } else { HeadOrder::Grouped };
        let (_, part) = name.split_once(".linear_attn.")?;
        if stored == hybrid.order || hybrid.key_heads == hybrid.value_heads {
            return None;
        }
        let heads = hybrid.order.places(stored, hybrid.key_heads, hybrid.value_heads);
        let rows = |width: usize| heads.iter().flat_map(move |&head| head * width..(head + 1) * width);
        let keys = 2 * hybrid.key_heads * hybrid.head_dim;
        match part.split('.').next()? {
            "in_proj_qkv" | "conv1d" => {
                Some(Moved::Rows((0..keys).chain(rows(hybrid.head_dim).map(|row| keys + row)).collect()))
            }
            "in_proj_z" => Some(Moved::Rows(rows(hybrid.head_dim).collect())),
            "in_proj_a" | "in_proj_b" | "A_log" | "dt_bias" => Some(Moved::Rows(heads)),
            "out_proj" => {
                let rotation = self.config.rotation.as_ref();
                let kept = rotation.is_some_and(|r| r.keeps_groups() && r.folds(&self.stored_name(name)));
                (!kept).then(|| Moved::Columns(rows(hybrid.head_dim).collect()))
            }
            _ => None,
        }
    }

    /// Hugging Face keeps this family's norms as their distance from 1, and the logarithm of the rate of decay; GGUF keeps what
    /// is computed with.
    fn unfold(&self, name: &str, values: &mut [f32]) {
        if self.config.hybrid.is_none() || self.file.gguf_metadata().is_some() {
            return;
        }
        if name.ends_with("norm.weight") && !name.ends_with("linear_attn.norm.weight") {
            values.iter_mut().for_each(|w| *w += 1.0);
        } else if name.ends_with("linear_attn.A_log") {
            values.iter_mut().for_each(|a| *a = -setun_kernels::float::exp(*a));
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
        self.names.extend(self.weights.companions(name, role));
        self.names.insert(stored);
        Ok(())
    }

    fn vector(&mut self, name: &str, _: usize) -> Result<(), ModelError> {
        self.names.insert(self.weights.stored_name(name));
        Ok(())
    }
}

/// Whether this is a matrix as MLX packs it.
fn is_mlx(info: &TensorInfo) -> bool {
    matches!(&info.encoding, Encoding::Other(name) if name == "U32")
}

/// MLX's scales and biases beside the matrix `stored`.
fn mlx_companions(stored: &str) -> [String; 2] {
    let module = stored.trim_end_matches(".weight");
    [format!("{module}.scales"), format!("{module}.biases")]
}

fn explained(error: ModelError, hint: &str) -> ModelError {
    match error {
        ModelError::Tensor { name, what } => ModelError::Tensor { name, what: format!("{what}: {hint}") },
        other => other,
    }
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
pub(crate) fn split_pair_rows(heads: usize, rotary: usize, rows: usize) -> impl Iterator<Item = usize> {
    let d = rows / heads.max(1);
    (0..rows).map(move |row| {
        let (head, at) = (row / d, row % d);
        let half = rotary.min(d) / 2;
        let from = match at {
            _ if at < half => 2 * at,
            _ if at < 2 * half => 2 * (at - half) + 1,
            _ => at,
        };
        head * d + from
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_split_inside_each_head() {
        assert_eq!(split_pair_rows(2, 4, 8).collect::<Vec<_>>(), [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn rows_that_do_not_rotate_stay_where_they_are() {
        let rows: Vec<usize> = split_pair_rows(2, 4, 12).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]);
    }
}

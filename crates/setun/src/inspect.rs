//! What a model file holds: every tensor, how it is stored, how many of its weights are zero, how its scales spread, and what in
//! the file fits nothing.
//!
//! With a configuration the tensors are those that the model asks for, under their canonical names, and are read exactly as they
//! would be to run it. Without one (a family that is not run, a file of unknown origin) they are those of the file, as far as their
//! types say what they are. Kinds and parts follow from names alone, so a family with other layers needs no word here.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use setun_kernels::matrix::{Scales, TernaryMatrix};
use setun_kernels::threads::physical_cores_allowed;

use crate::config::{ModelConfig, Numerics, Storage};
use crate::error::ModelError;
use crate::format::{Checkpoint, Encoding, Tensor, TensorInfo};
use crate::model::{Model, Role, Source};
use crate::weights::{Weight, Weights};

/// A part of a model, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Token embedding, which a tied model's head shares.
    Embedding,
    /// What carries information from token to token: attention, or what stands in its place.
    Attention,
    /// Feed-forward layers, experts and their routers.
    FeedForward,
    /// Norms, inside and outside the blocks.
    Norms,
    /// Output head of an untied model.
    Head,
    /// What no name gives away.
    Other,
}

/// What the matrices of one kind of storage have in common.
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

/// Scales of ternary weights, or absolute values: the smallest above zero, the middle one, the largest.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Spread {
    /// The smallest above zero; 0 if there is none.
    pub min: f32,
    /// As many are smaller as are larger; the mean of the middle two of an even number.
    pub median: f32,
    /// The largest.
    pub max: f32,
}

/// What a matrix holds.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "values")]
pub enum Values {
    /// −1, 0 and +1 with scales.
    Ternary {
        /// Weights that are −1.
        minus: usize,
        /// Weights that are 0.
        zero: usize,
        /// Weights that are +1.
        plus: usize,
        /// `tensor`, `row` or `block 1x256`.
        scale_per: String,
        /// How many scales there are.
        scale_count: usize,
        /// Scales that no weight can have: negative or not finite.
        bad_scales: usize,
        /// The scales.
        scales: Spread,
    },
    /// Floating point.
    Float {
        /// Root mean square, of a sample of the rows.
        rms: f32,
        /// Largest absolute value, of the same rows.
        largest: f32,
    },
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct TensorFacts {
    /// Its name in the file.
    pub name: String,
    /// What it does in its layer: `q_proj`, `experts.*.up_proj`.
    pub kind: String,
    /// Which layer it is in.
    pub layer: Option<usize>,
    /// Which part of the model it belongs to.
    pub part: Part,
    /// Row-major shape in the model.
    pub shape: Vec<usize>,
    /// How it is stored: `TQ2_0`, `packed U8`, `BF16 masters`, `F16`.
    pub packing: String,
    /// Its bytes in the file, a scale in a tensor of its own included.
    pub bytes: usize,
    /// Its values, where it is a matrix whose type is read.
    pub values: Option<Values>,
}

/// The matrices of one kind over all layers.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct KindFacts {
    /// `q_proj`, `embed_tokens`.
    pub kind: String,
    /// The part they belong to.
    pub part: Part,
    /// Matrices.
    pub tensors: usize,
    /// Their elements.
    pub elements: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Share of the weights that are 0, where they are ternary.
    pub zero_fraction: Option<f64>,
    /// Their scales where they are ternary (the median of the matrices' medians); else root mean squares, and the largest value.
    pub spread: Option<Spread>,
    /// How they are stored; several where they differ.
    pub packing: Vec<String>,
}

/// Everything [`survey`] found.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Survey {
    /// Bytes in the file by part of the model; together all of them.
    pub bytes: BTreeMap<Part, usize>,
    /// Matrices by how they are stored.
    pub packing: BTreeMap<String, Group>,
    /// Smallest and largest scale of all ternary matrices.
    pub scale_range: Option<(f32, f32)>,
    /// Share of ternary weights that are 0.
    pub zero_fraction: Option<f64>,
    /// Names of tensors that hold NaN or infinite values.
    pub not_finite: Vec<String>,
    /// Names of tensors in the file that the model does not use; empty where it is not known.
    pub unused: Vec<String>,
    /// Matrices and vectors, in the order of the forward pass, or of the file.
    pub tensors: Vec<TensorFacts>,
    /// The matrices by kind, in the order in which kinds first appear.
    pub kinds: Vec<KindFacts>,
}

/// Reads the tensors of `file` on all cores: those that `config` asks for, or without one all whose type is read.
/// `progress` is told the bytes of each tensor that is done, from any thread.
///
/// # Errors
/// When a tensor that `config` asks for is missing, has another shape, or cannot be decoded: then the model cannot be run either.
/// Without `config`, none.
pub fn survey(
    file: &Checkpoint,
    config: Option<&ModelConfig>,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Survey, ModelError> {
    let mut asked = Vec::new();
    let mut unused = Vec::new();
    match config {
        Some(config) => {
            Model::build(config.clone(), &mut Asked(&mut asked))?;
            unused = Weights::new(file, config).unused()?.into_iter().map(str::to_owned).collect();
        }
        None => asked.extend(file.tensors().map(|t| Ask {
            name: t.name.clone(),
            shape: t.shape.clone(),
            role: (t.shape.len() > 1).then_some(Role::Float),
        })),
    }
    let reader = Reader { file, weights: config.map(|config| Weights::new(file, config)) };
    let found = each(&asked, |ask| {
        let facts = reader.facts(ask);
        progress(facts.as_ref().map_or(0, |(facts, _)| facts.bytes));
        facts
    })?;
    let mut not_finite: Vec<String> =
        found.iter().filter(|(_, bad)| *bad).map(|(facts, _)| facts.name.clone()).collect();
    // Experts may share a tensor.
    not_finite.dedup();
    let mut survey = Survey {
        bytes: BTreeMap::new(),
        packing: BTreeMap::new(),
        scale_range: None,
        zero_fraction: None,
        not_finite,
        unused,
        tensors: found.into_iter().map(|(facts, _)| facts).collect(),
        kinds: Vec::new(),
    };
    for info in file.tensors() {
        *survey.bytes.entry(part_of(&info.name)).or_default() += info.stored_bytes();
    }
    survey.summarise();
    Ok(survey)
}

/// Runs `work` on every item on all cores; results in the order of the items, or the first error in that order.
fn each<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, ModelError> + Sync,
) -> Result<Vec<R>, ModelError> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Result<R, ModelError>)>> = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..physical_cores_allowed().min(items.len()) {
            scope.spawn(|| {
                while let Some((index, item)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    items.get(index).map(|item| (index, item))
                } {
                    let result = work(item);
                    if result.is_err() {
                        next.store(items.len(), Ordering::Relaxed); // The rest would be for nothing.
                    }
                    done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// A tensor that a model asks for.
struct Ask {
    name: String,
    shape: Vec<usize>,
    /// `None` for vectors.
    role: Option<Role>,
}

struct Asked<'a>(&'a mut Vec<Ask>);

impl Source for Asked<'_> {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<(), ModelError> {
        self.0.push(Ask { name: name.to_owned(), shape: vec![rows, cols], role: Some(role) });
        Ok(())
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<(), ModelError> {
        self.0.push(Ask { name: name.to_owned(), shape: vec![len], role: None });
        Ok(())
    }
}

struct Reader<'a> {
    file: &'a Checkpoint,
    weights: Option<Weights<'a>>,
}

impl Reader<'_> {
    /// A tensor's facts, and whether it holds values that are no numbers.
    fn facts(&self, ask: &Ask) -> Result<(TensorFacts, bool), ModelError> {
        let stored = self.weights.map_or_else(|| ask.name.clone(), |w| w.stored_name(&ask.name));
        let info = self.file.info(&stored);
        let (values, bad) = match (&self.weights, ask.role) {
            (Some(weights), Some(role)) => self.matrix(weights, ask, role, info)?,
            (Some(weights), None) => {
                let values = weights.vector(&ask.name, ask.shape.iter().product())?;
                (None, values.iter().any(|v| !v.is_finite()))
            }
            (None, Some(_)) => info.and_then(|info| self.unnamed(info).ok()).unwrap_or_default(),
            (None, None) => (None, false),
        };
        let own = info.map_or(0, TensorInfo::stored_bytes);
        let (bytes, beside) = match (self.weights, ask.role) {
            (Some(weights), Some(role)) => {
                (weights.stored_bytes(&ask.name), weights.companions(&ask.name, role))
            }
            _ => (own, Vec::new()),
        };
        let beside = beside.iter().filter_map(|name| self.file.info(name)).map(TensorInfo::stored_bytes);
        let ternary = matches!(values, Some(Values::Ternary { .. }));
        let (layer, kind) = place(&ask.name);
        let facts = TensorFacts {
            kind,
            layer,
            part: part_of(&ask.name),
            shape: ask.shape.clone(),
            packing: info.map_or_else(|| "made up".to_owned(), |i| self.packing(&i.encoding, ternary)),
            bytes: bytes + beside.sum::<usize>(),
            values,
            name: stored,
        };
        Ok((facts, bad))
    }

    fn matrix(
        &self,
        weights: &Weights,
        ask: &Ask,
        role: Role,
        info: Option<&TensorInfo>,
    ) -> Result<(Option<Values>, bool), ModelError> {
        let (rows, cols) = (ask.shape[0], ask.shape[1]);
        // A float matrix is looked at where it lies: a copy of the embedding may be the largest thing here.
        let as_it_lies = |i: &&TensorInfo| plain(&i.encoding) && i.shape == ask.shape;
        if let Some(info) = info.filter(as_it_lies).filter(|_| !weights.is_ternary(&ask.name, role)) {
            let tensor = self.file.tensor(&info.name)?;
            let facts = floats(&tensor, cols);
            self.file.release(info);
            return Ok(facts);
        }
        Ok(match weights.matrix(&ask.name, rows, cols, role)? {
            Weight::Ternary(matrix) => (Some(ternary(&matrix)), false),
            Weight::Dense(matrix) => {
                let mut sums = Sums::default();
                let mut row = vec![0.0; cols];
                for r in 0..rows {
                    matrix.row_f32(r, &mut row);
                    sums.add(&row);
                }
                sums.values()
            }
        })
    }

    /// A tensor that nothing describes, by its type.
    fn unnamed(&self, info: &TensorInfo) -> Result<(Option<Values>, bool), ModelError> {
        let tensor = self.file.tensor(&info.name)?;
        let facts = match &info.encoding {
            e if e.is_ternary() && info.shape.len() == 2 => (Some(ternary(&tensor.to_ternary()?)), false),
            e if plain(e) => floats(&tensor, info.shape.last().copied().unwrap_or(1)),
            _ => (None, false),
        };
        self.file.release(info);
        Ok(facts)
    }

    /// How a matrix is stored, in words.
    fn packing(&self, encoding: &Encoding, ternary: bool) -> String {
        let numerics = self.weights.map(|weights| &weights.config().numerics);
        let masters = matches!(numerics, Some(Numerics::Ternary(t)) if t.storage == Storage::Masters);
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
}

/// Whether values can be looked at without unpacking.
fn plain(encoding: &Encoding) -> bool {
    matches!(encoding, Encoding::F32 | Encoding::F16 | Encoding::BF16)
}

fn ternary(matrix: &TernaryMatrix) -> Values {
    let (mut zero, mut plus) = (0, 0);
    // Codes 0, 1, 2 in pairs of bits: the low bit is a zero weight, the high one +1.
    let (words, rest) = matrix.codes().as_chunks::<8>();
    for word in words.iter().map(|bytes| u64::from_le_bytes(*bytes)).chain(rest.iter().map(|&b| u64::from(b)))
    {
        zero += (word & 0x5555_5555_5555_5555).count_ones() as usize;
        plus += (word & 0xAAAA_AAAA_AAAA_AAAA).count_ones() as usize;
    }
    // Codes that fill up a row are zero weights.
    zero -= matrix.rows() * (matrix.cols().div_ceil(4) * 4 - matrix.cols());
    let (scale_per, values) = match matrix.scales() {
        Scales::Tensor(scale) => ("tensor".to_owned(), std::slice::from_ref(scale)),
        Scales::Row(values) => ("row".to_owned(), &values[..]),
        Scales::Block { rows, cols, values } => (format!("block {rows}x{cols}"), &values[..]),
    };
    Values::Ternary {
        minus: matrix.rows() * matrix.cols() - zero - plus,
        zero,
        plus,
        scale_per,
        scale_count: values.len(),
        bad_scales: values.iter().filter(|v| !v.is_finite() || **v < 0.0).count(),
        scales: Spread::of(values.to_vec()),
    }
}

impl Spread {
    /// Of absolute values; those that are no numbers are left out, and zeros of the smallest.
    fn of(mut values: Vec<f32>) -> Self {
        values.retain_mut(|v| {
            *v = v.abs();
            v.is_finite() && *v > 0.0
        });
        if values.is_empty() {
            return Self { min: 0.0, median: 0.0, max: 0.0 };
        }
        let (even, middle) = (values.len().is_multiple_of(2), values.len() / 2);
        let (below, &mut middle, _) = values.select_nth_unstable_by(middle, f32::total_cmp);
        let median = match below.iter().copied().reduce(f32::max).filter(|_| even) {
            Some(below) => below + (middle - below) / 2.0,
            None => middle,
        };
        let (min, max) = values.iter().fold((f32::MAX, 0f32), |(a, b), &v| (a.min(v), b.max(v)));
        Self { min, median, max }
    }
}

#[derive(Default)]
struct Sums {
    squares: f64,
    count: usize,
    largest: f32,
    bad: bool,
}

impl Sums {
    fn add(&mut self, values: &[f32]) {
        for &v in values.iter() {
            match v.is_finite() {
                true => {
                    self.squares += f64::from(v) * f64::from(v);
                    self.largest = self.largest.max(v.abs());
                }
                false => self.bad = true,
            }
        }
        self.count += values.len();
    }

    fn values(&self) -> (Option<Values>, bool) {
        let rms = (self.squares / self.count.max(1) as f64).sqrt() as f32;
        (Some(Values::Float { rms, largest: self.largest }), self.bad)
    }
}

/// Every exponent for values that are no numbers, and a sample of rows for their size.
fn floats(tensor: &Tensor, cols: usize) -> (Option<Values>, bool) {
    const ROWS: usize = 512;
    let data = &tensor.data[..];
    let half = |mask: u16| data.as_chunks::<2>().0.iter().any(|b| u16::from_le_bytes(*b) & mask == mask);
    let (width, bad) = match tensor.info.encoding {
        Encoding::F16 => (2, half(0x7c00)),
        Encoding::BF16 => (2, half(0x7f80)),
        _ => {
            let mask = 0x7f80_0000;
            (4, data.as_chunks::<4>().0.iter().any(|b| u32::from_le_bytes(*b) & mask == mask))
        }
    };
    let row_bytes = (cols * width).max(1);
    let step = (data.len() / row_bytes).div_ceil(ROWS).max(1);
    let mut sums = Sums::default();
    for row in data.chunks_exact(row_bytes).step_by(step) {
        let values: Vec<f32> = match tensor.info.encoding {
            Encoding::F16 => {
                row.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
            }
            Encoding::BF16 => {
                row.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
            _ => row.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        };
        sums.add(&values);
    }
    sums.bad |= bad;
    sums.values()
}

impl Survey {
    /// The figures that follow from the tensors'.
    fn summarise(&mut self) {
        let (mut zeros, mut weights) = (0, 0);
        let mut kinds: Vec<(KindFacts, usize, Vec<Spread>)> = Vec::new();
        for t in self.tensors.iter().filter(|t| t.shape.len() > 1) {
            let bytes = t.bytes;
            let elements = t.shape.iter().product::<usize>();
            let group = self.packing.entry(t.packing.clone()).or_default();
            group.tensors += 1;
            group.elements += elements;
            group.bytes += bytes;
            let place = kinds.iter().position(|(k, ..)| k.kind == t.kind).unwrap_or_else(|| {
                let (kind, part) = (t.kind.clone(), t.part);
                let (zero_fraction, spread, packing) = Default::default();
                let facts = KindFacts {
                    kind,
                    part,
                    tensors: 0,
                    elements: 0,
                    bytes: 0,
                    zero_fraction,
                    spread,
                    packing,
                };
                kinds.push((facts, 0, Vec::new()));
                kinds.len() - 1
            });
            let (kind, kind_zeros, spreads) = &mut kinds[place];
            kind.tensors += 1;
            kind.elements += elements;
            kind.bytes += bytes;
            if !kind.packing.contains(&t.packing) {
                kind.packing.push(t.packing.clone());
            }
            match &t.values {
                Some(Values::Ternary { zero, scale_per, scales, .. }) => {
                    *group.zeros.get_or_insert(0) += zero;
                    if !group.scales.contains(scale_per) {
                        group.scales.push(scale_per.clone());
                    }
                    (zeros, weights) = (zeros + zero, weights + elements);
                    *kind_zeros += zero;
                    kind.zero_fraction = Some(*kind_zeros as f64 / kind.elements as f64);
                    spreads.push(*scales);
                    let (low, high) = self.scale_range.unwrap_or((scales.min, scales.max));
                    self.scale_range = Some((low.min(scales.min), high.max(scales.max)));
                }
                Some(Values::Float { rms, largest }) => {
                    spreads.push(Spread { min: *rms, median: *rms, max: *largest });
                }
                None => {}
            }
        }
        self.zero_fraction = (weights > 0).then(|| zeros as f64 / weights as f64);
        self.kinds = kinds
            .into_iter()
            .map(|(mut kind, _, spreads)| {
                let largest = spreads.iter().map(|s| s.max).fold(0.0, f32::max);
                let smallest = spreads.iter().map(|s| s.min).fold(f32::MAX, f32::min);
                let median = Spread::of(spreads.iter().map(|s| s.median).collect()).median;
                kind.spread = (!spreads.is_empty()).then_some(Spread { min: smallest, median, max: largest });
                kind
            })
            .collect();
    }
}

/// Which layer a tensor is in, and what it does there. Names of Hugging Face and of GGUF alike: `model.layers.3.mlp.up_proj.weight`,
/// `blk.3.ffn_up.weight`.
fn place(name: &str) -> (Option<usize>, String) {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let parts: Vec<&str> = name.split('.').collect();
    let at = parts.iter().position(|part| part.parse::<usize>().is_ok());
    let layer = at.and_then(|at| parts[at].parse().ok());
    let rest = at.map_or(&parts[..], |at| &parts[at + 1..]);
    let common = ["model", "self_attn", "mlp", "language_model", "linear_attn", "block_sparse_moe"];
    let rest = rest.iter().filter(|part| !common.contains(part));
    let kind: Vec<&str> = rest.map(|part| if part.parse::<usize>().is_ok() { "*" } else { part }).collect();
    (layer, if kind.is_empty() { name.to_owned() } else { kind.join(".") })
}

/// Which part of a model a tensor belongs to, by its name.
fn part_of(name: &str) -> Part {
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    let last = name.strip_suffix(".weight").unwrap_or(name).rsplit('.').next().unwrap_or_default();
    match () {
        () if last.contains("norm") || last.starts_with("ln_") || last.ends_with("_ln") => Part::Norms,
        () if has(&["token_embd", "embed_tokens", "wte.", "tok_embeddings", "word_embeddings"]) => {
            Part::Embedding
        }
        () if name.starts_with("output.") || has(&["lm_head"]) => Part::Head,
        () if has(&["mlp", "ffn", "feed_forward", "expert", "block_sparse_moe"]) => Part::FeedForward,
        () if has(&["attn", "attention", "ssm", "mamba", "mixer", "conv1d"]) => Part::Attention,
        () => Part::Other,
    }
}

#[cfg(test)]
mod tests;

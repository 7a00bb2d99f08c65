//! Weights stored in a rotated basis: the `prism.hadamard.*` keys of GGUF files, versions 1 and 2, and inputs that BitNet v2 rotates.
//!
//! A folded matrix `W'` is `W · diag(s) · H`, block by block of its inputs, with `H` the orthonormal Walsh–Hadamard matrix and
//! `s` a vector of signs for each input width. So `W x = W' · H (s ⊙ x)`: inputs of folded layers are rotated first, and rows looked
//! up in a folded embedding are rotated back, `s ⊙ H z`. A program that ignores this prints fluent nonsense, hence every doubt
//! is an error here. Keys and refusals are listed in docs/format.md.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Family, value_error};
use crate::error::ModelError;
use crate::format::Checkpoint;
use crate::format::gguf::{Array, Metadata, Value, required};
use crate::ops::Rotate;
use crate::weights::gguf_name;

const PREFIX: &str = "prism.hadamard.";
const TRANSFORM: &str = "normalized-sylvester-walsh-hadamard";
const AXIS: &str = "input-last-dimension";
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

/// Layers of a block whose inputs this version rotates; the last three are those of gated DeltaNets.
const LAYERS: [&str; 10] = [
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
    "attn_qkv",
    "attn_gate",
    "ssm_out",
];

/// Layers whose inputs BitNet v2 rotates, as folders and as GGUF call them.
const INPUTS: [(&str, &str); 2] = [("o_proj", "attn_output"), ("down_proj", "ffn_down")];

const KEYS: [&str; 11] = [
    "version",
    "transform",
    "axis",
    "block_size",
    "sign_mode",
    "sign_widths",
    "sign_values",
    "weight_names",
    "inverse_weight_names",
    "gdn_v_grouped",
    "tied_output",
];

/// ±1 for every input, by input width.
type Signs = BTreeMap<usize, Arc<[f32]>>;

/// Which weights of a model are folded into a rotation, and the rotation.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    block: usize,
    /// `None`: +1 for all.
    signs: Option<Signs>,
    /// GGUF names of the folded matrices.
    folded: BTreeSet<String>,
    /// Whether rows of the embedding are rotated too.
    latent_embedding: bool,
    /// Whether the embedding is the head as well (version 2).
    tied_output: bool,
    /// Whether folded output projections of gated DeltaNets take their heads in grouped order, in which they were folded
    /// (`gdn_v_grouped`), and not in the order that GGUF has everywhere else.
    keeps_groups: bool,
}

impl Rotation {
    /// The rotation that a GGUF file declares, `None` where it declares none.
    ///
    /// # Errors
    /// For a declaration that is incomplete, contradicts itself or the tensors, or asks for something that this version does not
    /// do; each names the key or the tensor.
    pub(super) fn from_gguf(
        file: &Checkpoint,
        meta: &Metadata,
        family: Family,
        layers: usize,
    ) -> Result<Option<Self>, ModelError> {
        let mut keys =
            meta.iter().map(|(key, _)| key).filter(|key| key.starts_with("prism.hadamard")).peekable();
        if keys.peek().is_none() {
            return Ok(None);
        }
        if let Some(unknown) =
            keys.find(|key| key.strip_prefix(PREFIX).is_none_or(|key| !KEYS.contains(&key)))
        {
            let what = "is not known, and a rotation that is half understood gives nonsense".to_owned();
            return Err(ModelError::Metadata { key: unknown.to_owned(), what });
        }
        if !matches!(family, Family::Llama | Family::Mistral | Family::Qwen3 | Family::Qwen35) {
            let found = format!("{family:?}, with rotated weights (`{PREFIX}*`)");
            return Err(value_error(
                "general.architecture",
                found,
                "`llama`, `qwen3` or `qwen35`, whose rotation this version runs",
            ));
        }
        Declaration { file, meta, layers, hybrid: family == Family::Qwen35 }.read().map(Some)
    }

    /// Inputs of these layers of every block rotated before they are rounded, in blocks of `block` and without signs: BitNet v2
    /// (<https://arxiv.org/abs/2504.18415>, section 3.1), whose weights are learned in that basis.
    ///
    /// # Errors
    /// For a block that is no power of two, no layers, or others than `o_proj` and `down_proj`.
    pub fn of_inputs(layers: usize, modules: &[String], block: usize) -> Result<Self, ModelError> {
        let section = |field: &str| format!("quantization_config.hadamard.{field}");
        if !block.is_power_of_two() {
            return Err(value_error(&section("block_size"), block, "a power of two"));
        }
        let known = |module: &String| INPUTS.iter().any(|(name, _)| name == module);
        if modules.is_empty() || !modules.iter().all(known) {
            let found = format!("[{}]", modules.iter().map(|m| shown(m)).collect::<Vec<_>>().join(", "));
            return Err(value_error(&section("modules"), found, "`o_proj`, `down_proj` or both"));
        }
        let rotated = INPUTS.iter().filter(|(name, _)| modules.iter().any(|module| module == name));
        let of_block = |n: usize| rotated.clone().map(move |(_, stored)| format!("blk.{n}.{stored}.weight"));
        Ok(Self {
            block,
            signs: None,
            folded: (0..layers).flat_map(of_block).collect(),
            latent_embedding: false,
            tied_output: false,
            keeps_groups: false,
        })
    }

    /// What [`Rotation::of_inputs`] was given.
    pub(super) fn modules(&self) -> Vec<&'static str> {
        let rotated = |stored: &str| self.folded.iter().any(|name| name.contains(stored));
        INPUTS.iter().filter(|(_, stored)| rotated(stored)).map(|(name, _)| *name).collect()
    }

    /// The rotation of the input of the linear layer that Hugging Face calls `name`, `cols` wide; `None` if it is not folded.
    ///
    /// # Errors
    /// When it is folded, but there is no rotation of that width.
    pub fn of_linear(&self, name: &str, cols: usize) -> Result<Option<Rotate>, ModelError> {
        let stored = gguf_name(&format!("{name}.weight"));
        self.folded.contains(&stored).then(|| self.of_width(&stored, cols)).transpose()
    }

    /// The rotation of the embedding's rows, `hidden_size` wide; `None` if they are not rotated.
    ///
    /// # Errors
    /// When they are, but there is no rotation of that width.
    pub fn of_embedding(&self, hidden_size: usize) -> Result<Option<Rotate>, ModelError> {
        self.latent_embedding.then(|| self.of_width(EMBEDDING, hidden_size)).transpose()
    }

    /// Folded matrices, the embedding not counted.
    pub fn folded(&self) -> usize {
        self.folded.len()
    }

    /// Inputs that are mixed with one another.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Whether there are folded output projections of gated DeltaNets that take their heads in grouped order.
    pub(crate) fn keeps_groups(&self) -> bool {
        self.keeps_groups && self.folded.iter().any(|name| name.ends_with(".ssm_out.weight"))
    }

    /// Whether the tensor that GGUF calls `name` is folded.
    pub(crate) fn folds(&self, name: &str) -> bool {
        self.folded.contains(name)
    }

    fn of_width(&self, tensor: &str, width: usize) -> Result<Rotate, ModelError> {
        if !width.is_multiple_of(self.block) {
            let what =
                format!("it has {width} columns, which are no whole rotation blocks of {}", self.block);
            return Err(ModelError::tensor(tensor, what));
        }
        let of_width = |signs: &Signs| {
            signs.get(&width).cloned().ok_or_else(|| {
                let what =
                    format!("it is rotated, but `{PREFIX}sign_widths` has no signs for its {width} columns");
                ModelError::tensor(tensor, what)
            })
        };
        Ok(Rotate { block: self.block, signs: self.signs.as_ref().map(of_width).transpose()? })
    }

    /// The keys that [`Rotation::from_gguf`] reads back to the same rotation.
    pub(super) fn to_gguf(&self) -> Vec<(String, Value)> {
        let text = |s: &str| Value::String(s.into());
        let names = |names: Vec<String>| Value::Array(Array::String(names));
        let mut out = vec![
            ("version", Value::U32(1 + u32::from(self.tied_output))),
            ("transform", text(TRANSFORM)),
            ("axis", text(AXIS)),
            ("block_size", Value::U32(self.block as u32)),
            ("sign_mode", text(if self.signs.is_some() { "explicit" } else { "identity" })),
        ];
        if let Some(signs) = &self.signs {
            let widths = signs.keys().map(|&w| w as i32).collect();
            let values = signs.values().flat_map(|s| s.iter().map(|&s| s as i32)).collect();
            out.push(("sign_widths", Value::Array(Array::I32(widths))));
            out.push(("sign_values", Value::Array(Array::I32(values))));
        }
        out.push(("weight_names", names(self.folded.iter().cloned().collect())));
        let latent = self.latent_embedding.then(|| EMBEDDING.to_owned());
        out.push(("inverse_weight_names", names(latent.into_iter().collect())));
        for (key, _) in
            [("gdn_v_grouped", self.keeps_groups), ("tied_output", self.tied_output)].iter().filter(|f| f.1)
        {
            out.push((key, Value::Bool(true)));
        }
        out.into_iter().map(|(key, value)| (format!("{PREFIX}{key}"), value)).collect()
    }
}

/// The keys of one file.
struct Declaration<'a> {
    file: &'a Checkpoint,
    meta: &'a Metadata,
    layers: usize,
    /// Whether there are gated DeltaNet layers.
    hybrid: bool,
}

impl Declaration<'_> {
    fn read(&self) -> Result<Rotation, ModelError> {
        let tied_output = self.meta.bool(&key("tied_output"))?.unwrap_or(false);
        match (required(&key("version"), self.meta.u64(&key("version"))?)?, tied_output) {
            (1, false) | (2, true) => {}
            (1, true) => return Err(wrong("tied_output", true, "false in version 1")),
            (2, false) => return Err(wrong("tied_output", false, "true in version 2")),
            (other, _) => return Err(wrong("version", other, "1 or 2, the versions there are")),
        }
        self.text("transform", &[TRANSFORM])?;
        self.text("axis", &[AXIS])?;
        let explicit = self.text("sign_mode", &["explicit", "identity"])? == "explicit";
        let keeps_groups = self.meta.bool(&key("gdn_v_grouped"))?.unwrap_or(false);
        if keeps_groups && !self.hybrid {
            return Err(wrong("gdn_v_grouped", true, "false in an architecture without linear attention"));
        }
        let block = required(&key("block_size"), self.meta.u64(&key("block_size"))?)?;
        let block = usize::try_from(block)
            .ok()
            .filter(|b| b.is_power_of_two())
            .ok_or_else(|| wrong("block_size", block, "a power of two"))?;
        let signs = if explicit { Some(self.signs(block)?) } else { self.no_signs()? };
        let folded = self.names("weight_names")?;
        if folded.is_empty() {
            return Err(wrong("weight_names", "an empty list", "the names of the folded weights"));
        }
        let inverse = self.names("inverse_weight_names")?;
        if let Some(name) = inverse.iter().find(|name| *name != EMBEDDING) {
            let found = format!("`{}`", shown(name));
            return Err(wrong("inverse_weight_names", found, format!("`{EMBEDDING}` alone")));
        }
        let latent_embedding = !inverse.is_empty();
        let rotation = Rotation { block, signs, latent_embedding, tied_output, keeps_groups, folded };
        self.check(&rotation)?;
        Ok(rotation)
    }

    /// The declaration against the tensors.
    fn check(&self, rotation: &Rotation) -> Result<(), ModelError> {
        let own_head = self.file.info(HEAD).is_some();
        match (rotation.tied_output, rotation.latent_embedding) {
            (true, _) if own_head => {
                let expected = format!("false beside a tensor `{HEAD}`");
                return Err(wrong("tied_output", true, expected));
            }
            (true, false) => {
                let expected = format!("`{EMBEDDING}`, since the head is tied to it (tied_output)");
                return Err(wrong("inverse_weight_names", "without it", expected));
            }
            (false, true) if !own_head => {
                let found = format!("`{EMBEDDING}`, which the head shares");
                let expected = format!(
                    "empty where there is no tensor `{HEAD}`, unless tied_output says so (version 2)"
                );
                return Err(wrong("inverse_weight_names", found, expected));
            }
            _ => {}
        }
        for name in &rotation.folded {
            if !self.is_layer(name) {
                let kinds = self.kinds().join(", ");
                let expected = format!(
                    "`{HEAD}` or `blk.N.KIND.weight`, KIND one of {kinds} and N below {}",
                    self.layers
                );
                return Err(wrong("weight_names", format!("`{}`", shown(name)), expected));
            }
        }
        let latent = rotation.latent_embedding.then_some(EMBEDDING);
        for name in rotation.folded.iter().map(String::as_str).chain(latent) {
            let tensor = self.file.tensor(name)?;
            let &[_, cols] = tensor.shape() else {
                let what = format!(
                    "it is named as rotated, so a matrix is expected, but its shape is {:?}",
                    tensor.shape()
                );
                return Err(ModelError::tensor(name, what));
            };
            rotation.of_width(name, cols)?;
        }
        Ok(())
    }

    fn kinds(&self) -> &'static [&'static str] {
        if self.hybrid { &LAYERS } else { &LAYERS[..LAYERS.len() - 3] }
    }

    fn is_layer(&self, name: &str) -> bool {
        if name == HEAD {
            return true;
        }
        let parts = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let Some((number, kind)) = parts else { return false };
        let known = kind.strip_suffix(".weight").is_some_and(|kind| self.kinds().contains(&kind));
        // The name must be the tensor's own, so `blk.01` and `blk.+1` are none.
        known && number.parse::<usize>().is_ok_and(|n| n < self.layers && n.to_string() == number)
    }

    fn text(&self, name: &str, known: &[&str]) -> Result<&str, ModelError> {
        let found = required(&key(name), self.meta.str(&key(name))?)?;
        match known.contains(&found) {
            true => Ok(found),
            false => {
                let known: Vec<String> = known.iter().map(|k| format!("`{k}`")).collect();
                Err(wrong(name, format!("`{}`", shown(found)), known.join(" or ")))
            }
        }
    }

    fn numbers(&self, name: &str) -> Result<Option<Vec<i64>>, ModelError> {
        let Some(array) = self.meta.array(&key(name))? else { return Ok(None) };
        let numbers = array.to_i64s();
        numbers.map(Some).ok_or_else(|| wrong(name, "an array of another type", "an array of integers"))
    }

    fn signs(&self, block: usize) -> Result<Signs, ModelError> {
        let widths = required(&key("sign_widths"), self.numbers("sign_widths")?)?;
        let values = required(&key("sign_values"), self.numbers("sign_values")?)?;
        if widths.is_empty() {
            return Err(wrong("sign_widths", "an empty list", "the input widths of the folded weights"));
        }
        let mut signs = BTreeMap::new();
        let mut rest = &values[..];
        let mut total = 0u64;
        for &width in &widths {
            let whole = usize::try_from(width).ok().filter(|w| *w > 0 && w.is_multiple_of(block));
            let Some(columns) = whole else {
                return Err(wrong(
                    "sign_widths",
                    width,
                    format!("a positive multiple of block_size = {block}"),
                ));
            };
            total = total.saturating_add(columns as u64);
            let Some((own, others)) = rest.split_at_checked(columns) else { continue };
            rest = others;
            if let Some(other) = own.iter().find(|s| ![1, -1].contains(*s)) {
                return Err(wrong("sign_values", other, "1 or -1"));
            }
            if signs.insert(columns, own.iter().map(|&s| s as f32).collect()).is_some() {
                return Err(wrong("sign_widths", format!("{width} twice"), "every width once"));
            }
        }
        if total != values.len() as u64 {
            let found = format!("{} values", values.len());
            return Err(wrong("sign_values", found, format!("{total} values, the sum of sign_widths")));
        }
        Ok(signs)
    }

    /// Signs have no place beside `sign_mode` `identity`.
    fn no_signs(&self) -> Result<Option<Signs>, ModelError> {
        for name in ["sign_widths", "sign_values"] {
            if self.numbers(name)?.is_some_and(|numbers| !numbers.is_empty()) {
                return Err(wrong(name, "a list", "absent where sign_mode is `identity`"));
            }
        }
        Ok(None)
    }

    /// A list of names without repetition; an absent one is empty.
    fn names(&self, name: &str) -> Result<BTreeSet<String>, ModelError> {
        let Some(array) = self.meta.array(&key(name))? else { return Ok(BTreeSet::new()) };
        let Some(names) = array.as_strings() else {
            // Writers give an empty list any type.
            return match array.is_empty() {
                true => Ok(BTreeSet::new()),
                false => Err(wrong(name, "an array of another type", "an array of strings")),
            };
        };
        let mut seen = BTreeSet::new();
        for entry in names {
            if !seen.insert(entry.clone()) {
                return Err(wrong(name, format!("`{}` twice", shown(entry)), "every name once"));
            }
        }
        Ok(seen)
    }
}

fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

fn wrong(name: &str, found: impl ToString, expected: impl Into<String>) -> ModelError {
    value_error(&key(name), found, expected)
}

/// The beginning of a text that a file chose.
fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

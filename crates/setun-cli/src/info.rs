//! `setun info`: what a model file is.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};
use setun::config::{
    Activation, ActivationType, Family, Hybrid, InnerNorms, ModelConfig, Numerics, RopeScaling, Storage,
};
use setun::format::{Checkpoint, CheckpointKind};
use setun::inspect::{Part, Survey, survey};
use setun::recommended::Recommended;
use setun::tokenizer::Tokenizer;
use setun::weights::Weights;

use crate::{default_model, model, output};

/// Tell what a model is: family, shape, parameters, packing, scales, zero fraction, bytes by part, tokenizer, and what is
/// odd about it.
///
/// Every tensor that the model uses is read and checked on the way. A file that cannot be run is described as far
/// as it goes, and why it cannot be run is among the oddities.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  setun info model.gguf\n  setun info ./folder --json\n  setun info            the model in the program"
)]
pub struct InfoArgs {
    /// Model file (GGUF, safetensors, llama2.c), folder or hub name (OWNER/NAME[:FILE]) [default: the model in the program]
    model: Option<PathBuf>,
    /// Tokenizer to describe instead of the model's own
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Also list every tensor: name, shape, type, bytes
    #[arg(long)]
    tensors: bool,
    /// Print the works that the model in the program was trained on, with authors and licences
    #[arg(long, conflicts_with_all = ["model", "json", "tensors", "tokenizer"])]
    attribution: bool,
    #[command(flatten)]
    open: model::OpenArgs,
}

pub fn info(args: InfoArgs) -> Result<()> {
    if args.attribution {
        return Ok(output::print(default_model::ATTRIBUTION)?);
    }
    let file = args.open.open(args.model.as_deref())?;
    let mut odd = Vec::new();
    let config = ModelConfig::of(&file).map_err(|error| odd.push(format!("cannot be run: {error}"))).ok();
    let found = config.as_ref().and_then(|config| {
        survey(&file, config).map_err(|error| odd.push(format!("cannot be run: {error}"))).ok()
    });
    let tokenizer = match &args.tokenizer {
        Some(path) => Some(model::tokenizer_at(path)?),
        None => Tokenizer::of(&file).map_err(|error| odd.push(error.to_string())).ok(),
    };
    if let Some(config) = &config {
        let unplaced = Weights::new(&file, config).check_all_used();
        odd.extend(unplaced.err().map(|error| format!("cannot be run: {error}")));
        oddities(config, found.as_ref(), tokenizer.as_ref(), &mut odd);
    }
    let sampling = Recommended::of(&file).map_err(|error| odd.push(error.to_string())).unwrap_or_default();
    let facts = Facts { file: &file, config, found, tokenizer, sampling, odd };
    if args.json {
        let mut object = facts.json();
        if args.tensors {
            object["tensors"] = file.tensors().map(tensor_json).collect();
        }
        return output::print_json(&object);
    }
    let mut text = facts.text()?;
    if args.tensors {
        writeln!(text, "tensors")?;
        for t in file.tensors() {
            writeln!(
                text,
                "  {:48} {:10} {:?} {}",
                t.name,
                t.encoding,
                t.shape,
                output::bytes(t.stored_bytes())
            )?;
        }
    }
    Ok(output::print(&text)?)
}

fn tensor_json(t: &setun::format::TensorInfo) -> Value {
    json!({ "name": t.name, "shape": t.shape, "type": t.encoding.name(), "bytes": t.stored_bytes() })
}

/// What a user should know before trusting the model.
fn oddities(
    config: &ModelConfig,
    found: Option<&Survey>,
    tokenizer: Option<&Tokenizer>,
    odd: &mut Vec<String>,
) {
    if let Some(found) = found {
        if let Some(first) = found.not_finite.first() {
            let more = match found.not_finite.len() {
                1 => String::new(),
                n => format!(" and {} more tensors", n - 1),
            };
            odd.push(format!("`{first}`{more} hold NaN or infinite values: the file is damaged"));
        }
        if !found.unused.is_empty() {
            let (few, n) = (
                found.unused.iter().take(3).map(|n| format!("`{n}`")).collect::<Vec<_>>(),
                found.unused.len(),
            );
            odd.push(format!(
                "{n} tensors are not used: {}{}",
                few.join(", "),
                if n > 3 { ", …" } else { "" }
            ));
        }
        if found.packing.keys().any(|kind| kind.contains("masters")) {
            odd.push("holds float masters that are rounded to ternary when loaded: converting makes it several times smaller".into());
        }
        if found.zero_fraction.is_some_and(|zeros| !(0.05..=0.95).contains(&zeros)) {
            odd.push(format!(
                "{:.1} % of the ternary weights are 0",
                found.zero_fraction.unwrap_or(0.0) * 100.0
            ));
        }
        if let Some((low, high)) = found.scale_range
            && !(low > 0.0 && high.is_finite())
        {
            odd.push(format!("scales run from {low} to {high}"));
        }
    }
    if let Some(tokenizer) = tokenizer {
        let (model, vocabulary) = (config.vocab_size, tokenizer.vocab_size());
        if vocabulary > model {
            odd.push(format!(
                "the tokenizer has {vocabulary} tokens, but the model only {model}: some text cannot be run"
            ));
        } else if vocabulary < model {
            odd.push(format!(
                "the tokenizer has {vocabulary} tokens, the model {model}: the last {} have no text",
                model - vocabulary
            ));
        }
        if tokenizer.eos_ids().is_empty() && config.eos.is_empty() {
            odd.push("no end-of-text token is known: texts end only at their length limit".into());
        }
        let ends = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        if !config.eos.is_empty() && !config.eos.iter().any(|id| tokenizer.eos_ids().contains(id)) {
            odd.push(format!(
                "config and tokenizer disagree on the end of text ({} and {}): both end it",
                ends(&config.eos),
                ends(tokenizer.eos_ids())
            ));
        }
    }
}

struct Facts<'a> {
    file: &'a Checkpoint,
    config: Option<ModelConfig>,
    found: Option<Survey>,
    tokenizer: Option<Tokenizer>,
    sampling: Recommended,
    odd: Vec<String>,
}

impl Facts<'_> {
    /// Tensors and bytes by storage type, used or not.
    fn types(&self) -> BTreeMap<String, (usize, usize)> {
        let mut types = BTreeMap::<String, (usize, usize)>::new();
        for tensor in self.file.tensors() {
            let entry = types.entry(tensor.encoding.to_string()).or_default();
            entry.0 += 1;
            entry.1 += tensor.stored_bytes();
        }
        types
    }

    fn json(&self) -> Value {
        let types = self.types();
        let types =
            types.iter().map(|(name, (n, bytes))| (name.clone(), json!({ "tensors": n, "bytes": bytes })));
        json!({
            "path": self.file.path(),
            "container": container(self.file.kind()),
            "bytes": self.file.tensors().map(|t| t.stored_bytes()).sum::<usize>(),
            "types": types.collect::<serde_json::Map<_, _>>(),
            "runnable": self.found.is_some(),
            "model": self.config.as_ref().map(config_json),
            "packing": self.found.as_ref().map(|f| &f.packing),
            "scale_range": self.found.as_ref().map(|f| f.scale_range),
            "zero_fraction": self.found.as_ref().map(|f| f.zero_fraction),
            "bytes_by_part": self.found.as_ref().map(|f| &f.bytes),
            "not_finite_tensors": self.found.as_ref().map(|f| &f.not_finite),
            "unused_tensors": self.found.as_ref().map(|f| &f.unused),
            "tokenizer": self.tokenizer.as_ref().map(|t| json!({
                "vocab_size": t.vocab_size(),
                "bos": t.bos(),
                "eos": t.eos_ids(),
                "chat_template": t.chat_template(),
            })),
            "evidence": self.file.evidence(),
            "sampling": self.sampling,
            "odd": self.odd,
        })
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        let mut line = |name: &str, value: String| writeln!(out, "{name:12} {value}");
        let total: usize = self.file.tensors().map(|t| t.stored_bytes()).sum();
        let tensors = self.file.tensors().len();
        line("file", format!("{}", self.file.path().display()))?;
        line(
            "container",
            format!("{}, {tensors} tensors, {}", container(self.file.kind()), output::bytes(total)),
        )?;
        if let Some(c) = &self.config {
            line("family", family(c.family).to_owned())?;
            let (all, ternary) = (c.parameters(), c.block_weights());
            let active = match c.experts {
                Some(_) => format!(", {} of them used for a token", output::count(c.active_parameters())),
                None => String::new(),
            };
            let (all, ternary) = (output::count(all), output::count(ternary));
            line("parameters", format!("{all} ({ternary} in linear layers of the blocks){active}"))?;
            line("shape", shape(c))?;
            if let Some(hybrid) = &c.hybrid {
                line("hybrid", layers(hybrid))?;
            }
            line("features", features(c))?;
            line("position", rope(c))?;
            line("numerics", numerics(c))?;
        }
        if let Some(found) = &self.found {
            for (kind, group) in &found.packing {
                let bits = group.bytes as f64 * 8.0 / group.elements.max(1) as f64;
                let scales = match group.scales.is_empty() {
                    true => String::new(),
                    false => format!(", scale per {}", group.scales.join(" or ")),
                };
                let (n, size) = (group.tensors, output::bytes(group.bytes));
                line("matrices", format!("{n} × {kind}, {size}, {bits:.2} bits per weight{scales}"))?;
            }
            if let (Some(zeros), Some((low, high))) = (found.zero_fraction, found.scale_range) {
                line("ternary", format!("{:.2} % zeros, scales {low:.4e} to {high:.4e}", zeros * 100.0))?;
            }
            let part =
                |(part, bytes): (&Part, &usize)| format!("{} {}", part_name(*part), output::bytes(*bytes));
            line("bytes", found.bytes.iter().map(part).collect::<Vec<_>>().join(", "))?;
        } else {
            for (name, (n, bytes)) in self.types() {
                line("tensors", format!("{n} × {name}, {}", output::bytes(bytes)))?;
            }
        }
        if let Some(t) = &self.tokenizer {
            let ids = |ids: &[u32]| match ids {
                [] => "none".to_owned(),
                ids => ids.iter().map(|&id| token(t, id)).collect::<Vec<_>>().join(", "),
            };
            line(
                "tokenizer",
                format!(
                    "{} tokens, BOS {}, EOS {}",
                    t.vocab_size(),
                    ids(t.bos().as_slice()),
                    ids(t.eos_ids())
                ),
            )?;
            line(
                "chat",
                t.chat_template().map_or("no template".into(), |s| {
                    format!("template of {} characters", s.chars().count())
                }),
            )?;
        }
        for what in self.file.evidence() {
            line("evidence", what.clone())?;
        }
        if self.sampling != Recommended::default() {
            line("sampling", format!("recommended: {}", self.sampling))?;
        }
        if self.file.folder().is_none() {
            line("trained on", "works named by `setun info --attribution`".to_owned())?;
        }
        for what in &self.odd {
            line("odd", what.clone())?;
        }
        Ok(out)
    }
}

fn token(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.id_to_token(id) {
        Some(text) => format!("{id} `{text}`"),
        None => format!("{id} (not in the vocabulary)"),
    }
}

fn container(kind: CheckpointKind) -> &'static str {
    match kind {
        CheckpointKind::Safetensors => "safetensors",
        CheckpointKind::Gguf => "GGUF",
        CheckpointKind::Llama2c => "llama2.c",
        CheckpointKind::PyTorch => "PyTorch",
    }
}

fn part_name(part: Part) -> &'static str {
    match part {
        Part::Embedding => "embedding",
        Part::Blocks => "blocks",
        Part::Norms => "norms",
        Part::Head => "head",
    }
}

fn family(family: Family) -> &'static str {
    match family {
        Family::Llama => "Llama",
        Family::Mistral => "Mistral",
        Family::Qwen2 => "Qwen2",
        Family::Qwen3 => "Qwen3",
        Family::Qwen3Moe => "Qwen3-MoE",
        Family::Qwen35 => "Qwen3.5 (gated DeltaNet and attention layers)",
        Family::BitNet => "BitNet b1.58 (SubLN, squared ReLU)",
        Family::BitNetSilu => "BitNet b1.58 (SubLN, SiLU)",
    }
}

/// Short and stable, for scripts.
fn family_key(family: Family) -> &'static str {
    match family {
        Family::Llama => "llama",
        Family::Mistral => "mistral",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
        Family::Qwen3Moe => "qwen3-moe",
        Family::Qwen35 => "qwen3.5",
        Family::BitNet => "bitnet",
        Family::BitNetSilu => "bitnet-silu",
    }
}

fn shape(c: &ModelConfig) -> String {
    format!(
        "{} layers, hidden {}, feed-forward {}, {} heads ({} for keys) of {}, vocabulary {}, context {}",
        c.num_layers,
        c.hidden_size,
        c.intermediate_size,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.vocab_size,
        c.max_positions
    )
}

fn layers(h: &Hybrid) -> String {
    let recurrent = h.layers.iter().filter(|&&own| own).count();
    format!(
        "{recurrent} of {} layers are gated DeltaNets ({} value and {} key heads of {}, convolution over {}), state {} whatever \
         the context",
        h.layers.len(),
        h.value_heads,
        h.key_heads,
        h.head_dim,
        h.conv_kernel,
        output::bytes(h.state_bytes())
    )
}

fn features(c: &ModelConfig) -> String {
    let activation = match c.activation {
        Activation::Silu => "SiLU gate",
        Activation::Relu2 => "squared-ReLU gate",
    };
    let mut all = vec![activation.to_owned(), format!("norm ε {:e}", c.rms_norm_eps)];
    if c.pooling.is_none() {
        all.push(if c.tied { "head tied to the embedding" } else { "own head" }.to_owned());
    }
    let windowed = c.windows.iter().flatten().count();
    if let Some(window) = c.windows.iter().flatten().min() {
        all.push(format!("sliding window of {window} on {windowed} of {} layers", c.num_layers));
    }
    for (on, what) in [
        (c.sub_norms, "sub-norms"),
        (c.qk_norm, "norms on query and key heads"),
        (c.attention_gate, "gate on the output of attention"),
        (c.inner_norm_eps.is_some() && c.inner_norms == InnerNorms::All, "norms inside linear layers"),
        (
            c.inner_norm_eps.is_some() && c.inner_norms == InnerNorms::OutputAndDown,
            "norms inside o and down layers",
        ),
        (c.pooling.is_some(), "for embeddings: no output head"),
        (c.qkv_bias, "biases on q, k, v"),
        (c.output_bias, "bias on o"),
        (c.mlp_bias, "biases in the feed-forward layer"),
    ] {
        if on {
            all.push(what.to_owned());
        }
    }
    if let Some(experts) = &c.experts {
        let dense = match &experts.dense_layers[..] {
            [] => String::new(),
            list => format!(" in {} of {} layers", c.num_layers - list.len(), c.num_layers),
        };
        let (used, count, width) = (experts.used, experts.count, experts.intermediate_size);
        all.push(format!("{used} of {count} experts of width {width} for a token{dense}"));
    }
    if let Some(rotation) = &c.rotation {
        let (folded, block) = (rotation.folded(), rotation.block());
        all.push(format!("{folded} matrices rotated by Hadamard blocks of {block}"));
    }
    all.join(", ")
}

fn rope(c: &ModelConfig) -> String {
    let scaling = match &c.rope.scaling {
        RopeScaling::Default => "no scaling".to_owned(),
        RopeScaling::Linear { factor } => format!("linear scaling by {factor}"),
        RopeScaling::Dynamic { factor, .. } => format!("dynamic scaling by {factor}"),
        RopeScaling::Yarn { factor, original, .. } => format!("YaRN by {factor} from {original}"),
        RopeScaling::Llama3 { factor, original, .. } => {
            format!("Llama 3 scaling by {factor} from {original}")
        }
        RopeScaling::Divisors(_) => "a divisor for every frequency".to_owned(),
    };
    format!("RoPE, base {}, {} of {} dimensions, {scaling}", c.rope.theta, c.rope.rotary_dim, c.head_dim)
}

fn numerics(c: &ModelConfig) -> String {
    let Numerics::Ternary(ternary) = &c.numerics else { return "float".to_owned() };
    if !c.has_ternary_layers() {
        return "float: the configuration leaves every linear layer so".to_owned();
    }
    let stored = match ternary.storage {
        Storage::Masters => "float masters",
        Storage::Divide => "packed, 1/γ beside",
        Storage::Multiply => "packed, γ beside",
        Storage::SelfDescribed => "packed, γ inside",
        Storage::FloatCopies => "recognised in floats",
        Storage::Mlx { .. } => "packed by MLX",
    };
    let spared = match &ternary.exceptions {
        Some(listed) if !listed.names().is_empty() => format!(", except {}", listed.names().join(", ")),
        _ => String::new(),
    };
    match ternary.activations {
        ActivationType::Int8 => {
            format!("W1.58A8: ternary weights ({stored}), int8 activations per token{spared}")
        }
        ActivationType::Float => format!("W1.58A16: ternary weights ({stored}), float activations{spared}"),
    }
}

fn config_json(c: &ModelConfig) -> Value {
    let (numerics, scaling) = (numerics(c), format!("{:?}", c.rope.scaling));
    json!({
        "family": family_key(c.family),
        "parameters": c.parameters(),
        "active_parameters": c.active_parameters(),
        "block_weights": c.block_weights(),
        "experts": c.experts.as_ref().map(|e| json!({
            "count": e.count, "used": e.used, "intermediate_size": e.intermediate_size, "normalised": e.normalised,
            "dense_layers": e.dense_layers,
        })),
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_layers": c.num_layers,
        "heads": c.heads,
        "kv_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_positions": c.max_positions,
        "rms_norm_eps": c.rms_norm_eps,
        "tied": c.tied,
        "activation": c.activation,
        "sub_norms": c.sub_norms,
        "inner_norms": c.inner_norm_eps.is_some(),
        "qk_norm": c.qk_norm,
        "attention_gate": c.attention_gate,
        "hybrid": c.hybrid.as_ref().map(|h| json!({
            "recurrent_layers": h.layers,
            "key_heads": h.key_heads,
            "value_heads": h.value_heads,
            "head_dim": h.head_dim,
            "conv_kernel": h.conv_kernel,
            "draft_layers": h.draft_layers,
            "state_bytes": h.state_bytes(),
        })),
        "qkv_bias": c.qkv_bias,
        "output_bias": c.output_bias,
        "mlp_bias": c.mlp_bias,
        "windows": c.windows,
        "rope_theta": c.rope.theta,
        "rope_scaling": scaling,
        "ternary": c.numerics != Numerics::Float,
        "numerics": numerics,
        "activations": c.activations().to_string(),
        "rotated_matrices": c.rotation.as_ref().map_or(0, |r| r.folded()),
        "bos": c.bos,
        "eos": c.eos,
        "embedding": c.pooling.is_some(),
    })
}

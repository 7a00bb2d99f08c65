//! The screen: what a person reads, at most 100 columns wide.

use setun::chat::TurnEnd;
use setun::config::{
    Activation, ActivationType, Family, Hybrid, InnerNorms, ModelConfig, Numerics, Origin, RopeScaling,
    Storage,
};
use setun::format::CheckpointKind;
use setun::inspect::{Part, Survey};
use setun::recommended::Recommended;
use setun::tokenizer::Tokenizer;

use super::Facts;
use crate::output;

const WIDTH: usize = 100;
/// Columns before the text: a name and a blank.
const MARGIN: usize = 13;
/// Columns of a bar that stands for everything.
const BAR: usize = 30;
/// Kinds of matrices that are listed; a hybrid has some dozens.
const KINDS: usize = 16;

/// Lines with a name in the margin; long ones go on below, indented.
#[derive(Default)]
struct Screen(String);

impl Screen {
    fn line(&mut self, name: &str, text: &str) {
        let mut name = name;
        let mut line = String::new();
        for word in text.split(' ') {
            let longer = line.chars().count() + 1 + word.chars().count();
            if !line.is_empty() && longer > WIDTH - MARGIN {
                self.row(name, &line);
                (name, line) = ("", String::new());
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line += word;
        }
        self.row(name, &line);
    }

    /// A line as it is.
    fn row(&mut self, name: &str, text: &str) {
        self.0 += format!("{name:width$}{text}", width = MARGIN).trim_end();
        self.0.push('\n');
    }
}

pub(super) fn screen(facts: &Facts) -> String {
    let mut out = Screen::default();
    let file = facts.file;
    let total: usize = file.tensors().map(|t| t.stored_bytes()).sum();
    let (n, size) = (file.tensors().len(), output::bytes(total));
    let tensors = if n == 1 { "tensor" } else { "tensors" };
    out.line("file", &format!("{}", file.path().display()));
    out.line("container", &format!("{}, {n} {tensors}, {size}", container(file.kind())));
    if let Some(c) = &facts.config {
        let (all, blocks) = (output::count(c.parameters()), output::count(c.block_weights()));
        let active = match c.experts {
            Some(_) => format!(", {} used for a token", output::count(c.active_parameters())),
            None => String::new(),
        };
        let family = family(c.family);
        out.line("model", &format!("{family}, {all} parameters, {blocks} of them in linear layers{active}"));
        out.line("shape", &shape(c));
        if let Some(hybrid) = &c.hybrid {
            out.line("hybrid", &layers(hybrid));
        }
        out.line("features", &features(c));
        out.line("position", &rope(c));
        out.line("numerics", &numerics(c));
    }
    match &facts.found {
        Some(found) => bytes(&mut out, found, total),
        None => {
            for (name, (n, bytes)) in facts.types() {
                out.line("tensors", &format!("{n} × {name}, {}", output::bytes(bytes)));
            }
        }
    }
    facts_by_origin(&mut out, facts);
    talk(&mut out, facts);
    for what in file.evidence() {
        out.line("evidence", &output::flags(what));
    }
    if facts.sampling != Recommended::default() {
        out.line("sampling", &format!("recommended: {}", facts.sampling));
    }
    if file.folder().is_none() {
        out.line("trained on", "works named by `setun info --attribution`");
    }
    for what in &facts.losses {
        out.line("lost", what);
    }
    for what in &facts.odd {
        out.line("warning", what);
    }
    out.0
}

/// Where the bytes are, how they are packed, and what the matrices of each kind hold.
fn bytes(out: &mut Screen, found: &Survey, total: usize) {
    for (kind, group) in &found.packing {
        let bits = group.bytes as f64 * 8.0 / group.elements.max(1) as f64;
        let scales = match group.scales.is_empty() {
            true => String::new(),
            false => format!(", a scale per {}", group.scales.join(" or ")),
        };
        let (n, size) = (group.tensors, output::bytes(group.bytes));
        out.line("packing", &format!("{n} × {kind}, {size}, {bits:.2} bits per weight{scales}"));
    }
    for (i, (part, &bytes)) in found.bytes.iter().enumerate() {
        let share = bytes as f64 / total.max(1) as f64;
        let (size, percent) = (output::bytes(bytes), share * 100.0);
        let bar = bar(share);
        out.row(
            if i == 0 { "bytes" } else { "" },
            &format!("{:12} {size:>8} {percent:5.1} %  {bar}", part_name(*part)),
        );
    }
    if let Some(zeros) = found.zero_fraction {
        let range = found.scale_range.map_or(String::new(), |(a, b)| format!(", scales {a:.3e} to {b:.3e}"));
        out.line("ternary", &format!("{:.2} % zeros{range}", zeros * 100.0));
    }
    if found.kinds.is_empty() {
        return;
    }
    let head = ["kind", "n", "zeros", "scale: min", "median", "max", "max/min"];
    let row = |cells: [&str; 7]| {
        let [kind, n, zeros, min, median, max, ratio] = cells;
        format!("{kind:24} {n:>5} {zeros:>8} {min:>11} {median:>9} {max:>9} {ratio:>9}")
    };
    out.row("weights", &row(head));
    for kind in found.kinds.iter().take(KINDS) {
        let zeros = match (kind.zero_fraction, kind.spread) {
            (Some(zeros), _) => format!("{:.1} %", zeros * 100.0),
            (None, Some(_)) => "float".to_owned(),
            (None, None) => "unread".to_owned(),
        };
        let figures = kind.spread.map_or(Default::default(), |s| {
            let ratio = if s.min > 0.0 { format!("{:.1}", s.max / s.min) } else { String::new() };
            [format!("{:.2e}", s.min), format!("{:.2e}", s.median), format!("{:.2e}", s.max), ratio]
        });
        let [min, median, max, ratio] = &figures;
        let name: String = kind.kind.chars().take(24).collect();
        out.row("", &row([&name, &kind.tensors.to_string(), &zeros, min, median, max, ratio]));
    }
    if found.kinds.len() > KINDS {
        out.row("", &format!("more in --json, of {} kinds in all", found.kinds.len()));
    }
    if found.kinds.iter().any(|kind| kind.zero_fraction.is_none() && kind.spread.is_some()) {
        out.row("", "(float: root mean square for min and median, largest value for max)");
    }
}

fn bar(share: f64) -> String {
    let eighths = (share * BAR as f64 * 8.0).round() as usize;
    let end = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
    "█".repeat(eighths / 8) + end
}

/// Which facts the file itself gives, and which it does not.
fn facts_by_origin(out: &mut Screen, facts: &Facts) {
    let of = |origin: Origin| facts.provenance.iter().filter(move |fact| fact.origin == origin);
    let names: Vec<&str> = of(Origin::File).map(|fact| fact.name).collect();
    if !names.is_empty() {
        out.line("from file", &names.join(", "));
    }
    for (label, origin) in [
        ("from family", Origin::Family),
        ("by default", Origin::Default),
        ("derived", Origin::Derived),
        ("assumed", Origin::Assumed),
    ] {
        // Each reason once, behind all that it explains.
        let mut told: Vec<(String, &str)> = Vec::new();
        for fact in of(origin) {
            let what = match fact.value.as_str() {
                "true" => fact.name.to_owned(),
                value => format!("{} {value}", fact.name),
            };
            match told.iter_mut().find(|(_, from)| *from == fact.from) {
                Some((earlier, _)) => *earlier += &format!(", {what}"),
                None => told.push((what, &fact.from)),
            }
        }
        if !told.is_empty() {
            let told: Vec<String> = told.iter().map(|(what, from)| format!("{what} ({from})")).collect();
            out.line(label, &told.join("; "));
        }
    }
}

/// Tokenizer, template, end tokens.
fn talk(out: &mut Screen, facts: &Facts) {
    let Some(t) = &facts.tokenizer else { return };
    let bos = t.bos().map_or("none".to_owned(), |id| token(t, id));
    out.line("tokenizer", &format!("{} tokens, BOS {bos}", t.vocab_size()));
    out.line("template", &template(facts, t));
    let ends: Vec<String> =
        facts.ends.iter().map(|end| format!("{} ({})", token(t, end.id), end.sources.join(", "))).collect();
    out.line("ends at", &if ends.is_empty() { "nothing known".to_owned() } else { ends.join(", ") });
}

fn template(facts: &Facts, tokenizer: &Tokenizer) -> String {
    let Some(talk) = &facts.chat else { return "none: prompts are continued as they are".to_owned() };
    let mut parts = vec![format!("from {}", talk.origin)];
    let own = tokenizer.chat_template().filter(|_| !tokenizer.chat_templates().is_empty());
    parts.extend(own.map(|source| format!("{} characters", source.chars().count())));
    parts.push(
        if talk.system.is_none() { "takes system messages" } else { "takes no system messages" }.into(),
    );
    if let Some(tags) = talk.tags {
        parts.push(format!("thinks between {} and {}", tags.open, tags.close));
    }
    parts.push(match &talk.turn_end {
        TurnEnd::Token(id) => format!("ends a turn with {}", token(tokenizer, *id)),
        TurnEnd::Text(text) => format!("ends a turn with the text `{text}`"),
        TurnEnd::Unknown => "marks no end of a turn".to_owned(),
    });
    let more: Vec<&str> = tokenizer
        .chat_templates()
        .iter()
        .map(|t| t.name.as_str())
        .filter(|name| *name != "default")
        .collect();
    if !more.is_empty() {
        parts.push(format!("also named: {}", more.join(", ")));
    }
    parts.join(", ")
}

pub(super) fn part_name(part: Part) -> &'static str {
    match part {
        Part::Embedding => "embedding",
        Part::Attention => "attention",
        Part::FeedForward => "feed-forward",
        Part::Norms => "norms",
        Part::Head => "head",
        Part::Other => "other",
    }
}

pub(super) fn token(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.id_to_token(id) {
        Some(text) => format!("{id} `{text}`"),
        None => format!("{id} (not in the vocabulary)"),
    }
}

pub(super) fn container(kind: CheckpointKind) -> &'static str {
    match kind {
        CheckpointKind::Safetensors => "safetensors",
        CheckpointKind::Gguf => "GGUF",
        CheckpointKind::Llama2c => "llama2.c",
        CheckpointKind::PyTorch => "PyTorch",
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

pub(super) fn numerics(c: &ModelConfig) -> String {
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
        ActivationType::Int4 => {
            format!("W1.58A4: ternary weights ({stored}), int4 activations per token{spared}")
        }
        ActivationType::Float => format!("W1.58A16: ternary weights ({stored}), float activations{spared}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_go_on_below_within_the_screen() {
        let mut out = Screen::default();
        out.line("warning", &"many words ".repeat(30));
        assert!(out.0.lines().count() > 3);
        assert!(out.0.lines().all(|line| line.chars().count() <= WIDTH));
        assert!(
            out.0
                .lines()
                .skip(1)
                .all(|line| line.starts_with("             many") || line.starts_with("             words"))
        );
    }

    #[test]
    fn bars_are_as_long_as_their_share() {
        assert_eq!(
            (bar(0.0), bar(1.0).chars().count(), bar(0.5).chars().count()),
            (String::new(), BAR, BAR / 2)
        );
        assert_eq!(bar(1.5 / BAR as f64), "█▌");
    }
}

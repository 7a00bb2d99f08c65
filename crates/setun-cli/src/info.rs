//! `setun info`: what a model file is.

mod json;
mod plot;
mod text;
mod warnings;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget};
use serde_json::{Value, json};
use setun::chat::{Chat, Tags, TurnEnd};
use setun::config::{Fact, ModelConfig};
use setun::convert;
use setun::format::Checkpoint;
use setun::inspect::{Survey, survey};
use setun::recommended::Recommended;
use setun::tokenizer::Tokenizer;
use setun::weights::Weights;

use crate::{default_model, model, output, progress};

/// Tell what a model is: family, shape, numerics, packing, where its bytes are, zeros and scales of each kind of matrix, which
/// facts its files give and which they do not, tokenizer, chat template, end tokens, and what is odd about it.
///
/// Every tensor that the model uses is read on the way. A file that cannot be run is described as far as its names and types go,
/// and why it cannot be run is among the warnings.
///
/// `from file` lists what the files themselves say. The other facts have their reason beside them: `from family` (the
/// family's table), `by default` (what a missing key means), `derived` (from other facts), `assumed` (nothing says it; a flag
/// decides otherwise).
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  setun info model.gguf\n  setun info ./folder --json\n  setun info model.gguf --plot weights.svg\n  setun info            the model in the program"
)]
pub struct InfoArgs {
    /// Model file (GGUF, safetensors, llama2.c) or folder [default: the model in the program]
    model: Option<PathBuf>,
    /// Tokenizer to describe instead of the model's own
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Print one JSON object: all that is shown and more, matrix by matrix
    #[arg(long)]
    json: bool,
    /// Also list every tensor: name, shape, type, bytes
    #[arg(long)]
    tensors: bool,
    /// Draw shares of -1, 0 and +1 and the spread of scales, by layer and kind of matrix, into this SVG file
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Print the works that the model in the program was trained on, with authors and licences
    #[arg(long, conflicts_with_all = ["model", "json", "tensors", "tokenizer", "plot"])]
    attribution: bool,
    #[command(flatten)]
    open: model::OpenArgs,
}

pub fn info(args: InfoArgs) -> Result<()> {
    if args.attribution {
        return Ok(output::print(default_model::ATTRIBUTION)?);
    }
    if let Some(path) = &args.plot {
        output::check_svg(path)?;
    }
    let file = args.open.open(args.model.as_deref())?;
    let facts = Facts::of(&file, args.tokenizer.as_deref())?;
    if let Some(path) = &args.plot {
        plot::draw(&facts, path)?;
        eprintln!("{}", path.display());
    }
    if args.json {
        let mut object = json::object(&facts);
        if args.tensors {
            object["tensors"] = file.tensors().map(tensor_json).collect();
        }
        return output::print_json(&object);
    }
    let mut text = text::screen(&facts);
    if args.tensors {
        writeln!(text, "tensors")?;
        for t in file.tensors() {
            let size = output::bytes(t.stored_bytes());
            writeln!(text, "  {:48} {:10} {:?} {size}", t.name, t.encoding, t.shape)?;
        }
    }
    Ok(output::print(&text)?)
}

fn tensor_json(t: &setun::format::TensorInfo) -> Value {
    json!({ "name": t.name, "shape": t.shape, "type": t.encoding.name(), "bytes": t.stored_bytes() })
}

/// All that is known about a model.
struct Facts<'a> {
    file: &'a Checkpoint,
    config: Option<ModelConfig>,
    /// Whether everything that it takes to run it was read.
    runnable: bool,
    provenance: Vec<Fact>,
    found: Option<Survey>,
    tokenizer: Option<Tokenizer>,
    chat: Option<ChatFacts>,
    ends: Vec<End>,
    sampling: Recommended,
    /// What conversions that made the file say they lost.
    losses: Vec<String>,
    odd: Vec<String>,
}

/// What there is to say about conversations.
struct ChatFacts {
    origin: String,
    /// Why system messages do not arrive, if they do not.
    system: Option<String>,
    tags: Option<Tags>,
    turn_end: TurnEnd,
}

/// A token that ends an answer, and who says so.
struct End {
    id: u32,
    sources: Vec<String>,
}

impl<'a> Facts<'a> {
    fn of(file: &'a Checkpoint, tokenizer: Option<&std::path::Path>) -> Result<Self> {
        let mut odd = Vec::new();
        let mut note = |what: String| odd.push(output::flags(&what));
        let config = ModelConfig::of(file).map_err(|error| note(format!("cannot be run: {error}"))).ok();
        let read = config.as_ref().and_then(|config| {
            watched(file, Some(config)).map_err(|error| note(format!("cannot be run: {error}"))).ok()
        });
        let mut runnable = read.is_some();
        let found = match read {
            Some(found) => Some(found),
            None => watched(file, None).ok(),
        };
        let tokenizer = match tokenizer {
            Some(path) => Some(model::tokenizer_at(path)?),
            None => Tokenizer::of(file).map_err(|error| note(error.to_string())).ok(),
        };
        let mut provenance = Vec::new();
        if let Some(config) = &config {
            if let Err(error) = Weights::new(file, config).check_all_used() {
                runnable = false;
                note(format!("cannot be run: {error}"));
            }
            provenance = config.facts(file)?;
        }
        let sampling = Recommended::of(file).map_err(|error| note(error.to_string())).unwrap_or_default();
        let losses = convert::losses(file).map_err(|error| note(error.to_string())).unwrap_or_default();
        let chat = tokenizer.as_ref().and_then(|tokenizer| {
            let chat = Chat::of(tokenizer, config.as_ref(), None).map_err(|error| note(error.to_string()));
            let chat = chat.ok()??;
            Some(ChatFacts {
                origin: chat.origin().to_owned(),
                system: chat.check_system().err().map(|error| error.to_string()),
                tags: chat.tags(),
                turn_end: chat.turn_end().clone(),
            })
        });
        let ends = ends(config.as_ref(), tokenizer.as_ref(), chat.as_ref());
        let mut facts =
            Self { file, config, runnable, provenance, found, tokenizer, chat, ends, sampling, losses, odd };
        let more = warnings::collect(&facts);
        facts.odd.extend(more);
        Ok(facts)
    }

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
}

/// [`survey`] with a bar for those who wait longer than two seconds.
fn watched(file: &Checkpoint, config: Option<&ModelConfig>) -> Result<Survey, setun::error::ModelError> {
    let bar = progress::bytes();
    bar.set_draw_target(ProgressDrawTarget::hidden());
    bar.set_length(file.tensors().map(|t| t.stored_bytes() as u64).sum());
    bar.set_message("reading weights");
    let started = Instant::now();
    let shown = std::sync::Once::new();
    let advance = |bytes: usize| {
        if started.elapsed() > Duration::from_secs(2) {
            shown.call_once(|| bar.set_draw_target(ProgressDrawTarget::stderr()));
        }
        bar.inc(bytes as u64);
    };
    let found = survey(file, config, &advance);
    ProgressBar::finish_and_clear(&bar);
    found
}

/// Every token that ends an answer, whoever names it.
fn ends(config: Option<&ModelConfig>, tokenizer: Option<&Tokenizer>, chat: Option<&ChatFacts>) -> Vec<End> {
    let mut ends: Vec<End> = tokenizer
        .iter()
        .flat_map(|t| t.ends())
        .map(|(id, sources)| End { id, sources: sources.iter().map(|&s| s.to_owned()).collect() })
        .collect();
    let mut add = |id: u32, source: &str| match ends.iter_mut().find(|end| end.id == id) {
        Some(end) => end.sources.push(source.to_owned()),
        None => ends.push(End { id, sources: vec![source.to_owned()] }),
    };
    // The configuration's are the tokenizer's sources too, where it knows them.
    for &id in config.iter().flat_map(|config| &config.eos) {
        if !tokenizer.is_some_and(|t| t.eos_ids().contains(&id)) {
            add(id, "the model's configuration");
        }
    }
    if let Some(TurnEnd::Token(id)) = chat.map(|chat| &chat.turn_end) {
        add(*id, "the chat template");
    }
    ends
}

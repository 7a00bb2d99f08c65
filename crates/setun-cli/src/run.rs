//! `setun run`: text from a model, streaming; a conversation where there is somebody to talk to.

mod chat;

use std::cell::RefCell;
use std::hash::{BuildHasher, Hasher};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use setun::chat::{Chat, Message, Part, Prompt, Splitter, TurnEnd};
use setun::config::ModelConfig;
use setun::engine::{Engine, Session};
use setun::error::ModelError;
use setun::generate::{Extras, Limits, Report, Stop, generate_with};
use setun::kv_cache::KvType;
use setun::recommended::Recommended;
use setun::sampler::{Sampler, Sampling};
use setun::speculate::{DraftModel, PromptLookup, Speculator, can_verify};
use setun::stop::StopStrings;
use setun::tokenizer::Tokenizer;

use crate::model::{self, LoadArgs};
use crate::{WrongUsage, default_model, memory, output};

/// Generate text. The text goes to stdout, speed and memory to stderr.
///
/// The prompt is the one given with -p, else what is piped in. On a terminal without -p, a model with a chat template
/// starts a conversation; /help shows what it understands. The prompt itself is not printed.
///
/// The same seed gives the same text on any number of threads and with any kernel. Without --seed one is drawn and
/// printed, so that a text can be had again.
///
/// Conversations follow the model's chat template: chat_template.jinja, else the one in tokenizer_config.json, else
/// chat_template.json; in GGUF tokenizer.chat_template. They end an answer at every end token that the model's files name and at
/// what the template writes behind an answer; `setun info` lists them. A model without a template continues the prompt as it
/// is. What a model writes between <think> and </think> goes to stderr and does not return into the conversation.
#[derive(clap::Args)]
#[command(allow_negative_numbers = true)]
#[command(after_help = "Examples:
  setun run                                          a story by the default model
  setun run MODEL -p 'The capital of France is' -n 20 --temperature 0
  setun run MODEL -p 'Who wrote Emma?' --chat        the prompt as a user's message
  setun run MODEL --system 'Answer in rhyme.'        a conversation
  setun run MODEL < notes.txt > continued.txt")]
pub struct RunArgs {
    /// Model file (GGUF, safetensors, llama2.c), folder or hub name (OWNER/NAME[:FILE]) [default: the model in the program]
    model: Option<PathBuf>,
    /// Text to continue
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// New tokens at most [default: 256; in a conversation, what the context holds]
    #[arg(short = 'n', long, value_name = "N")]
    tokens: Option<usize>,
    /// Take the prompt as a user's message and answer it, by the model's chat template
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Continue the prompt as it is: the default, except in conversations
    #[arg(long)]
    raw: bool,
    /// System message of a conversation
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Thinking of models that think before they answer, in conversations [default: show; whether the model thinks is then its template's choice]
    #[arg(long, value_name = "WHAT", conflicts_with = "raw")]
    thinking: Option<Thinking>,
    /// Chat template: the name of one of the model's, or a file with Jinja source [default: the model's `default`]
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "raw")]
    chat_template: Option<String>,
    /// Stop before this text; may be repeated
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Go on after end-of-text tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object with text, ids and speed instead of streaming
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Type of the keys and values kept for attention: f16, int8 (half of its memory, and faster in
    /// long contexts), int4 (a quarter, less exact) or f32
    #[arg(long, value_name = "TYPE", value_parser = model::kv_type, default_value = "f16", help_heading = "Loading")]
    kv: KvType,
    #[command(flatten)]
    head: model::HeadArgs,
    /// Guess several tokens ahead and verify them in one pass; the text is the same [default: lookup, where the model can take
    /// guesses back]
    #[arg(long, value_name = "HOW", help_heading = "Loading")]
    speculate: Option<Speculate>,
    /// Smaller model with the same vocabulary that guesses ahead: file, folder or hub name
    #[arg(long, value_name = "MODEL", conflicts_with = "speculate", help_heading = "Loading")]
    draft: Option<PathBuf>,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Seed of the random choices [default: drawn, and printed]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// 0 always takes the likeliest token, 1 samples as the model says, more is wilder [default: the model's, else 0.8]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Choose among the K likeliest tokens only; 0: all [default: the model's, else 40]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that together reach this probability; 1: all [default: the model's, else 0.95]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Choose among tokens at least this likely, relative to the likeliest; 0: all [default: the model's, else 0.05]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Divide the logits of recent tokens by this; 1: off [default: the model's, else 1]
    #[arg(long, value_name = "X")]
    repeat_penalty: Option<f32>,
    /// Subtract this from a token's logit for every recent occurrence; 0: off
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Subtract this from a token's logit if it occurred recently; 0: off
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// How many tokens back the penalties look
    #[arg(long, value_name = "N", default_value_t = Sampling::default().repeat_last_n)]
    repeat_last_n: usize,
}

impl SamplingArgs {
    /// What the user asks for.
    fn asked(&self) -> Recommended {
        Recommended {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
        }
    }

    /// `settings`, and [`Sampling::default`] where they say nothing.
    fn sampling(&self, settings: &Recommended) -> Sampling {
        settings.over(Sampling {
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            repeat_last_n: self.repeat_last_n,
            // Five digits are easily typed again.
            seed: self
                .seed
                .unwrap_or_else(|| std::hash::RandomState::new().build_hasher().finish() % 100_000),
            ..Sampling::default()
        })
    }
}

/// Where guesses of the next tokens come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Speculate {
    /// What followed the last tokens where they stood before: texts that repeat their prompt or themselves get faster
    Lookup,
    /// One token at a time
    Off,
}

/// What happens to a model's thinking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Thinking {
    /// On stderr, dimmed where that is a terminal
    Show,
    /// Not shown
    Hide,
    /// The model is asked to answer without (enable_thinking=false, where its template knows it)
    Off,
}

/// New tokens where the user sets no limit and the context would be the only one.
const DEFAULT_TOKENS: usize = 256;

/// What `setun` alone does. Never waits for input that is not a terminal.
pub fn default_story(started: Instant) -> Result<()> {
    #[derive(clap::Parser)]
    struct Defaults {
        #[command(flatten)]
        run: RunArgs,
    }
    let Defaults { run: args } = clap::Parser::parse_from(["setun"]);
    start(args, started, false)
}

pub fn run(args: RunArgs, started: Instant) -> Result<()> {
    start(args, started, true)
}

fn start(mut args: RunArgs, started: Instant, read_stdin: bool) -> Result<()> {
    args.sampling.sampling(&args.sampling.asked()).validate()?;
    let memory = memory::Watch::start();
    let talking = std::io::stdin().is_terminal() && args.prompt.is_none() && !args.raw && !args.json;
    if args.prompt.is_none() && read_stdin && !std::io::stdin().is_terminal() {
        // Text files end with a line end that is not meant as part of the prompt.
        let text = crate::tokenize::stdin()?;
        let text = text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t)).unwrap_or(&text);
        args.prompt = (!text.is_empty()).then(|| text.to_owned());
    }
    let file = args.load.open.open(args.model.as_deref())?;
    // A model that cannot be run is refused before its tokenizer is missed.
    let config = ModelConfig::of(&file)?;
    model::needs_text(&config)?;
    let tokenizer = args.load.tokenizer(&file)?;
    let engine = args.load.fast_engine(&file, config, args.head)?;
    let settings = args.sampling.asked().completed(&file).map_err(|error| {
        anyhow::anyhow!("{error}; a value of your own (--temperature, --top-k, --top-p, --min-p or --repeat-penalty) takes its place")
    })?;
    let sampling = args.sampling.sampling(&settings);
    let draft = args.draft_engine(&engine, &tokenizer)?;
    drop(file);
    let limit = args.load.limit(engine.config());
    let session = engine.session(args.kv, Some(limit));
    let asked = args.chat || args.system.is_some() || args.chat_template.is_some() || args.thinking.is_some();
    let chat = match talking || asked {
        true => conversation(&args, &tokenizer, engine.config())?,
        false => None,
    };
    let mut stop = args.stop.clone();
    if let Some(TurnEnd::Text(text)) = chat.as_ref().map(Chat::turn_end).filter(|_| !args.ignore_eos) {
        stop.push(text.clone());
    }
    let stop_ids = stop_ids(&engine, &tokenizer, chat.as_ref(), args.ignore_eos);
    let speculator = RefCell::new(args.speculator(&engine, draft.as_ref(), limit)?);
    let speaker = Speaker {
        tokenizer: &tokenizer,
        chat: chat.as_ref(),
        stop_ids,
        stop,
        args: &args,
        memory: &memory,
        speculator,
    };
    if let Some(chat) = chat.as_ref().filter(|_| talking) {
        return chat::converse(&speaker, chat, session, sampling);
    }
    let mut shown = String::new();
    let prompt = match (&args.prompt, &args.model) {
        (Some(prompt), _) => prompt.as_str(),
        (None, None) => {
            shown += default_model::PROMPT; // Nobody typed it, so it is part of the story.
            default_model::PROMPT
        }
        (None, Some(_)) => {
            let why = if talking {
                "the model has no chat template, so it continues a text: "
            } else {
                "there is no prompt: "
            };
            return Err(WrongUsage(format!("{why}give one with -p TEXT, or pipe it in")).into());
        }
    };
    let read = match &chat {
        Some(chat) => {
            let system = args.system.iter().map(|text| Message::new("system", text));
            let messages: Vec<Message> = system.chain([Message::new("user", prompt)]).collect();
            chat.prompt(&messages, args.enable_thinking())?
        }
        None => Prompt { ids: tokenizer.encode_prompt(prompt)?, thinking: false },
    };
    speaker.tell(session, &read, &sampling, started, shown)
}

impl RunArgs {
    /// What the template is told; nothing unless the user says something.
    fn enable_thinking(&self) -> Option<bool> {
        self.thinking.map(|thinking| thinking != Thinking::Off)
    }
}

impl RunArgs {
    /// The draft model, if one is asked for that can help this one.
    fn draft_engine(&self, engine: &Engine, tokenizer: &Tokenizer) -> Result<Option<Engine>> {
        let Some(path) = &self.draft else { return Ok(None) };
        can_verify(engine).context("--draft is of no use here: leave it out")?;
        let file = self.load.open.open(Some(path))?;
        let config = ModelConfig::of(&file)?;
        model::needs_text(&config)?;
        let own =
            Tokenizer::of(&file).with_context(|| format!("cannot use {} as a draft", path.display()))?;
        let size = tokenizer.vocab_size().max(own.vocab_size());
        if let Some(id) = (0..size as u32).find(|&id| tokenizer.id_to_token(id) != own.id_to_token(id)) {
            let name = |token: Option<String>| token.map_or("nothing".to_owned(), |t| format!("{t:?}"));
            bail!(
                "{} cannot guess for this model: token {id} is {} there and {} here; a draft model needs the same vocabulary",
                path.display(),
                name(own.id_to_token(id)),
                name(tokenizer.id_to_token(id)),
            );
        }
        let options = model::fast(&config, self.load.compute.options());
        Ok(Some(engine.load_beside(&file, config, &options)?))
    }

    fn speculator<'e>(
        &self,
        engine: &Engine,
        draft: Option<&'e Engine>,
        limit: usize,
    ) -> Result<Option<Speculator<'e>>> {
        Ok(match (draft, self.speculate) {
            (Some(draft), _) => {
                let limit = limit.min(draft.config().max_positions);
                Some(Speculator::new(engine, DraftModel::new(draft.session(self.kv, Some(limit))))?)
            }
            (None, Some(Speculate::Off)) => None,
            (None, Some(Speculate::Lookup)) => Some(
                Speculator::new(engine, PromptLookup::new())
                    .context("--speculate lookup is of no use here: leave it out")?,
            ),
            (None, None) => Speculator::new(engine, PromptLookup::new()).ok(),
        })
    }
}

/// How to talk with the model as the user asks; `None`, said aloud, where it has no template.
fn conversation<'t>(
    args: &RunArgs,
    tokenizer: &'t Tokenizer,
    config: &ModelConfig,
) -> Result<Option<Chat<'t>>> {
    let file = args.chat_template.as_deref().filter(|name| std::path::Path::new(name).is_file());
    let chat = match file {
        Some(path) => {
            let source = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
            Some(Chat::with_template(tokenizer, &source, path)?)
        }
        None => Chat::of(tokenizer, Some(config), args.chat_template.as_deref())?,
    };
    for note in tokenizer.template_notes().iter().filter(|_| args.chat_template.is_none()) {
        eprintln!("note: {note}");
    }
    let Some(chat) = chat else {
        if args.system.is_some() {
            bail!(
                "the model has no chat template, so there is no place for a system message: leave --system out"
            );
        }
        if args.prompt.is_some() || args.model.is_none() {
            eprintln!("note: the model has no chat template, so the prompt is continued as it is");
        }
        return Ok(None);
    };
    if tokenizer.chat_templates().is_empty() && file.is_none() {
        eprintln!("note: the chat template is from {}", chat.origin());
    }
    if args.system.is_some() {
        chat.check_system()?;
    }
    Ok(Some(chat))
}

/// Ids after which a text is over, from wherever the model's files name them.
fn stop_ids(engine: &Engine, tokenizer: &Tokenizer, chat: Option<&Chat>, ignore: bool) -> Vec<u32> {
    if ignore {
        return Vec::new();
    }
    let mut ids = tokenizer.eos_ids().to_vec();
    ids.extend(engine.config().eos.iter().filter(|id| !tokenizer.eos_ids().contains(id)));
    if let Some(&TurnEnd::Token(id)) = chat.map(Chat::turn_end)
        && !ids.contains(&id)
    {
        ids.push(id);
    }
    ids
}

/// What stays the same from answer to answer.
struct Speaker<'a> {
    tokenizer: &'a Tokenizer,
    chat: Option<&'a Chat<'a>>,
    stop_ids: Vec<u32>,
    stop: Vec<String>,
    args: &'a RunArgs,
    memory: &'a memory::Watch,
    speculator: RefCell<Option<Speculator<'a>>>,
}

/// One generation: what came out, and when it began.
struct Told {
    report: Report,
    /// The answer, or the whole text where nobody thinks.
    text: String,
    thought: String,
    first_text: Option<Instant>,
}

impl Speaker<'_> {
    /// Generates once and reports.
    fn tell(
        &self,
        mut session: Session,
        prompt: &Prompt,
        sampling: &Sampling,
        started: Instant,
        shown: String,
    ) -> Result<()> {
        let streaming = !self.args.json;
        if streaming {
            output::print(&shown)?;
        }
        let mut sampler = Sampler::new(sampling.clone())?;
        let max_tokens = self.args.tokens.unwrap_or(DEFAULT_TOKENS);
        let mut thoughts = Thoughts::new(self.args);
        let told = self.generate(&mut session, prompt, 0, &mut sampler, max_tokens, &mut |part, text| {
            if streaming {
                thoughts.print(part, text)?;
            }
            Ok(true)
        })?;
        thoughts.end();
        let Told { report, text, thought, first_text } = &told;
        let first = first_text.map(|at| at - started);
        if self.args.json {
            return output::print_json(&serde_json::json!({
                "text": shown + text,
                "thinking": if thought.is_empty() { None } else { Some(thought) },
                "ids": report.new_ids,
                "stop": stop_name(report.stop),
                "seed": sampling.seed,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "repeat_penalty": sampling.repetition_penalty,
                "prompt_tokens": report.prompt_tokens,
                "new_tokens": report.new_ids.len(),
                "prefill_tokens_per_s": report.prefill_rate(),
                "decode_tokens_per_s": report.decode_rate(),
                "seconds_to_first_text": first.as_ref().map(Duration::as_secs_f64),
                "peak_rss_bytes": self.memory.peak(),
                "kernel": session.engine().kernels().name(),
                "threads": session.engine().pool().threads(),
                "activations": session.engine().activations().to_string(),
                "head": output::head(session.engine()),
                "speculation": { "guesses": report.speculated.guesses, "right": report.speculated.right },
            }));
        }
        if std::io::stdout().is_terminal() && !text.ends_with('\n') {
            output::print("\n")?;
        }
        eprintln!("\n{}", summary(report, first, sampling, self.memory.peak()));
        if report.stop == Stop::ContextFull {
            eprintln!(
                "note: it stopped because the context of {} tokens is full",
                session.len() + session.room()
            );
        }
        Ok(())
    }

    /// Feeds `prompt` without its first `fed` ids, which `session` has, and passes text on to `show` until something ends it, or
    /// `show` returns false.
    fn generate(
        &self,
        session: &mut Session,
        prompt: &Prompt,
        fed: usize,
        sampler: &mut Sampler,
        max_tokens: usize,
        show: &mut dyn FnMut(Part, &str) -> std::io::Result<bool>,
    ) -> Result<Told> {
        let limits = Limits { max_tokens, stop_ids: self.stop_ids.clone() };
        let mut stops = StopStrings::new(self.stop.clone());
        let mut splitter = Splitter::new(self.chat.and_then(Chat::tags), prompt.thinking);
        let (mut answer, mut thought, mut first_text) = (String::new(), String::new(), None);
        let (mut failed, mut go_on) = (None, true);
        let mut pass_on = |part: Part, text: &str| {
            first_text.get_or_insert_with(Instant::now);
            if part == Part::Thought { &mut thought } else { &mut answer }.push_str(text);
            go_on &= show(part, text).unwrap_or_else(|error| {
                failed = Some(error);
                false
            });
            go_on
        };
        let (mut stopped, mut asked) = (false, false);
        let shown = self.chat.map(Chat::hidden_tags).unwrap_or_default();
        let ids = &prompt.ids[fed..];
        let mut speculator = self.speculator.borrow_mut();
        let extras = Extras { shown: &shown, speculator: speculator.as_mut() };
        let report = generate_with(session, self.tokenizer, ids, sampler, &limits, extras, &mut |piece| {
            let passed = stops.push(piece);
            stopped |= passed.stopped;
            splitter.push(&passed.text, &mut |part, text| asked |= !pass_on(part, text));
            !stopped && !asked
        });
        // A prompt of special tokens alone is as empty as none.
        let report = report.map_err(|error| match error {
            ModelError::EmptyPrompt => WrongUsage(error.to_string()).into(),
            error => anyhow::Error::from(error),
        })?;
        if !stopped {
            splitter.push(&stops.finish(), &mut |part, text| _ = pass_on(part, text));
        }
        splitter.finish(&mut |part, text| _ = pass_on(part, text));
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(Told { report, text: answer, thought, first_text }),
        }
    }
}

/// Answers to stdout, thoughts to stderr.
struct Thoughts {
    show: bool,
    /// Codes that dim a terminal's text and end that.
    style: (&'static str, &'static str),
    open: bool,
}

impl Thoughts {
    fn new(args: &RunArgs) -> Self {
        let style = if std::io::stderr().is_terminal() { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
        Self { show: args.thinking != Some(Thinking::Hide), style, open: false }
    }

    fn print(&mut self, part: Part, text: &str) -> std::io::Result<()> {
        if part == Part::Answer {
            self.end();
            return output::print(text);
        }
        if self.show {
            let (dim, plain) = self.style;
            eprint!("{dim}{text}{plain}");
            self.open = true;
        }
        Ok(())
    }

    /// Ends the line that a thought is on.
    fn end(&mut self) {
        if std::mem::take(&mut self.open) {
            eprintln!("\n");
        }
    }
}

fn stop_name(stop: Stop) -> &'static str {
    match stop {
        Stop::EndOfText => "end_of_text",
        Stop::MaxTokens => "max_tokens",
        Stop::ContextFull => "context_full",
        Stop::Asked => "stop_string",
    }
}

/// The line under a text: what was read and written, how fast, in how much memory, by which seed.
fn summary(report: &Report, first: Option<Duration>, sampling: &Sampling, memory: Option<usize>) -> String {
    let mut parts = vec![
        format!("prompt {} tokens at {} tok/s", report.prompt_tokens, output::rate(report.prefill_rate())),
        // The first token comes with the prompt's logits, so one alone has no rate.
        match report.new_ids.len() {
            1 => "1 new token".to_owned(),
            n => format!("{n} new tokens at {} tok/s", output::rate(report.decode_rate())),
        },
    ];
    if report.speculated.guesses > 0 {
        parts.push(format!("{} of {} guesses right", report.speculated.right, report.speculated.guesses));
    }
    parts.extend(first.map(|first| format!("first text after {:.3} s", first.as_secs_f64())));
    parts.extend(memory.map(|peak| format!("memory {}", output::bytes(peak))));
    if sampling.temperature > 0.0 {
        parts.push(format!("seed {}", sampling.seed));
    }
    parts.join(", ")
}

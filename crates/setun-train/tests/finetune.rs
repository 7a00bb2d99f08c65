//! Fine-tuning starts from the model that inference runs, learns, resumes, and gives back a model of the same kind.

mod common;

use std::path::{Path, PathBuf};

use common::write_corpus;
use setun::chat::{Chat, Message};
use setun::config::RopeTable;
use setun::engine::{Engine, EngineOptions};
use setun::format::Checkpoint;
use setun::kv_cache::KvType;
use setun::model::Role;
use setun::tokenizer::Tokenizer;
use setun::weights::{Weight, Weights as Tensors};
use setun_kernels::{Kernels, Pool, TernaryMatrix};
use setun_train::export::{ExportOptions, TernaryForm, export_of};
use setun_train::finetune::{Base, Length, Settings, chat};
use setun_train::loss::IGNORE;
use setun_train::params::{Kind, Params, TrainModel};
use setun_train::tape::{Setting, Tape};
use setun_train::trainer::{Progress, StepReport};
use setun_train::weights::Weights;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models").join(name)
}

/// Models of every kind that can be trained, some in two containers.
const MODELS: [&str; 9] = [
    "bitnet-tied-packed-small",
    "bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf",
    "bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-tq1_0.gguf",
    "bitnet-untied-packed",
    "llama-bitnet-online-rmsnorm",
    "llama-bitnet-packed",
    "llama-bitnet-packed-gguf/llama-bitnet-packed-i2_s-by-bitnetcpp.gguf",
    "mistral-sliding-window",
    "qwen2-bias",
];

fn tokenizer() -> Tokenizer {
    Tokenizer::from_folder(&golden("bitnet-tied-packed-small")).unwrap()
}

/// A model's own; those without get one of two words.
fn tokenizer_of(file: &Checkpoint) -> Tokenizer {
    let two = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": null, "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}"#;
    Tokenizer::of(file).unwrap_or_else(|_| Tokenizer::from_json_bytes(two.as_bytes()).unwrap())
}

fn ids(vocab_size: usize) -> Vec<u32> {
    (0..40u32).map(|i| (i * i * 7 + 3 * i + 1) % vocab_size as u32).collect()
}

fn trained_logits(model: &TrainModel, params: &Params, ids: &[u32]) -> Vec<f32> {
    let engine = setun_train::engine::Engine::new(2);
    let weights = Weights::new(&engine, params);
    let mut rope = RopeTable::new(&model.config.rope);
    rope.prepare(ids.len());
    let (weights, rope, seq_len) = (&weights, &rope, ids.len());
    let on = Setting { engine: &engine, params, weights, rope, sequences: 1, seq_len };
    let mut tape = Tape::forward_only(on);
    let hidden = model.hidden(&mut tape, ids);
    model.logits(&mut tape, &hidden).values().to_vec()
}

fn run_logits(path: &Path, ids: &[u32]) -> Vec<f32> {
    let engine = Engine::open(path, &EngineOptions::default()).unwrap();
    engine.session(KvType::F32, None).feed_all(ids, None).unwrap().to_vec()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn masters_round_back_to_the_trits_and_scales_of_every_model() {
    let (kernels, pool) = (Kernels::best(), Pool::new(2));
    for name in MODELS {
        let file = Checkpoint::open(golden(name)).unwrap();
        let tokenizer = tokenizer_of(&file);
        let base = Base::new(&file, &tokenizer, None).unwrap();
        let (_, params) = base.load().unwrap();
        let tensors = Tensors::new(&file, base.config());
        let mut ternary = 0;
        for param in params.iter().filter(|p| p.kind == Kind::Matrix(Role::Ternary)) {
            let Weight::Ternary(original) =
                tensors.matrix(&param.name, param.rows, param.cols, Role::Ternary).unwrap()
            else {
                panic!("{name}: {} is not ternary", param.name)
            };
            let again =
                TernaryMatrix::quantize(kernels, &param.values, param.rows, param.cols, &pool).unwrap();
            assert_eq!(again.codes(), original.codes(), "{name}: {}", param.name);
            let scale = |m: &TernaryMatrix| {
                let mut row = vec![0.0; m.cols()];
                let rows = (0..m.rows()).find_map(|r| {
                    m.dequantize_row(r, &mut row);
                    row.iter().copied().find(|w| *w != 0.0)
                });
                rows.unwrap_or(0.0).abs().to_bits()
            };
            assert_eq!(scale(&again), scale(&original), "{name}: {}", param.name);
            ternary += 1;
        }
        assert_eq!(ternary > 0, base.config().has_ternary_layers(), "{name}");
    }
}

#[test]
fn the_untrained_model_has_the_logits_of_the_original_in_the_trainer_and_exported() {
    for name in MODELS {
        let file = Checkpoint::open(golden(name)).unwrap();
        let tokenizer = tokenizer_of(&file);
        let base = Base::new(&file, &tokenizer, None).unwrap();
        let (model, params) = base.load().unwrap();
        let ids = ids(base.config().vocab_size);
        let expected = run_logits(&golden(name), &ids);
        let size = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        let limit = if base.config().has_ternary_layers() { 0.05 } else { 1e-4 } * size;
        let found = trained_logits(&model, &params, &ids);
        let difference = largest_difference(&found, &expected);
        eprintln!("{name}: trainer {difference:e}, logits up to {size}");
        assert!(difference <= limit, "{name}: {difference}");
        let folder = tempfile::tempdir().unwrap();
        for ternary in [TernaryForm::Packed, TernaryForm::Masters] {
            let out = folder.path().join("model");
            export_of(&base, &out, &params, &ExportOptions { ternary, ..ExportOptions::default() }).unwrap();
            let difference = largest_difference(&run_logits(&out, &ids), &expected);
            eprintln!("{name}: exported {ternary:?} {difference:e}");
            let exact = base.config().has_ternary_layers() && !base.config().qkv_bias;
            assert!(difference <= if exact { 0.0 } else { limit }, "{name}, {ternary:?}: {difference}");
            assert!(Tokenizer::of(&Checkpoint::open(&out).unwrap()).is_ok(), "{name}");
        }
    }
}

fn settings(folder: &Path, out: &str, steps: u64) -> Settings {
    Settings {
        data: vec![folder.join("train.txt")],
        valid: vec![folder.join("valid.txt")],
        length: Length::Steps(steps),
        seq_len: Some(24),
        batch: 2,
        lr: 2e-3,
        threads: Some(2),
        checkpoint_every: 2,
        eval_every: 0,
        log_every: 1,
        out: folder.join(out),
        ..Settings::default()
    }
}

struct StopAfter(u64);

impl Progress for StopAfter {
    fn step(&mut self, _: &StepReport) {
        self.0 -= 1;
    }
    fn stop(&mut self) -> bool {
        self.0 == 0
    }
}

#[test]
fn a_ternary_model_learns_a_text_and_a_stopped_run_goes_on_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let file = Checkpoint::open(golden("bitnet-tied-packed-small")).unwrap();
    let tokenizer = tokenizer();
    let base = Base::new(&file, &tokenizer, None).unwrap();
    let none = &mut |_| ();
    let mut whole = base.train(&settings(folder.path(), "whole", 30), none).unwrap();
    let before = whole.evaluate_all(None)[0].1.loss();
    let losses: Vec<f64> = (0..30).map(|_| whole.step().unwrap().loss).collect();
    let after = whole.evaluate_all(None)[0].1.loss();
    assert!(after < before - 1.0, "{before} -> {after}");

    let mut first = base.train(&settings(folder.path(), "parts", 30), none).unwrap();
    first.run(&mut StopAfter(5)).unwrap();
    drop(first);
    let mut second = base.train(&settings(folder.path(), "parts", 30), none).unwrap();
    assert_eq!(second.steps_taken(), 5);
    let rest: Vec<f64> = (5..30).map(|_| second.step().unwrap().loss).collect();
    assert_eq!(rest, losses[5..]);
    assert!(second.params() == whole.params());

    // Another model cannot go on from there.
    let other = Checkpoint::open(golden("bitnet-untied-packed")).unwrap();
    let other = Base::new(&other, &tokenizer, None).unwrap();
    let error = other.train(&settings(folder.path(), "parts", 30), none).unwrap_err().to_string();
    assert!(error.contains("cannot resume") && error.contains("base"), "{error}");
}

#[test]
fn what_cannot_be_used_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let file = Checkpoint::open(golden("bitnet-tied-packed-small")).unwrap();
    let tokenizer = tokenizer();
    let base = Base::new(&file, &tokenizer, None).unwrap();
    let refused = |change: &dyn Fn(&mut Settings), part: &str| {
        let mut settings = settings(folder.path(), "out", 3);
        change(&mut settings);
        let error = base.train(&settings, &mut |_| ()).unwrap_err();
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            text += &source.to_string();
        }
        assert!(text.contains(part), "{part}: {text}");
        assert!(!folder.path().join("out").exists());
    };
    let jsonl = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let lines = [
        ("{\"txt\": \"a\"}", "line 1: a `text`"),
        ("{\"text\": \"a\"}\n{\"text\": 3}", "line 2"),
        ("{\"text\": \"a\"}\n\n[1]", "line 3: a JSON object"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "`assistant`"),
        ("{\"messages\": [{\"role\": \"user\"}]}", "message 1"),
        ("\n", "--data"),
    ];
    for (n, (text, part)) in lines.into_iter().enumerate() {
        let path = jsonl(&format!("{n}.jsonl"), text);
        refused(&|s| s.data = vec![path.clone()], part);
    }
    refused(&|s| s.data = vec![folder.path().join("missing.txt")], "missing.txt");
    refused(&|s| s.seq_len = Some(1 << 20), "--seq-len");
    refused(&|s| s.length = Length::Epochs(0.0), "--epochs");
    refused(&|s| s.lr = -1.0, "optimizer.lr");
    refused(&|s| s.valid = s.data.clone(), "not trained on");
    refused(&|s| s.batch = 0, "train.batch");

    let small = Checkpoint::open(golden("qwen2-bias")).unwrap();
    let big = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/tokenizers/ggml-vocab-phi-3.gguf");
    let big = Tokenizer::open(&big).unwrap();
    let error = Base::new(&small, &big, None).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
    let experts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/qwen3-moe/float");
    let experts = Checkpoint::open(experts).unwrap();
    let error = Base::new(&experts, &tokenizer, None).unwrap_err().to_string();
    assert!(error.contains("num_experts"), "{error}");
}

fn talk() -> Vec<Message> {
    vec![
        Message::new("user", "Who sat on the mat?"),
        Message::new("assistant", " The cat sat. "),
        Message::new("user", "And then: The cat sat."),
        Message::new("assistant", "It saw two birds"),
    ]
}

#[test]
fn the_assistants_turns_are_found_to_the_byte_in_every_template() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/chat/templates");
    let (tokenizer, mut seen) = (tokenizer(), 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let chat = Chat::with_template(&tokenizer, &std::fs::read_to_string(&path).unwrap(), "test").unwrap();
        // It prints what is said as Python would, so that nothing in the text is what was said.
        if path.ends_with("python_values.jinja") {
            let error = chat::render(&chat, &tokenizer, &talk()).unwrap_err();
            assert!(error.contains("message 2"), "{error}");
            continue;
        }
        for rendered in chat::render(&chat, &tokenizer, &talk()).unwrap_or_else(|e| panic!("{path:?}: {e}")) {
            let turns: Vec<&str> = rendered.turns.iter().map(|turn| &rendered.text[turn.clone()]).collect();
            eprintln!("{}: {turns:?} of {:?}", path.file_name().unwrap().display(), rendered.text);
            assert!(!turns.is_empty());
            assert!(
                turns.iter().all(|t| !t.contains("mat?") && !t.contains("And then")),
                "{path:?}: {turns:?}"
            );
            assert!(turns[turns.len() - 1].contains("It saw two birds") || turns[0].contains("The cat sat."));
            seen += turns.len();
        }
    }
    assert!(seen >= 12, "{seen}");
}

#[test]
fn only_the_assistants_tokens_count_and_their_end_is_among_them() {
    let tokenizer = tokenizer();
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.jsonl");
    let line = serde_json::json!({ "messages": talk() });
    std::fs::write(&path, format!("{line}\n{line}\n")).unwrap();
    let file = Checkpoint::open(golden("bitnet-tied-packed-small")).unwrap();
    let base = Base::new(&file, &tokenizer, Some(source.to_owned())).unwrap();
    let settings = Settings {
        data: vec![path],
        seq_len: Some(512),
        batch: 1,
        out: folder.path().join("out"),
        ..Settings::default()
    };
    let trainer = base.train(&settings, &mut |_| ()).unwrap();
    let mut feed = trainer.feed().clone();
    let batch = setun_train::feed::Feed::next_batch(&mut feed, 0.0);
    let counted: Vec<u32> = batch.targets.iter().copied().filter(|&t| t != IGNORE).collect();
    let said = tokenizer.decode(&counted, false).unwrap();
    let once = " The cat sat. <end>It saw two birds<end>";
    assert!(said.starts_with(&once.repeat(2)), "several conversations in one sequence: {said}");
    // The prompt before an answer has the tokens that it has at inference.
    let chat = base.chat().unwrap().unwrap();
    let prompt = chat.prompt(&talk()[..1], None).unwrap().ids;
    assert_eq!(batch.ids[..prompt.len()], prompt);
    assert_ne!(batch.targets[prompt.len() - 1], IGNORE);
    assert!(batch.targets[..prompt.len() - 1].iter().all(|&t| t == IGNORE));
}

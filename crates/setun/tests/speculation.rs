//! Speculation never changes a text: whoever guesses, whatever is guessed, however tokens are chosen.

use std::path::{Path, PathBuf};

use setun::engine::{Engine, EngineOptions};
use setun::error::ModelError;
use setun::generate::{Extras, Limits, Report, Stop, generate_with};
use setun::head::HeadMode;
use setun::kv_cache::KvType;
use setun::sampler::{Sampler, Sampling};
use setun::speculate::{DraftModel, Drafter, PromptLookup, Speculated, Speculator};
use setun::tokenizer::Tokenizer;

const PROMPT: &str =
    "Dick returned, one after another of the trio took the pan, one after another of the trio";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models").join(name)
}

struct Fixture {
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Vec<u32>,
}

fn fixture(head: HeadMode) -> Fixture {
    let path = golden("bitnet-tied-packed-small");
    let engine = Engine::open(&path, &EngineOptions { head, ..Default::default() }).unwrap();
    let tokenizer = Tokenizer::from_folder(&path).unwrap();
    let prompt = tokenizer.encode_prompt(PROMPT).unwrap();
    Fixture { engine, tokenizer, prompt }
}

impl Fixture {
    /// What is generated, and what the session knows afterwards.
    fn tell(
        &self,
        sampling: &Sampling,
        max_tokens: usize,
        speculator: Option<&mut Speculator>,
    ) -> (Report, Vec<u32>) {
        let mut session = self.engine.session(KvType::F32, Some(160));
        let mut sampler = Sampler::new(sampling.clone()).unwrap();
        let limits = Limits { max_tokens, stop_ids: Vec::new() };
        let extras = Extras { speculator, ..Default::default() };
        let tokenizer = &self.tokenizer;
        let report =
            generate_with(&mut session, tokenizer, &self.prompt, &mut sampler, &limits, extras, &mut |_| {
                true
            })
            .unwrap();
        (report, session.ids().to_vec())
    }

    /// Tells the same text with and without `drafter`, and returns how it did.
    fn compare(&self, sampling: &Sampling, drafter: impl Drafter) -> Speculated {
        let (plain, known) = self.tell(sampling, 100, None);
        // Not at the measured pace, which depends on what else the machine does.
        let mut speculator = Speculator::new(&self.engine, drafter).unwrap().always(5);
        let (guessed, known_too) = self.tell(sampling, 100, Some(&mut speculator));
        assert_eq!(guessed.new_ids, plain.new_ids, "{sampling:?}");
        assert_eq!(known_too, known, "{sampling:?}");
        assert_eq!(guessed.stop, plain.stop);
        speculator.total()
    }
}

fn samplings() -> Vec<Sampling> {
    let sampled = |temperature, top_k, seed| Sampling { temperature, top_k, seed, ..Default::default() };
    vec![
        Sampling::greedy(),
        Sampling { repetition_penalty: 1.3, ..Sampling::greedy() },
        // Looks back at fewer tokens than are guessed.
        Sampling { repetition_penalty: 1.5, repeat_last_n: 2, ..Sampling::greedy() },
        Sampling { presence_penalty: -2.0, repeat_last_n: 1, ..sampled(1.5, 4, 4) },
        sampled(0.7, 40, 1),
        sampled(0.3, 0, 2),
        Sampling { frequency_penalty: 0.2, presence_penalty: -0.3, repeat_last_n: 5, ..sampled(0.5, 8, 3) },
    ]
}

/// Guesses a known text, with every so many guesses wrong.
struct Knowing {
    text: Vec<u32>,
    wrong: usize,
}

impl Drafter for Knowing {
    fn look(&mut self, history: &[u32]) -> Option<usize> {
        (history.len() < self.text.len()).then_some(3)
    }

    fn propose(&mut self, history: &[u32], most: usize, guesses: &mut Vec<u32>) -> Result<(), ModelError> {
        let known = self.text.iter().enumerate().skip(history.len()).take(most);
        guesses.extend(known.map(|(i, &id)| if i % self.wrong == 0 { (id + 1) % 50 } else { id }));
        Ok(())
    }
}

#[test]
fn texts_are_the_same_with_right_and_wrong_guesses_and_any_sampling() {
    for head in [HeadMode::Exact, HeadMode::Shortlist] {
        let fixture = fixture(head);
        for sampling in samplings() {
            let (plain, known) = fixture.tell(&sampling, 110, None);
            let text = [&known[..], &plain.new_ids[plain.new_ids.len() - 1..]].concat();
            for wrong in [1, 2, 5, usize::MAX] {
                let total = fixture.compare(&sampling, Knowing { text: text.clone(), wrong });
                assert!(total.guesses > 0 && total.right <= total.guesses, "{total:?}");
                assert!(wrong < usize::MAX || total.right == total.guesses, "{total:?}");
                assert!(wrong > 1 || total.right == 0, "{total:?}");
            }
        }
    }
}

#[test]
fn looking_up_the_text_so_far_guesses_its_repetitions() {
    let fixture = fixture(HeadMode::Auto);
    let totals: Vec<Speculated> =
        samplings().iter().map(|sampling| fixture.compare(sampling, PromptLookup::new())).collect();
    assert!(totals[0].right > 20, "the greedy text repeats itself: {totals:?}");
}

#[test]
fn a_draft_model_changes_nothing_and_the_model_itself_guesses_right() {
    let fixture = fixture(HeadMode::Auto);
    for sampling in samplings() {
        let draft = DraftModel::new(fixture.engine.session(KvType::F32, Some(160)));
        let total = fixture.compare(&sampling, draft);
        if sampling == Sampling::greedy() {
            assert!(total.guesses > 0 && total.right == total.guesses, "{total:?}");
        }
    }
}

/// Guesses ids that the model has no rows for, as one with more padding may.
struct Beyond(u32);

impl Drafter for Beyond {
    fn look(&mut self, _: &[u32]) -> Option<usize> {
        Some(3)
    }

    fn propose(&mut self, history: &[u32], most: usize, guesses: &mut Vec<u32>) -> Result<(), ModelError> {
        guesses.extend([history[0], self.0, history[0]].iter().take(most));
        Ok(())
    }
}

#[test]
fn a_draft_model_may_have_another_number_of_rows() {
    let fixture = fixture(HeadMode::Auto);
    let size = fixture.engine.config().vocab_size as u32;
    for id in [size, u32::MAX] {
        let total = fixture.compare(&Sampling::greedy(), Beyond(id));
        assert!(total.guesses > 0, "what comes before is verified: {total:?}");
    }
    let other = Engine::open(golden("qwen2-bias"), &EngineOptions::default()).unwrap();
    assert!(other.config().vocab_size < size as usize);
    let mut draft = DraftModel::new(other.session(KvType::F32, None));
    let mut guesses = Vec::new();
    draft.propose(&[1, 2, size - 1], 3, &mut guesses).unwrap();
    assert!(guesses.is_empty());
    draft.propose(&[1, 2, 3], 3, &mut guesses).unwrap();
    assert!(!guesses.is_empty());
}

#[test]
fn a_full_context_and_every_limit_end_a_text_where_they_end_the_plain_one() {
    let fixture = fixture(HeadMode::Auto);
    let (longest, known) = fixture.tell(&Sampling::greedy(), usize::MAX, None);
    assert_eq!(longest.stop, Stop::ContextFull);
    let text = [&known[..], &longest.new_ids[longest.new_ids.len() - 1..]].concat();
    for max_tokens in [0, 1, 2, 3, 4, 5, 6, 7, 13, usize::MAX] {
        let (plain, known) = fixture.tell(&Sampling::greedy(), max_tokens, None);
        let drafter = Knowing { text: text.clone(), wrong: usize::MAX };
        let mut speculator = Speculator::new(&fixture.engine, drafter).unwrap().always(7);
        let (guessed, known_too) = fixture.tell(&Sampling::greedy(), max_tokens, Some(&mut speculator));
        assert_eq!((guessed.new_ids, guessed.stop), (plain.new_ids, plain.stop), "{max_tokens}");
        assert_eq!(known_too, known, "{max_tokens}");
    }
}

#[test]
fn the_measured_pace_changes_nothing_either() {
    let fixture = fixture(HeadMode::Auto);
    let (plain, _) = fixture.tell(&Sampling::greedy(), 100, None);
    let mut speculator = Speculator::new(&fixture.engine, PromptLookup::new()).unwrap();
    let (guessed, _) = fixture.tell(&Sampling::greedy(), 100, Some(&mut speculator));
    assert_eq!(guessed.new_ids, plain.new_ids);
}

#[test]
fn models_that_cannot_take_guesses_back_are_refused_with_the_reason() {
    let engine = Engine::open(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/bonsai/qwen35-basic/model-pq2_0.gguf"),
        &EngineOptions::default(),
    )
    .unwrap();
    let error = Speculator::new(&engine, PromptLookup::new()).unwrap_err().to_string();
    assert!(error.contains("recurrent"), "{error}");
}

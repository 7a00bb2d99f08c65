//! The head by a shortlist: the same choices as from all logits, and the exact head where bounds do not help.

use std::path::{Path, PathBuf};

use setun::config::{Activation, ModelConfig, Shape};
use setun::cpu::CpuMatrix;
use setun::engine::{Engine, EngineOptions, Session};
use setun::error::ModelError;
use setun::head::{HeadMode, LogitsNeed};
use setun::kv_cache::KvType;
use setun::model::{Model, Role, Source};
use setun::sampler::{Sampler, Sampling};
use setun_kernels::Kernels;
use setun_kernels::dense::{DenseData, DenseMatrix};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ (z >> 29)
    }

    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// Any valid settings, the ends of their ranges among them.
    fn sampling(&mut self) -> Sampling {
        Sampling {
            temperature: self.one_of(&[0.0, 0.3, 0.8, 1.0, 2.5, 1e-20, 1e20]),
            top_k: self.one_of(&[0, 1, 2, 20, 40, 100_000]),
            top_p: self.one_of(&[1.0, 0.95, 0.3]),
            min_p: self.one_of(&[0.0, 0.05, 0.5, 1.0, 1e-30]),
            repetition_penalty: self.one_of(&[1.0, 1.0, 1.3, 0.7, 1e30]),
            frequency_penalty: self.one_of(&[0.0, 0.0, 0.6, -0.4]),
            presence_penalty: self.one_of(&[0.0, 0.0, 1.5, -2.0]),
            repeat_last_n: self.one_of(&[0, 3, 64]),
            seed: self.next(),
        }
    }
}

/// A float model whose head has weights to the power `peaked`: the larger, the heavier their tails.
struct Weights {
    random: Random,
    peaked: i32,
}

impl Source for Weights {
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, _: Role) -> Result<CpuMatrix, ModelError> {
        let power = if name.contains("head") { self.peaked } else { 1 };
        let mut weight = || (2.0 * self.random.uniform() - 1.0).powi(power) * (3.0 / cols as f32).sqrt();
        let mut values: Vec<f32> = (0..rows * cols).map(|_| weight()).collect();
        if name.contains("head") {
            values.copy_within(cols..9 * cols, 40 * cols); // Tokens whose logits are equal.
        }
        Ok(CpuMatrix::Dense(DenseMatrix::new(rows, cols, DenseData::F32(values)).unwrap()))
    }

    fn vector(&mut self, _: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(vec![1.0; len])
    }
}

const VOCABULARY: usize = 3000;

fn random_engine(peaked: i32, options: &EngineOptions) -> Engine {
    let shape = Shape {
        vocab_size: VOCABULARY,
        hidden_size: 96,
        intermediate_size: 32,
        num_layers: 1,
        heads: 2,
        kv_heads: 1,
        max_positions: 4096,
        rope_theta: 1e4,
        tied: false,
        sub_norms: false,
        activation: Activation::Silu,
    };
    let config = ModelConfig::fresh(&shape, false).unwrap();
    let mut weights = Weights { random: Random(peaked as u64), peaked };
    Engine::from_model(Model::build(config, &mut weights).unwrap(), options)
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models").join(name)
}

fn options(head: HeadMode, kernels: &'static Kernels, threads: usize) -> EngineOptions {
    EngineOptions { kernels: Some(kernels), threads: Some(threads), head, ..EngineOptions::default() }
}

/// Writes on from `ids` with both engines, and compares choice for choice.
fn same_choices(listed: &mut Session, exact: &mut Session, ids: &[u32], sampling: Sampling, tokens: usize) {
    let what = format!("{sampling:?}");
    let mut samplers = [Sampler::new(sampling.clone()).unwrap(), Sampler::new(sampling).unwrap()];
    let mut ids = ids.to_vec();
    for i in 0..tokens {
        let need = samplers[0].need_after(&ids, 1);
        let candidates = listed.feed_for(&ids, 1, &need).unwrap()[0].clone();
        let mut logits = exact.feed(&ids).unwrap().to_vec();
        for (id, logit) in candidates.iter() {
            assert_eq!(logit.to_bits(), logits[id as usize].to_bits(), "token {i}, id {id}, {what}");
        }
        samplers.iter_mut().for_each(|s| ids.iter().for_each(|&id| s.accept(id)));
        let found = samplers[0].pick(&candidates);
        assert_eq!(found, samplers[1].sample(&mut logits), "token {i}, {} here, {what}", candidates.len());
        ids = vec![found];
    }
}

#[test]
fn choices_are_those_of_the_exact_head_for_any_settings() {
    let mut random = Random(11);
    for peaked in [1, 3, 9] {
        for kernels in Kernels::available() {
            let few = kernels.name() == "scalar";
            let listed =
                random_engine(peaked, &options(HeadMode::Shortlist, kernels, 1 + peaked as usize % 3));
            let exact = random_engine(peaked, &options(HeadMode::Exact, kernels, 2));
            let (mut a, mut b) = (listed.session(KvType::F32, None), exact.session(KvType::F32, None));
            for _ in 0..if few { 15 } else { 150 } {
                let sampling = random.sampling();
                let ids: Vec<u32> = (0..3).map(|_| random.below(VOCABULARY) as u32).collect();
                // Fewer tokens than it takes to give up for a while.
                same_choices(&mut a, &mut b, &ids, sampling, 2);
            }
            let stats = listed.head_stats();
            eprintln!("power {peaked}, {}: {stats:?}, {:.0} rows", kernels.name(), stats.mean_rows());
            assert!(listed.has_shortlist() && !exact.has_shortlist());
            assert!(peaked == 9 || stats.shortlisted >= if few { 5 } else { 80 }, "{stats:?}");
        }
    }
}

#[test]
fn a_golden_model_writes_the_same_with_either_head() {
    let mut random = Random(5);
    for name in ["bitnet-tied-packed-small", "bitnet-untied-packed", "qwen2-bias", "llama-bf16-gguf"] {
        let open = |head| Engine::open(golden(name), &options(head, Kernels::best(), 2)).unwrap();
        let (listed, exact) = (open(HeadMode::Shortlist), open(HeadMode::Exact));
        assert!(listed.has_shortlist(), "{name}");
        let vocabulary = listed.config().vocab_size;
        for _ in 0..30 {
            let (mut a, mut b) = (listed.session(KvType::F16, None), exact.session(KvType::F16, None));
            let ids: Vec<u32> = (0..3).map(|_| random.below(vocabulary) as u32).collect();
            let tokens = 12.min(a.room() - ids.len());
            same_choices(&mut a, &mut b, &ids, random.sampling(), tokens);
        }
        let stats = listed.head_stats();
        eprintln!("{name}, {vocabulary} tokens: {stats:?}, {:.0} rows", stats.mean_rows());
    }
}

#[test]
fn positions_of_a_draft_have_the_candidates_of_one_after_another() {
    let engine = random_engine(1, &options(HeadMode::Shortlist, Kernels::best(), 2));
    let ids: Vec<u32> = (0..700).map(|i| i * 37 % VOCABULARY as u32).collect();
    let need = LogitsNeed::Top { count: 3, within: f32::INFINITY, also: vec![5, 7, 2999, 4000] };
    let mut one = engine.session(KvType::F32, None);
    let expected: Vec<_> =
        (ids.iter()).map(|&id| one.feed_for(&[id], 1, &need).unwrap()[0].clone()).collect();
    for n in [1, 2, 5, 9, 600, 700] {
        let mut session = engine.session(KvType::F32, None);
        let found = session.feed_for(&ids, n, &need).unwrap();
        assert_eq!(found.len(), n);
        for (found, expected) in found.iter().zip(&expected[ids.len() - n..]) {
            // Where one of both fell back, more is there, and the same.
            assert!(found == expected || found.all().is_some() || expected.all().is_some(), "{n}");
            for (id, logit) in expected.iter() {
                if let Some(at) = found.position(id) {
                    assert_eq!(found.iter().nth(at), Some((id, logit)), "{n}");
                }
            }
        }
        assert!(session.logits().is_empty() && session.len() == ids.len());
    }
    // Out of range: as many as there are.
    assert_eq!(engine.session(KvType::F32, None).feed_for(&ids[..4], 9, &need).unwrap().len(), 4);
    assert_eq!(engine.session(KvType::F32, None).feed_for(&ids[..4], 0, &need).unwrap().len(), 1);
}

#[test]
fn what_a_shortlist_cannot_do_falls_back_and_is_counted() {
    let engine = random_engine(1, &options(HeadMode::Shortlist, Kernels::best(), 2));
    let mut session = engine.session(KvType::F32, None);
    assert!(session.feed_for(&[1], 1, &LogitsNeed::All).unwrap()[0].all().is_some());
    assert_eq!(engine.head_stats().exact, 1);
    let half = LogitsNeed::Top { count: VOCABULARY / 2, within: f32::INFINITY, also: Vec::new() };
    assert_eq!(session.feed_for(&[1], 1, &half).unwrap()[0].len(), VOCABULARY);
    assert_eq!((engine.head_stats().exact, engine.head_stats().fallbacks), (2, 0), "known beforehand");
    let many = LogitsNeed::Top { count: usize::MAX, within: 1e6, also: Vec::new() };
    for id in 0..20 {
        assert_eq!(session.feed_for(&[id], 1, &many).unwrap()[0].len(), VOCABULARY);
    }
    let stats = engine.head_stats();
    assert_eq!((stats.fallbacks, stats.exact, stats.shortlisted), (3, 19, 0), "it gives up for a while");
    let plane = engine.bytes_per_token();
    for id in 0..200 {
        session.feed_for(&[id], 1, &LogitsNeed::greedy()).unwrap();
    }
    let stats = engine.head_stats();
    assert!(stats.shortlisted > 100, "and tries again: {stats:?}");
    assert!(stats.mean_rows() >= 1.0 && engine.bytes_per_token() < plane);
}

#[test]
fn weights_or_inputs_that_are_not_numbers_give_all_logits() {
    struct Damaged(f32);
    impl Source for Damaged {
        type Matrix = CpuMatrix;
        type Vector = Vec<f32>;
        fn matrix(&mut self, name: &str, rows: usize, cols: usize, _: Role) -> Result<CpuMatrix, ModelError> {
            let mut values = vec![0.01; rows * cols];
            let value = if name.contains("embed") == self.0.is_nan() { self.0 } else { 0.01 };
            values[3 * cols] = value;
            Ok(CpuMatrix::Dense(DenseMatrix::new(rows, cols, DenseData::F32(values)).unwrap()))
        }
        fn vector(&mut self, _: &str, len: usize) -> Result<Vec<f32>, ModelError> {
            Ok(vec![1.0; len])
        }
    }
    for value in [f32::NAN, f32::INFINITY] {
        let shape = Shape {
            vocab_size: 200,
            hidden_size: 32,
            intermediate_size: 32,
            num_layers: 1,
            heads: 2,
            kv_heads: 1,
            max_positions: 16,
            rope_theta: 1e4,
            tied: false,
            sub_norms: false,
            activation: Activation::Silu,
        };
        let config = ModelConfig::fresh(&shape, false).unwrap();
        let model = Model::build(config, &mut Damaged(value)).unwrap();
        let engine = Engine::from_model(model, &options(HeadMode::Shortlist, Kernels::best(), 1));
        // An infinite weight of the head leaves it without bounds; a NaN among the embeddings, one token.
        assert_eq!(engine.has_shortlist(), value.is_nan());
        let mut session = engine.session(KvType::F32, None);
        let found = &session.feed_for(&[3], 1, &LogitsNeed::greedy()).unwrap()[0];
        assert!(found.all().is_some() && !found.is_finite());
    }
}

use setun::config::{ActivationType, Family, ModelConfig};
use setun::cpu::{CpuOps, CpuSource, Part, Workspace};
use setun::kv_cache::{KvCache, KvType};
use setun::model::Model;
use setun::ops::Ops;
use setun::tokenizer::Tokenizer;
use setun::weights::Weights;
use setun_kernels::{Kernels, Pool};

use super::*;

fn check(model: &Path, expected: &Path) {
    let name = model.display().to_string();
    let engine = engine(model);
    assert_eq!(engine.config().family, Family::Qwen35);
    assert_eq!(engine.activations(), ActivationType::Float, "{name}");
    let values = Checkpoint::open(expected.join("expected.safetensors")).unwrap();
    let facts = json(&expected.join("expected.json"));
    let sequences = facts["sequences"].as_array().unwrap();
    assert_eq!(sequences.len(), 6);
    for (i, sequence) in sequences.iter().enumerate() {
        let tokens = ids(&sequence["tokens"]);
        let mut session = engine.session(KvType::F32, None);
        let mut taps = Vec::new();
        let logits = session.feed_all(&tokens, Some(&mut taps)).unwrap();
        let gap = largest_gap(logits, &floats(&values, &format!("logits.{i}")));
        assert!(gap <= 2e-3, "{name}, sequence {i}: logits are {gap} off");
        let last = logits[logits.len() - engine.config().vocab_size..].to_vec();
        if values.info(&format!("hidden.{i}")).is_some() {
            let hidden = floats(&values, &format!("hidden.{i}"));
            // The reference has no output of the last layer before the norm.
            let before_norm = taps.len() - 2;
            let found = taps.iter().enumerate().filter(|(n, _)| *n != before_norm);
            let found: Vec<f32> = found.flat_map(|(_, (_, x))| x.clone()).collect();
            let gap = largest_gap(&found, &hidden);
            assert!(gap <= 2e-3, "{name}, sequence {i}: hidden states are {gap} off");
        }
        let mut session = engine.session(KvType::F32, None);
        for &token in &tokens {
            session.feed(&[token]).unwrap();
        }
        assert_eq!(bits(session.logits()), bits(&last), "{name}, sequence {i}: token by token");
        for (step, &want) in ids(&sequence["greedy"]).iter().enumerate() {
            let found = argmax(session.logits());
            assert_eq!(found, want, "{name}, sequence {i}, greedy step {step}");
            session.feed(&[found]).unwrap();
        }
    }
}

#[test]
fn logits_hidden_states_and_greedy_ids_equal_the_references() {
    check(&gguf(), &golden());
}

#[test]
fn both_containers_of_the_full_set_agree_where_it_is_at_hand() {
    let Some(full) = full() else { return };
    for model in ["model-pq2_0.gguf", "model-q2_0_g64.gguf", "hf-unpacked"] {
        check(&full.join(model), &full);
    }
}

#[test]
fn logits_have_the_same_bits_on_every_kernel_thread_count_and_prefill_chunking() {
    let tokens = long();
    for activations in [ActivationType::Float, ActivationType::Int8] {
        let mut first: Option<Vec<u32>> = None;
        for kernels in Kernels::available() {
            for threads in [1, 3] {
                let options = EngineOptions {
                    kernels: Some(kernels),
                    threads: Some(threads),
                    activations: Some(activations),
                    ..EngineOptions::default()
                };
                let engine = Engine::open(gguf(), &options).unwrap();
                for batch in [1, 2, 7, 512] {
                    let mut session = engine.session(KvType::F16, None);
                    let found = bits(session.feed_in_batches(&tokens, batch).unwrap());
                    let what =
                        format!("{}, {threads} threads, batches of {batch}, {activations}", kernels.name());
                    assert_eq!(first.get_or_insert_with(|| found.clone()), &found, "{what}");
                }
            }
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_beside_another_in_a_batch() {
    let file = Checkpoint::open(gguf()).unwrap();
    let config = ModelConfig::of(&file).unwrap();
    let (kernels, pool) = (Kernels::best(), Pool::new(2));
    let mut source = CpuSource::new(Weights::new(&file, &config), kernels, &pool, ActivationType::Float);
    let model = Model::build(config.clone(), &mut source).unwrap();
    let mut work = Workspace::new(&config, ActivationType::Float);
    // Bits of two sequences, whose pieces go through the model together.
    let mut run = |passes: &[[&[u32]; 2]]| {
        let mut caches = [0, 1].map(|_| KvCache::new(&config, KvType::F32, 64));
        let mut out = [Vec::new(), Vec::new()];
        for pass in passes {
            let (ids, mut taps) = (pass.concat(), Vec::new());
            let parts = caches.iter_mut().zip(pass).filter(|(_, ids)| !ids.is_empty());
            let mut parts: Vec<Part> = parts
                .map(|(cache, ids)| Part { length: cache.len() + ids.len(), cache, tokens: ids.len() })
                .collect();
            let mut ops = CpuOps::new(kernels, &pool, &mut work, &mut parts, Some(&mut taps));
            let hidden = model.hidden(&mut ops, &ids);
            ops.release(hidden);
            ops.finish();
            let (first, second) = taps.last().unwrap().1.split_at(pass[0].len() * config.hidden_size);
            out[0].extend(bits(first));
            out[1].extend(bits(second));
        }
        out
    };
    let tokens = long();
    let (a, b) = (&tokens[..9], &tokens[30..45]);
    let [alone, _] = run(&[[a, &[]]]);
    let [_, other] = run(&[[&[], b]]);
    let together = run(&[[&a[..4], &b[..1]], [&a[4..5], &b[1..12]], [&[], &b[12..]], [&a[5..], &[]]]);
    assert_eq!(together, [alone, other]);
}

#[test]
fn int8_activations_stay_within_twice_what_the_reference_simulates() {
    let options = EngineOptions {
        threads: Some(2),
        activations: Some(ActivationType::Int8),
        ..EngineOptions::default()
    };
    let engine = Engine::open(gguf(), &options).unwrap();
    let values = Checkpoint::open(golden().join("expected.safetensors")).unwrap();
    let facts = json(&golden().join("expected.json"));
    let cost =
        facts["activation_int8_sensitivity"]["q8_per_token"]["max_abs_logit_err"].as_f64().unwrap() as f32;
    for i in 0..5 {
        let tokens = ids(&facts["sequences"][i]["tokens"]);
        let mut session = engine.session(KvType::F32, None);
        let found = session.feed_all(&tokens, None).unwrap();
        let gap = largest_gap(found, &floats(&values, &format!("logits.{i}")));
        assert!(gap > 0.0 && gap <= 2.0 * cost, "sequence {i}: {gap} off");
    }
}

#[test]
fn going_back_in_a_sequence_never_leaves_the_state_of_tokens_that_were_forgotten() {
    let engine = engine(&gguf());
    let tokens = long();
    let fresh = |ids: &[u32]| {
        let mut session = engine.session(KvType::F16, None);
        bits(session.feed(ids).unwrap())
    };
    for back in [0, 1, 19, 20, 21, 24, 25, 40] {
        let mut session = engine.session(KvType::F16, None);
        session.feed(&tokens[..20]).unwrap();
        for id in &tokens[20..25] {
            session.feed(std::slice::from_ref(id)).unwrap();
        }
        let known = session.truncate(back);
        // What is kept is all, the end of the prompt, or nothing.
        let expected = if back >= 25 {
            25
        } else if back >= 20 {
            20
        } else {
            0
        };
        assert_eq!((known, session.len()), (expected, expected), "back to {back}");
        let mut other = tokens[..known].to_vec();
        other.extend([7, 8, 9, 300]);
        assert_eq!(bits(session.feed(&other[known..]).unwrap()), fresh(&other), "back to {back}");
        // And again: a copy that was restored is still good, one that was dropped is gone.
        let known = session.truncate(known + 4);
        assert_eq!(known, session.len());
        let again = session.truncate(known.saturating_sub(2));
        assert_eq!(again, 0, "the last prompt ended at {known}");
        assert_eq!(bits(session.feed(&tokens).unwrap()), fresh(&tokens));
    }
}

#[test]
fn a_session_counts_the_bytes_of_states_copies_and_keys() {
    let engine = engine(&gguf());
    let config = engine.config();
    let state = config.hybrid.as_ref().unwrap().state_bytes();
    // Three layers: three inputs of 512 channels, and four heads of 64 by 64.
    assert_eq!(state, 3 * 4 * (3 * 512 + 4 * 64 * 64));
    let mut session = engine.session(KvType::F16, None);
    assert_eq!(session.cache_bytes(), state);
    session.feed(&[1]).unwrap();
    // One attention layer of two heads of 64, for the 256 positions that are made at first.
    let keys = 2 * 2 * 256 * 64 * 2;
    assert_eq!(session.cache_bytes(), state + keys);
    session.feed(&[2, 3]).unwrap();
    assert_eq!(session.cache_bytes(), 2 * state + keys);
}

#[test]
fn the_tokenizer_inside_the_file_gives_the_references_ids() {
    let tokenizer = Tokenizer::of(&Checkpoint::open(gguf()).unwrap()).unwrap();
    let cases = json(&golden().join("tokenizer_cases.json"));
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 5);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&case["ids"]), "{text:?}");
    }
}

//! Several sequences in one pass against the same sequences one by one.

use setun::engine::{Engine, EngineOptions, Session};
use setun::head::{Candidates, HeadMode, LogitsNeed};
use setun::kv_cache::KvType;

/// A ternary model with grouped heads, and one with recurrent layers.
const MODELS: [&str; 2] = ["models/bitnet-tied-packed-small", "bonsai/qwen35-basic/model-pq2_0.gguf"];

fn open(name: &str) -> Engine {
    let path = format!("{}/../../golden/{name}", env!("CARGO_MANIFEST_DIR"));
    Engine::open(path, &EngineOptions { threads: Some(2), ..Default::default() }).unwrap()
}

/// Sequences of different lengths, each fed its prompt.
fn sessions(engine: &Engine, count: usize) -> Vec<Session<'_>> {
    let prompts = (0..count).map(|n| (1..=1 + 3 * n as u32).collect::<Vec<u32>>());
    let fed = prompts.map(|prompt| {
        let mut session = engine.session(KvType::F32, Some(40));
        session.feed(&prompt).unwrap();
        session
    });
    fed.collect()
}

#[test]
fn a_token_fed_in_company_gives_the_bits_of_one_fed_alone() {
    for engine in MODELS.map(open) {
        for count in [0, 1, 2, 3, 7] {
            let (mut together, mut alone) = (sessions(&engine, count), sessions(&engine, count));
            for step in 0..3u32 {
                let ids: Vec<u32> = (0..count as u32).map(|n| 5 + n * 7 + step).collect();
                engine.decode_batch(&mut together, &ids).unwrap();
                for ((a, b), &id) in together.iter().zip(&mut alone).zip(&ids) {
                    b.feed(&[id]).unwrap();
                    let bits =
                        |session: &Session| session.logits().iter().map(|l| l.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(a), bits(b), "{count} sequences, step {step}");
                    assert_eq!((a.len(), a.ids()), (b.len(), b.ids()));
                }
            }
        }
    }
}

#[test]
fn a_batch_with_one_impossible_token_feeds_none() {
    let engine = open(MODELS[0]);
    let mut two = sessions(&engine, 2);
    let before: Vec<Vec<f32>> = two.iter().map(|s| s.logits().to_vec()).collect();
    assert!(engine.decode_batch(&mut two, &[1, u32::MAX]).is_err());
    let mut full = engine.session(KvType::F32, Some(1));
    full.feed(&[1]).unwrap();
    two.push(full);
    let error = engine.decode_batch(&mut two, &[1, 1, 1]).unwrap_err().to_string();
    assert!(error.contains('1'), "{error}");
    for (session, before) in two.iter().zip(before) {
        assert_eq!(session.logits(), before);
    }
    assert_eq!((two[0].len(), two[1].len()), (1, 4));
}

#[test]
fn candidates_in_company_are_those_of_a_session_alone() {
    let path = format!("{}/../../golden/{}", env!("CARGO_MANIFEST_DIR"), MODELS[0]);
    for head in [HeadMode::Exact, HeadMode::Shortlist] {
        let engine = Engine::open(&path, &EngineOptions { head, ..Default::default() }).unwrap();
        let (mut together, mut alone) = (sessions(&engine, 11), sessions(&engine, 11));
        let ids: Vec<u32> = (0..11).map(|n| 5 + n * 7).collect();
        let top = LogitsNeed::Top { count: 3, within: f32::INFINITY, also: vec![2, 9] };
        let needs: Vec<&LogitsNeed> =
            (0..11).map(|n| if n % 4 == 0 { &LogitsNeed::All } else { &top }).collect();
        engine.decode_batch_for(&mut together, &ids, &needs).unwrap();
        for (((a, b), &id), need) in together.iter().zip(&mut alone).zip(&ids).zip(needs) {
            let expected = b.feed_for(&[id], 1, need).unwrap();
            let best = |c: &Candidates| {
                let mut all: Vec<(u32, f32)> = c.iter().collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                all[..3].to_vec()
            };
            let [found] = a.candidates() else { panic!("one position") };
            assert_eq!(best(found), best(&expected[0]), "{head:?} {need:?}");
            assert_eq!(found.all().is_some(), expected[0].all().is_some());
            assert_eq!(a.ids(), b.ids());
        }
    }
}

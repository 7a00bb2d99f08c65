use std::path::{Path, PathBuf};

use super::*;
use crate::config::ValidSection;

/// Documents that name themselves: `word` repeated, then the number.
fn documents(word: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{} {n}.", vec![word; n % 13 + 1].join(" "))).collect()
}

fn write(path: &Path, documents: &[String]) {
    std::fs::write(path, documents.join("\n<|endoftext|>\n")).unwrap();
}

/// A run on two sources, `cats` and `dogs`, in a fresh folder.
struct Run {
    folder: tempfile::TempDir,
    config: TrainConfig,
    vocabulary: Vocabulary,
}

fn run(extra: &str) -> Run {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("cats.txt"), &documents("cat", 50));
    write(&folder.path().join("dogs.txt"), &documents("dog", 30));
    let text = format!(
        r#"
        [model]
        vocab_size = 300
        hidden_size = 64
        intermediate_size = 64
        num_layers = 1
        heads = 2
        max_positions = 64
        [train]
        steps = 10
        batch = 4
        seed = 5
        threads = 2
        out = "out"
        [data]
        seq_len = 32
        [[data.sources]]
        name = "cats"
        path = "cats.txt"
        [[data.sources]]
        name = "dogs"
        path = "dogs.txt"
        {extra}
        "#
    );
    let config = TrainConfig::parse(&text, folder.path()).unwrap();
    let vocabulary = Vocabulary::prepare(&config).unwrap();
    Run { folder, config, vocabulary }
}

impl Run {
    fn batches(&self) -> Batches {
        Batches::new(&self.config, &self.vocabulary).unwrap()
    }

    fn cache(&self, name: &str) -> PathBuf {
        self.config.cache().join(name)
    }
}

/// The ids of the stream of one source, joined again from sequences.
fn stream(batches: &mut Batches, source: usize, tokens: usize) -> Vec<u32> {
    let mut ids = Vec::new();
    while ids.len() < tokens {
        let mut made = Batch::default();
        batches.streams[source].sequence(7, Packing::Stream, &mut made);
        assert_eq!(made.ids[1..], made.targets[..6]);
        ids.extend(made.ids);
    }
    ids
}

#[test]
fn an_epoch_reads_every_document_once_with_the_marker_between() {
    let run = run("");
    let mut batches = run.batches();
    let total = batches.streams[0].corpus.tokens();
    let ids = stream(&mut batches, 0, 2 * total);
    let mut orders = Vec::new();
    for epoch in [&ids[..total], &ids[total..2 * total]] {
        assert_eq!(epoch[0], run.vocabulary.end_of_text());
        let texts: Vec<String> = epoch[1..]
            .split(|&id| id == run.vocabulary.end_of_text())
            .map(|ids| run.vocabulary.decode(ids).unwrap())
            .collect();
        let (mut sorted, mut expected) = (texts.clone(), documents("cat", 50));
        sorted.sort();
        expected.sort();
        assert_eq!(sorted, expected);
        orders.push(texts);
    }
    assert_ne!(orders[0], orders[1], "each epoch has its own order");
    assert_ne!(orders[0], documents("cat", 50));
}

#[test]
fn targets_are_the_ids_that_follow_also_across_sequences_and_epochs() {
    let run = run("");
    let mut batches = run.batches();
    let total = batches.streams[1].corpus.tokens();
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    while ids.len() < 3 * total {
        let mut made = Batch::default();
        batches.streams[1].sequence(5, Packing::Stream, &mut made);
        ids.extend(made.ids);
        targets.extend(made.targets);
    }
    assert_eq!(ids[1..], targets[..targets.len() - 1]);
}

#[test]
fn packed_documents_start_at_their_markers_and_the_tokens_are_those_of_the_stream() {
    let run = run("");
    let mut packed = run.config.clone();
    packed.data.packing = Packing::Documents;
    let mut packed = Batches::new(&packed, &run.vocabulary).unwrap();
    let mut stream = run.batches();
    let marker = run.vocabulary.end_of_text();
    let mut several = 0;
    for _ in 0..30 {
        let (made, same) = (packed.next_batch(0.5), stream.next_batch(0.5));
        assert_eq!((&made.ids, &made.targets), (&same.ids, &same.targets));
        assert!(same.starts.is_empty());
        for (ids, starts) in made.ids.chunks(32).zip(made.starts.chunks_exact(32)) {
            let expected: Vec<u32> =
                (0..32).map(|i| ids[..=i].iter().rposition(|&id| id == marker).unwrap_or(0) as u32).collect();
            assert_eq!(starts, expected);
            several += usize::from(expected.last() != Some(&0));
        }
    }
    assert!(several > 30, "{several}");
    assert_eq!(packed.state(), stream.state());
}

#[test]
fn packed_held_out_windows_start_documents_at_their_markers() {
    let run = run("");
    let texts = documents("dog", 40);
    for seq_len in [1, 7, 64, 10_000] {
        let set = HeldOut::new("x", texts.iter().cloned().map(Ok), &run.vocabulary, seq_len).unwrap();
        let plain: Vec<HeldOutBatch> = set.batches(3, None).collect();
        let packed: Vec<HeldOutBatch> = set.packed(Packing::Documents).batches(3, None).collect();
        assert_eq!(plain.len(), packed.len());
        for (plain, packed) in plain.into_iter().zip(packed) {
            let length = packed.batch.seq_len;
            let sequences = packed.batch.ids.chunks(length);
            let expected: Vec<u32> = sequences
                .flat_map(|ids| {
                    let start =
                        |i: usize| ids[..=i].iter().rposition(|&id| id == run.vocabulary.end_of_text());
                    (0..length).map(move |i| start(i).unwrap_or(0) as u32)
                })
                .collect();
            assert_eq!(packed.batch.starts, expected);
            assert_eq!(Batch { starts: Vec::new(), ..packed.batch }, plain.batch);
            assert_eq!(packed.bytes, plain.bytes);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_batches_and_another_seed_others() {
    let run = run("");
    let (mut a, mut b) = (run.batches(), run.batches());
    let mut other = run.config.clone();
    other.train.seed = 6;
    let mut c = Batches::new(&other, &run.vocabulary).unwrap();
    let first = a.next_batch(0.0);
    assert_eq!(first, b.next_batch(0.0));
    assert_ne!(first, c.next_batch(0.0));
    assert_eq!((first.batch, first.seq_len), (4, 32));
    assert_eq!((first.ids.len(), first.targets.len()), (4 * 32, 4 * 32));
}

#[test]
fn a_restored_state_continues_with_the_identical_batches() {
    let run = run("");
    let mut going = run.batches();
    for step in 0..40 {
        let state: Value = serde_json::from_str(&going.state().to_string()).unwrap();
        let mut restored = run.batches();
        restored.restore(&state).unwrap();
        let (a, b) = (restored.sources(), going.sources());
        assert!(a.eq(b), "step {step}");
        let mut twin = going.clone();
        for _ in 0..3 {
            assert_eq!(restored.next_batch(0.3), twin.next_batch(0.3), "step {step}");
        }
        assert_eq!(restored.state(), twin.state());
        going.next_batch(0.3);
    }
    let epochs: Vec<f64> = going.sources().map(|s| s.epochs).collect();
    assert!(epochs.iter().all(|&e| e > 1.0), "the test crosses epochs: {epochs:?}");
}

#[test]
fn an_order_that_is_not_listed_reads_every_document_once_and_resumes_alike() {
    let run = run("");
    let computed = || {
        let mut batches = run.batches();
        for stream in &mut batches.streams {
            stream.listed = 0;
            stream.order = stream.order_of(0);
            assert_eq!(stream.order.bytes(), 0);
        }
        batches
    };
    let (mut batches, marker) = (computed(), run.vocabulary.end_of_text());
    let total = batches.streams[0].corpus.tokens();
    let ids = stream(&mut batches, 0, 2 * total);
    for epoch in [&ids[..total], &ids[total..2 * total]] {
        let parts = epoch[1..].split(|&id| id == marker);
        let mut texts: Vec<String> = parts.map(|ids| run.vocabulary.decode(ids).unwrap()).collect();
        let mut expected = documents("cat", 50);
        texts.sort();
        expected.sort();
        assert_eq!(texts, expected);
    }
    let mut going = computed();
    for step in 0..20 {
        let mut restored = computed();
        restored.restore(&going.state()).unwrap();
        assert!(restored.sources().eq(going.sources()), "step {step}");
        assert_eq!(restored.next_batch(0.3), going.next_batch(0.3), "step {step}");
    }
    // A place in an order of one kind means nothing in the other.
    let error = run.batches().restore(&going.state()).unwrap_err().to_string();
    assert!(error.contains("another kind than `listed`"), "{error}");
    let mut old = run.batches().state();
    old["sources"][0].as_object_mut().unwrap().remove("order");
    assert!(computed().restore(&old).unwrap_err().to_string().contains("source `cats`"));
    run.batches().restore(&old).unwrap();
}

#[test]
fn a_state_written_before_the_tokens_read_were_kept_gives_the_same_place() {
    let run = run("");
    let mut going = run.batches();
    (0..25).for_each(|_| drop(going.next_batch(0.5)));
    let mut old = going.state();
    for source in old["sources"].as_array_mut().unwrap() {
        source.as_object_mut().unwrap().retain(|name, _| name != "read" && name != "order");
    }
    let mut restored = run.batches();
    restored.restore(&old).unwrap();
    assert_eq!(restored.state(), going.state());
}

#[test]
fn a_state_of_another_run_or_a_damaged_one_is_refused_and_changes_nothing() {
    let run = run("");
    let mut batches = run.batches();
    batches.next_batch(0.0);
    let state = batches.state();
    let refusals: [(&str, Value, &str); 9] = [
        ("/seed", json!(6), "train.seed = 6"),
        ("/drawn", json!(-1), "damaged"),
        ("/sources", json!([]), "read the sources"),
        ("/sources/0/name", json!("mice"), "mice, dogs"),
        ("/sources/1/text", json!("0"), "source `dogs`"),
        ("/sources/1/document", json!(30), "damaged"),
        ("/sources/1/offset", json!(1u64 << 40), "damaged"),
        ("/sources/1/read", json!(1u64 << 40), "damaged"),
        ("/sources/1/order", json!("keyed"), "another kind"),
    ];
    for (pointer, value, expected) in refusals {
        let mut changed = state.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        let error = batches.restore(&changed).unwrap_err().to_string();
        assert!(error.contains(expected), "{pointer}: {error}");
        assert_eq!(batches.state(), state);
    }
}

#[test]
fn sources_are_drawn_by_their_weights_and_move_linearly() {
    let run = run("weight = 3.0\nweight_end = 0.0");
    let mut batches = run.batches();
    // Weights: cats 1 throughout, dogs from 3 to 0.
    for (progress, share) in [(0.0, 0.75), (0.5, 0.6), (1.0, 0.0)] {
        let draws = 20_000;
        let mut dogs = 0;
        for _ in 0..draws {
            dogs += batches.pick(progress);
            batches.drawn += 1;
        }
        let found = dogs as f64 / f64::from(draws);
        assert!((found - share).abs() < 0.015, "{progress}: {found}");
    }
}

#[test]
fn a_fresh_cache_is_used_and_a_stale_or_damaged_one_rebuilt() {
    let run = run("");
    let first = run.batches().next_batch(0.0);
    let cache = run.cache("cats.tokens");
    let stamp = || std::fs::metadata(&cache).unwrap().modified().unwrap();
    let bytes = std::fs::read(&cache).unwrap();
    let written = stamp();
    assert_eq!(run.batches().next_batch(0.0), first);
    assert_eq!(stamp(), written, "a fresh cache is not written again");

    let batches_told = || {
        let mut told = Vec::new();
        let mut watch = |now: Preparing| {
            if let Preparing::Remaking { cache, reason } = now {
                told.push(format!("{}: {reason}", cache.file_name().unwrap().display()));
            }
        };
        let batches = Batches::watched(&run.config, &run.vocabulary, &mut watch).unwrap();
        (batches, told)
    };
    // Damage: cut short, too long, a token beyond the vocabulary, an empty document, another version, too many documents.
    let (last, end) = (bytes.len() - 8, bytes.len());
    for (damage, reason) in [
        (bytes[..end - 2].to_vec(), "cut short"),
        ([&bytes[..], &[0]].concat(), "cut short or changed"),
        ([&bytes[..40], &[0xff, 0xff], &bytes[42..]].concat(), "it is damaged"),
        ([&bytes[..last], &bytes[last - 8..last]].concat(), "it is damaged"),
        ([&bytes[..8], &[9], &bytes[9..]].concat(), "format 9, this program's is 2"),
        ([&bytes[..24], &[0xff; 8], &bytes[32..]].concat(), "cut short or changed"),
        (Vec::new(), "it is no token cache"),
    ] {
        std::fs::write(&cache, damage).unwrap();
        let (mut batches, told) = batches_told();
        assert_eq!(batches.next_batch(0.0), first);
        assert!(told.len() == 1 && told[0].contains(reason), "{reason}: {told:?}");
        assert_eq!(std::fs::read(&cache).unwrap(), bytes);
    }
    assert_eq!(batches_told().1, [""; 0]);

    // Other text of the same length, same tokenizer.
    let mut texts = documents("cat", 50);
    texts[3] = texts[3].replace("cat", "cow");
    write(&run.folder.path().join("cats.txt"), &texts);
    run.batches();
    assert_ne!(std::fs::read(&cache).unwrap(), bytes);

    // Another tokenizer, the first text.
    write(&run.folder.path().join("cats.txt"), &documents("cat", 50));
    let other = Vocabulary::train(documents("cow", 9).into_iter().map(Ok), 270).unwrap();
    Batches::new(&run.config, &other).unwrap();
    assert_ne!(std::fs::read(&cache).unwrap(), bytes);
}

#[test]
fn the_tokenizer_is_kept_while_its_text_stays_and_trained_again_when_it_changes() {
    let run = run("");
    let path = run.cache("tokenizer.json");
    let marked = run.vocabulary.json().replace('\n', "\r\n");
    std::fs::write(&path, &marked).unwrap();
    assert_eq!(Vocabulary::prepare(&run.config).unwrap().json(), marked);
    write(&run.folder.path().join("dogs.txt"), &documents("fox", 30));
    let again = Vocabulary::prepare(&run.config).unwrap();
    assert_ne!(again.json(), marked);
    assert_ne!(again.json(), run.vocabulary.json());
}

#[test]
fn threads_do_not_change_the_tokens() {
    let mut run = run("");
    let first = run.batches().next_batch(0.0);
    for threads in [1, 3, 16] {
        run.config.train.threads = Some(threads);
        std::fs::remove_file(run.cache("cats.tokens")).unwrap();
        assert_eq!(run.batches().next_batch(0.0), first);
    }
}

#[test]
fn held_out_windows_score_every_token_and_byte_once() {
    let run = run("");
    let mut texts = documents("dög", 40);
    texts.push("a 🐈 with many bytes, 日本語".into());
    let stream = texts.iter().fold(vec![0], |mut all, text| {
        all.extend(run.vocabulary.encode(text).unwrap());
        all.push(0);
        all
    });
    let bytes: usize = texts.iter().map(String::len).sum();
    for seq_len in [1, 7, 64, 10_000] {
        let set = HeldOut::new("x", texts.iter().cloned().map(Ok), &run.vocabulary, seq_len);
        let set = set.unwrap();
        assert_eq!((set.tokens(), set.bytes()), (stream.len() - 1, bytes as u64));
        let (mut ids, mut targets, mut score) = (Vec::new(), Vec::new(), Score::default());
        for made in set.batches(3, None) {
            let Batch { batch, seq_len: length, .. } = made.batch;
            assert!(batch <= 3 && length <= seq_len && batch * length == made.batch.ids.len());
            score.add(made.batch.targets.len() as f64, &made);
            ids.extend(made.batch.ids);
            targets.extend(made.batch.targets);
        }
        assert_eq!(ids, stream[..stream.len() - 1]);
        assert_eq!(targets, stream[1..]);
        assert_eq!(score.bytes, bytes as u64);
        assert_eq!(score.loss(), 1.0);
        let bits = (stream.len() - 1) as f64 / std::f64::consts::LN_2 / bytes as f64;
        assert!((score.bits_per_byte() - bits).abs() < 1e-12);
    }
}

#[test]
fn a_limit_takes_whole_windows_spread_over_the_set() {
    let run = run("");
    let texts = documents("dog", 200);
    let set = HeldOut::new("x", texts.into_iter().map(Ok), &run.vocabulary, 16).unwrap();
    let take = |limit| set.batches(4, limit).collect::<Vec<_>>();
    let tokens = |taken: &[HeldOutBatch]| -> usize { taken.iter().map(|b| b.batch.ids.len()).sum() };
    let some = take(Some(100));
    assert_eq!(tokens(&some), 112, "seven windows of 16");
    assert_eq!(some, take(Some(100)));
    let all: Vec<u32> = take(None).into_iter().flat_map(|b| b.batch.ids).collect();
    let last = some.last().unwrap().batch.ids.chunks(16).last().unwrap();
    let place = all.windows(last.len()).position(|w| w == last).unwrap();
    assert!(place > all.len() / 2, "the last window taken lies in the second half");
    assert_eq!(tokens(&take(Some(usize::MAX))), set.tokens());
    assert_eq!(tokens(&take(Some(1))), 16);
}

#[test]
fn empty_text_is_an_error_that_names_the_source() {
    let run = run("");
    std::fs::write(run.folder.path().join("dogs.txt"), "\n<|endoftext|>\n").unwrap();
    let error = Batches::new(&run.config, &run.vocabulary).unwrap_err();
    assert!(error.to_string().contains("source `dogs` holds no document"));
    let path = run.folder.path().join("dogs.txt");
    let set = ValidSection { name: "dogs".into(), path: vec![path], text_field: None };
    let error = HeldOut::load(&set, &run.vocabulary, 8).unwrap_err();
    assert!(error.to_string().contains("held-out set `dogs` holds no document"));
}

//! What measures: `bench`, `eval`, `plot`.

use super::*;

#[test]
fn bench_json_has_the_stated_keys() {
    let args = ["bench", "--shape", "tiny", "--prefill", "32", "--decode", "4", "--repeats", "1", "--json"];
    let out = json(&args);
    for key in ["load_seconds", "peak_rss_bytes", "read_gb_per_s", "int8_gmac_per_s"] {
        assert!(out[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert!(out["machine"].is_object() && out["model"].is_object());
    let results = out["results"].as_array().unwrap();
    let phases: Vec<_> =
        results.iter().map(|r| (r["phase"].as_str().unwrap(), r["tokens"].as_u64().unwrap())).collect();
    assert_eq!(phases, [("prefill", 32), ("decode", 4)]);
    for r in results {
        assert_eq!(r["batch"], 1);
        assert!(r["kernel"].is_string() && r["threads"].as_u64().unwrap() >= 1);
        for key in ["tokens_per_s", "bytes_per_token", "share"] {
            assert!(r[key].as_f64().unwrap() > 0.0, "{key}");
        }
    }
    let table = stdout(&["bench", &small(), "--prefill", "16", "--decode", "4", "--repeats", "1"]);
    assert!(table.contains("% of read bandwidth") && table.contains("% of arithmetic"), "{table}");
}

#[test]
fn bench_measures_batches_and_depths_and_draws_them() {
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("roof.svg").display().to_string();
    let mut args =
        vec!["bench", "--shape", "tiny", "--prefill", "0", "--decode", "2", "--repeats", "1", "--json"];
    args.extend(["--batch", "1,3", "--depth", "4,9", "--svg", &svg]);
    let out = json(&args);
    let results = out["results"].as_array().unwrap();
    let of = |key: &str| results.iter().map(|r| r[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((of("batch"), of("depth")), (vec![1, 3, 1, 3], vec![4, 4, 9, 9]));
    let number = |at: usize, key: &str| results[at][key].as_f64().unwrap();
    assert!(number(0, "weight_bytes_per_token") > 2.9 * number(1, "weight_bytes_per_token"));
    assert!(number(2, "kv_bytes_per_token") > number(0, "kv_bytes_per_token"));
    assert!(
        out["warnings"].is_array() && out["energy_estimate_per_token"]["joules_7nm"].as_f64().unwrap() > 0.0
    );
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("3 at once after 9"));
}

#[test]
fn the_ladder_has_every_rung_that_the_shape_allows_and_names_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("ladder.svg").display().to_string();
    let lengths = ["--prefill", "4", "--decode", "1", "--repeats", "1"];
    let mut args = vec!["bench", "--ladder", "--shape", "tiny", "--json", "--svg", &svg];
    args.extend(lengths);
    let out = json(&args);
    let names = |key: &str| {
        out[key]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r["weights"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names("rungs"), ["F32", "F16", "BF16", "ternary"]);
    assert_eq!(names("skipped"), ["Q8_0", "Q4_0"]);
    assert!(std::fs::read_to_string(&svg).unwrap().contains("ternary"));
    let mut args = vec!["bench", "--ladder", "--shape", "tiny"];
    args.extend(lengths);
    assert!(stdout(&args).contains("Energy is an estimate"));
}

#[test]
fn perplexity_of_the_default_model_on_a_simple_story_is_low_and_does_not_depend_on_the_kernel() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "Once upon a time, there was a little girl named Lily. She loved to play with her toys.",
    )
    .unwrap();
    let path = file.path().display().to_string();
    let found = |kernel: &str| json(&["eval", "ppl", "--file", &path, "--json", "--kernel", kernel]);
    let best = found(setun_kernels::Kernels::best().name());
    assert!(best["perplexity"].as_f64().unwrap() < 20.0, "{best}");
    assert_eq!(best["perplexity"], found("scalar")["perplexity"]);
    assert_eq!(best["protocol"], "strided");
}

#[test]
fn plots_of_runs_are_svg_and_a_missing_run_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("first");
    std::fs::create_dir(&run).unwrap();
    let lines = "{\"step\":1,\"tokens\":10,\"loss\":5.0}\n{\"step\":2,\"tokens\":20,\"loss\":4.0}\n";
    std::fs::write(run.join("metrics.jsonl"), lines).unwrap();
    let (run, picture) = (run.display().to_string(), folder.path().join("p.svg"));
    stdout(&["plot", &run, "--out", &picture.display().to_string()]);
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("first"), "{svg}");
    assert!(failure(&["plot", "no-such-run", "-o", "x.svg"], 1).contains("no-such-run"));
}

#[test]
fn a_text_too_short_to_score_is_an_error_that_names_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().display().to_string();
    let error = failure(&["eval", "ppl", "--file", &path], 1);
    assert!(error.contains(&path) && error.contains("at least 2"), "{error}");
}

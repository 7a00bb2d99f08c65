use super::*;

const SMALL: &str = r#"
    [model]
    vocab_size = 512
    hidden_size = 256
    intermediate_size = 768
    num_layers = 2
    heads = 4
    max_positions = 128

    [data]
    seq_len = 64
    sources = [{ name = "stories", path = "text/stories.txt" }]

    [[data.valid]]
    name = "stories"
    path = ["held/a.txt", "/abs/b.txt"]

    [train]
    tokens = 10_000
    batch = 4
    out = "out/small"
"#;

fn parse(text: &str) -> Result<TrainConfig, TrainError> {
    TrainConfig::parse(text, Path::new("/runs"))
}

/// The error after replacing a line of [`SMALL`] (found by its beginning), or adding one after it.
fn refusal(line: &str, replacement: &str) -> String {
    let text: Vec<_> =
        SMALL.lines().map(|l| if l.trim().starts_with(line) { replacement } else { l }).collect();
    assert_ne!(text.join("\n"), SMALL.trim_end_matches(' '), "no line begins with {line}");
    parse(&text.join("\n")).expect_err(replacement).to_string()
}

#[test]
fn defaults_fill_what_a_small_file_leaves_out() {
    let config = parse(SMALL).unwrap();
    assert_eq!(config.shape().kv_heads, 4);
    assert!(config.shape().tied && config.shape().sub_norms);
    assert_eq!(config.model.precision, Precision::Ternary);
    assert_eq!(config.optimizer, OptimizerSection::default());
    assert_eq!(config.total_steps(), 10_000u64.div_ceil(4 * 64));
    assert_eq!(config.cache(), Path::new("/runs/out/small/tokens"));
    assert_eq!(config.warnings(), Vec::<String>::new());
    let model = config.model_config(0).unwrap();
    assert_eq!((model.bos, model.eos.as_slice()), (Some(0), &[0][..]));
}

#[test]
fn recommended_sampling_is_read_and_checked() {
    let with = |text: &str| parse(&format!("{SMALL}\n[sampling]\n{text}"));
    let sampling = with("temperature = 0.5\nmin_p = 0.1").unwrap().sampling;
    assert_eq!((sampling.temperature, sampling.min_p, sampling.top_p), (Some(0.5), Some(0.1), None));
    assert!(with("top_p = 2").unwrap_err().to_string().contains("`top_p` is 2"));
    assert!(with("heat = 1").unwrap_err().to_string().contains("heat"));
}

#[test]
fn relative_paths_start_at_the_file_and_absolute_ones_stay() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    std::fs::write(&file, SMALL).unwrap();
    let config = TrainConfig::load(&file).unwrap();
    assert_eq!(config.data.sources[0].path, [folder.path().join("text/stories.txt")]);
    assert_eq!(config.data.valid[0].path[1], Path::new("/abs/b.txt"));
    assert_eq!(config.train.out, folder.path().join("out/small"));
}

#[test]
fn a_config_survives_being_written_and_read() {
    let config = parse(SMALL).unwrap();
    let text = toml::to_string(&config).unwrap();
    assert_eq!(parse(&text).unwrap(), config, "{text}");
}

#[test]
fn every_refusal_names_the_field_or_the_line() {
    let cases = [
        ("hidden_size", "hiden_size = 256", "`hiden_size`"),
        ("hidden_size", "", "`hidden_size`"),
        ("hidden_size", "hidden_size = \"wide\"", "line 4, `hidden_size = \"wide\"`"),
        ("hidden_size", "hidden_size = 0", "`model.hidden_size` is 0"),
        ("hidden_size", "hidden_size = 258", "`model.hidden_size` is 258"),
        ("hidden_size", "hidden_size = -4", "`hidden_size = -4`"),
        ("heads", "heads = 0", "`model.heads` is 0"),
        ("heads", "heads = 4\nkv_heads = 3", "`model.kv_heads` is 3"),
        ("vocab_size", "vocab_size = 200", "`model.vocab_size` is 200"),
        ("seq_len", "seq_len = 129", "`data.seq_len` is 129"),
        ("seq_len", "seq_len = 8\npacking = \"tight\"", "`packing = \"tight\"`"),
        ("sources", "sources = []", "`data.sources` is empty"),
        ("sources", "sources = [{ name = \"a/b\", path = \"c\" }]", "`data.sources.name` is `a/b`"),
        ("sources", "sources = [{ name = \"a\", path = \"held/a.txt\" }]", "`data.valid.path of `stories`"),
        (
            "sources",
            "sources = [{ name = \"a\", path = \"b\", weight = -1 }]",
            "`data.sources.weight of `a``",
        ),
        ("sources", "sources = [{ name = \"a\", path = \"b\", weight_end = 0 }]", "`data.sources.weight`"),
        ("sources", "sources = [{ name = \"a\", path = 3 }]", "a path or a list of paths"),
        ("sources", "sources = [{ name = \"a\", path = \"b\", text_field = \"\" }]", "text_field of `a`"),
        ("tokens", "", "neither steps nor tokens"),
        ("tokens", "tokens = 1\nsteps = 1", "both steps and tokens"),
        ("batch", "batch = 0", "`train.batch` is 0"),
        ("batch", "threads = 0", "`train.threads` is 0"),
        ("batch", "spike_deviations = -1.0", "`train.spike_deviations` is -1"),
        ("batch", "spike_deviations = nan", "`train.spike_deviations` is NaN"),
        ("batch", "spike_steps = 0", "`train.spike_steps` is 0"),
        ("batch", "spike_window = 3", "`train.spike_window` is 3"),
        ("batch", "precision = \"float\"", "`precision`"),
        ("heads", "heads = 4\nprecision = \"ternary-weights\"", "`model.sub_norms` is true"),
        ("heads", "heads = 4\nactivation_bits = 5", "`model.activation_bits` is 5"),
        ("heads", "heads = 4\nprecision = \"float\"\nactivation_bits = 4", "`model.activation_bits` is 4"),
        ("heads", "heads = 4\nprecision = \"float\"\nhadamard = true", "`model.hadamard` is true"),
        ("heads", "heads = 4\ngroup_size = 64", "`model.group_size` is 64"),
        (
            "heads",
            "heads = 4\nsub_norms = false\nprecision = \"ternary-weights\"\ngroup_size = 30",
            "`model.group_size` is 30",
        ),
        ("batch", "batch = 4\nquantization_warmup_steps = 40", "below the run's 40 steps"),
        ("[train]", "[optimizer]\nkind = \"sgd\"\n[train]", "`kind = \"sgd\"`"),
        ("[train]", "[optimizer]\nmomentum = 1.0\n[train]", "`optimizer.momentum` is 1"),
        ("[train]", "[optimizer]\nlr = 0.0\n[train]", "`optimizer.lr` is 0"),
        ("[train]", "[optimizer]\nlr = nan\n[train]", "`optimizer.lr` is NaN"),
        ("[train]", "[optimizer]\nbetas = [0.9, 1.0]\n[train]", "`optimizer.betas` is 1"),
        ("[train]", "[optimizer]\nschedule = \"wavy\"\n[train]", "`schedule = \"wavy\"`"),
        ("[train]", "[tokenizer]\nvocab_size = 513\n[train]", "`tokenizer.vocab_size` is 513"),
        ("[train]", "[tokenizer]\npath = \"t\"\nvocab_size = 500\n[train]", "absent when tokenizer.path"),
        ("[train]", "[train", "line 18"),
    ];
    for (line, replacement, expected) in cases {
        let error = refusal(line, replacement);
        assert!(error.contains(expected), "{replacement:?}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn ternary_sizes_that_gguf_cannot_hold_are_warned_of() {
    let odd = SMALL.replace("intermediate_size = 768", "intermediate_size = 640");
    assert!(parse(&odd).unwrap().warnings()[0].contains("intermediate_size = 640"));
    let float = odd.replace("heads = 4", "heads = 4\nprecision = \"float\"");
    assert!(parse(&float).unwrap().warnings().is_empty());
}

#[test]
fn paths_lose_detours_but_keep_leading_ones() {
    for (given, tidied) in
        [("runs/../out/a", "out/a"), ("../../x", "../../x"), ("/a/b/../../c", "/c"), ("a/./b", "a/b")]
    {
        assert_eq!(super::tidy(Path::new(given)), Path::new(tidied));
    }
}

//! The recipes under `runs/` are runs that work.

use std::path::{Path, PathBuf};

use setun_train::config::TrainConfig;
use setun_train::trainer::Trainer;

fn recipes(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../runs").join(folder);
    let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|e| e == "toml")).collect();
    found.sort();
    found
}

#[test]
fn every_recipe_is_accepted_without_a_warning() {
    let all = [recipes("."), recipes("recipes")].concat();
    assert!(all.len() >= 8, "{all:?}");
    for path in all {
        let config = TrainConfig::load(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(config.warnings(), Vec::<String>::new(), "{}", path.display());
    }
}

#[test]
fn every_example_recipe_learns_from_its_first_steps() {
    let folder = tempfile::tempdir().unwrap();
    for path in recipes("recipes") {
        let mut config = TrainConfig::load(&path).unwrap();
        config.train.batch = 2;
        config.optimizer.warmup_steps = 1;
        config.train.threads = Some(2);
        config.data.cache = Some(folder.path().join("tokens"));
        config.train.out = folder.path().join(path.file_stem().unwrap());
        let mut trainer = Trainer::new(config).unwrap();
        let losses: Vec<f64> = (0..6).map(|_| trainer.step().unwrap().loss).collect();
        assert!(losses[5] < losses[0] - 0.2, "{}: {losses:?}", path.display());
    }
}

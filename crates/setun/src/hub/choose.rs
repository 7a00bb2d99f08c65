//! Which files of a repository make a model.
//!
//! The one GGUF file if there is one, which holds everything; else safetensors, with config, tokenizer and chat template
//! beside them; pickles only where there is nothing else; code never.

use std::collections::BTreeSet;

use super::name::{check_file, escapes, shown};
use crate::convert::COMPANIONS;

/// Beside those that a converted model keeps.
const ALSO: [&str; 3] = ["config.json", "chat_template.json", "vocab.txt"];
/// Names shown of a list.
const SHOWN: usize = 30;

/// The files of a model, as named in its repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) weights: Weights,
    /// Config, tokenizer and template.
    pub(super) companions: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Weights {
    /// All in one file.
    File(String),
    /// Shards that this index names.
    Index(String),
}

impl Weights {
    /// What is opened, relative to the snapshot: the folder where its files have the names that a folder is searched for.
    pub(super) fn opened(&self) -> &str {
        let folder =
            |name: &str, usual: &[&str]| usual.contains(&name.rsplit('/').next().unwrap_or_default());
        match self {
            Self::File(name) if !folder(name, &["model.safetensors", "pytorch_model.bin"]) => name,
            Self::File(name) | Self::Index(name) => name.rsplit_once('/').map_or("", |(folder, _)| folder),
        }
    }
}

/// Whether a file alone is all that is asked for when it is named: everything but weights that need a config.
pub(super) fn stands_alone(file: &str) -> bool {
    !is_index(file) && !["safetensors", "bin", "pt", "pth"].iter().any(|end| has_ending(file, end))
}

/// The files of the model that `wanted` names, or of the only one.
///
/// # Errors
/// Why there is none, or not one alone, as the end of a sentence.
pub(super) fn choose(names: &[String], wanted: Option<&str>) -> Result<Choice, String> {
    if let Some(name) = names.iter().find(|name| escapes(name)) {
        return Err(format!(
            "the hub lists a file `{}`, which would be written outside of its folder",
            shown(name)
        ));
    }
    let weights = match wanted {
        Some(file) if !names.iter().any(|name| name == file) => {
            return Err(format!(
                "the repository has no file `{}`: it has {}",
                shown(file),
                list(names.iter())
            ));
        }
        Some(file) if is_index(file) => Weights::Index(file.to_owned()),
        Some(file) => Weights::File(file.to_owned()),
        None => only(names)?,
    };
    let (Weights::File(chosen) | Weights::Index(chosen)) = &weights;
    check_file(chosen).map_err(|what| format!("`{}` {what}", shown(chosen)))?;
    let folder = chosen.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
    let companions = match has_ending(chosen, "gguf") || stands_alone(chosen) {
        true => Vec::new(),
        false => COMPANIONS
            .iter()
            .chain(&ALSO)
            .map(|name| format!("{folder}{name}"))
            .filter(|name| names.contains(name))
            .collect(),
    };
    Ok(Choice { weights, companions })
}

fn only(names: &[String]) -> Result<Weights, String> {
    // Projectors and calibration data are no models, though they come in the same container.
    let aside =
        |name: &str| ["mmproj", "imatrix"].iter().any(|part| name.to_ascii_lowercase().contains(part));
    let is_gguf = |name: &&String| has_ending(name, "gguf") && !aside(name);
    let (parts, whole): (Vec<&String>, Vec<&String>) =
        names.iter().filter(is_gguf).partition(|name| is_part(name));
    let in_root = |end: &str| -> Vec<&String> {
        names.iter().filter(|name| !name.contains('/') && has_ending(name, end)).collect()
    };
    let has = |name: &str| names.iter().any(|n| n == name);
    let (safetensors, pickles) = (in_root("safetensors"), in_root("pth"));
    match (whole.as_slice(), safetensors.as_slice(), pickles.as_slice()) {
        ([one], ..) => Ok(Weights::File((*one).clone())),
        ([_, ..], ..) => {
            Err(format!("the repository has {} GGUF files: name one of {}", whole.len(), list(whole)))
        }
        _ if has("model.safetensors") => Ok(Weights::File("model.safetensors".into())),
        _ if has("model.safetensors.index.json") => Ok(Weights::Index("model.safetensors.index.json".into())),
        (_, [one], _) => Ok(Weights::File((*one).clone())),
        (_, [_, ..], _) => {
            Err(format!("the repository has several models: name one of {}", list(safetensors)))
        }
        _ if !parts.is_empty() => Err("its GGUF file is split over several, which is not read".into()),
        _ if has("pytorch_model.bin") => Ok(Weights::File("pytorch_model.bin".into())),
        _ if has("pytorch_model.bin.index.json") => Ok(Weights::Index("pytorch_model.bin.index.json".into())),
        (_, _, [one]) => Ok(Weights::File((*one).clone())),
        _ => Err(format!(
            "the repository has no GGUF file, no safetensors and no pytorch_model.bin, so a file must be named: it has {}",
            list(names.iter())
        )),
    }
}

/// The shards that an index names, in the folder that the index is in.
///
/// # Errors
/// What is wrong with the index, as the end of a sentence.
pub(super) fn shards(index: &str, json: &[u8]) -> Result<Vec<String>, String> {
    let value: serde_json::Value =
        serde_json::from_slice(json).map_err(|e| format!("{index} is not valid JSON: {e}"))?;
    let map = value["weight_map"].as_object().ok_or_else(|| format!("{index} has no `weight_map`"))?;
    let folder = index.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
    let mut names = BTreeSet::new();
    for file in map.values() {
        let file = file.as_str().ok_or_else(|| format!("{index}: a shard's name is no text"))?;
        if file.contains('/') {
            return Err(format!("{index} names a shard `{}` outside of its folder", shown(file)));
        }
        check_file(file).map_err(|what| format!("{index} names a shard `{}`, which {what}", shown(file)))?;
        names.insert(format!("{folder}{file}"));
    }
    Ok(names.into_iter().collect())
}

fn is_index(name: &str) -> bool {
    name.ends_with(".safetensors.index.json") || name.ends_with(".bin.index.json")
}

fn has_ending(name: &str, end: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, found)| found.eq_ignore_ascii_case(end))
}

/// `…-00001-of-00003.gguf`
fn is_part(name: &str) -> bool {
    let numbers = || {
        let (front, of) = name.rsplit_once('.')?.0.rsplit_once("-of-")?;
        Some((front.rsplit_once('-')?.1, of))
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers().is_some_and(|(number, of)| digits(number) && digits(of))
}

fn list<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names: Vec<&String> = names.into_iter().collect();
    let first: Vec<String> = names.iter().take(SHOWN).map(|name| shown(name)).collect();
    match names.len() {
        0 => "none".into(),
        n if n > SHOWN => format!("{} and {} more", first.join(", "), n - SHOWN),
        _ => first.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], wanted: Option<&str>) -> Result<Choice, String> {
        choose(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), wanted)
    }

    #[test]
    fn the_one_gguf_file_is_taken_alone() {
        let found =
            chosen(&["README.md", "config.json", "x.gguf", "mmproj-x.gguf", "model.safetensors"], None)
                .unwrap();
        assert_eq!(found, Choice { weights: Weights::File("x.gguf".into()), companions: vec![] });
        let error = chosen(&["a.gguf", "q/b.gguf"], None).unwrap_err();
        assert!(error.contains("2 GGUF files") && error.contains("a.gguf, q/b.gguf"), "{error}");
        assert!(chosen(&["a.gguf", "q/b.gguf"], Some("q/b.gguf")).is_ok());
        assert!(
            chosen(&["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], None).unwrap_err().contains("split")
        );
    }

    #[test]
    fn safetensors_come_with_config_and_tokenizer_but_neither_code_nor_pickles() {
        let names = [
            "config.json",
            "modeling_x.py",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "x.png",
        ];
        let found = chosen(&names, None).unwrap();
        assert_eq!(found.weights, Weights::File("model.safetensors".into()));
        assert_eq!(found.companions, ["tokenizer.json", "config.json"]);
        let sharded =
            chosen(&["model.safetensors.index.json", "model-00001-of-00001.safetensors"], None).unwrap();
        assert_eq!(sharded.weights, Weights::Index("model.safetensors.index.json".into()));
        assert_eq!(chosen(&["pytorch_model.bin", "config.json"], None).unwrap().companions, ["config.json"]);
        assert!(chosen(&["README.md", "train.py"], None).unwrap_err().contains("README.md, train.py"));
    }

    #[test]
    fn what_is_opened_is_the_folder_where_that_is_enough() {
        let opened = |names: &[&str], wanted| chosen(names, wanted).unwrap().weights.opened().to_owned();
        assert_eq!(opened(&["x.gguf"], None), "x.gguf");
        assert_eq!(opened(&["model.safetensors"], None), "");
        assert_eq!(opened(&["odd.safetensors"], None), "odd.safetensors");
        assert_eq!(opened(&["a/model.safetensors"], Some("a/model.safetensors")), "a");
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in ["../x.gguf", "/etc/x.gguf", "a\\..\\x.gguf", "C:x.gguf", "a/../../x.json"] {
            let error = chosen(&[name, "model.safetensors"], None).unwrap_err();
            assert!(error.contains("outside"), "{error}");
        }
        assert!(chosen(&["CON.gguf"], None).unwrap_err().contains("every system"));
    }

    #[test]
    fn shards_are_those_that_the_index_names() {
        let index = |map: &str| {
            shards("model.safetensors.index.json", format!("{{\"weight_map\":{map}}}").as_bytes())
        };
        let named =
            index(r#"{"b": "m-2.safetensors", "a": "m-1.safetensors", "c": "m-2.safetensors"}"#).unwrap();
        assert_eq!(named, ["m-1.safetensors", "m-2.safetensors"]);
        for map in [
            r#"{"a": "../x.safetensors"}"#,
            r#"{"a": "sub/x.safetensors"}"#,
            r#"{"a": "x.py"}"#,
            r#"{"a": 1}"#,
            "3",
        ] {
            assert!(index(map).is_err(), "{map}");
        }
    }
}

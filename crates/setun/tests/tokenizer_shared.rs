//! Tokenizers against the larger collection of vocabularies beside the repository; skips aloud without it.

mod tokenizer_common;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use setun::format::gguf::{Array, Metadata, Value};
use setun::tokenizer::Tokenizer;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use tokenizer_common::*;

const VOCABULARIES: &str = "data/tokenizers/ggml-vocab";

/// Unpacks `x.gguf.xz` with the `xz` program.
fn unpack(path: &Path) -> Option<tempfile::NamedTempFile> {
    let Ok(output) = Command::new("xz").arg("-dc").arg(path).output() else {
        eprintln!("skipped: {} needs the `xz` program", path.display());
        return None;
    };
    assert!(output.status.success(), "xz -dc {}", path.display());
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    std::fs::write(file.path(), output.stdout).unwrap();
    Some(file)
}

#[test]
fn ggml_vocabularies_give_llama_cpps_ids() {
    for name in ["llama-spm", "phi-3", "bert-bge", "falcon", "gpt-2"] {
        let Some(out) = shared(&format!("{VOCABULARIES}/ggml-vocab-{name}.out")) else {
            return;
        };
        let plain = out.with_extension("gguf");
        let packed = out.with_extension("gguf.xz");
        let tokenizer = if plain.exists() {
            gguf(&plain)
        } else {
            let Some(file) = unpack(&packed) else {
                continue;
            };
            gguf(file.path())
        };
        check_out_file(&tokenizer, &out);
    }
}

/// GGUF metadata of a tiktoken file (lines of `base64 rank`) under Llama-3's rules.
///
/// The merge that makes a token is found by merging its bytes with only the tokens of lower rank.
fn tiktoken(path: &Path) -> Metadata {
    let text = std::fs::read_to_string(path).unwrap();
    let tokens: Vec<Vec<u8>> =
        text.lines().map(|line| BASE64_STANDARD.decode(line.split(' ').next().unwrap()).unwrap()).collect();
    let ranks: HashMap<&[u8], usize> = tokens.iter().enumerate().map(|(i, t)| (t.as_slice(), i)).collect();
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let others: Vec<u8> = (0..=255).filter(|&byte| !printable(byte)).collect();
    let spell = |bytes: &[u8]| -> String {
        let code = |&byte: &u8| match others.iter().position(|&other| other == byte) {
            Some(index) => char::from_u32(256 + index as u32).unwrap(),
            None => char::from(byte),
        };
        bytes.iter().map(code).collect()
    };
    let mut merges = Vec::new();
    'tokens: for (rank, token) in tokens.iter().enumerate().filter(|(_, token)| token.len() > 1) {
        let mut parts: Vec<&[u8]> = token.chunks(1).collect();
        while parts.len() > 2 {
            let best = (0..parts.len() - 1)
                .filter_map(|i| {
                    let start: usize = parts[..i].iter().map(|part| part.len()).sum();
                    let joined = &token[start..start + parts[i].len() + parts[i + 1].len()];
                    ranks.get(joined).filter(|&&r| r < rank).map(|&r| (r, i, joined))
                })
                .min();
            // A token that no merges lead to: found whole or not at all.
            let Some((_, index, joined)) = best else {
                continue 'tokens;
            };
            parts.splice(index..index + 2, [joined]);
        }
        merges.push(format!("{} {}", spell(parts[0]), spell(parts[1])));
    }
    let mut texts: Vec<String> = tokens.iter().map(|token| spell(token)).collect();
    let mut types = vec![1; texts.len()];
    for name in ["<|begin_of_text|>", "<|end_of_text|>"] {
        texts.push(name.to_owned());
        types.push(3);
    }
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.model", Value::String("gpt2".into()));
    metadata.insert("tokenizer.ggml.bos_token_id", Value::U32(tokens.len() as u32));
    metadata.insert("tokenizer.ggml.tokens", Value::Array(Array::String(texts)));
    metadata.insert("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    metadata.insert("tokenizer.ggml.merges", Value::Array(Array::String(merges)));
    metadata
}

#[test]
fn llama_3_ids_equal_llama_cpps_even_without_a_pre_key() {
    let Some(model) = shared("data/tokenizers/llama3/tokenizer.model") else {
        return;
    };
    let Some(out) = shared(&format!("{VOCABULARIES}/ggml-vocab-llama-bpe.out")) else {
        return;
    };
    let mut metadata = tiktoken(&model);
    let without = Tokenizer::from_gguf(&metadata).unwrap();
    check_out_file(&without, &out);
    assert_eq!(without.encode("Hello", true).unwrap(), [128000, 9906]);
    metadata.insert("tokenizer.ggml.pre", Value::String("llama-bpe".into()));
    check_same(&without, &Tokenizer::from_gguf(&metadata).unwrap(), &test_texts());
}

#[test]
fn gpt_2_json_gives_the_published_ids() {
    let Some(path) = shared("data/tokenizers/gpt2/tokenizer.json") else {
        return;
    };
    let tokenizer = Tokenizer::from_json_file(&path).unwrap();
    check_out_file(&tokenizer, &shared(&format!("{VOCABULARIES}/ggml-vocab-gpt-2.out")).unwrap());
    let text =
        std::fs::read_to_string(shared("data/tokenizers/vectors/microsoft_lib.rs.txt").unwrap()).unwrap();
    let expected = ids(&json(&shared("data/tokenizers/vectors/microsoft_tokens_gpt2.json").unwrap()));
    assert_eq!(tokenizer.encode(&text, false).unwrap(), expected);
    check_stream(&tokenizer, &expected);
    check_same(&tokenizer, &through_gguf(&tokenizer), &[text]);
}

#[test]
fn sentencepiece_files_give_sentencepieces_ids() {
    let expected = json(&golden("tokenizers/spm_cases.json"));
    for name in ["mistral_v1/tokenizer.model", "t5/spiece.model"] {
        let Some(path) = shared(&format!("data/tokenizers/{name}")) else {
            return;
        };
        let tokenizer = Tokenizer::from_sentencepiece(&std::fs::read(path).unwrap()).unwrap();
        for case in expected[name].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let found = tokenizer.encode(text, false).unwrap();
            assert_eq!(found, ids(&case["ids"]), "{name}: {text:?}");
            check_stream(&tokenizer, &found);
        }
    }
}

#[test]
fn llama_2_as_sentencepiece_file_and_as_gguf_agree_with_llama_cpp() {
    let Some(path) = shared("data/tokenizers/llama2/tokenizer.model") else {
        return;
    };
    let tokenizer = Tokenizer::from_sentencepiece(&std::fs::read(path).unwrap()).unwrap();
    check_out_file(&tokenizer, &shared(&format!("{VOCABULARIES}/ggml-vocab-llama-spm.out")).unwrap());
    check_same(&tokenizer, &through_gguf(&tokenizer), &test_texts());
}

#[test]
fn a_novel_comes_back_line_by_line() {
    let Some(path) = shared("data/tokenizers/sentencepiece/botchan.txt") else {
        return;
    };
    let novel = std::fs::read_to_string(path).unwrap();
    let mistral = shared("data/tokenizers/mistral_v1/tokenizer.model").unwrap();
    let mistral = Tokenizer::from_sentencepiece(&std::fs::read(mistral).unwrap()).unwrap();
    let t5 = shared("data/tokenizers/t5/spiece.model").unwrap();
    let t5 = Tokenizer::from_sentencepiece(&std::fs::read(t5).unwrap()).unwrap();
    for line in novel.lines().take(400) {
        let ids = mistral.encode(line, true).unwrap();
        assert_eq!(mistral.decode(&ids, true).unwrap(), line);
        // T5 drops spaces and composes characters, so only a second pass is the identity.
        let once = t5.decode(&t5.encode(line, false).unwrap(), true).unwrap();
        let twice = t5.decode(&t5.encode(&once, false).unwrap(), true).unwrap();
        assert_eq!(once, twice, "{line:?}");
    }
}

#[test]
fn golden_folders_and_their_gguf_twins_give_the_reference_ids() {
    let Some(root) = shared("golden") else { return };
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let folder = entry.unwrap().path();
        if folder.join("tokenizer.json").exists() && folder.join("expected/tokenizer_cases.json").exists() {
            folders.push(folder);
        }
    }
    assert!(folders.len() >= 5, "{folders:?}");
    for folder in folders {
        let cases = folder.join("expected/tokenizer_cases.json");
        check_cases(&Tokenizer::from_folder(&folder).unwrap(), &cases);
        let twin = PathBuf::from(format!("{}-gguf", folder.display()));
        for file in std::fs::read_dir(twin).into_iter().flatten() {
            let file = file.unwrap().path();
            if file.extension().is_some_and(|extension| extension == "gguf") {
                check_gguf_cases(&file, &cases);
            }
        }
    }
}

#[test]
fn bonsai_files_give_the_reference_ids() {
    for name in ["qwen3-tied", "qwen3-untied-hd128", "qwen3-hadamard-v1", "qwen35-basic"] {
        let Some(folder) = shared(&format!("golden/bonsai/{name}")) else {
            return;
        };
        let cases = folder.join("tokenizer_cases.json");
        for file in std::fs::read_dir(&folder).unwrap() {
            let file = file.unwrap().path();
            if file.extension().is_some_and(|extension| extension == "gguf") {
                check_gguf_cases(&file, &cases);
            }
        }
    }
}

/// The ids of the cases, from the vocabulary inside a model file.
fn check_gguf_cases(file: &Path, cases: &Path) {
    let checkpoint = match setun::format::Checkpoint::open(file) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    };
    let metadata = checkpoint.gguf_metadata().unwrap();
    let tokenizer = match Tokenizer::from_gguf(metadata) {
        Ok(tokenizer) => tokenizer,
        Err(error) if metadata.get("tokenizer.ggml.model").is_none() => {
            eprintln!("skipped: {} has no vocabulary ({error})", file.display());
            return;
        }
        Err(error) => panic!("{}: {error}", file.display()),
    };
    let all = json(cases);
    for case in all.as_array().or_else(|| all["cases"].as_array()).unwrap() {
        let text = case["text"].as_str().unwrap();
        // That converter spelled the control tokens wrongly (docs/tokenizers.md).
        if file.ends_with("llama-bitnet-packed-i2_s-by-bitnetcpp.gguf") && text.contains("<|") {
            continue;
        }
        let bare = ids(case.get("ids_no_special").unwrap_or(&case["ids"]));
        assert_eq!(tokenizer.encode(text, false).unwrap(), bare, "{}: {text:?}", file.display());
        check_stream(&tokenizer, &bare);
    }
}

#[test]
fn published_vectors_of_bert_t5_falcon_and_gpt_2_are_met() {
    let Some(article) = shared("data/tokenizers/vectors/bert_rust_article.txt") else {
        return;
    };
    let bert = gguf(&shared(&format!("{VOCABULARIES}/ggml-vocab-bert-bge.gguf")).unwrap());
    let expected = json(&shared("data/tokenizers/vectors/bert_uncased_rust_article.json").unwrap());
    let text = std::fs::read_to_string(article).unwrap();
    assert_eq!(bert.encode(&text, true).unwrap(), ids(&expected["token_ids"]));

    let t5 = std::fs::read(shared("data/tokenizers/t5/spiece.model").unwrap()).unwrap();
    let t5 = Tokenizer::from_sentencepiece(&t5).unwrap();
    let gpt2 = Tokenizer::from_json_file(&shared("data/tokenizers/gpt2/tokenizer.json").unwrap()).unwrap();
    let vectors = json(&shared("data/tokenizers/vectors/swift_tokenizer_tests.json").unwrap());
    for (name, tokenizer) in [("bert-base-uncased", &bert), ("t5-base", &t5), ("distilgpt2", &gpt2)] {
        for case in vectors[name].as_array().unwrap() {
            let text = case["input"].as_str().unwrap();
            let expected = ids(&case["encoded"]["input_ids"]);
            assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{name}: {text:?}");
        }
    }
}

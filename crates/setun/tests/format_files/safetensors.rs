//! Safetensors: single files and shards, well-formed and not.

use std::path::Path;

use setun::format::{Checkpoint, CheckpointKind, Encoding, SafetensorsWriter, TensorSpec};

use super::{assert_refused, open};

/// A file from the text of its header and the length of its data.
pub fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..data).map(|i| i as u8));
    bytes
}

pub fn valid() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"I64","shape":[1],"data_offsets":[8,16]},"e":{"dtype":"F16","shape":[0,3],"data_offsets":[16,16]}}"#;
    file(header, 16)
}

#[test]
fn tensors_are_read_and_unread_types_listed_by_name() {
    let file = open(&valid()).unwrap();
    assert_eq!(file.kind(), CheckpointKind::Safetensors);
    assert_eq!(file.header_metadata(), [("format".to_owned(), "pt".to_owned())]);
    assert_eq!(file.tensor("a").unwrap().data[..], [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(file.info("b").unwrap().encoding, Encoding::Other("I64".into()));
    let error = file.tensor("b").unwrap().to_f32().unwrap_err().to_string();
    assert!(error.contains("`b`") && error.contains("I64"), "{error}");
    assert!(file.tensor("e").unwrap().to_f32().unwrap().is_empty());
}

#[test]
fn a_wrong_header_is_refused() {
    assert_refused(&[0, 0, 0], &["starts with the bytes"]);
    assert_refused(&[], &["is empty"]);
    let mut long = file("{}", 0);
    long[0] = 200;
    assert_refused(&long, &["header claims 200 bytes", "2 follow"]);
    assert_refused(&file("{\"a\":", 0), &["header is wrong"]);
    assert_refused(&file("{\"a\":3}", 0), &["`a`"]);
    let mut bytes = file(r#"{"ab":3}"#, 0);
    bytes[10] = 0xff;
    assert_refused(&bytes, &["not UTF-8 at byte 10"]);
    let deep = "{\"a\":".to_owned() + &"[".repeat(100_000);
    assert_refused(&file(&deep, 0), &["header is wrong"]);
}

#[test]
fn wrong_tensors_are_refused_naming_the_tensor() {
    let one = |dtype: &str, shape: &str, from: u64, to: u64, data| {
        let entry = format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#);
        file(&entry, data)
    };
    assert!(open(&one("F32", "[2]", 0, 8, 8)).is_ok());
    assert_refused(&one("F32", "[2]", 0, 8, 7), &["`w`", "cut short"]);
    assert_refused(&one("F32", "[2]", 8, 0, 8), &["`w`", "8..0"]);
    assert_refused(&one("F32", "[2]", 0, u64::MAX, 8), &["`w`"]);
    assert_refused(&one("F32", "[3]", 0, 8, 8), &["`w`", "[3]", "8 bytes"]);
    assert_refused(&one("I64", "[3]", 0, 8, 8), &["`w`", "[3]", "8 bytes"]);
    assert_refused(&one("F32", "[4294967296,4294967296]", 0, 8, 8), &["`w`", "absurd"]);
    assert_refused(&one("F32", "[9223372036854775807]", 0, 8, 8), &["`w`"]);
    assert_refused(&one("F32", "[-1]", 0, 8, 8), &["`w`"]);
    assert_refused(&one("F32", "[1]", 4, 8, 8), &["`w`", "hole"]);
    assert_refused(&one("F32", "[2]", 0, 8, 9), &["1 bytes after tensor `w` belong to no tensor"]);
    let two = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
    assert_refused(&file(two, 6), &["`b`", "overlaps tensor `a`"]);
    let double = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
    assert_refused(&file(double, 8), &["`a` occurs twice"]);
}

fn write(path: &Path, names: &[&str]) {
    let specs = names.iter().map(|n| TensorSpec {
        name: (*n).into(),
        shape: if n.starts_with('u') { vec![1, n.len()] } else { vec![2, 2] },
        encoding: if n.starts_with('u') { Encoding::U8 } else { Encoding::F32 },
    });
    let mut writer = SafetensorsWriter::create(path, &[], specs.collect()).unwrap();
    while let Some(spec) = writer.pending() {
        let bytes = vec![spec.name.len() as u8; spec.encoding.byte_len(&spec.shape).unwrap()];
        writer.tensor(&bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn what_is_written_reads_back_here_and_by_the_format_s_own_crate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write(&path, &["uu", "fff"]);
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.folder(), Some(folder.path()));
    // Wider types come first where two bytes before them would leave them unaligned, and else the order stays.
    let order = |file: &Checkpoint| file.tensors().map(|t| t.name.clone()).collect::<Vec<_>>();
    assert_eq!(order(&opened), ["fff", "uu"]);
    assert_eq!(opened.tensor("fff").unwrap().data[..], [3; 16]);
    let aligned = folder.path().join("aligned.safetensors");
    write(&aligned, &["uuuu", "fff"]);
    assert_eq!(order(&Checkpoint::open(&aligned).unwrap()), ["uuuu", "fff"]);
    let bytes = std::fs::read(&path).unwrap();
    let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("uu").unwrap().data(), [2; 2]);
    let (_, header) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let spec = TensorSpec { name: "t".into(), shape: vec![256], encoding: Encoding::TQ2_0 };
    let error = SafetensorsWriter::create(&path, &[], vec![spec]).unwrap_err().to_string();
    assert!(error.contains("`t`") && error.contains("TQ2_0"), "{error}");
}

#[test]
fn shards_are_joined_by_their_index_and_hostile_indexes_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("one.safetensors"), &["a", "stray"]);
    write(&folder.path().join("two.safetensors"), &["bb"]);
    let open = |map: &str| {
        let text = format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{map}}}"#);
        std::fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
        Checkpoint::open(folder.path()).map_err(|e| e.to_string())
    };
    let good = open(r#"{"a":"one.safetensors","bb":"two.safetensors"}"#).unwrap();
    assert_eq!(good.tensors().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "bb"]);
    assert_eq!(good.tensor("bb").unwrap().data[..], [2; 16]);
    for hostile in ["../one.safetensors", "/etc/passwd", "a/b", "..", "", "a\\\\b", "C:x", "."] {
        let error = open(&format!(r#"{{"a":"{hostile}"}}"#)).unwrap_err();
        assert!(error.contains("not a plain file name"), "{hostile}: {error}");
    }
    let error = open(r#"{"a":"two.safetensors"}"#).unwrap_err();
    assert!(error.contains("`a`") && error.contains("two.safetensors"), "{error}");
    let error = open(r#"{"a":"gone.safetensors"}"#).unwrap_err();
    assert!(error.contains("gone.safetensors"), "{error}");
    let error = open(r#"{"a":"one.safetensors","a":"two.safetensors"}"#).unwrap_err();
    assert!(error.contains("`a` occurs twice"), "{error}");
}

#[test]
fn a_folder_without_one_clear_model_and_a_bad_config_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Checkpoint::open(folder.path());
    assert!(open().unwrap_err().to_string().contains("holds no model"));
    write(&folder.path().join("x.safetensors"), &["a"]);
    assert_eq!(open().unwrap().config_json().unwrap(), None);
    std::fs::write(folder.path().join("config.json"), r#"{"hidden_size": 4}"#).unwrap();
    assert_eq!(open().unwrap().config_json().unwrap().unwrap()["hidden_size"], 4);
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    let error = open().unwrap().config_json().unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("not valid JSON"), "{error}");
    write(&folder.path().join("y.safetensors"), &["a"]);
    let error = open().unwrap_err().to_string();
    assert!(error.contains("2 models") && error.contains("x.safetensors"), "{error}");
}

#[test]
fn a_tensor_reads_the_same_after_its_pages_were_released() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.bin"); // The name decides nothing.
    write(&path, &["long name"]);
    let file = Checkpoint::open(&path).unwrap();
    let before = file.tensor("long name").unwrap().data.into_owned();
    file.release(file.info("long name").unwrap());
    assert_eq!(file.tensor("long name").unwrap().data[..], before);
    assert_eq!(before, [9; 16]);
    let error = Checkpoint::open(folder.path().join("gone")).unwrap_err().to_string();
    assert!(error.contains("cannot read") && error.contains("gone"), "{error}");
}

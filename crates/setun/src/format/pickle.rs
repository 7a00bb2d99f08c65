//! PyTorch checkpoints as `torch.save` writes them: a zip archive of one pickle and the raw bytes of its storages.
//!
//! The archive is mapped and its entries are stored as they are, so tensors are borrowed from the file. The pickle, a
//! program in general, is read by [`machine`], which knows the few operations of a plain `state_dict` and refuses
//! everything else by name. What it says about places and shapes is checked against the entries.

mod machine;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use machine::{Dtype, Found, Machine, Value};

use super::tensor::{Encoding, Rewrite, TensorInfo, element_count};
use crate::error::ModelError;

/// Keys under which programs put a `state_dict` among other things.
const WRAPPERS: [&str; 5] = ["state_dict", "model_state_dict", "model", "module", "params"];
/// What CAT-Q's repositories hold beside their GGUF files.
const CATQ_NAME: &str = "parameters.pth";
/// How `torch.save` of PyTorch before 1.6 starts: a pickle of its magic number.
const LEGACY: [u8; 14] = [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// What a checkpoint holds.
#[derive(Debug)]
pub(crate) struct Header {
    /// In the order of the state_dict, ranges absolute and inside the file. Tensors may share bytes.
    pub(crate) tensors: Vec<TensorInfo>,
    /// What was left out, or looked for below a key.
    pub(crate) evidence: Vec<String>,
}

/// Whether the bytes start like a zip archive.
pub(crate) fn looks_like(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04")
}

/// Why a file that starts like an older or bare pickle is not read.
pub(crate) fn refusal(bytes: &[u8]) -> Option<&'static str> {
    if bytes.starts_with(&LEGACY) {
        return Some(
            "a PyTorch checkpoint in the format before PyTorch 1.6, which is not read: save it again with \
             `torch.save(torch.load(path, weights_only=True), new_path)`, or as safetensors",
        );
    }
    matches!(bytes, [0x80, 2..=5, ..]).then_some(
        "a bare Python pickle, which may be any program and is not read: save the model's state_dict with torch.save, or as \
         safetensors",
    )
}

/// Reads and checks the header of `bytes`, the whole file; `path` is for messages.
pub(crate) fn read(path: &Path, bytes: &[u8]) -> Result<Header, ModelError> {
    let found = header(path, bytes);
    let model = |header: &Header| header.tensors.iter().any(|t| t.name.ends_with("embed_tokens.weight"));
    if path.file_name().is_some_and(|name| name == CATQ_NAME) && !found.as_ref().is_ok_and(model) {
        let what = "CAT-Q's own record of how it quantised, whose layout is not published, and no model: take its GGUF file \
                    (`…-catq-q2_0.gguf`), which has groups of 128 under type 42";
        return Err(ModelError::unsupported(path, what));
    }
    found
}

fn header(path: &Path, bytes: &[u8]) -> Result<Header, ModelError> {
    let archive = Archive::read(path, bytes)?;
    let pickle = &bytes[archive.entry("data.pkl")?.ok_or_else(|| archive.no_checkpoint())?];
    if archive.entry("constants.pkl")?.is_some() {
        let what = "a TorchScript program, which is not read: save the model's state_dict with torch.save, or as safetensors";
        return Err(ModelError::unsupported(path, what));
    }
    if let Some(order) = archive.entry("byteorder")?
        && &bytes[order.clone()] != b"little"
    {
        let order = String::from_utf8_lossy(&bytes[order.start..order.end.min(order.start + 16)]);
        let what = format!("its numbers are {order:?}-endian, but only little-endian ones are read");
        return Err(ModelError::unsupported(path, what));
    }
    let mut machine = Machine::new(pickle);
    let root = machine.run().map_err(|found| match found {
        Found::Broken(what) => ModelError::format(path, format!("not a valid PyTorch checkpoint: {what}")),
        Found::Refused(what) => ModelError::unsupported(
            path,
            format!(
                "{what}, which tensors by name do not need, so it is not read (nothing in the file was run): save the \
                 model's state_dict alone with torch.save, or as safetensors"
            ),
        ),
    })?;
    let mut evidence = Vec::new();
    let entries = state_dict(path, &machine, root, &mut evidence)?;
    let mut names = HashSet::with_capacity(entries.len());
    let tensors = entries.into_iter().map(|(name, tensor)| {
        if !names.insert(name) {
            return Err(ModelError::format(
                path,
                format!("not a valid PyTorch checkpoint: `{name}` occurs twice"),
            ));
        }
        tensor_info(path, &archive, &machine, name, tensor)
    });
    Ok(Header { tensors: tensors.collect::<Result<_, _>>()?, evidence })
}

/// The entries of a zip archive below its one folder.
struct Archive<'a> {
    path: &'a Path,
    prefix: String,
    entries: HashMap<Vec<u8>, Entry>,
}

struct Entry {
    data: Range<usize>,
    stored: bool,
}

impl<'a> Archive<'a> {
    fn read(path: &'a Path, bytes: &[u8]) -> Result<Self, ModelError> {
        let broken = |e: rawzip::Error| ModelError::format(path, format!("not a valid zip archive: {e}"));
        let zip = rawzip::ZipArchive::from_slice(bytes).map_err(broken)?;
        let (mut records, mut entries) = (zip.entries(), HashMap::new());
        while let Some(record) = records.next_entry().map_err(broken)? {
            let entry = zip.get_entry(record.wayfinder()).map_err(broken)?;
            let start = entry.compressed_data_range().0 as usize;
            let data = start..start.saturating_add(entry.data().len());
            let plain = record.compression_method() == rawzip::CompressionMethod::STORE;
            let stored = plain && !record.flags().is_encrypted() && data.end <= bytes.len();
            let name = record.file_path().as_bytes().to_vec();
            if entries.contains_key(&name) {
                let name = String::from_utf8_lossy(&name);
                return Err(ModelError::format(
                    path,
                    format!("not a valid checkpoint: `{name}` is twice in the archive"),
                ));
            }
            entries.insert(name, Entry { data, stored });
        }
        let mut archive = Self { path, prefix: String::new(), entries };
        let folder = |name: &[u8]| {
            let name = std::str::from_utf8(name).ok()?.strip_suffix("data.pkl")?;
            (name.is_empty() || name.find('/') == Some(name.len() - 1)).then(|| name.to_owned())
        };
        let mut folders = archive.entries.keys().filter_map(|name| folder(name));
        let prefix = folders.next().filter(|_| folders.next().is_none());
        drop(folders);
        archive.prefix = prefix.ok_or_else(|| archive.no_checkpoint())?;
        Ok(archive)
    }

    fn no_checkpoint(&self) -> ModelError {
        let what = "a zip archive, but no PyTorch checkpoint: those hold one `data.pkl` in one folder";
        ModelError::unsupported(self.path, what)
    }

    /// Where the bytes of an entry are.
    fn entry(&self, name: &str) -> Result<Option<Range<usize>>, ModelError> {
        let full = format!("{}{name}", self.prefix);
        match self.entries.get(full.as_bytes()) {
            Some(Entry { stored: false, .. }) => {
                let what = format!(
                    "entry `{full}` is compressed or encrypted, but torch.save stores entries as they are"
                );
                Err(ModelError::unsupported(self.path, what))
            }
            entry => Ok(entry.map(|entry| entry.data.clone())),
        }
    }
}

/// The tensors of the state_dict that the pickle holds, itself or below one of the usual keys.
fn state_dict<'a>(
    path: &Path,
    machine: &Machine<'a>,
    root: Value,
    evidence: &mut Vec<String>,
) -> Result<Vec<(&'a str, u32)>, ModelError> {
    let Some(pairs) = machine.dict(root) else {
        let what = "it holds no dictionary of tensors by name: save the model's state_dict with torch.save";
        return Err(ModelError::unsupported(path, what));
    };
    let split = |pairs: &[(Value, Value)]| {
        let (mut tensors, mut others) = (Vec::new(), Vec::new());
        for &(key, value) in pairs {
            let key = machine.text(key);
            match (key, value) {
                (Some(key), Value::Tensor(tensor)) => tensors.push((key, tensor)),
                (key, _) => others.push(key.unwrap_or("a key that is no text")),
            }
        }
        (tensors, others)
    };
    let few = |names: &[&str]| {
        let shown: Vec<String> = names.iter().take(4).map(|n| format!("`{}`", shortened(n))).collect();
        shown.join(", ") + if names.len() > 4 { ", …" } else { "" }
    };
    let (mut tensors, mut others) = split(pairs);
    if tensors.is_empty() {
        let below = |key: &str| {
            let (_, value) = pairs.iter().find(|(k, _)| machine.text(*k) == Some(key))?;
            machine.dict(*value).map(split).filter(|(tensors, _)| !tensors.is_empty())
        };
        let mut found: Vec<_> = WRAPPERS.iter().filter_map(|key| Some((*key, below(key)?))).collect();
        let keys: Vec<&str> = found.iter().map(|(key, _)| *key).collect();
        match found.len() {
            1 => {
                let (key, inner) = found.remove(0);
                evidence
                    .push(format!("the tensors are those below the key `{key}` of the pickled dictionary"));
                (tensors, others) = inner;
            }
            0 => {
                let what = format!(
                    "it holds no tensors by name (its keys are {}): save the model's state_dict alone",
                    few(&others)
                );
                return Err(ModelError::unsupported(path, what));
            }
            _ => {
                let what = format!(
                    "several of its dictionaries hold tensors ({}): save the model's state_dict alone",
                    few(&keys)
                );
                return Err(ModelError::unsupported(path, what));
            }
        }
    }
    if !others.is_empty() {
        let n = others.len();
        evidence
            .push(format!("{n} entries of the state_dict are no tensors and are left out: {}", few(&others)));
    }
    Ok(tensors)
}

/// Enough of a name that a file made up, for a message.
fn shortened(name: &str) -> String {
    match name.char_indices().nth(80) {
        Some((at, _)) => format!("{}…", &name[..at]),
        None => name.to_owned(),
    }
}

fn tensor_info(
    path: &Path,
    archive: &Archive,
    machine: &Machine,
    name: &str,
    tensor: u32,
) -> Result<TensorInfo, ModelError> {
    let broken = |what: String| {
        ModelError::format(
            path,
            format!("not a valid PyTorch checkpoint: tensor `{}` {what}", shortened(name)),
        )
    };
    let tensor = machine.tensor(tensor);
    let storage = machine.storage(tensor.storage);
    let key = storage.key;
    let entry = archive.entry(&format!("data/{key}"))?;
    let entry = entry
        .ok_or_else(|| broken(format!("is in storage `{}`, which is not in the file", shortened(key))))?;
    let Dtype { name: dtype, bytes } = storage.dtype;
    let count =
        element_count(&tensor.shape).ok_or_else(|| broken(format!("has absurd shape {:?}", tensor.shape)))?;
    let held = entry.len() / bytes;
    if storage.elements != held as u64 || !entry.len().is_multiple_of(bytes) {
        let (claimed, found) = (storage.elements, entry.len());
        return Err(broken(format!(
            "is in a storage of {claimed} {dtype}, but {found} bytes are there: the file is damaged"
        )));
    }
    let encoding = match dtype {
        "F32" => Encoding::F32,
        "F16" => Encoding::F16,
        "BF16" => Encoding::BF16,
        "U8" => Encoding::U8,
        "I8" => Encoding::I8,
        other => Encoding::Other(other.to_owned()),
    };
    let info = |encoding, range| TensorInfo {
        name: name.to_owned(),
        shape: tensor.shape.clone(),
        encoding,
        file: 0,
        range,
        rewrite: Rewrite::None,
    };
    if !tensor.contiguous {
        let why = "is a view with gaps or in another order, which is not read: save the model again with `.contiguous()` on it";
        return Ok(info(Encoding::Undecided { name: "strided", why }, entry));
    }
    let end = usize::try_from(tensor.offset)
        .ok()
        .and_then(|offset| offset.checked_add(count))
        .filter(|&end| end <= held);
    let Some(end) = end else {
        return Err(broken(format!(
            "has elements {} to {} of a storage of {held}",
            tensor.offset,
            u128::from(tensor.offset) + count as u128
        )));
    };
    Ok(info(encoding, entry.start + (end - count) * bytes..entry.start + end * bytes))
}

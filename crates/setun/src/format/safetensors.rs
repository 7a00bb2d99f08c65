//! Safetensors: a JSON header and raw tensors, in one file or in shards with an index.
//!
//! Eight bytes of header length, the header, then the data. Tensors must cover the data without holes or
//! overlaps, so a file cannot hide bytes; that and everything else is checked here, because the messages
//! must name the tensor.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use super::mmap::FileBytes;
use super::output::Output;
use super::tensor::{Encoding, Rewrite, TensorInfo, TensorSpec, element_count};
use crate::error::ModelError;

/// Longest header accepted, in bytes; the format's own limit.
const MAX_HEADER: u64 = 100_000_000;
pub(super) const INDEX_NAME: &str = "model.safetensors.index.json";
/// What PyTorch's own format is called in model folders.
const PYTORCH_NAME: &str = "pytorch_model.bin";
const PYTORCH_INDEX_NAME: &str = "pytorch_model.bin.index.json";

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    /// In the order of their data, ranges absolute and inside the file.
    pub(crate) tensors: Vec<TensorInfo>,
    /// The strings of `__metadata__`, in file order.
    pub(crate) metadata: Vec<(String, String)>,
}

/// What a model folder holds.
pub(crate) enum Found {
    /// One file of weights.
    Single(PathBuf),
    /// The index of a sharded checkpoint.
    Index(PathBuf),
    /// The same of PyTorch files.
    PyTorchIndex(PathBuf),
}

/// Chooses the weights of a folder: `model.safetensors`, else the shard index, else `pytorch_model.bin` or its
/// index, else the only `.safetensors` or `.gguf` file.
pub(crate) fn find_in_folder(folder: &Path) -> Result<Found, ModelError> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(Found::Single(single));
    }
    let index = folder.join(INDEX_NAME);
    if index.is_file() {
        return Ok(Found::Index(index));
    }
    let (single, index) = (folder.join(PYTORCH_NAME), folder.join(PYTORCH_INDEX_NAME));
    if single.is_file() {
        return Ok(Found::Single(single));
    }
    if index.is_file() {
        return Ok(Found::PyTorchIndex(index));
    }
    let (mut names, mut pickles) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(folder).map_err(|e| ModelError::read(folder, e))? {
        let path = entry.map_err(|e| ModelError::read(folder, e))?.path();
        if path.extension().is_some_and(|e| e == "safetensors" || e == "gguf") {
            names.push(path);
        } else if path.extension().is_some_and(|e| e == "pth" || e == "pt" || e == "bin") {
            // Optimizer states and arguments of training have the same endings, so none is taken unasked.
            pickles.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    pickles.sort();
    match names.len() {
        1 => Ok(Found::Single(names.remove(0))),
        0 => {
            let mut what =
                "the folder holds no model: no model.safetensors, no pytorch_model.bin, no shard index, no .gguf file"
                    .to_owned();
            if let Some(name) = pickles.first() {
                what += &format!(
                    " (of {} other files that may be PyTorch's, `{name}` for one, name the model)",
                    pickles.len()
                );
            }
            Err(ModelError::unsupported(folder, what))
        }
        n => {
            let first: Vec<_> = names.iter().take(4).filter_map(|p| p.file_name()?.to_str()).collect();
            let what = format!("the folder holds {n} models ({}…): name one of them", first.join(", "));
            Err(ModelError::unsupported(folder, what))
        }
    }
}

/// Whether the bytes start like a safetensors file: a plausible length, then a JSON object.
pub(crate) fn looks_like(bytes: &[u8]) -> bool {
    // A longer header than the file is left to `read`, for its message.
    let length = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
    length.is_some_and(|n| n <= MAX_HEADER) && bytes.get(8) == Some(&b'{')
}

/// Reads and checks the header of `bytes`, the whole file; `path` is for messages.
pub(crate) fn read(path: &Path, bytes: &[u8]) -> Result<Header, ModelError> {
    let broken = |what: String| ModelError::format(path, format!("not a valid safetensors file: {what}"));
    let Some(length) = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b)) else {
        return Err(broken(format!("{} bytes are too few for a header", bytes.len())));
    };
    let room = (bytes.len() - 8) as u64;
    if length > MAX_HEADER || length > room {
        return Err(broken(format!("the header claims {length} bytes, but {room} follow")));
    }
    let start = 8 + length as usize;
    let text = std::str::from_utf8(&bytes[8..start])
        .map_err(|e| broken(format!("the header is not UTF-8 at byte {}", 8 + e.valid_up_to())))?;
    let RawHeader { mut entries, metadata } =
        serde_json::from_str(text).map_err(|e| broken(format!("the header is wrong: {e}")))?;

    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let data_len = bytes.len() - start;
    let mut tensors = Vec::with_capacity(entries.len());
    let (mut end, mut before) = (0, "the header".to_owned());
    for (name, RawEntry { dtype, shape, data_offsets: [from, to] }) in entries {
        if from > to || to > data_len {
            return Err(broken(format!(
                "tensor `{name}` claims bytes {from}..{to} of the data, which has {data_len}: the file is \
                 cut short or its header is wrong"
            )));
        }
        if from != end {
            let fault = if from < end { "overlaps" } else { "leaves a hole after" };
            return Err(broken(format!("tensor `{name}` at bytes {from}..{to} {fault} {before}")));
        }
        let bits = known_dtype(&dtype).map(|d| d.bitsize());
        let count = element_count(&shape)
            .ok_or_else(|| broken(format!("tensor `{name}` has absurd shape {shape:?}")))?;
        if let Some(bits) = bits
            && count.checked_mul(bits) != (to - from).checked_mul(8)
        {
            return Err(broken(format!(
                "tensor `{name}` of {dtype} and shape {shape:?} does not take {} bytes",
                to - from
            )));
        }
        end = to;
        before = format!("tensor `{name}`");
        tensors.push(TensorInfo {
            name,
            shape,
            encoding: encoding(dtype),
            file: 0,
            range: start + from..start + to,
            rewrite: Rewrite::None,
        });
    }
    if end != data_len {
        return Err(broken(format!("{} bytes after {before} belong to no tensor", data_len - end)));
    }
    Ok(Header { tensors, metadata })
}

/// Opens every shard of an index and takes from each the tensors the index assigns to it, and from the first the strings
/// of its header; `read` reads a shard's header.
pub(crate) fn open_sharded(
    index: &Path,
    read: impl Fn(&Path, &[u8]) -> Result<Header, ModelError>,
) -> Result<(Vec<FileBytes>, Header), ModelError> {
    let text = std::fs::read(index).map_err(|e| ModelError::read(index, e))?;
    let RawIndex { weight_map } = serde_json::from_slice(&text)
        .map_err(|e| ModelError::format(index, format!("not a valid shard index: {e}")))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in &weight_map.0 {
        shards.entry(shard).or_default().push(tensor);
    }
    let folder = index.parent().unwrap_or(Path::new("."));
    let (mut files, mut tensors, mut metadata) = (Vec::new(), Vec::new(), None);
    for (shard, wanted) in shards {
        let mut parts = Path::new(shard).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || shard.contains(['/', '\\', ':']) {
            let what = format!("not a valid shard index: `{shard}` is not a plain file name");
            return Err(ModelError::format(index, what));
        }
        let path = folder.join(shard);
        let bytes = FileBytes::open(&path)?;
        let header = read(&path, &bytes)?;
        metadata.get_or_insert(header.metadata);
        let mut wanted: HashSet<&str> = wanted.into_iter().collect();
        for mut info in header.tensors {
            // What the index does not name is left out, as the format's own loader does.
            if wanted.remove(info.name.as_str()) {
                info.file = files.len();
                tensors.push(info);
            }
        }
        if let Some(name) = wanted.into_iter().min() {
            let what = format!("the index places tensor `{name}` here, but it is not in the file");
            return Err(ModelError::format(&path, what));
        }
        files.push(bytes);
    }
    Ok((files, Header { tensors, metadata: metadata.unwrap_or_default() }))
}

fn known_dtype(name: &str) -> Option<Dtype> {
    Dtype::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(name)).ok()
}

fn encoding(dtype: String) -> Encoding {
    match dtype.as_str() {
        "F32" => Encoding::F32,
        "F16" => Encoding::F16,
        "BF16" => Encoding::BF16,
        "U8" => Encoding::U8,
        "I8" => Encoding::I8,
        _ => Encoding::Other(dtype),
    }
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: UniqueMap<String>,
}

/// The header's JSON. A plain map would silently keep the last of two equal keys.
struct RawHeader {
    entries: Vec<(String, RawEntry)>,
    metadata: Vec<(String, String)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut names = HashSet::new();
                let mut header = RawHeader { entries: Vec::new(), metadata: Vec::new() };
                while let Some(key) = map.next_key::<String>()? {
                    if !names.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("`{key}` occurs twice")));
                    }
                    if key == "__metadata__" {
                        header.metadata = map.next_value::<UniqueMap<String>>()?.0;
                    } else {
                        let entry = map
                            .next_value()
                            .map_err(|e| serde::de::Error::custom(format!("tensor `{key}`: {e}")))?;
                        header.entries.push((key, entry));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// A JSON object in file order that refuses a key given twice.
struct UniqueMap<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for MapVisitor<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap<V>, A::Error> {
                let (mut names, mut entries) = (HashSet::new(), Vec::new());
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if !names.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("`{key}` occurs twice")));
                    }
                    entries.push((key, value));
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(MapVisitor(std::marker::PhantomData))
    }
}

/// A safetensors file being written. It appears under its name when [`finish`](Self::finish) succeeds.
///
/// Tensors are laid out in the given order where each is then aligned to its elements in the mapped file, else by
/// falling element width, and in the given order among equals: ask [`pending`](Self::pending) which one is next.
#[derive(Debug)]
pub struct SafetensorsWriter {
    output: Output,
    specs: Vec<TensorSpec>,
    next: usize,
    /// Bytes of the pending tensor that are written.
    written: usize,
}

impl SafetensorsWriter {
    /// Writes the header, with `{"format": "pt"}` and then `metadata` as its free-form strings.
    ///
    /// # Errors
    /// [`ModelError::CannotEncode`] for encodings other than F32, F16, BF16, U8 and I8,
    /// [`ModelError::Format`] for duplicate names, [`ModelError::Write`] if the file cannot be created.
    pub fn create(
        path: &Path,
        metadata: &[(String, String)],
        mut specs: Vec<TensorSpec>,
    ) -> Result<Self, ModelError> {
        let width = |spec: &TensorSpec| spec.encoding.block().map_or(1, |(_, bytes)| bytes);
        let end = specs.iter().try_fold(0usize, |offset, spec| {
            let length = spec.encoding.byte_len(&spec.shape).filter(|_| offset.is_multiple_of(width(spec)));
            offset.checked_add(length?)
        });
        if end.is_none() {
            specs.sort_by_key(|spec| std::cmp::Reverse(width(spec)));
        }
        let mut strings = serde_json::Map::new();
        strings.insert("format".into(), "pt".into());
        for (key, value) in metadata {
            strings.insert(key.clone(), value.clone().into());
        }
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), strings.into());
        let mut offset = 0usize;
        for spec in &specs {
            let plain = matches!(
                spec.encoding,
                Encoding::F32 | Encoding::F16 | Encoding::BF16 | Encoding::U8 | Encoding::I8
            );
            let length = spec.encoding.byte_len(&spec.shape).filter(|_| plain);
            let end = length.and_then(|n| offset.checked_add(n)).ok_or_else(|| {
                let why = format!("{} of shape {:?} is no plain number type", spec.encoding, spec.shape);
                let name = spec.name.clone();
                ModelError::CannotEncode { name, encoding: "safetensors".into(), why }
            })?;
            let entry = serde_json::json!({
                "dtype": spec.encoding.name(),
                "shape": spec.shape,
                "data_offsets": [offset, end],
            });
            if header.insert(spec.name.clone(), entry).is_some() {
                let what = format!("cannot be written: tensor `{}` occurs twice", spec.name);
                return Err(ModelError::format(path, what));
            }
            offset = end;
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' '); // The data starts aligned.
        let mut output = Output::create(path)?;
        output.write(&(text.len() as u64).to_le_bytes())?;
        output.write(&text)?;
        Ok(Self { output, specs, next: 0, written: 0 })
    }

    /// The tensor whose bytes are to be written next.
    pub fn pending(&self) -> Option<&TensorSpec> {
        self.specs.get(self.next)
    }

    /// Writes the bytes of the [`pending`](Self::pending) tensor.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if they are too many or too few, [`ModelError::Write`] if the disk
    /// refuses, [`ModelError::Format`] if all tensors are written already.
    pub fn tensor(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        match self.specs.get(self.next) {
            Some(spec) if spec.encoding.byte_len(&spec.shape) != Some(self.written + bytes.len()) => {
                Err(wrong_length(spec, self.written + bytes.len()))
            }
            _ => self.part(bytes),
        }
    }

    /// Writes the next bytes of the [`pending`](Self::pending) tensor, which is complete with the last of them.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if they are too many, else as [`tensor`](Self::tensor).
    pub fn part(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        let Some(spec) = self.specs.get(self.next) else {
            return Err(ModelError::format(self.output.path(), "all tensors are already written"));
        };
        let (found, expected) = (self.written + bytes.len(), spec.encoding.byte_len(&spec.shape));
        if expected.is_none_or(|expected| found > expected) {
            return Err(wrong_length(spec, found));
        }
        self.output.write(bytes)?;
        self.written = found;
        if expected == Some(found) {
            (self.next, self.written) = (self.next + 1, 0);
        }
        Ok(())
    }

    /// Flushes and gives the file its name.
    ///
    /// # Errors
    /// [`ModelError::Format`] if a tensor is outstanding, [`ModelError::Write`] if the disk refuses.
    pub fn finish(self) -> Result<(), ModelError> {
        if let Some(spec) = self.pending() {
            let what = format!("cannot be finished: tensor `{}` was not written", spec.name);
            return Err(ModelError::format(self.output.path(), what));
        }
        self.output.finish()
    }
}

fn wrong_length(spec: &TensorSpec, found: usize) -> ModelError {
    ModelError::tensor(&spec.name, format!("{found} bytes to write, which is not what its header entry says"))
}

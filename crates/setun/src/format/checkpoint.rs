//! An opened model, whatever its container.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::gguf::{self, Metadata};
use super::llama2c::{self, Llama2cFacts};
use super::mmap::FileBytes;
use super::options::{FloatWeights, OpenOptions};
use super::tensor::{Tensor, TensorInfo};
use super::{pickle, safetensors};
use crate::error::ModelError;

/// The container a checkpoint came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointKind {
    /// One `.safetensors` file, or a folder of shards with their index.
    Safetensors,
    /// One GGUF file.
    Gguf,
    /// A llama2.c checkpoint, float or ternary.
    Llama2c,
    /// One file of `torch.save`, or a folder of shards with their index.
    PyTorch,
}

/// A model file or folder, opened: its tensors by name, and what it says about itself.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    kind: CheckpointKind,
    files: Vec<FileBytes>,
    tensors: Vec<TensorInfo>,
    places: HashMap<String, usize>,
    gguf: Option<Metadata>,
    header: Vec<(String, String)>,
    llama2c: Option<Llama2cFacts>,
    evidence: Vec<String>,
    float_weights: FloatWeights,
    on_disk: bool,
}

impl Checkpoint {
    /// Opens a model: a folder with safetensors, PyTorch's files or one GGUF file, or a file, whose kind is
    /// decided by its first bytes and not by its name.
    ///
    /// Tensor data is mapped, not read; every header is checked against it.
    ///
    /// # Errors
    /// [`ModelError::Read`] if the system refuses; [`ModelError::Format`] for files that break their
    /// format; [`ModelError::Unsupported`] for versions and containers that are not read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        Self::open_with(path, OpenOptions::default())
    }

    /// As [`open`](Self::open), with choices for what files leave open.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`ModelError::Unsupported`] if a choice contradicts the file.
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, ModelError> {
        let path = path.as_ref();
        let found = std::fs::metadata(path).map_err(|e| ModelError::read(path, e))?;
        if !found.is_dir() {
            return Self::from_file(path, FileBytes::open(path)?, true, &options);
        }
        let (kind, (files, header)) = match safetensors::find_in_folder(path)? {
            safetensors::Found::Single(file) => {
                let mut checkpoint = Self::from_file(&file, FileBytes::open(&file)?, true, &options)?;
                checkpoint.path = path.to_owned();
                return Ok(checkpoint);
            }
            safetensors::Found::Index(index) => {
                (CheckpointKind::Safetensors, safetensors::open_sharded(&index, safetensors::read)?)
            }
            safetensors::Found::PyTorchIndex(index) => {
                let read = |path: &Path, bytes: &[u8]| {
                    let tensors = pickle::read(path, bytes)?.tensors;
                    Ok(safetensors::Header { tensors, metadata: Vec::new() })
                };
                (CheckpointKind::PyTorch, safetensors::open_sharded(&index, read)?)
            }
        };
        let mut checkpoint = Self::new(path, kind, files, true, &options);
        checkpoint.set_tensors(header.tensors);
        checkpoint.header = header.metadata;
        Ok(checkpoint)
    }

    /// Opens a model that is part of the program; `name` stands for its path in messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(name: &str, bytes: &'static [u8]) -> Result<Self, ModelError> {
        Self::from_bytes_with(name, bytes, OpenOptions::default())
    }

    /// As [`from_bytes`](Self::from_bytes), with choices for what files leave open.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with).
    pub fn from_bytes_with(
        name: &str,
        bytes: &'static [u8],
        options: OpenOptions,
    ) -> Result<Self, ModelError> {
        Self::from_file(Path::new(name), FileBytes::Static(bytes), false, &options)
    }

    fn new(
        path: &Path,
        kind: CheckpointKind,
        files: Vec<FileBytes>,
        on_disk: bool,
        options: &OpenOptions,
    ) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            files,
            tensors: Vec::new(),
            places: HashMap::new(),
            gguf: None,
            header: Vec::new(),
            llama2c: None,
            evidence: Vec::new(),
            float_weights: options.weights,
            on_disk,
        }
    }

    fn from_file(
        path: &Path,
        bytes: FileBytes,
        on_disk: bool,
        options: &OpenOptions,
    ) -> Result<Self, ModelError> {
        if bytes.starts_with(gguf::MAGIC) {
            let header = gguf::reader::read(path, &bytes, options)?;
            let mut checkpoint = Self::new(path, CheckpointKind::Gguf, vec![bytes], on_disk, options);
            checkpoint.set_tensors(header.tensors);
            checkpoint.gguf = Some(header.metadata);
            checkpoint.evidence = header.evidence;
            return Ok(checkpoint);
        }
        if safetensors::looks_like(&bytes) {
            let header = safetensors::read(path, &bytes)?;
            let mut checkpoint = Self::new(path, CheckpointKind::Safetensors, vec![bytes], on_disk, options);
            checkpoint.set_tensors(header.tensors);
            checkpoint.header = header.metadata;
            return Ok(checkpoint);
        }
        if llama2c::looks_like(&bytes) {
            let (facts, tensors) = llama2c::read(path, &bytes)?;
            let mut checkpoint = Self::new(path, CheckpointKind::Llama2c, vec![bytes], on_disk, options);
            checkpoint.set_tensors(tensors);
            checkpoint.llama2c = Some(facts);
            return Ok(checkpoint);
        }
        if pickle::looks_like(&bytes) {
            let header = pickle::read(path, &bytes)?;
            let mut checkpoint = Self::new(path, CheckpointKind::PyTorch, vec![bytes], on_disk, options);
            checkpoint.set_tensors(header.tensors);
            checkpoint.evidence = header.evidence;
            return Ok(checkpoint);
        }
        let what = if bytes.is_empty() {
            "the file is empty".to_owned()
        } else if let Some(why) = pickle::refusal(&bytes) {
            why.to_owned()
        } else {
            let start: Vec<String> = bytes.iter().take(8).map(|b| format!("{b:02x}")).collect();
            format!(
                "not a model file that is read: it starts with the bytes {}, which is neither GGUF, \
                 safetensors, a PyTorch nor a llama2.c checkpoint",
                start.join(" ")
            )
        };
        Err(ModelError::unsupported(path, what))
    }

    fn set_tensors(&mut self, tensors: Vec<TensorInfo>) {
        self.places = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        self.tensors = tensors;
    }

    /// The container.
    pub fn kind(&self) -> CheckpointKind {
        self.kind
    }

    /// The file or folder it was opened from, or the name it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder beside which `config.json` and tokenizer files are looked for; `None` for a
    /// model that is part of the program.
    pub fn folder(&self) -> Option<&Path> {
        if !self.on_disk {
            return None;
        }
        if self.path.is_dir() {
            return Some(&self.path);
        }
        let parent = self.path.parent()?;
        Some(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
    }

    /// Every tensor, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// A tensor's entry, if it is there.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.places.get(name).map(|&place| &self.tensors[place])
    }

    /// A tensor with its bytes, if it is there.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if the bytes hold codes that the encoding does not have.
    pub fn find(&self, name: &str) -> Result<Option<Tensor<'_>>, ModelError> {
        self.info(name).map(|info| self.read(info)).transpose()
    }

    /// A tensor that must be there.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], naming the nearest names that are there; else as
    /// [`find`](Self::find).
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        self.find(name)?.ok_or_else(|| ModelError::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            hint: self.hint(name),
        })
    }

    fn read<'a>(&'a self, info: &'a TensorInfo) -> Result<Tensor<'a>, ModelError> {
        let stored = &self.files[info.file][info.range.clone()];
        let data = llama2c::rewritten(info, stored)?;
        Ok(Tensor { info: Cow::Borrowed(info), data })
    }

    /// Tells the system that a tensor's pages are not needed for now. A hint, for loading tensor by
    /// tensor in bounded memory; the tensor can be read again.
    pub fn release(&self, info: &TensorInfo) {
        self.release_part(info, 0..info.range.len());
    }

    /// As [`release`](Self::release), for some of its stored bytes.
    pub(crate) fn release_part(&self, info: &TensorInfo, part: Range<usize>) {
        if let Some(file) = self.files.get(info.file) {
            let start = info.range.start;
            file.release(start + part.start..(start + part.end).min(info.range.end));
        }
    }

    /// A sentence for each decision about a layout that the file's header alone does not settle: what was decided,
    /// or left open, and why. Empty for most files.
    pub fn evidence(&self) -> &[String] {
        &self.evidence
    }

    /// What the caller says about float matrices.
    pub fn float_weights(&self) -> FloatWeights {
        self.float_weights
    }

    /// The metadata of a GGUF file.
    pub fn gguf_metadata(&self) -> Option<&Metadata> {
        self.gguf.as_ref()
    }

    /// The free-form strings in a safetensors header, in file order.
    pub fn header_metadata(&self) -> &[(String, String)] {
        &self.header
    }

    /// What the header of a llama2.c checkpoint says.
    pub fn llama2c(&self) -> Option<&Llama2cFacts> {
        self.llama2c.as_ref()
    }

    /// The `config.json` beside the weights, parsed; `None` if there is none.
    ///
    /// # Errors
    /// [`ModelError::Read`] if it cannot be read, [`ModelError::Format`] if it is not JSON.
    pub fn config_json(&self) -> Result<Option<serde_json::Value>, ModelError> {
        self.json_beside("config.json")
    }

    /// A JSON file of this name beside the weights, parsed; `None` if there is none.
    ///
    /// # Errors
    /// As [`config_json`](Self::config_json).
    pub fn json_beside(&self, name: &str) -> Result<Option<serde_json::Value>, ModelError> {
        let Some(path) = self.folder().map(|folder| folder.join(name)) else {
            return Ok(None);
        };
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(ModelError::read(&path, e)),
        };
        let parsed = serde_json::from_slice(&text);
        parsed.map(Some).map_err(|e| ModelError::format(&path, format!("not valid JSON: {e}")))
    }

    /// The names most like `name`: those sharing the most of its dotted parts.
    fn hint(&self, name: &str) -> String {
        let wanted: Vec<&str> = name.split('.').collect();
        let score = |other: &str| {
            let parts: Vec<&str> = other.split('.').collect();
            let front = parts.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
            let back = parts.iter().rev().zip(wanted.iter().rev()).take_while(|(a, b)| a == b).count();
            front + back
        };
        let mut near: Vec<(usize, &str)> =
            self.tensors.iter().map(|t| (score(&t.name), t.name.as_str())).collect();
        near.sort_by_key(|&(score, _)| std::cmp::Reverse(score)); // Stable: file order among equals.
        let names: Vec<String> = near.iter().take(3).map(|(_, n)| format!("`{n}`")).collect();
        match names.len() {
            0 => " (the file holds no tensors)".to_owned(),
            _ => format!(" (there are {} tensors, nearest are {})", self.tensors.len(), names.join(", ")),
        }
    }
}

//! Documents from files, one at a time.
//!
//! - `NAME.jsonl`: the string in one field of every line.
//! - `NAME.parquet`: the values of one string column, absent ones skipped.
//! - any other file: UTF-8 text, documents separated by lines that say `<|endoftext|>`.
//! - each but Parquet also compressed, with `.gz`, `.zst`, `.xz` or `.bz2` after its name.
//! - a folder: its `.txt`, `.jsonl` and `.parquet` files in the order of their names, each as above.
//!
//! Documents lose their surrounding white space; empty ones are skipped. The same files give the same
//! documents in the same order. No more than one document, and of Parquet one page, is in memory: text that goes on for
//! [`LONGEST`] bytes is cut at a line's end, and longer lines and values are refused.

mod compressed;
mod lines;
mod parquet;

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::DataSection;
use crate::error::TrainError;
use compressed::Compression;

/// Bytes of the longest document.
pub(crate) const LONGEST: usize = 16 << 20;

/// Where a document's text is found unless a source says otherwise.
pub(crate) const TEXT_FIELD: &str = "text";

/// One file of a source.
#[derive(Debug, Clone)]
pub(crate) struct TextFile {
    path: PathBuf,
    kind: Kind,
    compression: Compression,
    /// The field or column that holds the text, where there are such.
    field: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Json,
    Parquet,
}

impl TextFile {
    fn new(path: PathBuf, field: &Arc<str>) -> Result<Self, TrainError> {
        let (compression, inner) = Compression::of(&path);
        let kind = if has_extension(&inner, "jsonl") {
            Kind::Json
        } else if has_extension(&inner, "parquet") {
            Kind::Parquet
        } else {
            Kind::Text
        };
        if let (Kind::Parquet, Some(name)) = (kind, compression.name()) {
            let what = format!("a Parquet file inside {name} cannot be read in parts; unpack it");
            return Err(TrainError::file(&path, what));
        }
        Ok(Self { path, kind, compression, field: field.clone() })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its lines are JSON.
    pub(crate) fn is_jsonl(&self) -> bool {
        self.kind == Kind::Json
    }

    /// Its bytes, unpacked.
    pub(crate) fn open(&self) -> Result<Box<dyn Read + Send>, TrainError> {
        self.compression.open(&self.path, &Arc::default())
    }

    /// What [`fingerprint`] knows of the file besides its bytes. Plain text is 0, and JSONL 1.
    fn tag(&self) -> u8 {
        self.kind as u8 + 3 * self.compression as u8
    }
}

/// The files that `paths` name, folders listed. `field` is where their documents are found, [`TEXT_FIELD`] if absent.
pub(crate) fn files(paths: &[PathBuf], field: Option<&str>) -> Result<Vec<TextFile>, TrainError> {
    let field: Arc<str> = field.unwrap_or(TEXT_FIELD).into();
    let mut found = Vec::new();
    for path in paths {
        let meta = std::fs::metadata(path).map_err(|e| TrainError::read(path, e))?;
        if !meta.is_dir() {
            found.push(TextFile::new(path.clone(), &field)?);
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|e| TrainError::read(path, e))?;
        let mut inside = Vec::new();
        for entry in entries {
            let file = entry.map_err(|e| TrainError::read(path, e))?.path();
            let (_, name) = Compression::of(&file);
            if ["txt", "jsonl", "parquet"].iter().any(|kind| has_extension(&name, kind)) {
                inside.push(TextFile::new(file, &field)?);
            }
        }
        if inside.is_empty() {
            let what = "the folder holds no .txt, .jsonl or .parquet file, compressed or not";
            return Err(TrainError::file(path, what));
        }
        inside.sort_by(|a, b| a.path.cmp(&b.path));
        found.append(&mut inside);
    }
    Ok(found)
}

/// Refuses a held-out file that is trained on as well, whichever folder or symbolic link leads to it. Copies are not recognised.
pub(crate) fn check_held_out(data: &DataSection) -> Result<(), TrainError> {
    let real = |path: &PathBuf| std::fs::canonicalize(path).map_err(|e| TrainError::read(path, e));
    let mut trained = HashMap::new();
    for source in &data.sources {
        for file in files(&source.path, None)? {
            trained.insert(real(&file.path)?, &source.name);
        }
    }
    for set in &data.valid {
        for file in files(&set.path, None)? {
            if let Some(source) = trained.get(&real(&file.path)?) {
                let field = format!("data.valid.path of `{}`", set.name);
                let expected =
                    format!("a file that is not trained on, but the source `{source}` reads it too");
                return Err(TrainError::setting(field, file.path.display(), expected));
            }
        }
    }
    Ok(())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// A hash of the files' contents, of their boundaries and of how they are read.
pub(crate) fn fingerprint(files: &[TextFile]) -> Result<u64, TrainError> {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    for file in files {
        let read = |e| TrainError::read(&file.path, e);
        let mut opened = File::open(&file.path).map_err(read)?;
        let mut length = 0u64;
        loop {
            let n = opened.read(&mut buffer).map_err(read)?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            length += n as u64;
        }
        // A text file and a JSONL file of the same bytes are different documents.
        hash.update(&[file.tag()]);
        if file.kind != Kind::Text && &*file.field != TEXT_FIELD {
            hash.update(file.field.as_bytes());
        }
        hash.update(&length.to_le_bytes());
    }
    Ok(hash.digest())
}

/// Iterates over the documents of `files`. After an error it ends.
pub(crate) struct Documents {
    files: std::vec::IntoIter<TextFile>,
    current: Option<Reader>,
    failed: bool,
    read: Arc<AtomicU64>,
    total: u64,
}

enum Reader {
    Lines(lines::Lines),
    Parquet(Box<parquet::Rows>),
}

impl Documents {
    pub(crate) fn new(files: Vec<TextFile>) -> Self {
        // A file that is gone is an error when it is opened.
        let size = |file: &TextFile| std::fs::metadata(&file.path).map_or(0, |meta| meta.len());
        let total = files.iter().map(size).sum();
        Self { files: files.into_iter(), current: None, failed: false, read: Arc::default(), total }
    }

    /// Bytes read so far, of how many, as they lie on disk.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.read.load(Ordering::Relaxed).min(self.total), self.total)
    }

    fn advance(&mut self) -> Result<Option<String>, TrainError> {
        loop {
            if self.current.is_none() {
                let Some(file) = self.files.next() else {
                    return Ok(None);
                };
                self.current = Some(match file.kind {
                    Kind::Parquet => Reader::Parquet(Box::new(parquet::Rows::open(file, &self.read)?)),
                    kind => Reader::Lines(lines::Lines::open(file, kind == Kind::Json, &self.read)?),
                });
            }
            let found = match self.current.as_mut().expect("set above") {
                Reader::Lines(lines) => lines.document()?,
                Reader::Parquet(rows) => rows.document()?,
            };
            match found {
                Some(text) => return Ok(Some(text)),
                None => self.current = None,
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<String, TrainError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let item = self.advance().transpose();
        self.failed = matches!(item, Some(Err(_)));
        item
    }
}

fn trimmed(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests;

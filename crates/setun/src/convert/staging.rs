//! An output that is built beside its target and takes its name when it is complete.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::huggingface::COMPANIONS;
use crate::error::ModelError;

/// A hidden sibling of the target; removed when dropped unfinished.
#[derive(Debug)]
pub(super) struct Staging {
    target: PathBuf,
    /// Where to build.
    pub path: PathBuf,
    folder: bool,
    force: bool,
}

impl Staging {
    pub(super) fn create(target: &Path, folder: bool, force: bool) -> Result<Self, ModelError> {
        check_target(target, folder, force)?;
        let staging = Self { target: target.to_owned(), path: sibling(target, "converting")?, folder, force };
        if folder {
            fs::create_dir(&staging.path).map_err(|e| ModelError::write(target, e))?;
        }
        Ok(staging)
    }

    /// Bytes built so far.
    pub(super) fn bytes(&self) -> Result<u64, ModelError> {
        let failed = |e| ModelError::read(&self.path, e);
        if !self.folder {
            return Ok(fs::metadata(&self.path).map_err(failed)?.len());
        }
        let mut total = 0;
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            total += entry.and_then(|e| e.metadata()).map_err(failed)?.len();
        }
        Ok(total)
    }

    /// Gives it its name. A folder that it replaces is removed afterwards.
    pub(super) fn finish(self) -> Result<(), ModelError> {
        check_target(&self.target, self.folder, self.force)?;
        let failed = |e| ModelError::write(&self.target, e);
        if self.folder && self.target.exists() {
            let old = sibling(&self.target, "replaced")?;
            fs::rename(&self.target, &old).map_err(failed)?;
            if let Err(error) = fs::rename(&self.path, &self.target) {
                let _ = fs::rename(&old, &self.target);
                return Err(failed(error));
            }
            return fs::remove_dir_all(&old).map_err(|e| ModelError::write(&old, e));
        }
        fs::rename(&self.path, &self.target).map_err(failed)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After `finish` nothing is there any more.
        let _ = if self.folder { fs::remove_dir_all(&self.path) } else { fs::remove_file(&self.path) };
    }
}

/// What is there is replaced only when asked, and only by its like.
fn check_target(target: &Path, folder: bool, force: bool) -> Result<(), ModelError> {
    let found = match fs::symlink_metadata(target) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|e| ModelError::read(target, e))?,
    };
    let what = match (force, folder, found.is_dir()) {
        (false, ..) => "exists already, and is replaced only when that is asked for (--force)".to_owned(),
        (true, true, false) => {
            "is a file, and the output would be a folder: remove it, or choose another name".to_owned()
        }
        (true, false, true) => "is a folder, and the output would be a file: choose another name".to_owned(),
        // A slip must not cost someone's other files.
        (true, true, true) => match foreign_entry(target)? {
            None => return Ok(()),
            Some(name) => format!(
                "holds `{name}`, which no conversion writes, so it is not replaced: move that away, or choose another name"
            ),
        },
        (true, false, false) => return Ok(()),
    };
    Err(ModelError::format(target, what))
}

/// Something in a folder that is no part of a model as this module writes or copies it.
fn foreign_entry(folder: &Path) -> Result<Option<String>, ModelError> {
    let failed = |e| ModelError::read(folder, e);
    let (mut foreign, mut known) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_model_file(&name) || entry.file_type().map_err(failed)?.is_dir() {
            foreign.push(name);
        } else {
            known.push(name);
        }
    }
    // Without a config it is no model folder, whatever its files are called.
    if !known.iter().any(|name| name == "config.json") {
        foreign.append(&mut known);
    }
    Ok(foreign.into_iter().min())
}

/// `config.json`, what goes along with it, `model.safetensors`, and shards with their index.
fn is_model_file(name: &str) -> bool {
    let shard = |name: &str| {
        let numbers = name.strip_prefix("model-")?.strip_suffix(".safetensors")?;
        let (one, of) = numbers.split_once("-of-")?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        Some(digits(one) && digits(of))
    };
    ["config.json", "model.safetensors", "model.safetensors.index.json"].contains(&name)
        || COMPANIONS.contains(&name)
        || shard(name) == Some(true)
}

fn sibling(target: &Path, what: &str) -> Result<PathBuf, ModelError> {
    let name = target.file_name().ok_or_else(|| {
        ModelError::write(
            target,
            std::io::Error::new(ErrorKind::InvalidInput, "the path names no file or folder"),
        )
    })?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.{what}", std::process::id()));
    Ok(target.with_file_name(hidden))
}

//! An output that is built beside its target and takes its name when it is complete.
//!
//! Everything lies in a hidden folder `.NAME.converting` with a lock: a conversion that was killed leaves it, unlocked,
//! and the next one to the same target clears it away.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::huggingface::{COMPANIONS, MORE_TEMPLATES};
use crate::error::ModelError;
use crate::format::is_shard_name;

const LOCK: &str = ".lock";
/// What `finish` calls the folder that it replaces, for a moment.
const REPLACED: &str = ".replaced";

/// A hidden sibling of the target; removed when dropped.
#[derive(Debug)]
pub(super) struct Staging {
    target: PathBuf,
    root: PathBuf,
    /// Where to build.
    pub path: PathBuf,
    folder: bool,
    force: bool,
    lock: Option<File>,
}

impl Staging {
    pub(super) fn create(target: &Path, folder: bool, force: bool) -> Result<Self, ModelError> {
        let failed = |e| ModelError::write(target, e);
        let name = target.file_name().ok_or_else(|| {
            failed(std::io::Error::new(ErrorKind::InvalidInput, "the path names no file or folder"))
        })?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".converting");
        let root = target.with_file_name(hidden);
        clear(&root, target)?;
        check_target(target, folder, force)?;
        fs::create_dir(&root).map_err(failed)?;
        let lock = File::create_new(root.join(LOCK)).map_err(failed)?;
        lock.try_lock().map_err(|e| busy_or(target, e))?;
        let path = root.join(name);
        let staging = Self { target: target.to_owned(), root, path, folder, force, lock: Some(lock) };
        if folder {
            fs::create_dir(&staging.path).map_err(failed)?;
        }
        Ok(staging)
    }

    /// Bytes built so far.
    pub(super) fn bytes(&self) -> Result<u64, ModelError> {
        fn within(path: &Path) -> std::io::Result<u64> {
            match fs::metadata(path)? {
                folder if folder.is_dir() => fs::read_dir(path)?.map(|entry| within(&entry?.path())).sum(),
                file => Ok(file.len()),
            }
        }
        within(&self.path).map_err(|e| ModelError::read(&self.path, e))
    }

    /// An error of the work in here, told of the target: the hidden name helps nobody.
    pub(super) fn outside(&self, error: ModelError) -> ModelError {
        let inside = |path: &Path| {
            path.strip_prefix(&self.path).ok().map(|rest| match rest.as_os_str().is_empty() {
                true => self.target.clone(),
                false => self.target.join(rest),
            })
        };
        match error {
            ModelError::Write { path, source } => {
                ModelError::Write { path: inside(&path).unwrap_or(path), source }
            }
            ModelError::Format { path, what } => {
                ModelError::Format { path: inside(&path).unwrap_or(path), what }
            }
            other => other,
        }
    }

    /// Gives it its name. A folder that it replaces is removed afterwards.
    pub(super) fn finish(self) -> Result<(), ModelError> {
        check_target(&self.target, self.folder, self.force)?;
        let failed = |e| ModelError::write(&self.target, e);
        if self.folder && self.target.exists() {
            let old = self.root.join(REPLACED);
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
        // The lock goes last, where a locked file can be removed at all.
        let _ = fs::remove_dir_all(&self.root);
        drop(self.lock.take());
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn busy_or(target: &Path, error: TryLockError) -> ModelError {
    match error {
        TryLockError::WouldBlock => {
            ModelError::format(target, "another conversion is writing it at this moment")
        }
        TryLockError::Error(e) => ModelError::write(target, e),
    }
}

/// Removes what a killed conversion left. If it died between the two renames of `finish`, what it was about to replace
/// goes back to its place first.
fn clear(root: &Path, target: &Path) -> Result<(), ModelError> {
    let failed = |e| ModelError::write(root, e);
    match File::open(root.join(LOCK)) {
        Ok(lock) => lock.try_lock().map_err(|e| busy_or(target, e))?,
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    let old = root.join(REPLACED);
    if old.is_dir() && !target.exists() {
        fs::rename(&old, target).map_err(failed)?;
    }
    match fs::remove_dir_all(root) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
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
        let is_folder = entry.file_type().map_err(failed)?.is_dir();
        if is_folder && name == MORE_TEMPLATES {
            for template in fs::read_dir(entry.path()).map_err(failed)? {
                let inside = template.map_err(failed)?.file_name().to_string_lossy().into_owned();
                if !inside.ends_with(".jinja") {
                    foreign.push(format!("{name}/{inside}"));
                }
            }
        } else if !is_model_file(&name) || is_folder {
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
    ["config.json", "model.safetensors", "model.safetensors.index.json"].contains(&name)
        || COMPANIONS.contains(&name)
        || is_shard_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_conversion_left_is_cleared_away_and_a_running_one_respected() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("m.gguf");
        let hidden = folder.path().join(".m.gguf.converting");
        let running = Staging::create(&target, false, false).unwrap();
        fs::write(&running.path, "half").unwrap();
        let error = Staging::create(&target, false, false).unwrap_err().to_string();
        assert!(error.contains("another conversion"), "{error}");
        assert!(running.path.exists());
        // Killed: the lock is gone, the files are not.
        running.lock.as_ref().unwrap().unlock().unwrap();
        std::mem::forget(running);
        assert!(hidden.exists() && !target.exists());
        let next = Staging::create(&target, false, false).unwrap();
        assert!(!next.path.exists());
        fs::write(&next.path, "whole").unwrap();
        next.finish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        assert!(!hidden.exists());
    }

    #[test]
    fn a_folder_whose_replacement_was_cut_off_between_two_renames_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let (target, hidden) = (folder.path().join("m"), folder.path().join(".m.converting"));
        fs::create_dir_all(hidden.join(REPLACED)).unwrap();
        fs::write(hidden.join(REPLACED).join("config.json"), "{}").unwrap();
        let error = Staging::create(&target, true, false).unwrap_err().to_string();
        assert!(error.contains("exists already"), "{error}");
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"{}");
        assert!(!hidden.exists());
    }

    #[test]
    fn errors_name_the_target_and_not_the_hidden_place() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("m");
        let staging = Staging::create(&target, true, false).unwrap();
        let full = || std::io::Error::from(ErrorKind::StorageFull);
        let error = staging.outside(ModelError::write(&staging.path.join("config.json"), full()));
        assert_eq!(error.to_string(), format!("cannot write {}", target.join("config.json").display()));
        drop(staging);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

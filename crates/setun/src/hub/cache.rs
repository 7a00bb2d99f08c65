//! The cache folder, in the layout that the hub's other clients share:
//!
//! ```text
//! models--OWNER--NAME/blobs/ETAG                       contents, each once; ETAG.incomplete while it is fetched
//! models--OWNER--NAME/refs/REVISION                    the commit that a branch or tag was when it was last asked for
//! models--OWNER--NAME/snapshots/COMMIT/path/of/file    a link to its blob
//! .locks/models--OWNER--NAME/ETAG.lock                 held while a blob is fetched
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::name::is_safe_part;
use crate::error::ModelError;

/// Folders deep, and entries, that a snapshot is searched for.
const DEPTH: usize = 4;
const MOST_FILES: usize = 100_000;

/// The folder of one repository.
#[derive(Debug)]
pub(super) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache: &Path, repo: &str) -> Self {
        let folder = format!("models--{}", repo.replace('/', "--"));
        Self { root: cache.join(&folder), locks: cache.join(".locks").join(folder) }
    }

    /// Folder of the files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Where a blob is while it is fetched.
    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The commit that a revision was when it was last fetched; a commit is itself.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        let known = fs::read_to_string(self.root.join("refs").join(revision)).ok();
        let known = known.map(|text| text.trim().to_owned()).filter(|commit| is_safe_part(commit));
        known.or_else(|| self.snapshot(revision).is_dir().then(|| revision.to_owned()))
    }

    /// Notes which commit a revision is. A commit needs no note.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<(), ModelError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        if fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        let partial = path.with_file_name(format!("{}.{}.partial", file_name(&path), std::process::id()));
        let written = create_parent(&path)
            .and_then(|()| File::create(&partial)?.write_all(commit.as_bytes()))
            .and_then(|()| fs::rename(&partial, &path));
        written.map_err(|e| {
            let _ = fs::remove_file(&partial);
            ModelError::write(&path, e)
        })
    }

    /// Names of the files of a commit that are there, sorted.
    pub(super) fn files(&self, commit: &str) -> Vec<String> {
        let mut names = Vec::new();
        list(&self.snapshot(commit), "", DEPTH, &mut names);
        names.sort();
        names
    }

    /// Keeps other programs from fetching the same blob until the result is dropped. `waiting` is called once if one
    /// does so now.
    pub(super) fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<File, ModelError> {
        let path = self.locks.join(format!("{etag}.lock"));
        let failed = |e| ModelError::write(&path, e);
        create_parent(&path).map_err(failed)?;
        // Never truncated or removed: another program may hold it.
        let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
        let mut waiting = Some(waiting);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {
                    if let Some(tell) = waiting.take() {
                        tell();
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(TryLockError::Error(e)) => return Err(failed(e)),
            }
        }
    }

    /// Gives a blob its name in a snapshot: a relative symbolic link; a hard link or a copy where there are none.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf, ModelError> {
        let path = self.snapshot(commit).join(file);
        let blob = self.blob(etag);
        if path.exists() && path.canonicalize().ok() == blob.canonicalize().ok() {
            return Ok(path);
        }
        let partial = path.with_file_name(format!(".{}.{}.partial", file_name(&path), std::process::id()));
        let up = "../".repeat(file.split('/').count() + 1);
        let linked = create_parent(&path)
            .and_then(|()| {
                let _ = fs::remove_file(&partial);
                symlink(Path::new(&format!("{up}blobs/{etag}")), &partial)
                    .or_else(|_| fs::hard_link(&blob, &partial))
                    .or_else(|_| fs::copy(&blob, &partial).map(|_| ()))
            })
            .and_then(|()| fs::rename(&partial, &path));
        linked.map_err(|e| {
            let _ = fs::remove_file(&partial);
            ModelError::write(&path, e)
        })?;
        Ok(path)
    }
}

#[cfg(unix)]
fn symlink(to: &Path, at: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(to, at)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

fn list(folder: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (path, name) = (entry.path(), format!("{prefix}{name}"));
        // A link whose blob is gone is no file.
        if path.is_file() && names.len() < MOST_FILES {
            names.push(name);
        } else if depth > 1 && entry.file_type().is_ok_and(|t| t.is_dir()) {
            list(&path, &format!("{name}/"), depth - 1, names);
        }
    }
}

pub(super) fn create_parent(path: &Path) -> std::io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Bytes free for this user where `path` will be; `None` where the system does not tell.
#[cfg(unix)]
pub(super) fn room(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|folder| folder.exists())?;
    let found = rustix::fs::statvfs(existing).ok()?;
    found.f_bavail.checked_mul(found.f_frsize)
}

#[cfg(not(unix))]
pub(super) fn room(_: &Path) -> Option<u64> {
    None
}

/// Bytes of a file, if it is there.
pub(super) fn length(path: &Path) -> Result<Option<u64>, ModelError> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some(found.len())),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(ModelError::read(path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_file_is_a_relative_link_to_its_blob() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), "org/name");
        let blob = cache.blob("abc");
        create_parent(&blob).unwrap();
        fs::write(&blob, "contents").unwrap();
        for file in ["x.gguf", "sub/x.gguf"] {
            let path = cache.link("c0ffee", file, "abc").unwrap();
            assert_eq!(path, folder.path().join("models--org--name/snapshots/c0ffee").join(file));
            assert_eq!(fs::read_to_string(&path).unwrap(), "contents");
            #[cfg(unix)]
            assert!(fs::read_link(&path).unwrap().is_relative());
            assert_eq!(cache.link("c0ffee", file, "abc").unwrap(), path, "twice is once");
        }
        assert_eq!(cache.files("c0ffee"), ["sub/x.gguf", "x.gguf"]);
        fs::remove_file(&blob).unwrap();
        assert!(cache.files("c0ffee").is_empty(), "a link without its blob is no file");
    }

    #[test]
    fn a_revision_is_the_commit_it_was_last_noted_to_be() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), "org/name");
        assert_eq!(cache.commit("main"), None);
        cache.set_commit("main", "c1").unwrap();
        cache.set_commit("refs/pr/1", "c2").unwrap();
        cache.set_commit("main", "c3").unwrap();
        assert_eq!(
            (cache.commit("main").as_deref(), cache.commit("refs/pr/1").as_deref()),
            (Some("c3"), Some("c2"))
        );
        fs::write(folder.path().join("models--org--name/refs/main"), "../../x").unwrap();
        assert_eq!(cache.commit("main"), None, "a note that leads out of the cache is none");
    }

    #[test]
    fn a_lock_is_held_by_one_and_tells_who_waits() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), "org/name");
        let held = cache.lock("abc", || panic!("nobody else holds it")).unwrap();
        let told = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                cache.lock("abc", || told.store(true, std::sync::atomic::Ordering::SeqCst)).unwrap();
            });
            while !told.load(std::sync::atomic::Ordering::SeqCst) {
                std::thread::yield_now();
            }
            assert!(!other.is_finished());
            drop(held);
        });
    }
}

//! A file that appears whole or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::ModelError;

/// Writes beside the target under a temporary name and renames at the end; a writer that is dropped
/// unfinished removes what it wrote and leaves an existing target alone.
#[derive(Debug)]
pub(crate) struct Output {
    target: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
}

impl Output {
    pub(crate) fn create(target: &Path) -> Result<Self, ModelError> {
        let name = target.file_name().ok_or_else(|| {
            let kind = std::io::ErrorKind::InvalidInput;
            ModelError::write(target, std::io::Error::new(kind, "the path names no file"))
        })?;
        // The process id keeps two concurrent writers of one target apart.
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.partial", std::process::id()));
        let temporary = target.with_file_name(hidden);
        let file = File::create(&temporary).map_err(|e| ModelError::write(target, e))?;
        let file = Some(BufWriter::with_capacity(1 << 20, file));
        Ok(Self { target: target.to_owned(), temporary, file })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        let file = self.file.as_mut().expect("only `finish` takes the file, and it consumes self");
        file.write_all(bytes).map_err(|e| ModelError::write(&self.target, e))
    }

    /// Writes `count` zero bytes, fewer than any alignment allowed.
    pub(crate) fn pad(&mut self, count: usize) -> Result<(), ModelError> {
        const ZEROS: [u8; 256] = [0; 256];
        let mut left = count;
        while left > 0 {
            let n = left.min(ZEROS.len());
            self.write(&ZEROS[..n])?;
            left -= n;
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.target
    }

    /// Flushes to the disk and gives the file its name.
    pub(crate) fn finish(mut self) -> Result<(), ModelError> {
        let file = self.file.take().expect("taken once, here");
        let done = file.into_inner().map_err(std::io::IntoInnerError::into_error);
        done.and_then(|f| f.sync_all()).and_then(|()| fs::rename(&self.temporary, &self.target)).map_err(
            |e| {
                let _ = fs::remove_file(&self.temporary);
                ModelError::write(&self.target, e)
            },
        )
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

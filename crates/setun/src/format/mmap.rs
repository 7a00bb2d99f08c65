//! The bytes of an opened file: mapped, owned, or part of the program.
//!
//! This file holds the crate's only `unsafe` code.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use crate::error::ModelError;

/// A whole file as one slice, without copying it where the system can map it.
#[derive(Debug)]
pub(crate) enum FileBytes {
    /// A read-only mapping; pages are loaded as they are touched.
    Mapped(memmap2::Mmap),
    /// Bytes embedded in the program.
    Static(&'static [u8]),
}

impl FileBytes {
    /// Maps `path` read-only.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(|e| ModelError::read(path, e))?;
        let length = file.metadata().map_err(|e| ModelError::read(path, e))?.len();
        if length == 0 {
            return Ok(Self::Static(&[])); // Mapping nothing is an error on some systems.
        }
        // SAFETY: the mapping is private and read-only, so nothing here can write through it. Another
        // process that rewrites the file in place meanwhile could change the bytes under us, as with
        // every mapped file; headers are checked once, and what is read from tensors afterwards is
        // plain numbers in which every bit pattern is a valid value, so no index depends on them. A file
        // cut short meanwhile ends the process with a bus error, which is no undefined behaviour.
        let mapped = unsafe { memmap2::Mmap::map(&file) };
        mapped.map(Self::Mapped).map_err(|e| ModelError::read(path, e))
    }

    /// Lets the system drop the pages of `range` from this process's memory. They are read from the
    /// file again when touched again. A hint: failure is of no consequence.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            // SAFETY: `DontNeed` on a private mapping that was never written discards clean pages only;
            // later reads fault them in from the file with the same contents.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// A file of any kind, mapped read-only: its pages come as they are touched, and go when memory is short.
///
/// Whoever changes the file in place meanwhile changes these bytes: slices into them are checked where they are taken, never once
/// for all. Cut short meanwhile, it ends the process.
#[derive(Debug)]
pub struct MappedFile(FileBytes);

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// [`ModelError::Read`] when it cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        FileBytes::open(path).map(Self)
    }

    /// Gives back the pages of a range that will not be read again soon: a hint. What lies outside the file is ignored.
    pub fn release(&self, range: Range<usize>) {
        let end = range.end.min(self.len());
        if range.start < end {
            self.0.release(range.start..end);
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

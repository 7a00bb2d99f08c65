//! Files as they were before they were compressed.

use std::fs::File;
use std::io::{BufReader, Error, ErrorKind, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::TrainError;

/// Memory that an xz file may ask for, KiB: what its highest preset needs is 65 MiB.
const XZ_MEMORY: u32 = 512 << 10;

/// How a file was compressed, by the end of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
    Xz,
    Bzip2,
}

impl Compression {
    const NAMES: [(&'static str, Self); 4] =
        [("gz", Self::Gzip), ("zst", Self::Zstd), ("xz", Self::Xz), ("bz2", Self::Bzip2)];

    /// The compression that the name of `path` tells, and the path without that ending.
    pub(super) fn of(path: &Path) -> (Self, std::path::PathBuf) {
        match Self::NAMES.iter().find(|(end, _)| super::has_extension(path, end)) {
            Some(&(_, found)) => (found, path.with_extension("")),
            None => (Self::None, path.to_owned()),
        }
    }

    /// What a damaged file of this kind is not.
    pub(super) fn name(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Gzip => Some("gzip"),
            Self::Zstd => Some("zstd"),
            Self::Xz => Some("xz"),
            Self::Bzip2 => Some("bzip2"),
        }
    }

    /// Opens `path` for its uncompressed bytes; the bytes read from disk are added to `read`. Files of several members
    /// (`cat a.gz b.gz`) are read to their end.
    pub(super) fn open(self, path: &Path, read: &Arc<AtomicU64>) -> Result<Box<dyn Read + Send>, TrainError> {
        let file = File::open(path).map_err(|e| TrainError::read(path, e))?;
        let file = BufReader::with_capacity(1 << 18, Counted { file, read: read.clone() });
        Ok(match self {
            Self::None => Box::new(file),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            Self::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(file);
                Box::new(decoder.map_err(|e| TrainError::read(path, e))?)
            }
            Self::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(file, true, XZ_MEMORY)),
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(file)),
        })
    }

    /// What reading `path` failed with, up to line `line`: the system's error, or damage to the compressed data.
    pub(super) fn failure(self, path: &Path, line: usize, error: Error) -> TrainError {
        let system = error.raw_os_error().is_some() || error.kind() == ErrorKind::OutOfMemory;
        match self.name() {
            Some(name) if !system => {
                let cut = error.kind() == ErrorKind::UnexpectedEof;
                let how = if cut { "is cut short".to_owned() } else { format!("is damaged ({error})") };
                TrainError::file(path, format!("the {name} data {how} after line {line} of its text"))
            }
            _ => TrainError::read(path, error),
        }
    }
}

struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

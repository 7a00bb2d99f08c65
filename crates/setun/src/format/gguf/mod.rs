//! GGUF, versions 2 and 3, little-endian: metadata and tensors in one file.
//!
//! `"GGUF"`, version, the two counts, the metadata, one entry per tensor, padding, then the data; each
//! tensor's offset counts from the start of the data and is a multiple of `general.alignment`. Dimensions
//! are stored fastest first; everywhere else in this library shapes are row-major.

mod collisions;
mod i2s;
pub mod metadata;
pub(crate) mod reader;
mod type42;
pub mod types;
pub mod writer;

pub use metadata::{Array, Metadata, Value, required};
pub use writer::GgufWriter;

/// The first four bytes of every GGUF file.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// Alignment of tensor data where `general.alignment` is absent, in bytes.
pub const DEFAULT_ALIGNMENT: usize = 32;

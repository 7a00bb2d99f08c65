//! Model files: what is inside a checkpoint, whichever container and packing it came in.
//!
//! [`Checkpoint`] opens a file or folder and hands out [`Tensor`]s by name; [`decode`] turns their bytes
//! into floats, dense or ternary matrices, [`encode`] goes the other way, and the containers' writers
//! put the result on disk. What a model's tensors mean is not decided here, see `config` and `weights`.
//!
//! Every header is hostile until it is checked: see docs/format.md for what is read, written and refused.

mod checkpoint;
pub mod decode;
pub mod encode;
pub mod gguf;
mod llama2c;
mod mmap;
mod options;
mod output;
mod pickle;
mod safetensors;
mod shards;
mod tensor;

pub use checkpoint::{Checkpoint, CheckpointKind};
pub(crate) use decode::{Sample, Tl};
pub use decode::{ScaleConvention, hf_packed_to_ternary, mlx_to_ternary};
pub use encode::{Scaling, encode_floats, encode_hf_packed, encode_ternary};
pub use llama2c::{Llama2cFacts, Llama2cKind};
pub use mmap::MappedFile;
pub use options::{FloatWeights, I2sLayout, OpenOptions, TlTiles, Type42};
pub use safetensors::SafetensorsWriter;
pub(crate) use shards::is_shard_name;
pub use shards::{DEFAULT_SHARD_SIZE, ShardedWriter};
pub use tensor::{Encoding, Tensor, TensorInfo, TensorSpec};

//! The model that is part of the program, so that `setun` alone has something to say.
//!
//! `models/default.gguf` is all there is to it: weights, tokenizer and end tokens in one file. Its card is models/README.md.

/// What it is called in messages, where other models have a path.
pub const NAME: &str = "default model";

/// What it continues when it is given no prompt.
pub const PROMPT: &str = "Once upon a time";

/// The file.
pub const BYTES: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/default.gguf"));

/// Whose text it was trained on: the licences ask that this travels with it.
pub const ATTRIBUTION: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ATTRIBUTION.md"));

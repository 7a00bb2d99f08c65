//! The model that is part of the program, so that `setun` alone has something to say.
//!
//! `models/default.gguf` is all there is to it: weights, tokenizer and end tokens in one file.

/// What it is called in messages, where other models have a path.
pub const NAME: &str = "default model";

/// What it continues when it is given no prompt.
pub const PROMPT: &str = "Once upon a time";

/// The file, if this build has it.
#[cfg(default_model)]
pub const BYTES: Option<&[u8]> =
    Some(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/default.gguf")));
/// The file, if this build has it.
#[cfg(not(default_model))]
pub const BYTES: Option<&[u8]> = None;

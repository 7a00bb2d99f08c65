//! Why a model could not be read, run or converted: the one error type of this crate.
//!
//! Messages are lower case, one sentence, without a final stop, and name the thing at fault: the file,
//! the tensor or the field. Text after a colon says what was expected, what was found, what to do.

use std::path::{Path, PathBuf};

/// Everything that can go wrong between a file and its model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused to open or read a file.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The operating system refused to create, write or rename a file.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file that was to be written.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file breaks the rules of its own format, or is cut short.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Which rule, where, with the values found.
        what: String,
    },
    /// A file is valid, but in a format, version or layout that this library does not read.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is, and what is read instead.
        what: String,
    },
    /// A model on a hub cannot be found, fetched or kept.
    #[error("{name}: {what}")]
    Hub {
        /// The model as the user named it, or the setting at fault.
        name: String,
        /// What the hub, the network or the disk refused, and what to do.
        what: String,
    },
    /// A tensor that the model needs is not in the file.
    #[error("{}: tensor `{name}` is missing{hint}", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The name that was looked up.
        name: String,
        /// Empty, or a clause with the nearest names that are there.
        hint: String,
    },
    /// A tensor's shape contradicts the model's config.
    #[error("tensor `{name}` has shape {found:?}, but {expected:?} is expected")]
    Shape {
        /// The tensor.
        name: String,
        /// Row-major shape that the model needs.
        expected: Vec<usize>,
        /// Row-major shape in the file.
        found: Vec<usize>,
    },
    /// A tensor's contents or encoding cannot be used as asked.
    #[error("tensor `{name}`: {what}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong and what was expected.
        what: String,
    },
    /// A tensor cannot be stored in the encoding asked for without changing its values.
    #[error("tensor `{name}` cannot be stored as {encoding}: {why}")]
    CannotEncode {
        /// The tensor.
        name: String,
        /// The encoding's name.
        encoding: String,
        /// Which property it lacks.
        why: String,
    },
    /// A tokenizer's file or vocabulary is damaged, contradicts itself, or is of a kind that is not read.
    #[error("tokenizer: {what}")]
    Tokenizer {
        /// What is wrong, and what was expected.
        what: String,
    },
    /// A chat template cannot be parsed or rendered.
    #[error("chat template: {what}")]
    ChatTemplate {
        /// What the template engine or the template itself says.
        what: String,
    },
    /// A setting for sampling is outside its range.
    #[error("sampling setting `{name}` is {value}, but {expected} is expected")]
    Sampling {
        /// The field of `Sampling`.
        name: &'static str,
        /// Its value.
        value: String,
        /// The valid range in words.
        expected: &'static str,
    },
    /// A metadata key of a GGUF file or a setting beside a model is missing, of the wrong type or out of range.
    #[error("metadata key `{key}` {what}")]
    Metadata {
        /// The key.
        key: String,
        /// "is missing", "is a string, but an integer is expected".
        what: String,
    },
    /// A sequence would outgrow the context.
    #[error(
        "the context is full: {used} tokens so far and {more} more do not fit into {limit} positions; shorten the \
             prompt, or start a new sequence"
    )]
    ContextFull {
        /// Positions filled.
        used: usize,
        /// Tokens that were to be added.
        more: usize,
        /// Positions there are.
        limit: usize,
    },
    /// A forward pass gave no numbers.
    #[error(
        "the logits after {tokens} tokens are not numbers: the model's weights hold NaN or infinite values, so the file \
         is damaged or was converted wrongly; `setun info` names the tensors"
    )]
    NotFinite {
        /// Tokens fed so far.
        tokens: usize,
    },
    /// This model cannot verify guesses.
    #[error("guesses of this model's tokens cannot be verified: {why}")]
    Speculation {
        /// What prevents it.
        why: &'static str,
    },
    /// A token id that the vocabulary does not have.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Ids there are.
        vocab_size: usize,
    },
    /// A text in which no token can be predicted from one before it.
    #[error("the text has {tokens} tokens, but at least 2 are needed to predict one from another")]
    TooShort {
        /// Tokens of the text.
        tokens: usize,
    },
    /// Work that was asked to stop.
    #[error("stopped before it was done; nothing is left behind")]
    Stopped,
    /// There is nothing to continue.
    #[error("the prompt has no tokens, and a model needs at least one to continue from")]
    EmptyPrompt,
    /// A field of the model's configuration is absent.
    #[error("config field `{field}` is missing")]
    ConfigMissing {
        /// The field, as `config.json` spells it.
        field: String,
    },
    /// A field of the model's configuration has a value that cannot be used.
    #[error("config field `{field}` is {found}, but must be {expected}")]
    ConfigValue {
        /// The field, as `config.json` spells it.
        field: String,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
}

impl ModelError {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }

    pub(crate) fn format(path: &Path, what: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), what: what.into() }
    }

    #[cfg(feature = "hub")]
    pub(crate) fn hub(name: &str, what: impl Into<String>) -> Self {
        Self::Hub { name: name.to_owned(), what: what.into() }
    }

    pub(crate) fn tensor(name: &str, what: impl Into<String>) -> Self {
        Self::Tensor { name: name.to_owned(), what: what.into() }
    }
}

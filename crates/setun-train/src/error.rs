//! Why a training run could not start, go on or be exported.
//!
//! Messages are lower case, one sentence, without a final stop, and name the file, field or source at fault.

use std::path::{Path, PathBuf};

/// Everything that can go wrong around training.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
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
        /// The file or folder that was to be written.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file's contents cannot be used.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Where in it, what was expected and what was found.
        what: String,
    },
    /// A setting of the run's TOML file has a value that cannot be used.
    #[error("setting `{field}` is {found}, but must be {expected}")]
    Setting {
        /// Table and key, as `optimizer.lr`.
        field: String,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A run's TOML file breaks TOML's rules, or has a key that is unknown, missing or of the wrong type.
    #[error("{what}")]
    Syntax {
        /// The line, what it says, and what is wrong with it.
        what: String,
    },
    /// A tokenizer could not be trained, read or applied.
    #[error("tokenizer: {what}")]
    Tokenizer {
        /// What happened.
        what: String,
    },
    /// A saved state does not belong to this run.
    #[error("cannot resume: {what}")]
    Resume {
        /// What differs, and what to do.
        what: String,
    },
    /// The loss rose and stayed high, or it or the gradient is no number.
    #[error("training diverged at step {began}: {what}; {way_out}, and a lower learning rate may help")]
    Diverged {
        /// Where it began: the first step with a high loss, or with one that is no number.
        began: u64,
        /// The step that was not taken.
        step: u64,
        /// What was seen.
        what: String,
        /// Where the last good weights are.
        way_out: String,
    },
    /// A picture could not be drawn.
    #[error("cannot draw {}: {what}", path.display())]
    Plot {
        /// The picture's file.
        path: PathBuf,
        /// What the drawing library said.
        what: String,
    },
    /// The model's definition or files are at fault.
    #[error(transparent)]
    Model(#[from] setun::error::ModelError),
}

impl TrainError {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }

    pub(crate) fn file(path: &Path, what: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn setting(
        field: impl Into<String>,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Setting { field: field.into(), found: found.to_string(), expected: expected.into() }
    }

    pub(crate) fn tokenizer(what: impl ToString) -> Self {
        Self::Tokenizer { what: what.to_string() }
    }
}

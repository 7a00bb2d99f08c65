//! Setun: read, convert and run language models whose weights are −1, 0 and +1.
//!
//! The modules follow the way of the data: a file is opened by [`format`].

pub mod error;
pub mod format;

//! Setun: read, convert and run language models whose weights are −1, 0 and +1.
//!
//! The modules follow the way of the data: a file is opened by [`format`], described by [`config`], its tensors found
//! by [`weights`]; [`tokenizer`] and [`chat`] turn text into ids; [`model`] is the forward pass over [`ops`], which
//! [`cpu`] executes with a [`kv_cache`]; [`engine`] holds a loaded model and its sequences, [`head`] gives their logits, [`sampler`] picks the next
//! token (as [`recommended`] by the model's makers or otherwise asked), [`generate`] puts them together and [`stop`] watches for strings that end a text. [`inspect`] tells what a file
//! holds, [`eval`] scores a model, [`convert`] rewrites one, [`lora`] reads what is added to one. [`hub`] fetches models and keeps them. [`error`] says why something could not be done.

mod batch;
pub mod chat;
pub mod config;
pub mod convert;
pub mod cpu;
pub mod engine;
pub mod error;
pub mod eval;
pub mod format;
pub mod generate;
pub mod head;
#[cfg(feature = "hub")]
pub mod hub;
pub mod inspect;
pub mod kv_cache;
pub mod lora;
pub mod model;
pub mod ops;
pub mod recommended;
pub mod sampler;
pub mod speculate;
pub mod stop;
pub mod tokenizer;
pub mod weights;

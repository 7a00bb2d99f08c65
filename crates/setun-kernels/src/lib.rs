//! Kernels for ternary language models: packings, exact integer products, one defined float order.
//!
//! Modules in reading order: [`matrix`] is the canonical ternary matrix, [`pack`] its codecs, [`quant`]
//! the two quantisers of BitNet b1.58; [`kernels`] chooses an instruction set; [`ternary`] multiplies,
//! [`float`], [`dense`], [`attention`] and [`delta`] are the float steps between; [`threads`] is the pool and
//! [`peak`] measures the limits of this machine. No notion of model, file or tokenizer lives here.

#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

pub mod matrix;
pub mod pack;
pub mod quant;

pub mod kernels;

pub mod ternary;

#[cfg(feature = "std")]
pub mod attention;
#[cfg(feature = "std")]
pub mod delta;
#[cfg(feature = "std")]
pub mod dense;
#[cfg(feature = "std")]
pub mod float;
#[cfg(feature = "std")]
mod lanes;
#[cfg(feature = "std")]
mod scratch;
#[cfg(feature = "std")]
pub mod shortlist;

mod buffer;
#[cfg(feature = "gemm")]
pub mod gemm;
#[cfg(feature = "std")]
pub mod peak;
pub mod threads;

#[cfg(feature = "std")]
pub use buffer::advise_huge_pages;
pub use kernels::Kernels;
pub use matrix::{MatrixError, Scales, TernaryMatrix};
pub use quant::Activations;
pub use ternary::PackedMatrix;
pub use threads::Pool;

//! Kernels for ternary language models: packings, exact integer products, one defined float order.
//!
//! Modules in reading order: [`matrix`] is the canonical ternary matrix, [`pack`] its codecs, [`quant`]
//! the two quantisers of BitNet b1.58; [`kernels`] chooses an instruction set; [`ternary`] multiplies,
//! [`float`], [`dense`] and [`attention`] are the float steps between; [`threads`] is the pool and
//! [`peak`] measures the limits of this machine. No notion of model, file or tokenizer lives here.

pub mod kernels;
pub use kernels::Kernels;

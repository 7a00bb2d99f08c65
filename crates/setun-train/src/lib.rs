//! Trains ternary language models on a CPU.
//!
//! Modules in reading order: [`params`] holds float masters and what the forward pass reads of them; [`tape`] executes
//! the one definition of the model ([`setun::model`]) and records it for the backward pass; [`loss`] is the output head with
//! cross-entropy; [`optimizer`] and [`schedule`] turn gradients into the next weights; [`checkpoint`] keeps
//! everything that the next step depends on; [`trainer`] runs the loop. What a run shows of itself: [`metrics`], with
//! [`census`] (the ternary weights) and [`work`] (the share of the machine's peak).
//!
//! The linear layers of a ternary model are BitLinear (<https://arxiv.org/abs/2402.17764>): the forward product is the exact
//! integer product of inference, on the same kernels; the backward pass is straight-through.

pub mod census;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod divergence;
pub mod engine;
pub mod error;
pub mod export;
pub mod feed;
pub mod finetune;
pub mod lines;
pub mod loss;
pub mod metrics;
pub mod optimizer;
pub mod params;
pub mod plot;
mod random;
pub mod schedule;
pub mod tape;
pub mod tensorboard;
pub mod trainer;
pub mod vocabulary;
pub mod weights;
pub mod work;

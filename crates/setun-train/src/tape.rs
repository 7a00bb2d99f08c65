//! The forward pass that remembers how to go back.
//!
//! A [`Tape`] executes the operations of [`setun::ops::Ops`] on one batch. Each of them is one function in a submodule: it
//! computes its result and records a closure that turns the gradient of the result into gradients of its inputs and
//! parameters. [`Tape::backward`] runs the closures in reverse.
//!
//! Values are counted references: what no closure keeps is free as soon as the model drops it. Gradients too: both
//! inputs of a residual addition share one buffer until somebody adds to it.
//!
//! Sums run in an order fixed by the shapes, so a step has the same bits for any number of threads (of one machine: the
//! `gemm` crate's inner loops differ between instruction sets).

mod attention;
mod documents;
mod elementwise;
mod embed;
mod linear;
mod low_rank;
mod norm;

use std::sync::Arc;

use setun::config::{Activation, RopeTable};
use setun::ops::{Attention, DeltaNet, DeltaWeights, Direction, Linear, Ops, Rotate, Routing};

use crate::engine::{CHUNK, Engine, Floats, add_assign};
use crate::params::{ParamId, Params};
use crate::weights::Weights;
use documents::Documents;

/// The gradient of every parameter, in their order.
#[derive(Debug, Clone)]
pub struct Gradients {
    list: Vec<Vec<f32>>,
}

impl Gradients {
    /// Zeros.
    pub fn new(params: &Params) -> Self {
        Self { list: params.ids().map(|id| vec![0.0; params.trained(id)]).collect() }
    }

    /// Back to zeros.
    pub fn clear(&mut self, engine: &Engine) {
        let chunks = self.list.iter_mut().flat_map(|g| g.chunks_mut(CHUNK)).collect();
        engine.pool.run_items(chunks, |_, chunk: &mut [f32]| chunk.fill(0.0));
    }

    /// Gradient of one parameter.
    pub fn get(&self, id: ParamId) -> &[f32] {
        &self.list[id.0]
    }

    pub(crate) fn get_mut(&mut self, id: ParamId) -> &mut [f32] {
        &mut self.list[id.0]
    }

    /// All of them, in the order of [`Params::iter`].
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.list.iter().map(Vec::as_slice)
    }
}

/// An activation of the batch, `[tokens, width]`.
#[derive(Debug, Clone)]
pub struct Var {
    id: usize,
    width: usize,
    value: Arc<Floats>,
}

impl Var {
    /// Its values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.value
    }

    pub(crate) fn id(&self) -> usize {
        self.id
    }

    /// Length of a row.
    pub fn width(&self) -> usize {
        self.width
    }
}

/// What the forward pass reads and does not change.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// Threads, kernels, buffers.
    pub engine: &'a Engine,
    /// Float masters.
    pub params: &'a Params,
    /// Their ternary form, for the layers that have one.
    pub weights: &'a Weights,
    /// Rotations, prepared for at least `seq_len` positions.
    pub rope: &'a RopeTable,
    /// Sequences in the batch.
    pub sequences: usize,
    /// Tokens in each; positions start at 0, and anew at every document of [`Tape::documents`].
    pub seq_len: usize,
}

type Step<'a> = Box<dyn FnOnce(&mut Tape<'a>) + 'a>;

/// One batch on its way through the model and back.
pub struct Tape<'a> {
    pub(crate) on: Setting<'a>,
    documents: Documents,
    /// `None` where nothing is recorded.
    gradients: Option<&'a mut Gradients>,
    steps: Vec<Step<'a>>,
    /// Gradient of each variable, while known.
    slots: Vec<Option<Arc<Floats>>>,
}

impl<'a> Tape<'a> {
    /// A tape whose backward pass adds to `gradients`.
    pub fn new(on: Setting<'a>, gradients: &'a mut Gradients) -> Self {
        Self {
            on,
            documents: Documents::whole(on.seq_len),
            gradients: Some(gradients),
            steps: Vec::new(),
            slots: Vec::new(),
        }
    }

    /// Only the forward pass: for evaluation.
    pub fn forward_only(on: Setting<'a>) -> Self {
        Self {
            on,
            documents: Documents::whole(on.seq_len),
            gradients: None,
            steps: Vec::new(),
            slots: Vec::new(),
        }
    }

    /// Sequences hold several documents: token `i` of the batch belongs to the one whose first token is number `starts[i]` of its
    /// sequence. Attention then stays within documents, and positions count from their starts. Empty: every sequence is one document.
    ///
    /// Panics unless there is one start per token (or none), each sequence's rise, and each is the start of the token it names. To be called
    /// before the first operation.
    pub fn documents(&mut self, starts: &[u32]) {
        assert!(starts.is_empty() || starts.len() == self.tokens(), "starts of {} tokens", self.tokens());
        self.documents = match starts {
            [] => Documents::whole(self.on.seq_len),
            _ => Documents::new(starts, self.on.seq_len),
        };
    }

    /// Tokens of the batch.
    pub fn tokens(&self) -> usize {
        self.on.sequences * self.on.seq_len
    }

    /// Whether there will be a backward pass.
    pub fn records(&self) -> bool {
        self.gradients.is_some()
    }

    /// An input from outside, such as a batch of given activations. Panics unless `values` is whole rows, one per token.
    pub fn input(&mut self, values: &[f32], width: usize) -> Var {
        assert_eq!(values.len(), self.tokens() * width, "an input of {} tokens", self.tokens());
        let value = self.on.engine.copy(values);
        self.var(value, width)
    }

    /// Runs the recorded operations backwards, from the gradients given so far.
    pub fn backward(mut self) {
        self.run_back();
    }

    /// [`Tape::backward`], then the gradients of `of`, which must be inputs: others are used up on the way. `None` where
    /// nothing depends on it.
    pub fn backward_to<const N: usize>(mut self, of: [&Var; N]) -> [Option<Vec<f32>>; N] {
        self.run_back();
        of.map(|var| self.slots[var.id].take().map(|grad| grad.to_vec()))
    }

    /// Adds `grad` to the gradient of `var`: an objective of the caller's own. Panics when it has another length.
    pub fn seed(&mut self, var: &Var, grad: &[f32]) {
        assert_eq!(grad.len(), var.value.len(), "a gradient of another length");
        let grad = self.on.engine.copy(grad);
        self.give(var.id, grad);
    }

    fn run_back(&mut self) {
        while let Some(step) = self.steps.pop() {
            step(self);
        }
    }

    pub(crate) fn var(&mut self, value: Floats, width: usize) -> Var {
        self.shared(Arc::new(value), width)
    }

    fn shared(&mut self, value: Arc<Floats>, width: usize) -> Var {
        self.slots.push(None);
        Var { id: self.slots.len() - 1, width, value }
    }

    pub(crate) fn record(&mut self, step: impl FnOnce(&mut Tape<'a>) + 'a) {
        if self.records() {
            self.steps.push(Box::new(step));
        }
    }

    /// Whether a parameter has a gradient: frozen ones have none.
    pub(crate) fn trains(&self, id: ParamId) -> bool {
        self.gradients.is_some() && !self.on.params.is_frozen(id)
    }

    pub(crate) fn param_grad(&mut self, id: ParamId) -> &mut [f32] {
        self.gradients.as_mut().expect("steps are recorded only with gradients").get_mut(id)
    }

    /// The gradient of `var`, complete and no longer needed by anybody else.
    fn take(&mut self, var: usize) -> Option<Arc<Floats>> {
        self.slots[var].take()
    }

    /// The same, to be overwritten.
    fn take_owned(&mut self, var: usize) -> Option<Floats> {
        let grad = self.take(var)?;
        Some(Arc::try_unwrap(grad).unwrap_or_else(|shared| self.on.engine.copy(&shared)))
    }

    /// Adds `grad` to the gradient of `var`.
    pub(crate) fn give(&mut self, var: usize, grad: Floats) {
        self.give_shared(var, Arc::new(grad));
    }

    fn give_shared(&mut self, var: usize, grad: Arc<Floats>) {
        let Some(mut sum) = self.take_owned(var) else {
            self.slots[var] = Some(grad);
            return;
        };
        self.on.engine.pool.run_chunks_mut(&mut sum, CHUNK, |i, sum| {
            add_assign(sum, &grad[i * CHUNK..]);
        });
        self.slots[var] = Some(Arc::new(sum));
    }
}

impl<'a> Ops for Tape<'a> {
    type Buf = Var;
    type Matrix = ParamId;
    type Vector = ParamId;

    fn embed(&mut self, table: &ParamId, ids: &[u32]) -> Var {
        self.embed_rows(*table, ids)
    }

    fn rms_norm(&mut self, x: &Var, weight: &ParamId, eps: f32) -> Var {
        self.norm_rows(x, *weight, eps)
    }

    fn linear<const N: usize>(&mut self, x: &Var, layers: [&Linear<ParamId, ParamId>; N]) -> [Var; N] {
        let out = self.linear_group(x, layers.map(|layer| (layer.matrix, layer.bias)));
        let mut adapters = layers.into_iter().map(|layer| &layer.adapter);
        out.map(|y| match adapters.next() {
            Some(Some(adapter)) => self.adapt(x, y, adapter),
            _ => y,
        })
    }

    fn rotate(&mut self, x: &Var, by: &Rotate, direction: Direction) -> Var {
        self.turn(x, by, direction)
    }

    fn rope(&mut self, x: Var, heads: usize, head_dim: usize) -> Var {
        self.rotate(x, heads, head_dim)
    }

    fn attention(&mut self, q: Var, k: Var, v: Var, shape: Attention) -> Var {
        self.attend(q, k, v, shape)
    }

    // `params::load` makes no parameters for the models that call these three.
    fn split(&mut self, _: Var, _: usize) -> [Var; 2] {
        unreachable!("gated attention has no parameters to train")
    }

    fn delta_net(&mut self, _: Var, _: Var, _: Var, _: DeltaWeights<ParamId>, _: DeltaNet) -> Var {
        unreachable!("gated DeltaNets have no parameters to train")
    }

    fn sigmoid_gate(&mut self, _: Var, _: Var) -> Var {
        unreachable!("gated attention has no parameters to train")
    }

    fn gate(&mut self, gate: Var, up: Var, activation: Activation) -> Var {
        self.gate_rows(gate, up, activation)
    }

    fn mixture(&mut self, _: Var, _: Var, _: Routing, _: impl FnMut(&mut Self, usize, Var) -> Var) -> Var {
        unreachable!("`params::load` refuses models with experts")
    }

    fn add(&mut self, x: Var, y: Var) -> Var {
        self.residual(x, y)
    }
}

//! The forward pass, once, for every family and every executor.
//!
//! A [`Model`] is the tree of its weights; [`Model::build`] is the only place that knows which tensors a configuration asks
//! for, and [`Model::hidden`] the only place that knows in which order they are used. Both are generic: `M` and `V` are a
//! matrix and a vector as an executor holds them (see [`crate::ops`]).

mod attention;
mod delta_net;
mod experts;
mod feed_forward;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::{Direction, Linear, LowRank, Ops, Tap};

pub use attention::Attention;
pub use delta_net::DeltaNet;
pub use experts::Experts;
pub use feed_forward::{FeedForward, Gated};

/// What a matrix is for, which decides how it is stored and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The token embedding, `[vocab_size, hidden_size]`; also the output head of a tied model. Ternary in a few models.
    Embedding,
    /// A linear layer whose weights are ternary.
    Ternary,
    /// A linear layer in floating point; the output head, which is ternary in a few models.
    Float,
}

/// Where weights come from: a file, a random initialisation, a checkpoint.
pub trait Source {
    /// Matrices as the executor wants them.
    type Matrix;
    /// Vectors as the executor wants them.
    type Vector;

    /// The matrix `name` (Hugging Face spelling, ending in `.weight`), `[rows, cols]`.
    ///
    /// # Errors
    /// When it is absent, of another shape, or not decodable.
    fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        role: Role,
    ) -> Result<Self::Matrix, ModelError>;

    /// The vector `name` of `len` elements.
    ///
    /// # Errors
    /// When it is absent, of another shape, or not decodable.
    fn vector(&mut self, name: &str, len: usize) -> Result<Self::Vector, ModelError>;

    /// What is added to the linear layer `module` (`model.layers.0.mlp.up_proj`), whose matrix is `[rows, cols]`: nothing, unless
    /// the source has adapters.
    ///
    /// # Errors
    /// When it is of another shape.
    fn adapter(
        &mut self,
        _module: &str,
        _rows: usize,
        _cols: usize,
    ) -> Result<Option<LowRank<Self::Matrix>>, ModelError> {
        Ok(None)
    }
}

/// One block: tokens are mixed, then each goes through a feed-forward layer, both behind a norm and a residual.
#[derive(Debug, Clone)]
pub struct Layer<M, V> {
    /// Norm before the mixer.
    pub mixer_norm: V,
    /// What carries information from token to token.
    pub mixer: Mixer<M, V>,
    /// Norm before the feed-forward layer.
    pub mlp_norm: V,
    /// What is done with each token alone.
    pub mlp: FeedForward<M, V>,
}

/// What carries information from token to token; the configuration says which, layer by layer.
#[derive(Debug, Clone)]
pub enum Mixer<M, V> {
    /// Softmax attention over the KV cache.
    Attention(Attention<M, V>),
    /// Linear attention with a state of fixed size.
    DeltaNet(DeltaNet<M, V>),
}

impl<M, V> Mixer<M, V> {
    fn build(
        c: &ModelConfig,
        n: usize,
        layer: &str,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        Ok(match c.delta_net(n) {
            Some(shape) => Self::DeltaNet(DeltaNet::build(c, shape, layer, source)?),
            None => Self::Attention(Attention::build(c, layer, source)?),
        })
    }

    fn linears(&self) -> Vec<&Linear<M, V>> {
        match self {
            Self::Attention(attention) => attention.linears().to_vec(),
            Self::DeltaNet(net) => net.linears().to_vec(),
        }
    }
}

/// A decoder-only language model.
#[derive(Debug, Clone)]
pub struct Model<M, V> {
    /// Its shape and numerics.
    pub config: ModelConfig,
    /// Token embedding, `[vocab_size, hidden_size]`; the output head too when tied. Where it has a rotation, its rows are
    /// rotated back when they are looked up.
    pub embed: Linear<M, V>,
    /// The blocks, in order.
    pub layers: Vec<Layer<M, V>>,
    /// Final norm.
    pub norm: V,
    /// Output head, `[vocab_size, hidden_size]`; absent when tied to the embedding.
    pub head: Option<Linear<M, V>>,
}

impl<M, V> Model<M, V> {
    /// Asks `source` for every tensor that `config` implies, in the order of the forward pass.
    ///
    /// # Errors
    /// The source's first refusal.
    pub fn build(
        config: ModelConfig,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        let c = &config;
        let embed =
            source.matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size, Role::Embedding)?;
        let layers = (0..c.num_layers).map(|n| Layer::build(c, n, source)).collect::<Result<_, _>>()?;
        let norm = source.vector("model.norm.weight", c.hidden_size)?;
        let head = match c.tied {
            true => None,
            false => Some(linear(c, source, "lm_head", c.vocab_size, c.hidden_size, false)?),
        };
        let rotation = c.rotation.as_ref().map_or(Ok(None), |r| r.of_embedding(c.hidden_size))?;
        Ok(Self { embed: Linear { rotation, ..Linear::plain(embed) }, layers, norm, head, config })
    }

    /// Hidden states `[tokens, hidden_size]` after the final norm, for the batch that `ops` was told about.
    pub fn hidden<O: Ops<Matrix = M, Vector = V>>(&self, ops: &mut O, ids: &[u32]) -> O::Buf {
        let mut x = ops.embed(&self.embed.matrix, ids);
        if let Some(rotation) = &self.embed.rotation {
            let latent = x;
            x = ops.rotate(&latent, rotation, Direction::Back);
            ops.release(latent);
        }
        ops.tap(Tap::Embed, &x);
        for (n, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&self.config, n, ops, x);
            ops.tap(Tap::Layer(n), &x);
        }
        let normed = ops.rms_norm(&x, &self.norm, self.config.rms_norm_eps);
        ops.release(x);
        ops.tap(Tap::FinalNorm, &normed);
        normed
    }

    /// Logits `[rows, vocab_size]` of hidden states as [`Model::hidden`] returns them.
    pub fn logits<O: Ops<Matrix = M, Vector = V>>(&self, ops: &mut O, hidden: &O::Buf) -> O::Buf {
        let [logits] = project(&self.config, ops, hidden, [self.head.as_ref().unwrap_or(&self.embed)]);
        logits
    }
}

impl<M, V> Layer<M, V> {
    /// Its linear layers, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = &Linear<M, V>> {
        self.mixer.linears().into_iter().chain(self.mlp.linears())
    }

    fn build(
        c: &ModelConfig,
        n: usize,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        let layer = format!("model.layers.{n}");
        Ok(Self {
            mixer_norm: source.vector(&format!("{layer}.input_layernorm.weight"), c.hidden_size)?,
            mixer: Mixer::build(c, n, &layer, source)?,
            mlp_norm: source.vector(&format!("{layer}.post_attention_layernorm.weight"), c.hidden_size)?,
            mlp: FeedForward::build(c, n, &layer, source)?,
        })
    }

    fn forward<O: Ops<Matrix = M, Vector = V>>(
        &self,
        c: &ModelConfig,
        n: usize,
        ops: &mut O,
        x: O::Buf,
    ) -> O::Buf {
        let normed = ops.rms_norm(&x, &self.mixer_norm, c.rms_norm_eps);
        let mixed = match &self.mixer {
            Mixer::Attention(attention) => attention.forward(c, n, ops, normed),
            Mixer::DeltaNet(net) => net.forward(c, ops, normed),
        };
        let x = ops.add(x, mixed);
        let normed = ops.rms_norm(&x, &self.mlp_norm, c.rms_norm_eps);
        let mlp = self.mlp.forward(c, ops, normed);
        ops.add(x, mlp)
    }
}

/// The linear layer `name`, with the bias and the inner norm that `c` gives it.
fn linear<M, V>(
    c: &ModelConfig,
    source: &mut impl Source<Matrix = M, Vector = V>,
    name: &str,
    rows: usize,
    cols: usize,
    bias: bool,
) -> Result<Linear<M, V>, ModelError> {
    let ternary = c.is_ternary(name);
    let role = if ternary { Role::Ternary } else { Role::Float };
    let made = Linear {
        matrix: source.matrix(&format!("{name}.weight"), rows, cols, role)?,
        bias: optional(bias, source, &format!("{name}.bias"), rows)?,
        norm: optional(ternary && c.has_inner_norm(name), source, &format!("{name}.rms_norm.weight"), cols)?,
        rotation: c.rotation.as_ref().map_or(Ok(None), |r| r.of_linear(name, cols))?,
        adapter: source.adapter(name, rows, cols)?,
    };
    if made.adapter.is_some() && (made.norm.is_some() || made.rotation.is_some()) {
        let what = "an adapter is to change it, but its input is normed or rotated inside the layer, which adapters do not know of";
        return Err(ModelError::tensor(&format!("{name}.weight"), what));
    }
    Ok(made)
}

fn optional<M, V>(
    present: bool,
    source: &mut impl Source<Matrix = M, Vector = V>,
    name: &str,
    len: usize,
) -> Result<Option<V>, ModelError> {
    if present { source.vector(name, len).map(Some) } else { Ok(None) }
}

/// One input through several layers. Those with an inner norm each see their own normalised copy; those that are folded share
/// one rotated copy, since a rotation belongs to the input's width.
fn project<O: Ops, const N: usize>(
    c: &ModelConfig,
    ops: &mut O,
    x: &O::Buf,
    layers: [&Linear<O::Matrix, O::Vector>; N],
) -> [O::Buf; N] {
    if let Some(eps) = c.inner_norm_eps.filter(|_| layers.iter().any(|layer| layer.norm.is_some())) {
        return layers.map(|layer| {
            let normed = layer.norm.as_ref().map(|weight| ops.rms_norm(x, weight, eps));
            let [y] = project_rotated(ops, normed.as_ref().unwrap_or(x), [layer]);
            normed.into_iter().for_each(|buf| ops.release(buf));
            y
        });
    }
    project_rotated(ops, x, layers)
}

fn project_rotated<O: Ops, const N: usize>(
    ops: &mut O,
    x: &O::Buf,
    layers: [&Linear<O::Matrix, O::Vector>; N],
) -> [O::Buf; N] {
    let Some(rotation) = layers.iter().find_map(|layer| layer.rotation.as_ref()) else {
        return ops.linear(x, layers);
    };
    let rotated = ops.rotate(x, rotation, Direction::Forward);
    let out = match layers.iter().all(|layer| layer.rotation.is_some()) {
        true => ops.linear(&rotated, layers),
        // A declaration may leave some of them out.
        false => layers.map(|layer| {
            let [y] = ops.linear(if layer.rotation.is_some() { &rotated } else { x }, [layer]);
            y
        }),
    };
    ops.release(rotated);
    out
}

/// The norm that some families have here.
fn norm<O: Ops>(c: &ModelConfig, ops: &mut O, x: O::Buf, weight: Option<&O::Vector>) -> O::Buf {
    let Some(weight) = weight else { return x };
    let normed = ops.rms_norm(&x, weight, c.rms_norm_eps);
    ops.release(x);
    normed
}

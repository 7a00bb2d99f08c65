//! What the layers of a model remember of the tokens a sequence has seen.
//!
//! Attention keeps keys and values in a [`KvStore`], which takes memory as the sequence grows, up to the limit that the cache was
//! made with. A gated DeltaNet layer keeps a state of fixed size that every token overwrites: it cannot be rewound, only put back
//! to where it was copied ([`KvCache::mark`]).

use setun_kernels::attention::KvStore;

pub use setun_kernels::attention::KvType;

use crate::config::ModelConfig;
use crate::ops::DeltaNet;

/// The state of one gated DeltaNet layer, zeros before the first token.
#[derive(Debug, Clone)]
struct Recurrent {
    /// Last inputs of the convolution, `[conv_kernel - 1, channels]`, oldest first.
    tail: Vec<f32>,
    /// The matrices of its heads, as the kernels lay them out.
    memory: Vec<f32>,
}

impl Recurrent {
    fn new(shape: &DeltaNet) -> Self {
        let [tail, memory] = shape.state_len();
        Self { tail: vec![0.0; tail], memory: vec![0.0; memory] }
    }

    fn copy_from(&mut self, other: &Self) {
        self.tail.copy_from_slice(&other.tail);
        self.memory.copy_from_slice(&other.memory);
    }

    fn clear(&mut self) {
        self.tail.fill(0.0);
        self.memory.fill(0.0);
    }

    fn bytes(&self) -> usize {
        4 * (self.tail.len() + self.memory.len())
    }
}

#[derive(Debug)]
enum LayerState {
    /// Keys and values: which layer of the store.
    Attention(usize),
    DeltaNet(Recurrent),
}

/// What one sequence remembers.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerState>,
    store: KvStore,
    /// The states of the recurrent layers, in order, as they were after so many positions.
    mark: Option<(usize, Vec<Recurrent>)>,
    len: usize,
    limit: usize,
}

impl KvCache {
    /// An empty cache for `config` that will hold at most `limit` positions.
    pub fn new(config: &ModelConfig, kind: KvType, limit: usize) -> Self {
        let mut attention = 0;
        let layers = (0..config.num_layers).map(|n| match config.delta_net(n) {
            Some(shape) => LayerState::DeltaNet(Recurrent::new(&shape)),
            None => {
                attention += 1;
                LayerState::Attention(attention - 1)
            }
        });
        let layers = layers.collect();
        let store = KvStore::new(kind, attention, config.kv_heads, config.head_dim, limit);
        Self { layers, store, mark: None, len: 0, limit }
    }

    /// Positions filled.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was stored yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions it may hold at most.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Forgets everything after the first `len` positions, and returns how many are still filled: where there are recurrent
    /// states, those up to the mark if it is not beyond `len`, else none. What is missing has to be fed again.
    pub fn truncate(&mut self, len: usize) -> usize {
        if len >= self.len {
            return self.len;
        }
        let mut states = recurrent(&mut self.layers).peekable();
        if states.peek().is_none() {
            self.len = len;
            return len;
        }
        // A mark beyond `len` is of tokens that are to be replaced.
        self.mark = self.mark.take().filter(|(at, _)| *at <= len);
        match &self.mark {
            Some((at, marked)) => {
                states.zip(marked).for_each(|(state, marked)| state.copy_from(marked));
                self.len = *at;
            }
            None => {
                states.for_each(Recurrent::clear);
                self.len = 0;
            }
        }
        self.len
    }

    /// Copies the recurrent states, so that [`KvCache::truncate`] can come back to here. Keys and values need no copy.
    pub(crate) fn mark(&mut self) {
        let mut states = recurrent(&mut self.layers).peekable();
        if states.peek().is_none() {
            return;
        }
        match &mut self.mark {
            Some((at, marked)) => {
                *at = self.len;
                marked.iter_mut().zip(states).for_each(|(marked, state)| marked.copy_from(state));
            }
            None => self.mark = Some((self.len, states.map(|state| state.clone()).collect())),
        }
    }

    /// Bytes of memory that keys, values, states and their copies take now.
    pub fn bytes(&self) -> usize {
        let marked = self.mark.iter().flat_map(|(_, states)| states).map(Recurrent::bytes);
        let states = self.layers.iter().map(|layer| match layer {
            LayerState::DeltaNet(state) => state.bytes(),
            LayerState::Attention(_) => 0,
        });
        self.store.bytes() + states.chain(marked).sum::<usize>()
    }

    /// Makes room for `more` positions after the filled ones. Panics beyond the limit, which callers check.
    pub(crate) fn reserve(&mut self, more: usize) {
        self.store.reserve(self.len + more);
    }

    /// Keys and values of all layers.
    pub(crate) fn store(&mut self) -> &mut KvStore {
        &mut self.store
    }

    /// Which layer of the store is `layer` of the model.
    pub(crate) fn slot(&self, layer: usize) -> usize {
        let LayerState::Attention(slot) = self.layers[layer] else {
            unreachable!("layer {layer} has no keys and values by the configuration")
        };
        slot
    }

    /// Last inputs of the convolution and state of `layer`, a gated DeltaNet.
    pub(crate) fn recurrent(&mut self, layer: usize) -> (&mut [f32], &mut [f32]) {
        let LayerState::DeltaNet(state) = &mut self.layers[layer] else {
            unreachable!("layer {layer} has no recurrent state by the configuration")
        };
        (&mut state.tail, &mut state.memory)
    }

    /// Counts `tokens` more positions as filled.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

fn recurrent(layers: &mut [LayerState]) -> impl Iterator<Item = &mut Recurrent> {
    layers.iter_mut().filter_map(|layer| match layer {
        LayerState::DeltaNet(state) => Some(state),
        LayerState::Attention(_) => None,
    })
}

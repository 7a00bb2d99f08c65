//! What the layers of a model remember of the tokens a sequence has seen.
//!
//! Attention keeps keys and values, `[kv_heads][capacity][head_dim]`, so that it streams one head's keys. Capacity doubles as
//! the sequence grows, up to the limit that the cache was made with. A gated DeltaNet layer keeps a state of fixed size that
//! every token overwrites: it cannot be rewound, only put back to where it was copied ([`KvCache::mark`]).

use half::f16;
use setun_kernels::Kernels;
use setun_kernels::attention::KvData;

use crate::config::ModelConfig;
use crate::ops::DeltaNet;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    /// Half precision: the default for running.
    #[default]
    F16,
    /// Single precision: the default for measuring (`logits`, `eval`).
    F32,
}

impl std::str::FromStr for KvType {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f16" => Ok(Self::F16),
            "f32" => Ok(Self::F32),
            _ => Err(format!("`{s}` is not a cache type: use f16 or f32")),
        }
    }
}

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::F16 { "f16" } else { "f32" })
    }
}

#[derive(Debug, Clone)]
enum Store {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Store {
    fn view(&self) -> KvData<'_> {
        match self {
            Self::F16(values) => KvData::F16(values),
            Self::F32(values) => KvData::F32(values),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F16(values) => 2 * values.len(),
            Self::F32(values) => 4 * values.len(),
        }
    }

    fn grow(&mut self, heads: usize, old: usize, new: usize) {
        fn spread<T: Copy + Default>(values: &mut Vec<T>, heads: usize, old: usize, new: usize) {
            let mut grown = vec![T::default(); heads * new];
            for (to, from) in grown.chunks_mut(new).zip(values.chunks(old.max(1))) {
                to[..old].copy_from_slice(from);
            }
            *values = grown;
        }
        match self {
            Self::F16(values) => spread(values, heads, old, new),
            Self::F32(values) => spread(values, heads, old, new),
        }
    }

    fn put(&mut self, kernels: &Kernels, at: usize, row: &[f32]) {
        match self {
            Self::F16(values) => kernels.store_kv(row, &mut values[at..at + row.len()]),
            Self::F32(values) => values[at..at + row.len()].copy_from_slice(row),
        }
    }
}

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

#[derive(Debug, Clone)]
enum LayerState {
    /// Keys and values.
    Attention([Store; 2]),
    DeltaNet(Recurrent),
}

/// What one sequence remembers.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerState>,
    /// The states of the recurrent layers, in order, as they were after so many positions.
    mark: Option<(usize, Vec<Recurrent>)>,
    kv_heads: usize,
    head_dim: usize,
    len: usize,
    capacity: usize,
    limit: usize,
}

impl KvCache {
    /// An empty cache for `config` that will hold at most `limit` positions.
    pub fn new(config: &ModelConfig, kind: KvType, limit: usize) -> Self {
        let empty = || match kind {
            KvType::F16 => Store::F16(Vec::new()),
            KvType::F32 => Store::F32(Vec::new()),
        };
        Self {
            layers: (0..config.num_layers)
                .map(|n| match config.delta_net(n) {
                    Some(shape) => LayerState::DeltaNet(Recurrent::new(&shape)),
                    None => LayerState::Attention([empty(), empty()]),
                })
                .collect(),
            mark: None,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            len: 0,
            capacity: 0,
            limit,
        }
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
        let layers = self.layers.iter().map(|layer| match layer {
            LayerState::DeltaNet(state) => state.bytes(),
            LayerState::Attention(stores) => stores.iter().map(Store::bytes).sum(),
        });
        layers.chain(marked).sum()
    }

    /// Makes room for `more` positions after the filled ones. Panics beyond the limit, which callers check.
    pub(crate) fn reserve(&mut self, more: usize) {
        let needed = self.len + more;
        assert!(needed <= self.limit, "{needed} positions in a cache limited to {}", self.limit);
        if needed <= self.capacity {
            return;
        }
        let capacity = needed.next_power_of_two().max(256).min(self.limit);
        let (old, new) = (self.capacity * self.head_dim, capacity * self.head_dim);
        for layer in &mut self.layers {
            if let LayerState::Attention(stores) = layer {
                stores.iter_mut().for_each(|store| store.grow(self.kv_heads, old, new));
            }
        }
        self.capacity = capacity;
    }

    /// Stores one token's keys and values `[kv_heads * head_dim]` of `layer` at `position`.
    pub(crate) fn put(
        &mut self,
        kernels: &Kernels,
        layer: usize,
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        let (d, capacity) = (self.head_dim, self.capacity);
        let LayerState::Attention([key_store, value_store]) = &mut self.layers[layer] else {
            unreachable!("layer {layer} has no keys and values by the configuration")
        };
        for head in 0..self.kv_heads {
            let (at, from) = ((head * capacity + position) * d, head * d..(head + 1) * d);
            key_store.put(kernels, at, &keys[from.clone()]);
            value_store.put(kernels, at, &values[from]);
        }
    }

    /// Keys and values of `layer`, `[kv_heads][capacity][head_dim]`, and the capacity.
    pub(crate) fn layer(&self, layer: usize) -> (KvData<'_>, KvData<'_>, usize) {
        let LayerState::Attention([keys, values]) = &self.layers[layer] else {
            unreachable!("layer {layer} has no keys and values by the configuration")
        };
        (keys.view(), values.view(), self.capacity)
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

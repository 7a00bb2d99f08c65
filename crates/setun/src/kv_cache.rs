//! Keys and values of the tokens a sequence has seen, one block of memory per layer.
//!
//! Layout: `[kv_heads][capacity][head_dim]`, so that attention streams one head's keys. Capacity doubles as the
//! sequence grows, up to the limit that the cache was made with.

use half::f16;
use setun_kernels::Kernels;
use setun_kernels::attention::KvData;

use crate::config::ModelConfig;

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

/// One sequence's keys and values.
#[derive(Debug, Clone)]
pub struct KvCache {
    /// Keys and values of each layer.
    layers: Vec<[Store; 2]>,
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
            layers: (0..config.num_layers).map(|_| [empty(), empty()]).collect(),
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

    /// Forgets everything after the first `len` positions.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes of memory that the keys and values take now.
    pub fn bytes(&self) -> usize {
        let element = match self.layers.first() {
            Some([Store::F32(_), _]) => 4,
            _ => 2,
        };
        2 * self.layers.len() * self.kv_heads * self.capacity * self.head_dim * element
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
        for store in self.layers.iter_mut().flatten() {
            store.grow(self.kv_heads, old, new);
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
        let [key_store, value_store] = &mut self.layers[layer];
        for head in 0..self.kv_heads {
            let (at, from) = ((head * capacity + position) * d, head * d..(head + 1) * d);
            key_store.put(kernels, at, &keys[from.clone()]);
            value_store.put(kernels, at, &values[from]);
        }
    }

    /// Keys and values of `layer`, `[kv_heads][capacity][head_dim]`, and the capacity.
    pub(crate) fn layer(&self, layer: usize) -> (KvData<'_>, KvData<'_>, usize) {
        let [keys, values] = &self.layers[layer];
        (keys.view(), values.view(), self.capacity)
    }

    /// Counts `tokens` more positions as filled.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

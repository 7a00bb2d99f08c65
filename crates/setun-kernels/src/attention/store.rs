//! Where keys and values are kept: in the order in which attention reads them.
//!
//! Positions come in segments of [`SEGMENT`]. A segment's memory, for all layers at once, is taken when the first of its
//! positions is needed and never moves. For one layer and head it holds, one after the other:
//!
//! | section | floats | codes |
//! |---|---|---|
//! | scales of the keys | – | `[groups][positions]`, bf16 |
//! | keys | `[blocks of 64 positions][head_dim][64]` | `[blocks][pairs of dimensions][64 positions][2 dimensions]` |
//! | scales of the values | – | `[groups][positions]`, bf16 |
//! | values | `[panels of 64 dimensions][positions][64]` | `[panels][pairs of positions][64 dimensions][2 positions]` |
//!
//! So a lane is a position while scores are computed and a dimension while values are summed, and both read memory
//! forwards. The last panel is as wide as what is left, in sixteens. Two 4-bit codes share a byte, the first in its low
//! half, each 8 more than the code.

use super::softmax::{all_finite, largest};
use super::tile::Element;
use super::{BLOCK, SEGMENT};
use crate::Kernels;
use crate::buffer::Buffer;
use crate::lanes::{LANES, Lanes, chunk_at, job};
use crate::scratch::{cast, cast_mut};
use crate::threads::Pool;
use half::{bf16, f16};

/// Chunks of sixteen in a block of positions, and in a panel of dimensions.
pub(super) const WIDTH: usize = BLOCK / LANES;
/// Fewer rows than this are stored by the caller alone.
const SERIAL: usize = 16;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    /// Single precision: the default for measuring.
    F32,
    /// Half precision: the default for running.
    #[default]
    F16,
    /// 8-bit codes with a scale per position, head and 256 dimensions: 2.03 bytes per dimension of a head of 128, both sides.
    Int8,
    /// 4-bit codes with a scale per position, head and 32 dimensions: 1.13 bytes.
    Int4,
}

impl KvType {
    /// All of them, largest first.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Int8, Self::Int4];

    /// As `--kv` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

impl core::str::FromStr for KvType {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == s);
        known.ok_or_else(|| format!("`{s}` is not a cache type: use f16, int8, int4 or f32"))
    }
}

impl core::fmt::Display for KvType {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

/// The sizes from which every offset follows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub kind: KvType,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Layout {
    /// Chunks of a row of values.
    pub fn dims(&self) -> usize {
        self.head_dim.div_ceil(LANES)
    }

    /// Pairs of dimensions of a key.
    pub fn pairs(&self) -> usize {
        self.head_dim.div_ceil(2)
    }

    /// Dimensions that share a scale. Sums of a group stay within i32: 256 · 127 · 32767 < 2^31.
    pub fn group(&self) -> usize {
        if self.kind == KvType::Int4 { 32 } else { 256 }
    }

    pub fn groups(&self) -> usize {
        self.head_dim.div_ceil(self.group())
    }

    /// Bytes of the four sections of a head with `positions`, a multiple of [`BLOCK`]: each a multiple of 64 bytes.
    fn sections(&self, positions: usize) -> [usize; 4] {
        let (keys, values) = (positions * self.head_dim, positions * self.dims() * LANES);
        let (codes, scales) = (positions * 2 * self.pairs(), 2 * positions * self.groups());
        match self.kind {
            KvType::F32 => [0, 4 * keys, 0, 4 * values],
            KvType::F16 => [0, 2 * keys, 0, 2 * values],
            KvType::Int8 => [scales, codes, scales, values],
            KvType::Int4 => [scales, codes / 2, scales, values / 2],
        }
    }

    fn head_bytes(&self, positions: usize) -> usize {
        self.sections(positions).iter().sum()
    }

    /// The chunk of a pair of dimensions, or of one, of 16 keys: `part` counts the pairs, or the dimensions, of `parts`.
    pub fn key_chunk(parts: usize, part: usize, position: usize) -> usize {
        (position / BLOCK * parts + part) * WIDTH + position % BLOCK / LANES
    }

    /// The chunks of panel `panel`: its first one, and how many a row has. Rows are positions or pairs of them.
    pub fn panel(&self, panel: usize, rows: usize) -> (usize, usize) {
        (panel * WIDTH * rows, (self.dims() - panel * WIDTH).min(WIDTH))
    }
}

/// One head's part of a segment, as it lies in memory.
#[derive(Clone, Copy)]
pub(super) struct Section<'a> {
    pub positions: usize,
    pub key_scales: &'a [bf16],
    pub keys: &'a [u8],
    pub value_scales: &'a [bf16],
    pub values: &'a [u8],
}

/// Keys and values of all attention layers of one sequence.
#[derive(Debug)]
pub struct KvStore {
    layout: Layout,
    layers: usize,
    limit: usize,
    /// `[layers][kv_heads]` of heads' sections each.
    segments: Vec<Buffer>,
}

impl KvStore {
    /// An empty store for `layers` layers of `kv_heads` heads with `head_dim` elements, and at most `limit` positions.
    pub fn new(kind: KvType, layers: usize, kv_heads: usize, head_dim: usize, limit: usize) -> Self {
        Self { layout: Layout { kind, kv_heads, head_dim }, layers, limit, segments: Vec::new() }
    }

    /// How it stores them.
    pub fn kind(&self) -> KvType {
        self.layout.kind
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    /// Panics unless there is such a layer of such heads.
    pub(super) fn check(&self, layer: usize, kv_heads: usize, head_dim: usize) {
        let Layout { kv_heads: heads, head_dim: dim, .. } = self.layout;
        assert!(
            (heads, dim) == (kv_heads, head_dim) && layer < self.layers,
            "attention: the cache has another shape"
        );
    }

    /// Positions there is memory for.
    pub fn capacity(&self) -> usize {
        self.limit.min(self.segments.len() * SEGMENT)
    }

    /// Bytes of that memory.
    pub fn bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.len()).sum()
    }

    /// Positions of segment `n`, in whole blocks.
    fn positions(&self, n: usize) -> usize {
        (self.limit - n * SEGMENT).min(SEGMENT).next_multiple_of(BLOCK)
    }

    /// Makes room for `positions` in all. Panics beyond the limit.
    pub fn reserve(&mut self, positions: usize) {
        assert!(positions <= self.limit, "{positions} positions in a cache limited to {}", self.limit);
        while self.segments.len() * SEGMENT < positions {
            let heads = self.layers * self.layout.kv_heads;
            let bytes = self.layout.head_bytes(self.positions(self.segments.len()));
            self.segments.push(Buffer::zeroed(heads * bytes));
        }
    }

    /// Where a head's part of a segment lies in its memory, and the positions of the segment.
    fn part(&self, layer: usize, head: usize, segment: usize) -> (usize, usize, usize) {
        let positions = self.positions(segment);
        let bytes = self.layout.head_bytes(positions);
        ((layer * self.layout.kv_heads + head) * bytes, bytes, positions)
    }

    /// One head's part of a segment.
    ///
    /// # Safety
    /// Nobody stores into it while the result lives.
    pub(super) unsafe fn section(&self, layer: usize, head: usize, segment: usize) -> Section<'_> {
        let (at, bytes, positions) = self.part(layer, head, segment);
        let [key_scales, keys, value_scales, _] = self.layout.sections(positions);
        // SAFETY: the caller's promise.
        let memory = unsafe { self.segments[segment].part(at, bytes) };
        let (key_scales, rest) = memory.split_at(key_scales);
        let (keys, rest) = rest.split_at(keys);
        let (value_scales, values) = rest.split_at(value_scales);
        Section { positions, key_scales: cast(key_scales), keys, value_scales: cast(value_scales), values }
    }

    /// Stores what of `new` lies in one head's part of a segment.
    ///
    /// # Safety
    /// Nobody else refers to that part of that layer meanwhile.
    #[inline(always)]
    pub(super) unsafe fn put_part<S: Lanes>(
        &self,
        s: S,
        layer: usize,
        head: usize,
        segment: usize,
        new: &NewRows,
    ) {
        let start = segment * SEGMENT;
        let (from, to) = (new.first.max(start), (new.first + new.tokens).min(start + SEGMENT));
        if from >= to {
            return;
        }
        let (at, bytes, positions) = self.part(layer, head, segment);
        // SAFETY: the caller's promise.
        let memory = unsafe { self.segments[segment].part_mut(at, bytes) };
        let mut place = Place::new(self.layout, positions, memory);
        if to - from < SERIAL {
            place.prefetch(s, from - start);
        }
        let head_dim = self.layout.head_dim;
        for at in from..to {
            let row = (at - new.first) * new.width + head * head_dim;
            let (key, value) = (&new.keys[row..row + head_dim], &new.values[row..row + head_dim]);
            match self.layout.kind {
                KvType::F32 => place.put_floats::<S, f32>(s, at - start, key, value),
                KvType::F16 => place.put_floats::<S, f16>(s, at - start, key, value),
                KvType::Int8 | KvType::Int4 => place.put_codes(s, at - start, key, value),
            }
        }
    }

    /// The rows of tokens from position `first` on. Panics where lengths differ, are no whole rows, or there is no room.
    pub(super) fn rows<'a>(
        &self,
        layer: usize,
        first: usize,
        keys: &'a [f32],
        values: &'a [f32],
    ) -> NewRows<'a> {
        let width = self.layout.kv_heads * self.layout.head_dim;
        let tokens = keys.len() / width.max(1);
        assert!(
            keys.len() == tokens * width && values.len() == keys.len(),
            "put: keys or values are no rows"
        );
        assert!(first + tokens <= self.capacity() && layer < self.layers, "put: no room for the positions");
        NewRows { keys, values, width, first, tokens }
    }

    /// Stores rows `[kv_heads * head_dim]` of keys and values of consecutive tokens from position `first` on. A position may be
    /// stored again.
    ///
    /// Codes are `rne(x / s)`, `s` the largest magnitude of the group over 127 (or 7), rounded up to bf16. Where that magnitude is below
    /// 1e-30 all is zero. A token with an element that is not finite gets NaN as its scale of keys: whatever sees it becomes NaN.
    ///
    /// Panics where lengths differ, are no whole rows, or there is no room.
    pub fn put(
        &mut self,
        kernels: &Kernels,
        layer: usize,
        first: usize,
        keys: &[f32],
        values: &[f32],
        pool: &Pool,
    ) {
        let new = self.rows(layer, first, keys, values);
        let (store, heads, start) = (&*self, self.layout.kv_heads, first / SEGMENT);
        let tasks = ((first + new.tokens).div_ceil(SEGMENT) - start) * heads;
        let task = |n: usize| {
            kernels.lanes(Put { store, layer, head: n % heads, segment: start + n / heads, new: &new })
        };
        if new.tokens < SERIAL {
            (0..tasks).for_each(task);
        } else {
            pool.run(tasks, &task);
        }
    }
}

/// Keys and values `[tokens, width]` on their way into a store.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewRows<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    width: usize,
    /// Position of the first token.
    first: usize,
    pub tokens: usize,
}

/// Where one head's rows of one segment go.
struct Place<'a> {
    layout: Layout,
    positions: usize,
    key_scales: &'a mut [bf16],
    keys: &'a mut [u8],
    value_scales: &'a mut [bf16],
    values: &'a mut [u8],
}

impl<'a> Place<'a> {
    fn new(layout: Layout, positions: usize, memory: &'a mut [u8]) -> Self {
        let [key_scales, keys, value_scales, _] = layout.sections(positions);
        let (key_scales, rest) = memory.split_at_mut(key_scales);
        let (keys, rest) = rest.split_at_mut(keys);
        let (value_scales, values) = rest.split_at_mut(value_scales);
        let (key_scales, value_scales) = (cast_mut(key_scales), cast_mut(value_scales));
        Self { layout, positions, key_scales, keys, value_scales, values }
    }

    /// Asks for the lines that a position is written to: those of its key are far apart.
    #[inline(always)]
    fn prefetch<S: Lanes>(&self, s: S, at: usize) {
        let codes = matches!(self.layout.kind, KvType::Int8 | KvType::Int4);
        let parts = if codes { self.layout.pairs() } else { self.layout.head_dim };
        let chunk = self.keys.len() / (self.positions / LANES * parts).max(1); // Bytes.
        for part in 0..parts {
            s.prefetch(self.keys.as_ptr().wrapping_add(Layout::key_chunk(parts, part, at) * chunk));
        }
        let row = self.values.len() / self.positions;
        for panel in 0..self.layout.dims().div_ceil(WIDTH) {
            let (first, width) = self.layout.panel(panel, self.positions);
            let chunk = row / self.layout.dims();
            s.prefetch(self.values.as_ptr().wrapping_add((first + at * width) * chunk));
        }
    }

    /// The index of a value's chunk, rows being positions or pairs of them.
    #[inline(always)]
    fn value_chunk(&self, rows: usize, row: usize, chunk: usize) -> usize {
        let (first, width) = self.layout.panel(chunk / WIDTH, rows);
        first + row * width + chunk % WIDTH
    }

    #[inline(always)]
    fn put_floats<S: Lanes, E: Element>(&mut self, s: S, at: usize, key: &[f32], value: &[f32]) {
        let head_dim = self.layout.head_dim;
        let mut row = [E::default(); LANES];
        for i in 0..self.layout.dims() {
            E::store(s, s.load(&chunk_at(key, i)), &mut row);
            let keys: &mut [E] = cast_mut(self.keys);
            for (d, &x) in (i * LANES..head_dim).zip(&row) {
                keys[Layout::key_chunk(head_dim, d, at) * LANES + at % LANES] = x;
            }
            E::store(s, s.load(&chunk_at(value, i)), &mut row);
            let chunk = self.value_chunk(self.positions, at, i);
            cast_mut::<u8, [E; LANES]>(self.values)[chunk] = row;
        }
    }

    #[inline(always)]
    fn put_codes<S: Lanes>(&mut self, s: S, at: usize, key: &[f32], value: &[f32]) {
        let four = self.layout.kind == KvType::Int4;
        let (group, levels) = (self.layout.group(), if four { 7.0 } else { 127.0 });
        let finite = all_finite(key) & all_finite(value);
        let set = |codes: &mut [u8], index: usize, code: i16| {
            if four {
                let (byte, shift) = (&mut codes[index / 2], 4 * (index % 2));
                *byte = *byte & !(0xF << shift) | ((code + 8) as u8) << shift;
            } else {
                codes[index] = code as u8;
            }
        };
        let mut codes = [[0i16; LANES]; 16];
        for (g, key) in key.chunks(group).enumerate() {
            let scale = quantize(s, key, levels, finite, &mut codes);
            self.key_scales[g * self.positions + at] = if finite { scale } else { bf16::NAN };
            for (d, &code) in (g * group..).zip(&codes.as_flattened()[..key.len()]) {
                let chunk = Layout::key_chunk(self.layout.pairs(), d / 2, at);
                set(self.keys, (chunk * LANES + at % LANES) * 2 + d % 2, code);
            }
        }
        for (g, value) in value.chunks(group).enumerate() {
            self.value_scales[g * self.positions + at] = quantize(s, value, levels, finite, &mut codes);
            for (d, &code) in (g * group..).zip(&codes.as_flattened()[..value.len()]) {
                let chunk = self.value_chunk(self.positions / 2, at / 2, d / LANES);
                set(self.values, (chunk * LANES + d % LANES) * 2 + at % 2, code);
            }
        }
    }
}

/// Codes and scale of one group; zeros unless it is finite and worth a scale. Elementwise, so of the same bits everywhere.
#[inline(always)]
fn quantize<S: Lanes>(s: S, x: &[f32], levels: f32, finite: bool, codes: &mut [[i16; LANES]; 16]) -> bf16 {
    let largest = largest(s, x);
    if !finite || largest < 1e-30 {
        codes.as_flattened_mut()[..x.len()].fill(0);
        return bf16::ZERO;
    }
    // Up, so that no code is beyond the levels by more than rounding.
    let bits = ((largest / levels).to_bits() + 0xFFFF) >> 16;
    let inverse = s.splat(1.0 / f32::from_bits(bits << 16));
    let (least, most) = (s.splat(-levels), s.splat(levels));
    for (i, codes) in codes.iter_mut().enumerate().take(x.len().div_ceil(LANES)) {
        let code = s.mul(s.load(&chunk_at(x, i)), inverse);
        s.store_i16(s.max(least, s.min(most, code)), codes);
    }
    bf16::from_bits(bits as u16)
}

job!(Put {
    store: &'a KvStore, layer: usize, head: usize, segment: usize, new: &'a NewRows<'a>
} -> (), |s| {
    // SAFETY: `KvStore::put` holds the store exclusively, and makes one task of every head and segment.
    unsafe { store.put_part(s, layer, head, segment, new) }
});

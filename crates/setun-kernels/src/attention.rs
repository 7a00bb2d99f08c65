//! Causal attention over a key–value cache, without ever holding a tokens × tokens matrix.
//!
//! Positions are visited in segments of [`SEGMENT`], counted from position 0. Of each segment a query keeps the largest score, the
//! sum of `e^(score - largest)` and the values weighted so; these are put together in order, each time relative to the larger
//! maximum: the online softmax of Milakov and Gimelshein (<https://arxiv.org/abs/1805.02867>) as used by FlashAttention
//! (<https://arxiv.org/abs/2205.14135>), with segments as its blocks. What a query computes depends on its own position and
//! the cache only, so its bits depend neither on how a prompt was cut into pieces, nor on other queries, nor on which threads
//! took which segments (long contexts of few tokens are shared out so: flash decoding).
//!
//! Queries of all heads that share a key–value head, and of some neighbouring tokens, form one task: what they read is read
//! once for all of them. Floats are multiplied by chains of fused multiply-adds; codes (int8, int4) by exact integer
//! products with queries and weights rounded to 16 bits. docs/numerics.md has the formulas.

use crate::Kernels;
use crate::scratch::{Parts, cast_mut, with_scratch};
use crate::threads::Pool;
use segment::{Finish, Task};
use std::sync::atomic::{AtomicUsize, Ordering};

mod segment;
mod softmax;
mod store;
mod tile;

use store::NewRows;
pub use store::{KvStore, KvType};

/// Positions per segment of the online softmax. Part of the definition: another size gives other bits.
pub const SEGMENT: usize = 256;
/// Positions of which keys lie together.
const BLOCK: usize = 64;
/// Rows that a task aims at: enough to repay the conversion of a segment, few enough for the L2 cache.
const ROWS: usize = 192;
/// With fewer tasks per thread than this, segments become tasks of their own.
const TASKS_PER_THREAD: usize = 4;

/// What attention needs to know about a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`; head `h` reads key–value head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Sliding window `w`: position `i` sees `i - w < j <= i`. At least 1.
    pub window: Option<usize>,
}

/// The new tokens of one sequence.
#[derive(Debug)]
pub struct Queries<'a> {
    /// `[tokens, heads * head_dim]`, already rotated; `tokens` follows from the length.
    pub q: &'a [f32],
    /// The same shape.
    pub out: &'a mut [f32],
    /// Position of the first token.
    pub first: usize,
    /// What they see.
    pub against: Against<'a>,
}

/// Keys and values of all positions up to the last token's.
#[derive(Debug)]
pub enum Against<'a> {
    /// All stored before.
    Stored(&'a KvStore),
    /// Those of the tokens themselves are stored now. Of few tokens it is done by whoever reads them next, who has just asked memory for
    /// what lies around them.
    Storing {
        /// Holds the positions before the tokens, and has room for theirs.
        store: &'a mut KvStore,
        /// `[tokens, kv_heads * head_dim]`, rotated.
        keys: &'a [f32],
        /// The same shape.
        values: &'a [f32],
    },
}

impl Against<'_> {
    fn store(&self) -> &KvStore {
        match self {
            Self::Stored(store) => store,
            Self::Storing { store, .. } => store,
        }
    }
}

/// Some neighbouring tokens of a sequence against one key–value head.
struct Tile {
    sequence: usize,
    head: usize,
    tokens: std::ops::Range<usize>,
    segments: std::ops::Range<usize>,
    /// Where its records start, if its segments are tasks of their own; and how many of those are left.
    records: usize,
    left: AtomicUsize,
}

/// A sequence as tasks see it.
struct Input<'a> {
    q: &'a [f32],
    first: usize,
    store: &'a KvStore,
    /// What tasks store: only where every head has one tile, so that no other reads it.
    new: Option<NewRows<'a>>,
    out: Parts<'a>,
}

impl Kernels {
    /// `softmax(q Kᵀ * scale) V` of layer `layer` for every token of every sequence; position `i` sees `j <= i`, and nothing older
    /// than the window.
    ///
    /// Panics where lengths do not fit the shape, a store has another one or fewer positions, or the window is 0.
    pub fn attention(&self, shape: &AttentionShape, layer: usize, sequences: &mut [Queries], pool: &Pool) {
        let AttentionShape { heads, kv_heads, head_dim, window, .. } = *shape;
        let width = heads * head_dim;
        if width == 0 {
            return assert!(sequences.iter().all(|s| s.q.is_empty()), "attention: the shape has no heads");
        }
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "attention: heads do not share key-value heads"
        );
        assert!(window != Some(0), "attention: a window of 0 sees nothing");
        let (group, window) = (heads / kv_heads, window.unwrap_or(usize::MAX));
        for Queries { q, out, first, against } in sequences.iter() {
            let (tokens, store) = (q.len() / width, against.store());
            assert!(
                q.len() == tokens * width && out.len() == q.len(),
                "attention: q or out is not [tokens, width]"
            );
            assert!(first + tokens <= store.capacity(), "attention: positions beyond the cache");
            store.check(layer, kv_heads, head_dim);
            if let Against::Storing { keys, .. } = against {
                assert!(keys.len() == tokens * kv_heads * head_dim, "attention: keys are not of the tokens");
            }
        }
        let tokens: usize = sequences.iter().map(|s| s.q.len() / width).sum();
        // A prompt that fills less than a few tasks per thread is cut finer.
        let finer = (tokens * kv_heads).div_ceil(TASKS_PER_THREAD * pool.threads());
        let step = (ROWS / group).min(finer).max(1);
        let mut tiles = Vec::with_capacity(sequences.len() * kv_heads);
        for (sequence, Queries { q, first, .. }) in sequences.iter().enumerate() {
            let tokens = q.len() / width;
            // The last tokens see most positions: they come first, so that no thread ends alone with a long task.
            for tile in (0..tokens.div_ceil(step)).rev() {
                let tokens = tile * step..tokens.min((tile + 1) * step);
                let oldest = (first + tokens.start + 1).saturating_sub(window);
                let segments = oldest / SEGMENT..(first + tokens.end).div_ceil(SEGMENT);
                tiles.extend((0..kv_heads).map(|head| Tile {
                    sequence,
                    head,
                    tokens: tokens.clone(),
                    segments: segments.clone(),
                    records: 0,
                    left: AtomicUsize::new(segments.len()),
                }));
            }
        }
        let row = head_dim.div_ceil(crate::lanes::LANES) + 1;
        let apart =
            tiles.len() < TASKS_PER_THREAD * pool.threads() && tiles.iter().any(|t| t.segments.len() > 1);
        let inputs: Vec<_> = sequences
            .iter_mut()
            .map(|s| {
                let tokens = s.q.len() / width;
                let (store, new) = match &mut s.against {
                    Against::Stored(store) => (*store, None),
                    Against::Storing { store, keys, values } => {
                        let now = tokens > step;
                        if now {
                            store.put(self, layer, s.first, keys, values, pool);
                        }
                        let store = &**store;
                        (store, (!now).then(|| store.rows(layer, s.first, keys, values)))
                    }
                };
                Input { q: s.q, first: s.first, store, new, out: Parts::new(s.out) }
            })
            .collect();
        let at = |tile: &Tile, row: usize| {
            (tile.tokens.start + row / group) * width + (tile.head * group + row % group) * head_dim
        };
        let run = |tile: &Tile, segments: std::ops::Range<usize>, records: &mut [crate::lanes::Chunk]| {
            let Input { q, first, store, new, .. } = &inputs[tile.sequence];
            let rows = tile.tokens.len() * group;
            with_scratch(segment::scratch_chunks(store.layout(), rows), |scratch| {
                self.lanes(Task {
                    store,
                    layer,
                    head: tile.head,
                    group,
                    q: &q[at(tile, 0)..],
                    width,
                    first: first + tile.tokens.start,
                    rows,
                    scale: shape.scale,
                    window,
                    segments,
                    new: new.as_ref(),
                    records,
                    scratch,
                });
            });
        };
        let finish = |tile: &Tile, records: &mut [crate::lanes::Chunk]| {
            let rows = tile.tokens.len() * group;
            for r in 0..rows {
                // SAFETY: a tile owns its tokens' part of its heads, and is finished once.
                let out = unsafe { inputs[tile.sequence].out.get(at(tile, r), head_dim) };
                self.lanes(Finish {
                    records: &mut records[r * row..],
                    dims: row - 1,
                    apart: rows * row,
                    out,
                });
            }
        };
        if !apart {
            return pool.run(tiles.len(), &|n| {
                let tile = &tiles[n];
                with_scratch(tile.tokens.len() * group * row, |records| {
                    run(tile, tile.segments.clone(), records);
                    finish(tile, records);
                });
            });
        }
        let (mut total, mut tasks) = (0, Vec::new());
        for (n, tile) in tiles.iter_mut().enumerate() {
            tile.records = total;
            total += tile.segments.len() * tile.tokens.len() * group * row;
            tasks.extend(tile.segments.clone().map(|segment| (n, segment)));
        }
        with_scratch(total, |records| {
            let records = Parts::new(records.as_flattened_mut());
            pool.run(tasks.len(), &|n| {
                let (tile, segment) = (&tiles[tasks[n].0], tasks[n].1);
                let floats = tile.tokens.len() * group * row * crate::lanes::LANES;
                let start = tile.records * crate::lanes::LANES;
                // SAFETY: a task owns the records of its segment until it counts itself done.
                let own = unsafe { records.get(start + (segment - tile.segments.start) * floats, floats) };
                run(tile, segment..segment + 1, cast_mut(own));
                if tile.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    // SAFETY: all tasks of the tile are done, and this one was the last.
                    let all = unsafe { records.get(start, tile.segments.len() * floats) };
                    finish(tile, cast_mut(all));
                }
            });
        });
    }
}

#[cfg(test)]
mod tests;

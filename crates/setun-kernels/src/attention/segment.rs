//! The work of one task: some rows of one key–value head against some segments of the cache.
//!
//! Rows are taken in tiles of up to six. Few rows multiply what memory holds as they convert it; many have it converted once,
//! into the second-level cache. Exact conversions, so the bits are the same.

// Tiles are written by index: rows, columns and lanes then look the same on both sides of an assignment.
#![allow(clippy::needless_range_loop)]

use super::softmax::{SCORES, Total, all_finite, largest, merge, softmax};
use super::store::{KvStore, KvType, Layout, NewRows, Section, WIDTH};
use super::tile::{Element, columns, product, rows};
use super::{BLOCK, SEGMENT};
use crate::lanes::{Chunk, Job, LANES, Lanes, chunk_at};
use crate::scratch::{cast, cast_mut};
use half::f16;

/// Most rows of a tile.
const TILE: usize = 6;
/// Up to so many rows, codes and half floats are converted while they are multiplied.
const DIRECT: usize = 8;
/// Pairs of 16-bit integers in a chunk of memory.
const PAIRS: usize = 16;

/// Chunks of scratch memory that a task takes: queries and their scales, a tile's scores, weights and values, a converted segment.
pub(super) fn scratch_chunks(layout: Layout, rows: usize) -> usize {
    let queries = rows * layout.dims() + rows.div_ceil(LANES);
    let tile = TILE * (SCORES + SCORES / 2 + layout.dims());
    // Values are the larger half: whole chunks of dimensions.
    queries + tile + 2 * SEGMENT * layout.dims() + 2 * TILE
}

/// Rows `first token.. ` of one key–value head: row `r` is head `r % group` of the group at token `r / group`.
pub(super) struct Task<'a> {
    pub store: &'a KvStore,
    pub layer: usize,
    /// The key–value head.
    pub head: usize,
    pub group: usize,
    /// Queries from the first token's first head of the group on; tokens are `width` apart.
    pub q: &'a [f32],
    pub width: usize,
    /// Position of the first token.
    pub first: usize,
    pub rows: usize,
    pub scale: f32,
    pub window: usize,
    pub segments: std::ops::Range<usize>,
    /// What is stored before anything is read, as far as it lies in the segments.
    pub new: Option<&'a NewRows<'a>>,
    /// `[rows, dims + 1]`: a row's weighted values, then maximum and sum. Overwritten.
    pub records: &'a mut [Chunk],
    pub scratch: &'a mut [Chunk],
}

/// One task's constants while it runs over a segment.
#[derive(Clone, Copy)]
struct Rows {
    layout: Layout,
    group: usize,
    first: usize,
    rows: usize,
    window: usize,
    /// First position of the segment.
    start: usize,
    positions: usize,
}

impl Rows {
    /// Positions of the segment that a row sees, from its start on.
    #[inline(always)]
    fn seen(&self, row: usize) -> (usize, usize) {
        let position = self.first + row / self.group;
        let within = |p: usize| p.saturating_sub(self.start).min(self.positions);
        let to = within(position + 1);
        (within((position + 1).saturating_sub(self.window)).min(to), to)
    }

    /// What any row sees.
    #[inline(always)]
    fn union(&self) -> (usize, usize) {
        (self.seen(0).0, self.seen(self.rows - 1).1)
    }
}

/// An empty record.
fn clear(record: &mut [Chunk]) {
    record.as_flattened_mut().fill(0.0);
    record[record.len() - 1][0] = f32::NEG_INFINITY;
}

impl Job for Task<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        for (segment, new) in self.segments.clone().zip(self.new.iter().cycle()) {
            // SAFETY: where something is to be stored, this is the only task of the head that has the segment, and whoever
            // made it holds the store exclusively.
            unsafe { self.store.put_part(s, self.layer, self.head, segment, new) };
        }
        for record in self.records.chunks_exact_mut(self.store.layout().dims() + 1) {
            clear(record);
        }
        match self.store.kind() {
            KvType::F32 => self.floats::<S, f32>(s),
            KvType::F16 => self.floats::<S, f16>(s),
            KvType::Int8 => self.codes::<S, 8>(s),
            KvType::Int4 => self.codes::<S, 4>(s),
        }
    }
}

impl<'a> Task<'a> {
    fn query(&self, row: usize) -> &'a [f32] {
        let head_dim = self.store.layout().head_dim;
        &self.q[row / self.group * self.width + row % self.group * head_dim..][..head_dim]
    }

    #[inline(always)]
    fn section(&self, segment: usize) -> Section<'a> {
        // SAFETY: only tasks store meanwhile, each into segments of heads that it alone has, and before it reads them.
        unsafe { self.store.section(self.layer, self.head, segment) }
    }

    /// What of a segment the rows see; nothing where it is empty.
    fn rows_of(&self, segment: usize, section: &Section) -> Option<Rows> {
        let rows = Rows {
            layout: self.store.layout(),
            group: self.group,
            first: self.first,
            rows: self.rows,
            window: self.window,
            start: segment * SEGMENT,
            positions: section.positions,
        };
        let (from, to) = rows.union();
        (from < to).then_some(rows)
    }

    #[inline(always)]
    fn floats<S: Lanes, E: Element>(mut self, s: S) {
        let layout = self.store.layout();
        let (dims, head_dim) = (layout.dims(), layout.head_dim);
        let (records, scratch) = (std::mem::take(&mut self.records), std::mem::take(&mut self.scratch));
        let (queries, scratch) = scratch.split_at_mut(self.rows * dims);
        let (scores, scratch) = scratch.split_at_mut(TILE * SCORES);
        let (values, scratch) = scratch.split_at_mut(TILE * dims);
        let (key_block, value_block) =
            scratch[..SEGMENT * (head_dim.div_ceil(LANES) + dims)].split_at_mut(SEGMENT * dims);
        let scale = s.splat(self.scale);
        for (row, query) in queries.chunks_exact_mut(dims).enumerate() {
            for (i, chunk) in query.iter_mut().enumerate() {
                s.store(s.mul(s.load(&chunk_at(self.query(row), i)), scale), chunk);
            }
        }
        let mut tile = FloatTile { rows: None, queries, scores, values, records };
        for segment in self.segments.clone() {
            let section = self.section(segment);
            let Some(rows) = self.rows_of(segment, &section) else { continue };
            tile.rows = Some(rows);
            let (keys, stored) =
                (cast::<u8, [E; LANES]>(section.keys), cast::<u8, [E; LANES]>(section.values));
            if size_of::<E>() == 4 {
                rows!(row < self.rows, R of 6 => tile.run::<S, f32, R>(s, rows, row, cast(keys), cast(stored)));
            } else if self.rows <= DIRECT {
                rows!(row < self.rows, R of 4 => tile.run::<S, E, R>(s, rows, row, keys, stored));
            } else {
                let (from, to) = rows.union();
                let blocks = from / BLOCK * head_dim * WIDTH..to.div_ceil(BLOCK) * head_dim * WIDTH;
                widen::<S, E>(s, &keys[blocks.clone()], &mut key_block[blocks]);
                for panel in 0..dims.div_ceil(WIDTH) {
                    let (first, width) = layout.panel(panel, rows.positions);
                    let seen = first + from * width..first + to * width;
                    widen::<S, E>(s, &stored[seen.clone()], &mut value_block[seen]);
                }
                let (keys, stored) = (&*key_block, &*value_block);
                rows!(row < self.rows, R of 6 => tile.run::<S, f32, R>(s, rows, row, keys, stored));
            }
        }
    }

    #[inline(always)]
    fn codes<S: Lanes, const BITS: usize>(mut self, s: S) {
        let layout = self.store.layout();
        let (dims, pairs) = (layout.dims(), layout.pairs());
        let (records, scratch) = (std::mem::take(&mut self.records), std::mem::take(&mut self.scratch));
        let row_chunks = pairs.div_ceil(PAIRS);
        let (queries, scratch) = scratch.split_at_mut(self.rows * row_chunks);
        let (scales, scratch) = scratch.split_at_mut(self.rows.div_ceil(LANES));
        let (scores, scratch) = scratch.split_at_mut(TILE * SCORES);
        let (weights, scratch) = scratch.split_at_mut(TILE * SCORES / 2);
        let (values, scratch) = scratch.split_at_mut(TILE * dims);
        let (key_block, value_block) = scratch[..SEGMENT * dims].split_at_mut(SEGMENT / 2 * dims);
        let scales = scales.as_flattened_mut();
        for (row, codes) in queries.chunks_exact_mut(row_chunks).enumerate() {
            scales[row] = quantize_query(s, self.query(row), cast_mut(codes)) * self.scale;
        }
        let queries = cast(queries);
        let mut tile = CodeTile { queries, scales, scores, weights: cast_mut(weights), values, records };
        for segment in self.segments.clone() {
            let section = self.section(segment);
            let Some(rows) = self.rows_of(segment, &section) else { continue };
            if self.rows <= DIRECT {
                rows!(row < self.rows, R of 4 => tile.run::<S, BITS, R>(s, rows, row, section));
            } else {
                let (from, to) = rows.union();
                let blocks = from / BLOCK * pairs * WIDTH..to.div_ceil(BLOCK) * pairs * WIDTH;
                widen_codes::<S, BITS>(s, section.keys, blocks, cast_mut(key_block));
                for panel in 0..dims.div_ceil(WIDTH) {
                    let (first, width) = layout.panel(panel, rows.positions / 2);
                    let seen = first + from / 2 * width..first + to.div_ceil(2) * width;
                    widen_codes::<S, BITS>(s, section.values, seen, cast_mut(value_block));
                }
                let wide = Section { keys: cast(key_block), values: cast(value_block), ..section };
                rows!(row < self.rows, R of 6 => tile.run::<S, 16, R>(s, rows, row, wide));
            }
        }
    }
}

#[inline(always)]
fn widen<S: Lanes, E: Element>(s: S, from: &[[E; LANES]], to: &mut [Chunk]) {
    for (from, to) in from.iter().zip(to) {
        s.store(E::load(s, from), to);
    }
}

#[inline(always)]
fn widen_codes<S: Lanes, const BITS: usize>(
    s: S,
    from: &[u8],
    chunks: std::ops::Range<usize>,
    to: &mut [[[i16; 2]; LANES]],
) {
    let from = from[chunks.start * 4 * BITS..].chunks_exact(4 * BITS);
    for (from, to) in from.zip(&mut to[chunks]) {
        s.widen_pairs::<BITS>(from, to);
    }
}

/// Codes `rne(q * 32767 / m)`, `m` the largest magnitude, and what a code is worth. Nothing but zeros where `m` is below 1e-30;
/// NaN where an element is not finite.
#[inline(always)]
fn quantize_query<S: Lanes>(s: S, query: &[f32], codes: &mut [[i16; LANES]]) -> f32 {
    let (finite, largest) = (all_finite(query), largest(s, query));
    codes.as_flattened_mut().fill(0);
    if !finite || largest < 1e-30 {
        return if finite { 0.0 } else { f32::NAN };
    }
    let inverse = s.splat(32767.0 / largest);
    for (i, codes) in codes.iter_mut().enumerate().take(query.len().div_ceil(LANES)) {
        s.store_i16(s.mul(s.load(&chunk_at(query, i)), inverse), codes);
    }
    largest / 32767.0
}

struct FloatTile<'a> {
    rows: Option<Rows>,
    /// `[rows, dims]`, times the scale of the scores.
    queries: &'a [Chunk],
    /// `[TILE, SCORES]`.
    scores: &'a mut [Chunk],
    /// `[TILE, dims]`: weighted values of this segment.
    values: &'a mut [Chunk],
    records: &'a mut [Chunk],
}

impl FloatTile<'_> {
    /// Rows `row..row + R` against one segment.
    #[inline(always)]
    fn run<S: Lanes, E: Element, const R: usize>(
        &mut self,
        s: S,
        rows: Rows,
        row: usize,
        keys: &[[E; LANES]],
        stored: &[[E; LANES]],
    ) {
        let Layout { head_dim, .. } = rows.layout;
        let dims = rows.layout.dims();
        let seen: [(usize, usize); R] = std::array::from_fn(|i| rows.seen(row + i));
        let (from, to) = (seen[0].0, seen[R - 1].1);
        if from >= to {
            return;
        }
        let queries: [&[f32]; R] = std::array::from_fn(|i| {
            &self.queries[(row + i) * dims..(row + i + 1) * dims].as_flattened()[..head_dim]
        });
        for block in from / BLOCK..to.div_ceil(BLOCK) {
            let mut c = from.saturating_sub(block * BLOCK) / LANES;
            let end = (to - block * BLOCK).min(BLOCK).div_ceil(LANES);
            let keys = &keys[block * head_dim * WIDTH..(block + 1) * head_dim * WIDTH];
            columns!(S, R, c < end, C => {
                let mut sums = [[s.zero(); C]; R];
                product::<S, E, R, C>(s, queries, &keys[c..], WIDTH, &mut sums);
                for i in 0..R {
                    for j in 0..C {
                        s.store(sums[i][j], &mut self.scores[i * SCORES + block * WIDTH + c + j]);
                    }
                }
            });
        }
        let chunks = from / LANES..to.div_ceil(LANES);
        let totals = softmax::<S, R>(s, self.scores, chunks.clone(), &seen);
        self.values[..R * dims].as_flattened_mut().fill(0.0);
        // What all rows see goes in tiles; a row's positions before and after alone, in their order: what a row does not see is
        // not even multiplied by zero.
        let (together, apart) = (seen[R - 1].0, seen[0].1.max(seen[R - 1].0));
        for phase in 0..3 {
            if phase == 1 {
                self.weigh::<S, E, R>(s, rows, 0, together, apart.min(to), stored);
                continue;
            }
            for (i, &(first, last)) in seen.iter().enumerate() {
                let (from, to) =
                    if phase == 0 { (first, together.min(last)) } else { (apart.max(first), last) };
                self.weigh::<S, E, 1>(s, rows, i, from, to, stored);
            }
        }
        merge::<S, R>(s, &mut self.records[row * (dims + 1)..(row + R) * (dims + 1)], &totals, self.values);
    }

    /// Adds the values of positions `from..to`, weighted, to those of rows `at..at + R` of the tile.
    #[inline(always)]
    fn weigh<S: Lanes, E: Element, const R: usize>(
        &mut self,
        s: S,
        rows: Rows,
        at: usize,
        from: usize,
        to: usize,
        stored: &[[E; LANES]],
    ) {
        if from >= to {
            return;
        }
        let dims = rows.layout.dims();
        let weights: [&[f32]; R] = std::array::from_fn(|i| {
            &self.scores[(at + i) * SCORES..(at + i + 1) * SCORES].as_flattened()[from..to]
        });
        for panel in 0..dims.div_ceil(WIDTH) {
            let (first, width) = rows.layout.panel(panel, rows.positions);
            let stored = &stored[first + from * width..first + to * width];
            let mut c = 0;
            columns!(S, R, c < width, C => {
                let mut sums = [[s.zero(); C]; R];
                for i in 0..R {
                    for j in 0..C {
                        sums[i][j] = s.load(&self.values[(at + i) * dims + panel * WIDTH + c + j]);
                    }
                }
                product::<S, E, R, C>(s, weights, &stored[c..], width, &mut sums);
                for i in 0..R {
                    for j in 0..C {
                        s.store(sums[i][j], &mut self.values[(at + i) * dims + panel * WIDTH + c + j]);
                    }
                }
            });
        }
    }
}

struct CodeTile<'a> {
    /// `[rows]` of codes in pairs, padded to chunks.
    queries: &'a [[i16; 2]],
    /// What a row's codes are worth, times the scale of the scores.
    scales: &'a [f32],
    /// `[TILE, SCORES]`.
    scores: &'a mut [Chunk],
    /// `[TILE, SEGMENT]`: the weights as codes.
    weights: &'a mut [[i16; LANES]],
    /// `[TILE, dims]`.
    values: &'a mut [Chunk],
    records: &'a mut [Chunk],
}

impl CodeTile<'_> {
    /// Rows `row..row + R` against one segment.
    #[inline(always)]
    fn run<S: Lanes, const BITS: usize, const R: usize>(
        &mut self,
        s: S,
        rows: Rows,
        row: usize,
        section: Section,
    ) {
        let layout = rows.layout;
        let (dims, pairs, positions) = (layout.dims(), layout.pairs(), rows.positions);
        let seen: [(usize, usize); R] = std::array::from_fn(|i| rows.seen(row + i));
        let (from, to) = (seen[0].0, seen[R - 1].1);
        if from >= to {
            return;
        }
        let queries: [&[[i16; 2]]; R] = std::array::from_fn(|i| {
            let len = pairs.next_multiple_of(PAIRS);
            &self.queries[(row + i) * len..][..pairs]
        });
        let key_scales: &[[half::bf16; LANES]] = cast(section.key_scales);
        let value_scales: &[[half::bf16; LANES]] = cast(section.value_scales);
        let chunk = 4 * BITS; // Bytes.
        for block in from / BLOCK..to.div_ceil(BLOCK) {
            let mut c = from.saturating_sub(block * BLOCK) / LANES;
            let end = (to - block * BLOCK).min(BLOCK).div_ceil(LANES);
            columns!(S, R, c < end, C => {
                let mut sums = [[s.zero(); C]; R];
                for g in 0..layout.groups() {
                    let group = g * layout.group() / 2..pairs.min((g + 1) * layout.group() / 2);
                    let keys = &section.keys[((block * pairs + group.start) * WIDTH + c) * chunk..];
                    let dots = s.dot_pairs::<BITS, R, C>(queries.map(|q| &q[group.clone()]), keys, WIDTH);
                    for j in 0..C {
                        let scale = s.load_bf16(&key_scales[g * positions / LANES + block * WIDTH + c + j]);
                        for i in 0..R {
                            sums[i][j] = s.fma(s.load_i32(&dots[i][j]), scale, sums[i][j]);
                        }
                    }
                }
                for i in 0..R {
                    let scale = s.splat(self.scales[row + i]);
                    for j in 0..C {
                        s.store(s.mul(sums[i][j], scale), &mut self.scores[i * SCORES + block * WIDTH + c + j]);
                    }
                }
            });
        }
        let chunks = from / LANES..to.div_ceil(LANES);
        let totals = softmax::<S, R>(s, self.scores, chunks.clone(), &seen);
        for g in 0..layout.groups() {
            let mut worth = [0.0; R];
            for i in 0..R {
                let scores = &self.scores[i * SCORES + chunks.start..i * SCORES + chunks.end];
                let scales = &value_scales[g * positions / LANES..][chunks.clone()];
                let codes = &mut self.weights[i * SCORES + chunks.start..i * SCORES + chunks.end];
                worth[i] = quantize_weights(s, scores, scales, codes);
            }
            let weights: [&[[i16; 2]]; R] = std::array::from_fn(|i| {
                let codes = &self.weights[i * SCORES..(i + 1) * SCORES];
                &cast::<_, [i16; 2]>(codes)[from / 2..to.div_ceil(2)]
            });
            let mut at = g * layout.group() / LANES;
            let end = dims.min((g + 1) * layout.group() / LANES);
            while at < end {
                let (first, width) = layout.panel(at / WIDTH, positions / 2);
                let mut c = at % WIDTH;
                let last = width.min(c + end - at);
                let stored = &section.values[(first + from / 2 * width) * chunk..];
                let base = at - c;
                columns!(S, R, c < last, C => {
                    let dots = s.dot_pairs::<BITS, R, C>(weights, &stored[c * chunk..], width);
                    for i in 0..R {
                        let worth = s.splat(worth[i]);
                        for j in 0..C {
                            let value = s.mul(s.load_i32(&dots[i][j]), worth);
                            s.store(value, &mut self.values[i * dims + base + c + j]);
                        }
                    }
                });
                at = base + last;
            }
        }
        merge::<S, R>(s, &mut self.records[row * (dims + 1)..(row + R) * (dims + 1)], &totals, self.values);
    }
}

/// Codes `rne(w * 32767 / m)` of weights `w`, each a probability times the scale of its value, `m` the largest of them; and what a
/// code is worth. Zeros where `m` is below 1e-30.
#[inline(always)]
fn quantize_weights<S: Lanes>(
    s: S,
    scores: &[Chunk],
    scales: &[[half::bf16; LANES]],
    codes: &mut [[i16; LANES]],
) -> f32 {
    let mut max = s.zero();
    for (score, scale) in scores.iter().zip(scales) {
        max = s.max(s.mul(s.load(score), s.load_bf16(scale)), max);
    }
    let max = s.fold_max(max);
    if max < 1e-30 {
        codes.as_flattened_mut().fill(0);
        return 0.0;
    }
    let inverse = s.splat(32767.0 / max);
    for ((score, scale), codes) in scores.iter().zip(scales).zip(codes) {
        s.store_i16(s.mul(s.mul(s.load(score), s.load_bf16(scale)), inverse), codes);
    }
    max / 32767.0
}

/// Puts the records of the segments of one row together, in order, and writes `values / sum`.
pub(super) struct Finish<'a> {
    /// One row's records, each `dims + 1` chunks, `apart` chunks from one to the next.
    pub records: &'a mut [Chunk],
    pub dims: usize,
    pub apart: usize,
    pub out: &'a mut [f32],
}

impl Job for Finish<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { records, dims, apart, out } = self;
        let (into, mut rest) = records.split_at_mut(dims + 1);
        while rest.len() >= apart {
            // The next record ends `apart` chunks further on.
            let (part, later) = rest.split_at_mut(apart);
            let (values, last) = part[apart - dims - 1..].split_at(dims);
            let [max, sum, ..] = last[0];
            merge::<S, 1>(s, into, &[Total { max, sum }], values);
            rest = later;
        }
        let (values, last) = into.split_at(dims);
        let inverse = s.splat(1.0 / last[0][1]);
        let (chunks, tail) = out.as_chunks_mut();
        // Adding zero makes one zero of two: signs of zeros depend on how segments were put together.
        for (chunk, value) in chunks.iter_mut().zip(values) {
            s.store(s.fma(s.load(value), inverse, s.zero()), chunk);
        }
        if !tail.is_empty() {
            let mut last = [0.0; LANES];
            s.store(s.fma(s.load(&values[dims - 1]), inverse, s.zero()), &mut last);
            tail.copy_from_slice(&last[..tail.len()]);
        }
    }
}

//! Causal attention over a key–value cache, without ever holding a tokens × tokens matrix.
//!
//! Keys are visited in blocks of [`BLOCK`] counted from position 0, with the online softmax of Milakov and
//! Gimelshein (<https://arxiv.org/abs/1805.02867>) as used by FlashAttention (<https://arxiv.org/abs/2205.14135>):
//! a query keeps its largest score so far, the sum of exponentials and the weighted values, and rescales them
//! when a block raises the maximum. Everything that a query computes depends on its own position and the
//! cache only, so its bits do not depend on how a prompt was cut into pieces, nor on other queries.
//!
//! Queries of all heads that share a key–value head, and of some neighbouring tokens, form one task: a block
//! is converted to f32 once for all of them.

// Tiles are written by index: rows, tokens and lanes then look the same on both sides of an assignment.
#![allow(clippy::needless_range_loop)]

use crate::Kernels;
use crate::float::exp_lanes;
use crate::lanes::{Chunk, Job, LANES, Lanes, One, chunk_at};
use crate::scratch::{Parts, with_scratch};
use crate::threads::Pool;
use half::f16;

/// Keys per block of the online softmax. Part of the definition: another size gives other bits.
pub const BLOCK: usize = 64;
/// Chunks of a row of scores.
const SCORES: usize = BLOCK / LANES;
/// Queries that a task aims at: enough to repay the conversion of a block, few enough for the L2 cache.
const QUERIES: usize = 64;

/// The keys or the values of one layer: `[kv_heads, capacity, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub enum KvData<'a> {
    /// Half precision: half the bytes, and what most runs use.
    F16(&'a [f16]),
    /// What a model's definition says.
    F32(&'a [f32]),
}

impl KvData<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F16(d) => d.len(),
            Self::F32(d) => d.len(),
        }
    }
}

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

impl Kernels {
    /// `softmax(q Kᵀ * scale) V` for `tokens` consecutive positions from `first_position` on; position `i` sees
    /// `j <= i`, and nothing older than the window.
    ///
    /// - `q`, `out`: `[tokens, heads * head_dim]`, queries already rotated; `tokens` follows from their length.
    /// - `keys`, `values`: one layer of the cache, in which all positions up to the last token's are filled.
    ///
    /// Panics where lengths do not fit the shape, `capacity` is less than the positions, or the window is 0.
    #[allow(clippy::too_many_arguments)]
    pub fn attention(
        &self,
        shape: &AttentionShape,
        q: &[f32],
        first_position: usize,
        keys: KvData,
        values: KvData,
        capacity: usize,
        out: &mut [f32],
        pool: &Pool,
    ) {
        let AttentionShape { heads, kv_heads, head_dim, window, .. } = *shape;
        let width = heads * head_dim;
        if width == 0 {
            return assert!(q.is_empty() && out.is_empty(), "attention: the shape has no heads");
        }
        let tokens = q.len() / width;
        assert!(
            q.len() == tokens * width && out.len() == q.len(),
            "attention: q or out is not [tokens, width]"
        );
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "attention: heads do not share key-value heads"
        );
        assert!(window != Some(0), "attention: a window of 0 sees nothing");
        assert!(first_position + tokens <= capacity, "attention: positions beyond the cache");
        let expected = kv_heads * capacity * head_dim;
        assert!(keys.len() == expected && values.len() == expected, "attention: the cache has another shape");
        let group = heads / kv_heads;
        // Tokens per task; a prompt that fills less than one task per thread is cut finer.
        let step =
            (QUERIES / group).min((tokens * kv_heads).div_ceil(2 * pool.threads())).clamp(1, tokens.max(1));
        let tiles = tokens.div_ceil(step);
        let out = Parts::new(out);
        pool.run(tiles * kv_heads, &|task| {
            // The last tokens see most keys: start with them, so that no thread ends alone with a long task.
            let tile = tiles - 1 - task / kv_heads;
            let (from, to) = (tile * step, tokens.min((tile + 1) * step));
            let head = task % kv_heads;
            let cells = head * capacity * head_dim..(head + 1) * capacity * head_dim;
            let dims = head_dim.div_ceil(LANES);
            let rows = (to - from) * group;
            // Rows in fours, so that a tile of scores never ends early.
            let padded = rows.next_multiple_of(4);
            with_scratch(2 * padded * dims + 2 * BLOCK * dims + padded * SCORES, |scratch| {
                let (queries, scratch) = scratch.split_at_mut(padded * dims);
                let (sums, scratch) = scratch.split_at_mut(padded * dims);
                let (key_block, scratch) = scratch.split_at_mut(BLOCK * dims);
                let (value_block, scores) = scratch.split_at_mut(BLOCK * dims);
                for row in 0..rows {
                    let start = (from + row / group) * width + (head * group + row % group) * head_dim;
                    let query = &q[start..start + head_dim];
                    for i in 0..dims {
                        queries[row * dims + i] = chunk_at(query, i);
                    }
                }
                queries[rows * dims..].fill([0.0; LANES]);
                sums.fill([0.0; LANES]);
                let job = Task {
                    group,
                    dims,
                    first: first_position + from,
                    rows,
                    scale: shape.scale,
                    window: window.unwrap_or(usize::MAX),
                    keys: Head::new(keys, cells.clone(), head_dim),
                    values: Head::new(values, cells.clone(), head_dim),
                    queries,
                    sums: &mut *sums,
                    key_block,
                    value_block,
                    scores,
                    running: &mut vec![Running::default(); rows],
                };
                self.lanes(job);
                for row in 0..rows {
                    let start = (from + row / group) * width + (head * group + row % group) * head_dim;
                    // SAFETY: a task owns its tokens' part of its heads.
                    let out = unsafe { out.get(start, head_dim) };
                    out.copy_from_slice(&sums[row * dims..(row + 1) * dims].as_flattened()[..head_dim]);
                }
            });
        });
    }
}

/// One head of the cache: `[capacity, head_dim]`.
#[derive(Clone, Copy)]
struct Head<'a> {
    data: KvData<'a>,
    head_dim: usize,
}

impl<'a> Head<'a> {
    fn new(data: KvData<'a>, cells: std::ops::Range<usize>, head_dim: usize) -> Self {
        let data = match data {
            KvData::F16(d) => KvData::F16(&d[cells]),
            KvData::F32(d) => KvData::F32(&d[cells]),
        };
        Self { data, head_dim }
    }

    /// Converts positions `from..to` to f32 rows of whole chunks, padded with zeros.
    #[inline(always)]
    fn unpack<S: Lanes>(self, s: S, from: usize, to: usize, block: &mut [Chunk]) {
        let dims = self.head_dim.div_ceil(LANES);
        for (position, row) in (from..to).zip(block.chunks_exact_mut(dims)) {
            let cells = position * self.head_dim..(position + 1) * self.head_dim;
            match self.data {
                KvData::F16(d) => {
                    // The cache comes from memory: the next block travels while this one is computed with.
                    let ahead = d.as_ptr().wrapping_add(cells.start + BLOCK * self.head_dim);
                    for line in 0..dims.div_ceil(2) {
                        s.prefetch(ahead.wrapping_add(32 * line));
                    }
                    let (chunks, tail) = d[cells].as_chunks();
                    for (chunk, out) in chunks.iter().zip(row.iter_mut()) {
                        s.store(s.load_f16(chunk), out);
                    }
                    if !tail.is_empty() {
                        let mut padded = [f16::ZERO; LANES];
                        padded[..tail.len()].copy_from_slice(tail);
                        s.store(s.load_f16(&padded), &mut row[dims - 1]);
                    }
                }
                KvData::F32(d) => {
                    let cells = &d[cells];
                    for (i, out) in row.iter_mut().enumerate() {
                        *out = chunk_at(cells, i);
                    }
                }
            }
        }
    }
}

/// All queries of one task against one key–value head.
struct Task<'a> {
    /// Rows per token.
    group: usize,
    /// Chunks per row of queries, keys, values and sums.
    dims: usize,
    /// Position of the first row's token.
    first: usize,
    rows: usize,
    scale: f32,
    window: usize,
    keys: Head<'a>,
    values: Head<'a>,
    /// `[rows in fours, dims]`.
    queries: &'a [Chunk],
    /// `[rows in fours, dims]`: zeros before, the result afterwards.
    sums: &'a mut [Chunk],
    key_block: &'a mut [Chunk],
    value_block: &'a mut [Chunk],
    /// `[rows in fours, SCORES]`.
    scores: &'a mut [Chunk],
    running: &'a mut [Running],
}

/// The running softmax of one row.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
    /// What the row's weighted values are multiplied by before this block's are added.
    rescale: f32,
    /// Keys of the present block that the row sees.
    from: usize,
    to: usize,
}

impl Default for Running {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0, rescale: 1.0, from: 0, to: 0 }
    }
}

impl Job for Task<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Lanes>(mut self, s: S) {
        let Self { group, dims, first, rows, window, .. } = self;
        let running = std::mem::take(&mut self.running);
        let last = first + (rows - 1) / group;
        let oldest = (first + 1).saturating_sub(window);
        for block in oldest / BLOCK..=last / BLOCK {
            let start = block * BLOCK;
            let end = (last + 1).min(start + BLOCK);
            // Positions before the window are neither converted nor looked at.
            let begin = oldest.max(start);
            self.keys.unpack(s, begin, end, &mut self.key_block[(begin - start) * dims..]);
            self.values.unpack(s, begin, end, &mut self.value_block[(begin - start) * dims..]);
            for row in 0..rows {
                let position = first + row / group;
                let from = (position + 1).saturating_sub(window).max(start);
                let to = (position + 1).min(end);
                running[row].from = from.min(to).saturating_sub(start);
                running[row].to = to.saturating_sub(start);
            }
            let mut row = 0;
            while row < rows {
                let part = &mut running[row..rows.min(row + 4)];
                let from = part.iter().map(|r| r.from).min().unwrap_or(0);
                let to = part.iter().map(|r| r.to).max().unwrap_or(0);
                if part.iter().any(|r| r.from < r.to) {
                    // A lone row (decoding without grouped heads) takes sixteen keys instead.
                    if part.len() == 1 {
                        self.scores::<S, 1, 16>(s, row, from, to);
                    } else {
                        self.scores::<S, 4, 4>(s, row, from, to);
                    }
                    for (i, running) in part.iter_mut().enumerate() {
                        self.softmax(s, row + i, running);
                    }
                    self.weigh(s, row, part);
                }
                row += 4;
            }
        }
        for row in 0..rows {
            let sum = s.splat(running[row].sum);
            for out in &mut self.sums[row * dims..(row + 1) * dims] {
                s.store(s.div(s.load(out), sum), out);
            }
        }
    }
}

impl Task<'_> {
    /// Scaled dot products of `R` rows from `row` on with keys `from..to` of the block, `K` at a time;
    /// `R * K` is 16. Keys up to the next multiple of `K` are computed as well, and overwritten later.
    #[inline(always)]
    fn scores<S: Lanes, const R: usize, const K: usize>(&mut self, s: S, row: usize, from: usize, to: usize) {
        const { assert!(R * K == LANES && (R == 1 || R == 4)) };
        let dims = self.dims;
        let queries: [&[Chunk]; R] = std::array::from_fn(|i| {
            let start = (row + i) * dims;
            &self.queries[start..start + dims]
        });
        let scale = s.splat(self.scale);
        for key in (from / K * K..to).step_by(K) {
            let keys: [&[Chunk]; K] = std::array::from_fn(|i| {
                let start = (key + i) * dims;
                &self.key_block[start..start + dims]
            });
            let mut sums = [s.zero(); LANES];
            if S::WIDE {
                for d in 0..dims {
                    let mut q = [s.zero(); R];
                    for i in 0..R {
                        q[i] = s.load(&queries[i][d]);
                    }
                    for j in 0..K {
                        let k = s.load(&keys[j][d]);
                        for i in 0..R {
                            sums[K * i + j] = s.fma(q[i], k, sums[K * i + j]);
                        }
                    }
                }
            } else {
                // Sixteen registers hold a quarter of the tile: two rows by two keys, or one row by four.
                for quarter in 0..4 {
                    let mut part = [s.zero(); 4];
                    if R == 1 {
                        for d in 0..dims {
                            let q = s.load(&queries[0][d]);
                            for j in 0..4 {
                                part[j] = s.fma(q, s.load(&keys[4 * quarter + j][d]), part[j]);
                            }
                        }
                        sums[4 * quarter..4 * quarter + 4].copy_from_slice(&part);
                    } else {
                        let (row, key) = (quarter / 2 * 2, quarter % 2 * 2);
                        for d in 0..dims {
                            let k = [s.load(&keys[key][d]), s.load(&keys[key + 1][d])];
                            for i in 0..2 {
                                let q = s.load(&queries[row + i][d]);
                                for j in 0..2 {
                                    part[2 * i + j] = s.fma(q, k[j], part[2 * i + j]);
                                }
                            }
                        }
                        for i in 0..2 {
                            let at = K * (row + i) + key;
                            sums[at..at + 2].copy_from_slice(&part[2 * i..2 * i + 2]);
                        }
                    }
                }
            }
            let mut dots = [0.0; LANES];
            s.store(s.mul(s.fold_each(&sums), scale), &mut dots);
            for i in 0..R {
                let scores = self.scores[(row + i) * SCORES..(row + i + 1) * SCORES].as_flattened_mut();
                scores[key..key + K].copy_from_slice(&dots[K * i..K * (i + 1)]);
            }
        }
    }

    /// Turns a row's scores into `e^(score - max)` and brings its maximum and sum up to date. Keys that the row
    /// does not see take part as minus infinity, which is a weight of exactly zero.
    #[inline(always)]
    fn softmax<S: Lanes>(&mut self, s: S, row: usize, running: &mut Running) {
        let scores = &mut self.scores[row * SCORES..(row + 1) * SCORES];
        scores.as_flattened_mut()[..running.from].fill(f32::NEG_INFINITY);
        scores.as_flattened_mut()[running.to..].fill(f32::NEG_INFINITY);
        if running.from >= running.to {
            running.rescale = 1.0;
            return;
        }
        let mut max = s.splat(running.max);
        for chunk in scores.iter() {
            max = s.max(s.load(chunk), max);
        }
        let new = s.fold_max(max);
        let splat = s.splat(new);
        let mut sum = s.zero();
        for chunk in scores.iter_mut() {
            let p = exp_lanes(s, s.sub(s.load(chunk), splat));
            s.store(p, chunk);
            sum = s.add(p, sum);
        }
        // The first block rescales zeros by e^-infinity = 0.
        running.rescale = exp_lanes(One, running.max - new);
        running.sum = running.sum.mul_add(running.rescale, s.fold(sum));
        running.max = new;
    }

    /// Adds this block's values to rows `row..row + part.len()`, key after key.
    #[inline(always)]
    fn weigh<S: Lanes>(&mut self, s: S, row: usize, part: &[Running]) {
        let dims = self.dims;
        for (i, running) in part.iter().enumerate() {
            let rescale = s.splat(running.rescale);
            for sum in &mut self.sums[(row + i) * dims..(row + i + 1) * dims] {
                s.store(s.mul(s.load(sum), rescale), sum);
            }
        }
        // Keys that all four rows see go in tiles; a row's keys before and after them alone, in their order.
        let from = part.iter().map(|r| r.from).max().unwrap_or(0);
        let to = part.iter().map(|r| r.to).min().unwrap_or(0);
        let together = part.len() == 4 && from < to;
        for (i, running) in part.iter().enumerate() {
            let end = if together { from } else { running.to };
            self.weigh_rows::<S, 1>(s, row + i, running.from, end);
        }
        if together {
            self.weigh_rows::<S, 4>(s, row, from, to);
            for (i, running) in part.iter().enumerate() {
                self.weigh_rows::<S, 1>(s, row + i, to, running.to);
            }
        }
    }

    #[inline(always)]
    fn weigh_rows<S: Lanes, const R: usize>(&mut self, s: S, row: usize, from: usize, to: usize) {
        if from >= to {
            return;
        }
        let mut d = 0;
        if S::WIDE && R == 1 {
            while d + 8 <= self.dims {
                self.weigh_tile::<S, R, 8>(s, row, d, from, to);
                d += 8;
            }
        }
        if S::WIDE || R == 1 {
            while d + 4 <= self.dims {
                self.weigh_tile::<S, R, 4>(s, row, d, from, to);
                d += 4;
            }
        }
        while d < self.dims {
            self.weigh_tile::<S, R, 1>(s, row, d, from, to);
            d += 1;
        }
    }

    /// `sums[row..row + R][d..d + D] += p * v` for keys `from..to`, one after the other.
    #[inline(always)]
    fn weigh_tile<S: Lanes, const R: usize, const D: usize>(
        &mut self,
        s: S,
        row: usize,
        d: usize,
        from: usize,
        to: usize,
    ) {
        let dims = self.dims;
        let mut sums = [[s.zero(); D]; R];
        for i in 0..R {
            for j in 0..D {
                sums[i][j] = s.load(&self.sums[(row + i) * dims + d + j]);
            }
        }
        let weights: [&[f32]; R] = std::array::from_fn(|i| {
            &self.scores[(row + i) * SCORES..(row + i + 1) * SCORES].as_flattened()[from..to]
        });
        let values = self.value_block[from * dims..to * dims].chunks_exact(dims);
        for (key, value) in values.enumerate() {
            let value = &value[d..d + D];
            let mut v = [s.zero(); D];
            for j in 0..D {
                v[j] = s.load(&value[j]);
            }
            for i in 0..R {
                let p = s.splat(weights[i][key]);
                for j in 0..D {
                    sums[i][j] = s.fma(p, v[j], sums[i][j]);
                }
            }
        }
        for i in 0..R {
            for j in 0..D {
                s.store(sums[i][j], &mut self.sums[(row + i) * dims + d + j]);
            }
        }
    }
}

#[cfg(test)]
mod tests;

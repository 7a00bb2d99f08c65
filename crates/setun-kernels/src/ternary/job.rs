//! One product cut into chunks, and what all its chunks share.

use alloc::vec::Vec;
use core::ops::Range;

use super::columns::Span;
#[cfg(target_arch = "x86_64")]
use super::lut;
use super::{
    BlockDot, Blocks, Dot, Factor, MAX_COLUMNS, MAX_FOLDED_TOKENS, MAX_ROWS, MAX_TOKENS, PackedMatrix, Sums,
    TileKernels, scalar, tile_kernels,
};
use crate::buffer::Buffer;
#[cfg(target_arch = "x86_64")]
use crate::kernels::Isa;
use crate::kernels::Kernels;
use crate::matrix::Scales;
use crate::quant::Activations;
use crate::threads::{Pool, SharedMut};

/// Rows that the scalar kernel treats as a panel.
const SCALAR_ROWS: usize = 16;
/// Most tokens of a chunk: the rows of sums stay in the second-level cache.
const MOST_TOKENS: usize = 512;
/// Most activations of a chunk of packed weights, to stay in the second-level cache from panel to panel.
const ACTIVATIONS: usize = 512 << 10;
/// Activations that take longer to prepare than a fork.
const WORTH_A_FORK: usize = 1 << 15;

#[derive(Clone, Copy)]
pub(super) enum Out {
    F32(SharedMut<f32>),
    I32(SharedMut<i32>),
}

/// How a product goes through its matrix. Products that agree in it share what is [`Prepared`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    columns: super::columns::Columns,
    /// Whether packed weights are used as they are.
    direct: bool,
    /// Whether every block of columns has its own scale to apply.
    by_block: bool,
    /// Whether activations are copied to their positions, with gaps between blocks.
    placed: bool,
}

impl Plan {
    pub(super) fn new(matrix: &PackedMatrix, acts: &Activations, floats: bool) -> Self {
        let columns = matrix.columns;
        let by_block = floats && matches!(matrix.scales, Scales::Block { .. });
        let (direct, placed) = match tile_kernels(matrix.kernels.products) {
            None => (true, false),
            Some(k) => {
                // Blocks are cut into pieces, where a field could overflow, at whole tiles only.
                let whole = columns.unit == columns.tile || columns.block <= MAX_COLUMNS;
                let limit = match by_block {
                    false => k.direct_limit,
                    true if whole => k.block_limit,
                    true => 0,
                };
                #[cfg(target_arch = "x86_64")]
                let limit = if lut::wanted(matrix, acts) { usize::MAX } else { limit };
                (acts.tokens() <= limit, !columns.contiguous())
            }
        };
        Self { columns, direct, by_block, placed }
    }

    pub(super) fn needs_preparation(self) -> bool {
        self.by_block || self.placed
    }
}

/// Activations in the order of a plan's positions, and their sums.
pub(super) struct Prepared {
    pub(super) plan: Plan,
    /// `[tokens, stride]`; empty when the given rows will do.
    rows: Vec<i8>,
    stride: usize,
    /// Sums of the activations of each block, `[tokens, blocks]`, where blocks have their own scales: with
    /// codes `w + 1`, `Σ w·a = Σ code·a - Σ a`.
    sums: Vec<i32>,
}

impl Prepared {
    pub(super) fn new(plan: Plan, acts: &Activations, kernels: &Kernels, pool: &Pool) -> Self {
        let (tokens, columns) = (acts.tokens(), plan.columns);
        let blocks = columns.blocks();
        let stride = if plan.placed { columns.tiles() * columns.tile } else { 0 };
        let mut rows = alloc::vec![0; tokens * stride];
        let tokens_per_chunk = WORTH_A_FORK.div_ceil(columns.cols.max(1));
        if stride > 0 {
            pool.run_chunks_mut(&mut rows, stride * tokens_per_chunk, |chunk, rows| {
                for (i, row) in rows.chunks_mut(stride).enumerate() {
                    let given = acts.row(chunk * tokens_per_chunk + i);
                    for b in 0..blocks {
                        let from = columns.range(b);
                        let to = columns.start(b);
                        row[to..to + from.len()].copy_from_slice(&given[from]);
                    }
                }
            });
        }
        let mut sums = alloc::vec![0; if plan.by_block { tokens * blocks } else { 0 }];
        if !sums.is_empty() {
            pool.run_chunks_mut(&mut sums, blocks * tokens_per_chunk, |chunk, sums| {
                for (i, sums) in sums.chunks_mut(blocks).enumerate() {
                    block_sums(kernels, acts.row(chunk * tokens_per_chunk + i), columns.block, sums);
                }
            });
        }
        Self { plan, rows, stride, sums }
    }
}

/// Sums of every `block` activations.
fn block_sums(kernels: &Kernels, acts: &[i8], block: usize, sums: &mut [i32]) {
    #[inline(always)]
    fn generic(acts: &[i8], block: usize, sums: &mut [i32]) {
        for (sum, acts) in sums.iter_mut().zip(acts.chunks(block)) {
            *sum = acts.iter().map(|&a| i32::from(a)).sum();
        }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn avx2(acts: &[i8], block: usize, sums: &mut [i32]) {
        generic(acts, block, sums);
    }
    match kernels.isa {
        // SAFETY: a `Kernels` exists only when its instruction set was found; both sets include AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => unsafe { avx2(acts, block, sums) },
        _ => generic(acts, block, sums),
    }
}

/// One product, with what all its chunks need.
pub(super) struct Job<'a> {
    pub(super) matrix: &'a PackedMatrix,
    kernels: Option<&'static TileKernels>,
    pub(super) acts: &'a Activations,
    prepared: Option<&'a Prepared>,
    plan: Plan,
    pub(super) out: Out,
    /// Where most tokens are looked up, how chunks are cut instead.
    #[cfg(target_arch = "x86_64")]
    looked_up: Option<lut::Cut>,
    panels: usize,
    /// A chunk is this many tokens of one panel; chunks of the same tokens follow one another.
    chunk_tokens: usize,
    pub(super) chunks: usize,
}

impl<'a> Job<'a> {
    /// `prepared` is that of the same plan, if the plan needs it.
    pub(super) fn new(
        matrix: &'a PackedMatrix,
        acts: &'a Activations,
        plan: Plan,
        prepared: &'a [Prepared],
        out: Out,
        threads: usize,
    ) -> Self {
        let kernels = tile_kernels(matrix.kernels.products);
        let tokens = acts.tokens();
        let panels = matrix.rows.div_ceil(kernels.map_or(SCALAR_ROWS, |k| k.rows));
        // A panel is fetched, or unpacked, once for each chunk, which a few dozen tokens pay for.
        let pieces = if threads == 1 { 1 } else { (threads * 4).div_ceil(panels.max(1)) };
        let (group, most) = match kernels {
            Some(k) if plan.direct => (k.direct_tokens, ACTIVATIONS / matrix.cols().max(1)),
            Some(k) => (k.unpacked_tokens, MOST_TOKENS),
            None => (1, MOST_TOKENS),
        };
        let most = most.clamp(48, MOST_TOKENS);
        let chunk_tokens = tokens.div_ceil(pieces).clamp(48, most).next_multiple_of(group);
        let chunks = panels * tokens.div_ceil(chunk_tokens);
        #[cfg(target_arch = "x86_64")]
        let looked_up = lut::wanted(matrix, acts).then(|| lut::Cut::new(matrix, tokens, threads));
        #[cfg(target_arch = "x86_64")]
        let chunks = looked_up.as_ref().map_or(chunks, lut::Cut::chunks);
        let prepared = prepared.iter().find(|p| p.plan == plan);
        Self {
            matrix,
            kernels,
            acts,
            prepared,
            plan,
            out,
            #[cfg(target_arch = "x86_64")]
            looked_up,
            panels,
            chunk_tokens,
            chunks,
        }
    }

    /// The activations of token `t` in the order of positions.
    pub(super) fn act_row(&self, t: usize) -> &[i8] {
        match self.prepared {
            Some(p) if p.stride > 0 => &p.rows[t * p.stride..][..p.stride],
            _ => self.acts.padded_row(t),
        }
    }

    /// Whether every block of columns has its own scale to apply.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn by_block(&self) -> bool {
        self.plan.by_block
    }

    fn run_chunk(&self, chunk: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some(cut) = &self.looked_up {
            return lut::run_chunk(self, cut, chunk);
        }
        let panel = chunk % self.panels;
        let first = chunk / self.panels * self.chunk_tokens;
        let tokens = first..self.acts.tokens().min(first + self.chunk_tokens);
        match self.kernels {
            Some(k) => self.run_panel(k, panel, tokens),
            None => self.run_scalar(panel, tokens),
        }
    }

    fn run_scalar(&self, panel: usize, tokens: Range<usize>) {
        let m = self.matrix;
        let row_bytes = m.columns.cols.div_ceil(4);
        let rows = panel * SCALAR_ROWS..m.rows.min((panel + 1) * SCALAR_ROWS);
        for r in rows {
            let codes = &m.bytes[r * row_bytes..][..row_bytes];
            for t in tokens.clone() {
                let acts = self.acts.row(t);
                let at = t * m.rows + r;
                match self.out {
                    // SAFETY: element (t, r) of the output belongs to this chunk alone.
                    Out::I32(out) => unsafe {
                        *out.as_ptr().add(at) = scalar::dot(codes, acts);
                    },
                    // SAFETY: as above.
                    Out::F32(out) => unsafe {
                        let inverse = self.acts.inverse(t);
                        *out.as_ptr().add(at) = scalar::row(codes, &m.scales, r, acts, inverse);
                    },
                }
            }
        }
    }

    pub(super) fn run_panel(&self, k: &TileKernels, panel: usize, tokens: Range<usize>) {
        let m = self.matrix;
        let columns = m.columns;
        let (tiles, tile_bytes) = (columns.tiles(), k.rows * 4);
        let packed = &m.bytes[panel * tiles * tile_bytes..][..tiles * tile_bytes];
        if self.plan.direct {
            let whole = Span { first: 0, count: tiles };
            let weights = Weights {
                bytes: packed,
                step_bytes: tile_bytes,
                step_cols: columns.tile,
                dot: k.direct,
                fused: k.direct_blocks,
                spans: if self.plan.by_block { &m.spans } else { &[whole] },
            };
            let most = if self.plan.by_block { MAX_FOLDED_TOKENS } else { MAX_TOKENS };
            for group in even_groups(tokens, k.direct_tokens.min(most)) {
                // SAFETY: `packed` is `tiles` tiles, and `k` belongs to the matrix's kernel set.
                unsafe { self.run_group(k, &weights, panel, group) };
            }
        } else {
            with_scratch(k.rows * columns.tile * tiles, |bytes| {
                // SAFETY: there is room for a byte of every position of every tile.
                unsafe { (k.unpack)(packed.as_ptr(), tiles, bytes.as_mut_ptr()) };
                let whole = Span { first: 0, count: columns.positions().div_ceil(columns.unit) };
                let weights = Weights {
                    bytes,
                    step_bytes: k.rows * columns.unit,
                    step_cols: columns.unit,
                    dot: k.unpacked,
                    fused: k.unpacked_blocks,
                    spans: if self.plan.by_block { &m.spans } else { &[whole] },
                };
                for group in even_groups(tokens, k.unpacked_tokens) {
                    // SAFETY: `bytes` holds the unpacked positions; `k` as above.
                    unsafe { self.run_group(k, &weights, panel, group) };
                }
            });
        }
    }

    /// One panel for as many tokens as its kernel takes at once.
    ///
    /// # Safety
    /// `weights` holds the panel as its `dot` reads it; the CPU has the instructions of `k`.
    unsafe fn run_group(&self, k: &TileKernels, weights: &Weights, panel: usize, tokens: Range<usize>) {
        let mut rows = [core::ptr::null::<i8>(); MAX_TOKENS];
        for (row, t) in rows.iter_mut().zip(tokens.clone()) {
            *row = self.act_row(t).as_ptr();
        }
        let rows = &rows[..tokens.len()];
        self.fetch_out(k, panel, tokens.clone());
        if self.plan.by_block {
            let mut y = [[0.0; MAX_ROWS]; MAX_TOKENS];
            // SAFETY: the caller's promise.
            unsafe { self.fold_blocks(k, weights, panel, tokens.clone(), rows, &mut y) };
            for (y, t) in y.iter().zip(tokens) {
                let Out::F32(out) = self.out else { unreachable!("scales are applied for floats only") };
                let inverse = self.acts.inverse(t);
                // SAFETY: these rows of token `t` belong to this chunk alone; the caller vouches for the
                // instruction set.
                unsafe { (k.scale)(y, inverse, self.out_rows(out, k, panel, t)) };
            }
            return;
        }
        let mut sums = [[0; MAX_ROWS]; MAX_TOKENS];
        if let [span] = weights.spans {
            // SAFETY: the caller's promise.
            unsafe { weights.sum(*span, rows, &mut sums) };
        }
        for (sums, t) in sums.iter().zip(tokens) {
            let (inverse, correction) = (self.acts.inverse(t), self.acts.sum(t));
            match self.out {
                Out::I32(out) => {
                    // SAFETY: as above.
                    let out = unsafe { self.out_rows(out, k, panel, t) };
                    out.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum.wrapping_sub(correction));
                }
                Out::F32(out) => {
                    // SAFETY: as above.
                    let out = unsafe { self.out_rows(out, k, panel, t) };
                    let factor = match &self.matrix.scales {
                        Scales::Row(scales) => Factor::Row(&scales[panel * k.rows..][..out.len()], inverse),
                        scales => Factor::Tensor(scales.at(0, 0, self.acts.cols()) * inverse),
                    };
                    // SAFETY: the caller vouches for the instruction set.
                    unsafe { (k.finish)(sums, correction, factor, out) };
                }
            }
        }
    }

    /// Fetches the cache lines of the outputs, which are rows apart: while stores wait for them, those after
    /// them fill up the queue.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    fn fetch_out(&self, k: &TileKernels, panel: usize, tokens: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        for t in tokens {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let start = match self.out {
                Out::F32(out) => out.as_ptr().cast::<i8>(),
                Out::I32(out) => out.as_ptr().cast(),
            };
            for line in (0..k.rows * 4).step_by(64) {
                // SAFETY: prefetching never faults, wherever the address points.
                unsafe {
                    let at = (t * self.matrix.rows + panel * k.rows) * 4 + line;
                    _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at));
                }
            }
        }
    }

    /// The products of all scale blocks, scaled.
    ///
    /// # Safety
    /// As [`Job::run_group`].
    unsafe fn fold_blocks(
        &self,
        k: &TileKernels,
        weights: &Weights,
        panel: usize,
        tokens: Range<usize>,
        rows: &[*const i8],
        y: &mut [[f32; MAX_ROWS]; MAX_TOKENS],
    ) {
        let m = self.matrix;
        let count = m.columns.blocks();
        let scales = m.block_scales.rows(panel * count * k.rows, count * k.rows);
        let all_sums = self.prepared.map_or(&[][..], |p| &p.sums);
        let mut block_sums = [&[][..]; MAX_TOKENS];
        for (sums, t) in block_sums.iter_mut().zip(tokens) {
            *sums = &all_sums[t * count..][..count];
        }
        let block_sums = &block_sums[..rows.len()];
        if let Some(fused) = weights.fused
            && m.columns.block <= MAX_COLUMNS
        {
            let blocks = Blocks { weights: weights.bytes.as_ptr(), spans: weights.spans, scales };
            // SAFETY: spans, sums and scales are those of all blocks; the rest is the caller's promise.
            return unsafe { fused(&blocks, rows, block_sums, y) };
        }
        for (b, span) in weights.spans.iter().enumerate() {
            let mut sums = [[0; MAX_ROWS]; MAX_TOKENS];
            // SAFETY: the caller's promise.
            unsafe { weights.sum(*span, rows, &mut sums) };
            for ((y, sums), block_sums) in y.iter_mut().zip(&sums).zip(block_sums) {
                // SAFETY: the caller vouches for the instruction set.
                unsafe { (k.fold)(sums, block_sums[b], scales.rows(b * k.rows, k.rows), y) };
            }
        }
    }

    /// The outputs of a panel's rows for token `t`.
    ///
    /// # Safety
    /// `out` is the job's output, and nobody else uses this part of it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn out_rows<T>(&self, out: SharedMut<T>, k: &TileKernels, panel: usize, t: usize) -> &mut [T] {
        let (rows, first) = (self.matrix.rows, panel * k.rows);
        // SAFETY: the output holds `rows` values for each token; the rest is the caller's promise.
        unsafe {
            core::slice::from_raw_parts_mut(out.as_ptr().add(t * rows + first), k.rows.min(rows - first))
        }
    }
}

/// Weights of a panel in one of the two forms that kernels read.
struct Weights<'a> {
    bytes: &'a [u8],
    /// Bytes and columns of a tile, or of a unit of unpacked columns.
    step_bytes: usize,
    step_cols: usize,
    dot: Dot,
    fused: Option<BlockDot>,
    spans: &'a [Span],
}

impl Weights<'_> {
    /// The sums of `span`, taken in pieces that no field overflows in.
    ///
    /// # Safety
    /// The span lies within the weights, and its activations within each of `rows`; the CPU has the
    /// instructions of `dot`.
    unsafe fn sum(&self, span: Span, rows: &[*const i8], sums: &mut Sums) {
        let most = MAX_COLUMNS / self.step_cols;
        for done in (0..span.count).step_by(most) {
            let mut acts = [core::ptr::null(); MAX_TOKENS];
            for (a, row) in acts.iter_mut().zip(rows) {
                // SAFETY: the caller's promise.
                *a = unsafe { row.add((span.first + done) * self.step_cols) };
            }
            let from = self.bytes[(span.first + done) * self.step_bytes..].as_ptr();
            let dot = |to: &mut Sums| {
                // SAFETY: so many steps of weights and activations start there.
                unsafe { (self.dot)(from, most.min(span.count - done), &acts[..rows.len()], to) };
            };
            if done == 0 {
                dot(sums);
                continue;
            }
            let mut part = [[0; MAX_ROWS]; MAX_TOKENS];
            dot(&mut part);
            for (sum, part) in sums.as_flattened_mut().iter_mut().zip(part.as_flattened()) {
                *sum = sum.wrapping_add(*part);
            }
        }
    }
}

/// Cuts tokens into as few groups of at most `most` as possible, of nearly the same size.
pub(super) fn even_groups(tokens: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let groups = tokens.len().div_ceil(most);
    let at = move |g: usize| tokens.start + tokens.len() * g / groups;
    (0..groups).map(move |g| at(g)..at(g + 1))
}

/// Runs all chunks of all jobs as one piece of work.
pub(super) fn run(jobs: &[Option<Job>], pool: &Pool) {
    let total = jobs.iter().flatten().map(|job| job.chunks).sum();
    pool.run_neighbours(total, &|mut chunk| {
        for job in jobs.iter().flatten() {
            if chunk < job.chunks {
                return job.run_chunk(chunk);
            }
            chunk -= job.chunks;
        }
    });
}

/// Room for one unpacked panel, kept by each thread from one panel to the next.
#[cfg(feature = "std")]
pub(super) fn with_scratch(len: usize, f: impl FnOnce(&mut [u8])) {
    use std::cell::RefCell;
    std::thread_local! {
        static SCRATCH: RefCell<Buffer> = RefCell::new(Buffer::zeroed(0));
    }
    SCRATCH.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            *buffer = Buffer::zeroed(len);
        }
        f(&mut buffer[..len]);
    });
}

#[cfg(not(feature = "std"))]
pub(super) fn with_scratch(len: usize, f: impl FnOnce(&mut [u8])) {
    f(&mut Buffer::zeroed(len));
}

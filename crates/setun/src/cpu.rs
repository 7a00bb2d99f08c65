//! The CPU executor: packed weights, integer products, KV cache.

use setun_kernels::Kernels;
use setun_kernels::attention::{Against, AttentionShape, Queries};
use setun_kernels::delta::DeltaGates;
use setun_kernels::dense::DenseMatrix;
use setun_kernels::matrix::TernaryMatrix;
use setun_kernels::ternary::PackedMatrix;
use setun_kernels::threads::Pool;

use crate::config::{Activation, ActivationType, MAX_CONV_KERNEL};
use crate::error::ModelError;
use crate::kv_cache::KvCache;
use crate::lora::{Adapter, Update};
use crate::model::{Role, Source};
use crate::ops::{Attention, DeltaNet, DeltaWeights, Direction, Linear, LowRank, Ops, Rotate, Routing, Tap};
use crate::weights::{Weight, Weights};

mod workspace;

pub use workspace::{Buf, Workspace};

/// A matrix ready to multiply.
#[derive(Debug)]
pub enum CpuMatrix {
    /// Ternary, in the layout of one kernel; inputs are rounded to int8 per token.
    Ternary(PackedMatrix),
    /// Ternary, as canonical codes: multiplied with float inputs, or an embedding's rows.
    Codes(TernaryMatrix),
    /// A ternary embedding that is the head as well: rows from the codes, products with inputs rounded to int8.
    Tied {
        /// For looking up.
        rows: TernaryMatrix,
        /// For multiplying.
        product: PackedMatrix,
    },
    /// Floating point.
    Dense(DenseMatrix),
    /// One half of an adapter: rows in floats, multiplied in the order that all instruction sets share.
    Rows {
        /// Row-major; of an adapter's `B` the rows are its columns.
        values: Vec<f32>,
        /// Length of a row.
        cols: usize,
    },
}

impl CpuMatrix {
    /// Bytes that one multiplication reads.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Ternary(matrix) | Self::Tied { product: matrix, .. } => matrix.bytes(),
            Self::Codes(matrix) => matrix.bytes(),
            Self::Dense(matrix) => matrix.bytes(),
            Self::Rows { values, .. } => size_of_val(&values[..]),
        }
    }
}

/// Reads a checkpoint's tensors into the layouts of one kernel.
pub struct CpuSource<'a> {
    weights: Weights<'a>,
    kernels: &'static Kernels,
    pool: &'a Pool,
    activations: ActivationType,
    progress: Option<&'a mut dyn FnMut(usize)>,
    adapter: Option<&'a Adapter>,
}

impl<'a> CpuSource<'a> {
    /// A source over `weights` for `kernels`.
    pub fn new(
        weights: Weights<'a>,
        kernels: &'static Kernels,
        pool: &'a Pool,
        activations: ActivationType,
    ) -> Self {
        Self { weights, kernels, pool, activations, progress: None, adapter: None }
    }

    /// The same, with what `adapter` adds to it.
    pub fn adapted(self, adapter: Option<&'a Adapter>) -> Self {
        Self { adapter, ..self }
    }

    /// The same, telling of every matrix how many weights it had.
    pub fn telling(self, progress: &'a mut dyn FnMut(usize)) -> Self {
        Self { progress: Some(progress), ..self }
    }

    fn load(&self, name: &str, rows: usize, cols: usize, role: Role) -> Result<CpuMatrix, ModelError> {
        let matrix = match self.weights.matrix(name, rows, cols, role)? {
            Weight::Dense(matrix) => return Ok(CpuMatrix::Dense(matrix)),
            Weight::Ternary(matrix) => matrix,
        };
        let pack = |matrix: &TernaryMatrix| PackedMatrix::pack(matrix, self.kernels, self.pool);
        let tied = self.weights.config().tied;
        Ok(match (self.activations, role) {
            (ActivationType::Float, _) => CpuMatrix::Codes(matrix),
            (_, Role::Embedding) if tied => CpuMatrix::Tied { product: pack(&matrix), rows: matrix },
            (_, Role::Embedding) => CpuMatrix::Codes(matrix),
            (_, _) => CpuMatrix::Ternary(pack(&matrix)),
        })
    }
}

impl Source for CpuSource<'_> {
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<CpuMatrix, ModelError> {
        let matrix = self.load(name, rows, cols, role)?;
        if let Some(progress) = &mut self.progress {
            progress(rows * cols);
        }
        Ok(matrix)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        self.weights.vector(name, len)
    }

    fn adapter(
        &mut self,
        module: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Option<LowRank<CpuMatrix>>, ModelError> {
        let update = self.adapter.map_or(Ok(None), |adapter| adapter.update(module, rows, cols))?;
        Ok(update.map(|Update { rank, a, b, scale }| {
            // By columns: a token's product with B is then a sum of rows.
            let columns = (0..rank).flat_map(|j| (0..rows).map(move |r| b[r * rank + j])).collect();
            let a = CpuMatrix::Rows { values: a.to_vec(), cols };
            LowRank { a, b: CpuMatrix::Rows { values: columns, cols: rows }, scale }
        }))
    }
}

/// One sequence's share of a batch: its cache, and how many of the batch's rows are its new tokens.
#[derive(Debug)]
pub struct Part<'a> {
    /// What its layers remember; the pass adds the new tokens.
    pub cache: &'a mut KvCache,
    /// Rows of the batch that belong to it.
    pub tokens: usize,
    /// Length that the sequence will have when its whole prompt is read, which dynamic RoPE scaling depends on.
    pub length: usize,
}

/// Executes a model on the CPU for one batch.
pub struct CpuOps<'a, 'c> {
    kernels: &'static Kernels,
    pool: &'a Pool,
    work: &'a mut Workspace,
    parts: &'a mut [Part<'c>],
    tokens: usize,
    taps: Option<&'a mut Vec<(Tap, Vec<f32>)>>,
}

/// Work below this many floats is not worth a fork.
const SERIAL: usize = 1 << 14;

impl<'a, 'c> CpuOps<'a, 'c> {
    /// An executor for the rows of `parts`, in order. Makes room in their caches, which it panics without (limits are
    /// the caller's to check). With `taps`, block outputs are recorded there.
    pub fn new(
        kernels: &'static Kernels,
        pool: &'a Pool,
        work: &'a mut Workspace,
        parts: &'a mut [Part<'c>],
        taps: Option<&'a mut Vec<(Tap, Vec<f32>)>>,
    ) -> Self {
        for part in parts.iter_mut() {
            part.cache.reserve(part.tokens);
        }
        let tokens = parts.iter().map(|part| part.tokens).sum();
        Self { kernels, pool, work, parts, tokens, taps }
    }

    /// Counts the batch's tokens into the caches: the last step of a pass.
    pub fn finish(self) {
        for part in self.parts {
            part.cache.advance(part.tokens);
        }
    }

    fn by_rows(&self, data: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = (SERIAL / width.max(1)).max(1);
        self.pool.run_chunks_mut(data, rows * width, |chunk, part| {
            for (i, row) in part.chunks_mut(width).enumerate() {
                f(chunk * rows + i, row);
            }
        });
    }
}

impl Ops for CpuOps<'_, '_> {
    type Buf = Buf;
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;

    fn embed(&mut self, table: &CpuMatrix, ids: &[u32]) -> Buf {
        let width = match table {
            CpuMatrix::Dense(table) => table.cols(),
            CpuMatrix::Codes(rows) | CpuMatrix::Tied { rows, .. } => rows.cols(),
            CpuMatrix::Ternary(_) | CpuMatrix::Rows { .. } => {
                unreachable!("what is read as Role::Embedding keeps its rows")
            }
        };
        let mut out = self.work.buf(ids.len(), width);
        for (out, &id) in out.data.chunks_mut(width).zip(ids) {
            match table {
                CpuMatrix::Dense(table) => table.row_f32(id as usize, out),
                CpuMatrix::Codes(rows) | CpuMatrix::Tied { rows, .. } => {
                    rows.dequantize_row(id as usize, out)
                }
                CpuMatrix::Ternary(_) | CpuMatrix::Rows { .. } => {}
            }
        }
        out
    }

    fn rms_norm(&mut self, x: &Buf, weight: &Vec<f32>, eps: f32) -> Buf {
        let mut out = self.work.buf(self.rows(x), x.width);
        let (kernels, width) = (self.kernels, weight.len());
        self.fill(&mut out, width, |t, row| {
            kernels.rms_norm(&x.data[t * width..(t + 1) * width], Some(weight), eps, row);
        });
        out
    }

    fn linear<const N: usize>(&mut self, x: &Buf, layers: [&Linear<CpuMatrix, Vec<f32>>; N]) -> [Buf; N] {
        let tokens = self.rows(x);
        let rows = |matrix: &CpuMatrix| match matrix {
            CpuMatrix::Ternary(matrix) | CpuMatrix::Tied { product: matrix, .. } => matrix.rows(),
            CpuMatrix::Codes(matrix) => matrix.rows(),
            CpuMatrix::Dense(matrix) => matrix.rows(),
            CpuMatrix::Rows { .. } => unreachable!("adapters are no layers of their own"),
        };
        let mut out = layers.map(|layer| self.work.buf(tokens, rows(&layer.matrix)));
        let mut packed: Vec<&PackedMatrix> = Vec::with_capacity(N);
        let mut packed_out: Vec<&mut [f32]> = Vec::with_capacity(N);
        for (layer, out) in layers.iter().zip(&mut out) {
            match &layer.matrix {
                CpuMatrix::Ternary(matrix) | CpuMatrix::Tied { product: matrix, .. } => {
                    packed.push(matrix);
                    packed_out.push(&mut out.data);
                }
                CpuMatrix::Codes(matrix) => {
                    matrix.matmul_float(self.kernels, &x.data, tokens, &mut out.data, self.pool)
                }
                CpuMatrix::Dense(matrix) => {
                    matrix.matmul(self.kernels, &x.data, tokens, &mut out.data, self.pool)
                }
                CpuMatrix::Rows { .. } => {}
            }
        }
        if !packed.is_empty() {
            if self.work.quantized != x.contents {
                self.work.activations.quantize(self.kernels, &x.data, tokens, x.width, Some(self.pool));
                (self.work.quantized, self.work.int8) = (x.contents, true);
            }
            PackedMatrix::matmul_group(&packed, &self.work.activations, &mut packed_out, self.pool);
        }
        for (layer, out) in layers.iter().zip(&mut out) {
            if let Some(bias) = &layer.bias {
                for row in out.data.chunks_mut(out.width) {
                    self.kernels.add_assign(row, bias);
                }
            }
            if let Some(adapter) = &layer.adapter {
                self.adapt(x, out, adapter);
            }
        }
        out
    }

    fn rotate(&mut self, x: &Buf, by: &Rotate, direction: Direction) -> Buf {
        let mut out = self.work.buf(self.rows(x), x.width);
        let (kernels, width) = (self.kernels, x.width);
        self.by_rows(&mut out.data, width, |t, row| {
            row.copy_from_slice(&x.data[t * width..(t + 1) * width]);
            by.apply(kernels, row, direction);
        });
        out
    }

    fn rope(&mut self, mut x: Buf, heads: usize, head_dim: usize) -> Buf {
        let mut first = 0;
        for part in self.parts.iter() {
            let start = part.cache.len();
            self.work.rope.prepare(part.length.max(start + part.tokens));
            let (table, kernels) = (&self.work.rope, self.kernels);
            let rows = &mut x.data[first * x.width..(first + part.tokens) * x.width];
            self.by_rows(rows, x.width, |t, row| {
                let (cos, sin) = table.at(start + t);
                kernels.rope(row, heads, head_dim, cos, sin);
            });
            first += part.tokens;
        }
        x.contents = self.work.fresh();
        x
    }

    fn attention(&mut self, q: Buf, k: Buf, v: Buf, shape: Attention) -> Buf {
        let mut out = self.work.buf(self.tokens, q.width);
        let kernel_shape = AttentionShape {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            scale: shape.scale,
            window: shape.window,
        };
        // Layers of a model are those of all its caches.
        let slot = self.parts.first().map_or(0, |part| part.cache.slot(shape.layer));
        let (mut first, mut rest) = (0, &mut out.data[..]);
        let mut queries = Vec::with_capacity(self.parts.len());
        for part in self.parts.iter_mut() {
            let of = |buf: &Buf| first * buf.width..(first + part.tokens) * buf.width;
            let own;
            (own, rest) = std::mem::take(&mut rest).split_at_mut(part.tokens * q.width);
            queries.push(Queries {
                q: &q.data[of(&q)],
                out: own,
                first: part.cache.len(),
                against: Against::Storing {
                    keys: &k.data[of(&k)],
                    values: &v.data[of(&v)],
                    store: part.cache.store(),
                },
            });
            first += part.tokens;
        }
        self.kernels.attention(&kernel_shape, slot, &mut queries, self.pool);
        for buf in [q, k, v] {
            self.release(buf);
        }
        out
    }

    fn split(&mut self, x: Buf, width: usize) -> [Buf; 2] {
        let (tokens, half) = (self.rows(&x), x.width / 2);
        let mut out = [self.work.buf(tokens, half), self.work.buf(tokens, half)];
        for (i, piece) in x.data.chunks_exact(width).enumerate() {
            out[i % 2].data[i / 2 * width..][..width].copy_from_slice(piece);
        }
        self.release(x);
        out
    }

    fn delta_net(
        &mut self,
        qkv: Buf,
        alpha: Buf,
        beta: Buf,
        weights: DeltaWeights<Vec<f32>>,
        shape: DeltaNet,
    ) -> Buf {
        let (width, taps, heads) = (shape.channels(), shape.conv_kernel, shape.value_heads);
        let mut mixed = self.work.buf(self.tokens, width);
        let mut out = self.work.buf(self.tokens, shape.values());
        let (kernels, pool) = (self.kernels, self.pool);
        let mut first = 0;
        for part in self.parts.iter_mut() {
            let tokens = first..first + part.tokens;
            let of = |width: usize| tokens.start * width..tokens.end * width;
            let (tail, state) = part.cache.recurrent(shape.layer);
            let (x, mixed) = (&qkv.data[of(width)], &mut mixed.data[of(width)]);
            {
                // The inputs before this pass, then its own.
                let row = |i: usize| match i.checked_sub(taps - 1) {
                    Some(own) => &x[own * width..(own + 1) * width],
                    None => &tail[i * width..(i + 1) * width],
                };
                pool.run_chunks_mut(mixed, width, |t, out| {
                    let mut rows = [&[][..]; MAX_CONV_KERNEL];
                    rows[..taps].iter_mut().enumerate().for_each(|(i, slot)| *slot = row(t + i));
                    kernels.short_conv(&rows[..taps], weights.conv, out);
                });
            }
            // Of both together, the last inputs are what the next token's convolution sees.
            let kept = (taps - 1).saturating_sub(part.tokens) * width;
            tail.copy_within(tail.len() - kept.., 0);
            let new = tail.len() - kept;
            tail[kept..].copy_from_slice(&x[x.len() - new..]);
            let gates = DeltaGates {
                alpha: &alpha.data[of(heads)],
                beta: &beta.data[of(heads)],
                rate: weights.rate,
                dt_bias: weights.dt_bias,
            };
            kernels.delta_rule(
                &shape.kernel_shape(),
                mixed,
                &gates,
                state,
                &mut out.data[of(shape.values())],
                pool,
            );
            first = tokens.end;
        }
        for buf in [qkv, alpha, beta, mixed] {
            self.release(buf);
        }
        out
    }

    fn sigmoid_gate(&mut self, gate: Buf, x: Buf) -> Buf {
        let mut out = self.work.buf(self.rows(&x), x.width);
        let (kernels, width) = (self.kernels, x.width);
        self.by_rows(&mut out.data, width, |t, row| {
            let row_of = |buf: &Buf| t * buf.width..(t + 1) * buf.width;
            kernels.sigmoid_gate(&gate.data[row_of(&gate)], &x.data[row_of(&x)], row);
        });
        self.release(gate);
        self.release(x);
        out
    }

    fn gate(&mut self, gate: Buf, up: Buf, activation: Activation) -> Buf {
        self.gated(gate, up, activation, |_, _| ())
    }

    fn gate_normed(
        &mut self,
        gate: Buf,
        up: Buf,
        activation: Activation,
        weight: &Vec<f32>,
        eps: f32,
    ) -> Buf {
        self.gated(gate, up, activation, |kernels, row| kernels.rms_norm_assign(row, weight, eps))
    }

    fn mixture(
        &mut self,
        x: Buf,
        mut scores: Buf,
        routing: Routing,
        mut expert: impl FnMut(&mut Self, usize, Buf) -> Buf,
    ) -> Buf {
        let (kernels, width, experts, tokens) = (self.kernels, x.width, scores.width, self.rows(&x));
        let used = routing.used.min(experts);
        // For each expert its rows of the batch, with their weights; for each row the places of its results, by rising expert.
        let mut rows: Vec<Vec<(usize, f32)>> = vec![Vec::new(); experts];
        let mut picked = Vec::with_capacity(tokens * used);
        for (t, scores) in scores.data.chunks_mut(experts.max(1)).enumerate() {
            for (e, weight) in routing.pick(kernels, scores) {
                picked.push((e, rows[e].len()));
                rows[e].push((t, weight));
            }
        }
        self.release(scores);
        // One buffer for the results of all experts, one expert after another.
        let mut results = self.work.buf(picked.len(), width);
        let mut firsts = Vec::with_capacity(experts);
        let mut first = 0;
        for (e, rows) in rows.iter().enumerate() {
            firsts.push(first);
            if rows.is_empty() {
                continue;
            }
            let mut input = self.work.buf(rows.len(), width);
            self.by_rows(&mut input.data, width, |i, row| {
                row.copy_from_slice(&x.data[rows[i].0 * width..][..width]);
            });
            let result = expert(self, e, input);
            let place = &mut results.data[first * width..][..rows.len() * width];
            self.by_rows(place, width, |i, row| {
                row.copy_from_slice(&result.data[i * width..][..width]);
                kernels.scale_assign(row, rows[i].1);
            });
            self.release(result);
            first += rows.len();
        }
        let mut out = x;
        out.contents = self.work.fresh();
        self.by_rows(&mut out.data, width, |t, row| {
            row.fill(0.0);
            for &(e, i) in &picked[t * used..][..used] {
                kernels.add_assign(row, &results.data[(firsts[e] + i) * width..][..width]);
            }
        });
        self.release(results);
        out
    }

    fn add(&mut self, mut x: Buf, y: Buf) -> Buf {
        let (kernels, width) = (self.kernels, x.width);
        self.by_rows(&mut x.data, width, |t, row| {
            kernels.add_assign(row, &y.data[t * width..(t + 1) * width])
        });
        self.release(y);
        x.contents = self.work.fresh();
        x
    }

    fn tap(&mut self, name: Tap, x: &Buf) {
        if let Some(taps) = &mut self.taps {
            taps.push((name, x.data.to_vec()));
        }
    }

    fn release(&mut self, x: Buf) {
        self.work.put_back(x);
    }
}

impl CpuOps<'_, '_> {
    /// `y += scale · (x · Aᵀ) · Bᵀ`, row by row, in an order that depends on the shapes alone.
    fn adapt(&self, x: &Buf, y: &mut Buf, by: &LowRank<CpuMatrix>) {
        let (CpuMatrix::Rows { values: a, cols }, CpuMatrix::Rows { values: b, .. }) = (&by.a, &by.b) else {
            return;
        };
        let (kernels, width) = (self.kernels, y.width);
        self.by_rows(&mut y.data, width, |t, y| {
            let x = &x.data[t * cols..(t + 1) * cols];
            let mut sum = vec![0.0; width];
            for (a, b) in a.chunks_exact(*cols).zip(b.chunks_exact(width)) {
                let u = by.scale * kernels.dot(a, x);
                for (sum, b) in sum.iter_mut().zip(b) {
                    *sum += u * b;
                }
            }
            kernels.add_assign(y, &sum);
        });
    }

    /// Fills `out` row by row, `width` at a time. Whole rows are quantised as well, if that is what comes next in this model.
    fn fill(&mut self, out: &mut Buf, width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        if !self.work.int8 || width != out.width {
            return self.by_rows(&mut out.data, width, f);
        }
        let (shape, pool) = ([self.rows(out), width], Some(self.pool));
        self.work.activations.quantize_filled(self.kernels, &mut out.data, shape, pool, f);
        self.work.quantized = out.contents;
    }

    /// `then(activation(gate) * up)`.
    fn gated(
        &mut self,
        gate: Buf,
        up: Buf,
        activation: Activation,
        then: impl Fn(&Kernels, &mut [f32]) + Sync,
    ) -> Buf {
        let mut out = self.work.buf(self.rows(&gate), gate.width);
        let (kernels, width) = (self.kernels, gate.width);
        self.fill(&mut out, width, |t, row| {
            let (gate, up) = (&gate.data[t * width..(t + 1) * width], &up.data[t * width..(t + 1) * width]);
            match activation {
                Activation::Silu => kernels.silu_gate(gate, up, row),
                Activation::Relu2 => kernels.relu2_gate(gate, up, row),
            }
            then(kernels, row);
        });
        self.release(gate);
        self.release(up);
        out
    }

    fn rows(&self, x: &Buf) -> usize {
        x.data.len() / x.width.max(1)
    }

    /// A buffer with only rows `rows` of `x`: those whose logits are asked for.
    pub(crate) fn pick(&mut self, x: &Buf, rows: impl ExactSizeIterator<Item = usize>) -> Buf {
        let mut out = self.work.buf(rows.len(), x.width);
        for (out, t) in out.data.chunks_exact_mut(x.width.max(1)).zip(rows) {
            out.copy_from_slice(&x.data[t * x.width..(t + 1) * x.width]);
        }
        out
    }
}

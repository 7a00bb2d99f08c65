//! Causal attention, block by block of queries, so that no `[T, T]` matrix exists.
//!
//! Where a sequence holds several documents ([`Tape::documents`]), none sees another: blocks begin anew at each document and
//! take its keys alone, so a document costs what it would cost by itself and gets the same bits.
//!
//! The forward pass keeps the logarithm of each row's sum of exponentials; the backward pass recomputes the probabilities
//! from it (Dao et al., "FlashAttention", 2022, <https://arxiv.org/abs/2205.14135>, section 3.1). One thread takes a
//! whole sequence: its rows are contiguous, and training batches have more sequences than this machine has threads.

use std::ops::Range;

use setun::ops::Attention;
use setun_kernels::gemm::{Into, View, ViewMut, gemm};

use super::{Tape, Var};
use crate::engine::{subtract, sum2, vectorised};
use crate::loss::softmax;

/// Queries that share one product with the keys.
const QUERIES: usize = 64;

/// One sequence's matrices, and where heads lie in their rows.
#[derive(Clone, Copy)]
struct Heads {
    shape: Attention,
    seq_len: usize,
}

impl Heads {
    fn q_width(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    fn kv_width(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    /// Start of query head `h` in a row, and of the key head it reads.
    fn columns(&self, h: usize) -> (usize, usize) {
        let group = self.shape.heads / self.shape.kv_heads;
        (h * self.shape.head_dim, h / group * self.shape.head_dim)
    }

    /// Blocks of queries of one document each, with the keys that any of them sees.
    fn blocks(self, documents: &[Range<usize>]) -> impl Iterator<Item = Block> {
        documents.iter().flat_map(move |document| {
            document.clone().step_by(QUERIES).map(move |start| {
                let end = document.end.min(start + QUERIES);
                let first = self.first_seen(start, document.start);
                Block { document: document.start, queries: start..end, keys: first..end }
            })
        })
    }

    /// The keys that query `i` sees, as columns of its block.
    fn seen(&self, i: usize, block: &Block) -> Range<usize> {
        self.first_seen(i, block.document) - block.keys.start..i + 1 - block.keys.start
    }

    fn first_seen(&self, i: usize, document: usize) -> usize {
        self.shape.window.map_or(document, |w| (i + 1).saturating_sub(w).max(document))
    }

    /// `[rows, head_dim]` of one head.
    fn view<'a>(&self, data: &'a [f32], rows: Range<usize>, width: usize, column: usize) -> View<'a> {
        View::new(&data[rows.start * width + column..], rows.len(), self.shape.head_dim, width)
    }

    fn view_mut<'a>(
        &self,
        data: &'a mut [f32],
        rows: Range<usize>,
        width: usize,
        column: usize,
    ) -> ViewMut<'a> {
        ViewMut::new(&mut data[rows.start * width + column..], rows.len(), self.shape.head_dim, width)
    }
}

/// Queries of one document, and the keys that any of them sees, as rows of their sequence.
struct Block {
    /// Where the document starts.
    document: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Tape<'_> {
    /// `softmax(scale · q·kᵀ) · v` within each sequence, see [`setun::ops::Ops::attention`].
    pub(super) fn attend(&mut self, q: Var, k: Var, v: Var, shape: Attention) -> Var {
        let (on, documents) = (self.on, self.documents.clone());
        let heads = Heads { shape, seq_len: on.seq_len };
        let (q_len, kv_len) = (on.seq_len * heads.q_width(), on.seq_len * heads.kv_width());
        let mut out = on.engine.scratch(q.value.len());
        let mut lse = on.engine.scratch(self.tokens() * shape.heads);
        let items = out.chunks_mut(q_len).zip(lse.chunks_mut(on.seq_len * shape.heads)).collect();
        on.engine.pool.run_items(items, |i, (out, lse): (&mut [f32], &mut [f32])| {
            let q = &q.value[i * q_len..][..q_len];
            let (k, v) = (&k.value[i * kv_len..][..kv_len], &v.value[i * kv_len..][..kv_len]);
            let documents: Vec<_> = documents.of(i).collect();
            forward(heads, on.engine.kernels, &documents, [q, k, v], out, lse);
        });
        let out = self.var(out, heads.q_width());
        let (to, result) = (out.id, out.value.clone());
        self.record(move |tape| {
            let Some(grad) = tape.take(to) else { return };
            let engine = tape.on.engine;
            let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|var| engine.scratch(var.value.len()));
            let items = dq.chunks_mut(q_len).zip(dk.chunks_mut(kv_len)).zip(dv.chunks_mut(kv_len)).collect();
            engine.pool.run_items(items, |i, ((dq, dk), dv): ((&mut [f32], &mut [f32]), &mut [f32])| {
                let of = |x: &'_ [f32], len: usize| -> Range<usize> { i * len..(i * len + len).min(x.len()) };
                let saved = Saved {
                    q: &q.value[of(&q.value, q_len)],
                    k: &k.value[of(&k.value, kv_len)],
                    v: &v.value[of(&v.value, kv_len)],
                    out: &result[of(&result, q_len)],
                    lse: &lse[of(&lse, tape.on.seq_len * shape.heads)],
                };
                let grad = &grad[of(&grad, q_len)];
                let documents: Vec<_> = documents.of(i).collect();
                backward(heads, engine.kernels, &documents, saved, grad, [dq, dk, dv]);
            });
            let ids = [q.id, k.id, v.id];
            drop((q, k, v));
            for (id, grad) in ids.into_iter().zip([dq, dk, dv]) {
                tape.give(id, grad);
            }
        });
        out
    }
}

/// One sequence: `out` as `q`, `lse` `[heads, seq_len]`.
fn forward(
    heads: Heads,
    kernels: &setun_kernels::Kernels,
    documents: &[Range<usize>],
    [q, k, v]: [&[f32]; 3],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (wide, narrow) = (heads.q_width(), heads.kv_width());
    let mut scores = vec![0.0; QUERIES * heads.seq_len];
    for (h, lse) in lse.chunks_exact_mut(heads.seq_len).enumerate() {
        let (column, kv_column) = heads.columns(h);
        for block in heads.blocks(documents) {
            let Block { queries, keys, .. } = &block;
            let (rows, cols) = (queries.len(), keys.len());
            let (key, value) = (
                heads.view(k, keys.clone(), narrow, kv_column),
                heads.view(v, keys.clone(), narrow, kv_column),
            );
            let query = heads.view(q, queries.clone(), wide, column);
            gemm(ViewMut::new(&mut scores, rows, cols, cols), Into::Set, heads.shape.scale, query, key.t());
            for (i, row) in queries.clone().zip(scores.chunks_exact_mut(cols)) {
                let seen = heads.seen(i, &block);
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
                let row = &mut row[seen];
                let (top, sum) = softmax(kernels, row, 1.0);
                lse[i] = top + sum.ln();
            }
            let mixed = heads.view_mut(out, block.queries, wide, column);
            gemm(mixed, Into::Set, 1.0, View::new(&scores, rows, cols, cols), value);
        }
    }
}

/// What the forward pass kept of one sequence.
struct Saved<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
}

/// With `P` the probabilities and `D = rowsum(dO · O)`: `dV = PᵀdO`, `dS = P · (dO·Vᵀ - D)`, `dQ = s·dS·K`, `dK = s·dSᵀQ`.
fn backward(
    heads: Heads,
    kernels: &setun_kernels::Kernels,
    documents: &[Range<usize>],
    saved: Saved,
    grad: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let (wide, narrow, dim) = (heads.q_width(), heads.kv_width(), heads.shape.head_dim);
    let mut probabilities = vec![0.0; QUERIES * heads.seq_len];
    let mut slopes = vec![0.0; QUERIES * heads.seq_len];
    dk.fill(0.0);
    dv.fill(0.0);
    for (h, lse) in saved.lse.chunks_exact(heads.seq_len).enumerate() {
        let (column, kv_column) = heads.columns(h);
        let scale = heads.shape.scale;
        for block in heads.blocks(documents) {
            let Block { queries, keys, .. } = &block;
            let (rows, cols) = (queries.len(), keys.len());
            let key = heads.view(saved.k, keys.clone(), narrow, kv_column);
            let value = heads.view(saved.v, keys.clone(), narrow, kv_column);
            let query = heads.view(saved.q, queries.clone(), wide, column);
            let out = heads.view(grad, queries.clone(), wide, column);
            gemm(ViewMut::new(&mut probabilities, rows, cols, cols), Into::Set, scale, query, key.t());
            gemm(ViewMut::new(&mut slopes, rows, cols, cols), Into::Set, 1.0, out, value.t());
            let row_pairs = probabilities.chunks_exact_mut(cols).zip(slopes.chunks_exact_mut(cols));
            for (i, (p, ds)) in queries.clone().zip(row_pairs) {
                let seen = heads.seen(i, &block);
                for row in [&mut *p, &mut *ds] {
                    row[..seen.start].fill(0.0);
                    row[seen.end..].fill(0.0);
                }
                let (p, ds) = (&mut p[seen.clone()], &mut ds[seen]);
                vectorised(
                    #[inline(always)]
                    || subtract(p, lse[i]),
                );
                kernels.exp_in_place(p);
                let at = i * wide + column;
                vectorised(
                    #[inline(always)]
                    || {
                        let d = sum2(&grad[at..at + dim], &saved.out[at..at + dim], |a, b| a * b);
                        for (ds, p) in ds.iter_mut().zip(&*p) {
                            *ds = p * (*ds - d);
                        }
                    },
                );
            }
            let (p, ds) = (View::new(&probabilities, rows, cols, cols), View::new(&slopes, rows, cols, cols));
            gemm(heads.view_mut(dv, keys.clone(), narrow, kv_column), Into::Add, 1.0, p.t(), out);
            gemm(heads.view_mut(dk, block.keys, narrow, kv_column), Into::Add, scale, ds.t(), query);
            gemm(heads.view_mut(dq, block.queries, wide, column), Into::Set, scale, ds, key);
        }
    }
}

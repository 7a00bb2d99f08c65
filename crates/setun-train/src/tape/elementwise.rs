//! Rotation, gate and residual: operations without parameters that touch every element once.

use std::sync::Arc;

use setun::config::Activation;
use setun::ops::{Direction, Rotate};

use super::{Tape, Var};
use crate::engine::{CHUNK, Engine, Floats, rows_per_chunk, vectorised};

impl Tape<'_> {
    /// RoPE in place: its derivative is the opposite rotation, so nothing is kept.
    pub(super) fn rotate(&mut self, x: Var, heads: usize, head_dim: usize) -> Var {
        let (from, width) = (x.id, x.width);
        let mut value = self.own(x.value);
        self.rotate_rows(&mut value, heads, head_dim, false);
        let y = self.var(value, width);
        let to = y.id;
        self.record(move |tape| {
            let Some(mut grad) = tape.take_owned(to) else { return };
            tape.rotate_rows(&mut grad, heads, head_dim, true);
            tape.give(from, grad);
        });
        y
    }

    fn rotate_rows(&self, x: &mut [f32], heads: usize, head_dim: usize, back: bool) {
        let (on, documents) = (self.on, &self.documents);
        let width = heads * head_dim;
        let rows = rows_per_chunk(width);
        on.engine.pool.run_chunks_mut(x, rows * width, |i, x| {
            let mut negated = Vec::new();
            for (row, x) in x.chunks_exact_mut(width).enumerate() {
                let (cos, sin) = on.rope.at(documents.position(i * rows + row));
                if back {
                    negated.clear();
                    negated.extend(sin.iter().map(|s| -s));
                    on.engine.kernels.rope(x, heads, head_dim, cos, &negated);
                } else {
                    on.engine.kernels.rope(x, heads, head_dim, cos, sin);
                }
            }
        });
    }

    /// A rotation in a fixed direction: orthogonal, so its derivative is the one in the other.
    pub(super) fn turn(&mut self, x: &Var, by: &Rotate, direction: Direction) -> Var {
        let mut value = self.on.engine.copy(&x.value);
        self.turn_rows(&mut value, x.width, by, direction);
        let y = self.var(value, x.width);
        let (from, to, width, by) = (x.id, y.id, x.width, by.clone());
        self.record(move |tape| {
            let Some(mut grad) = tape.take_owned(to) else { return };
            tape.turn_rows(&mut grad, width, &by, direction.reversed());
            tape.give(from, grad);
        });
        y
    }

    fn turn_rows(&self, x: &mut [f32], width: usize, by: &Rotate, direction: Direction) {
        let on = self.on;
        on.engine.pool.run_chunks_mut(x, rows_per_chunk(width) * width, |_, x| {
            for row in x.chunks_exact_mut(width) {
                by.apply(on.engine.kernels, row, direction);
            }
        });
    }

    /// `activation(gate) · up`.
    pub(super) fn gate_rows(&mut self, gate: Var, up: Var, activation: Activation) -> Var {
        let on = self.on;
        let mut y = on.engine.scratch(gate.value.len());
        on.engine.pool.run_chunks_mut(&mut y, CHUNK, |i, y| {
            let part = i * CHUNK..i * CHUNK + y.len();
            let (gate, up) = (&gate.value[part.clone()], &up.value[part]);
            match activation {
                Activation::Silu => on.engine.kernels.silu_gate(gate, up, y),
                Activation::Relu2 => on.engine.kernels.relu2_gate(gate, up, y),
            }
        });
        let y = self.var(y, gate.width);
        let to = y.id;
        self.record(move |tape| {
            let Some(grad) = tape.take(to) else { return };
            let (gate_id, up_id) = (gate.id, up.id);
            // The inputs are usually kept by nobody else: their buffers become their gradients.
            let (mut gate, mut up) = (tape.own(gate.value), tape.own(up.value));
            let items = gate.chunks_mut(CHUNK).zip(up.chunks_mut(CHUNK)).collect();
            let engine = tape.on.engine;
            engine.pool.run_items(items, |i, (gate, up): (&mut [f32], &mut [f32])| {
                let grad = &grad[i * CHUNK..][..gate.len()];
                match activation {
                    Activation::Silu => silu_back(engine.kernels, gate, up, grad),
                    Activation::Relu2 => relu2_back(gate, up, grad),
                }
            });
            tape.give(gate_id, gate);
            tape.give(up_id, up);
        });
        y
    }

    /// `x + y`, in the place of `y`.
    pub(super) fn residual(&mut self, x: Var, y: Var) -> Var {
        let (from, width) = ([x.id, y.id], x.width);
        let mut sum = self.own(y.value);
        let on = self.on;
        on.engine.pool.run_chunks_mut(&mut sum, CHUNK, |i, sum| {
            let part = i * CHUNK..i * CHUNK + sum.len();
            on.engine.kernels.add_assign(sum, &x.value[part]);
        });
        let z = self.var(sum, width);
        let to = z.id;
        self.record(move |tape| {
            let Some(grad) = tape.take(to) else { return };
            tape.give_shared(from[0], grad.clone());
            tape.give_shared(from[1], grad);
        });
        z
    }

    /// The value itself when nobody else holds it, else a copy.
    pub(super) fn own(&self, value: Arc<Floats>) -> Floats {
        Arc::try_unwrap(value).unwrap_or_else(|shared| self.on.engine.copy(&shared))
    }
}

/// With `s = sigmoid(gate)`: `dgate = g · up · s · (1 + gate · (1 - s))`, `dup = g · gate · s`.
fn silu_back(kernels: &setun_kernels::Kernels, gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
    const BLOCK: usize = 1024;
    let mut e = [0f32; BLOCK];
    for ((gate, up), grad) in gate.chunks_mut(BLOCK).zip(up.chunks_mut(BLOCK)).zip(grad.chunks(BLOCK)) {
        let e = &mut e[..gate.len()];
        for (e, x) in e.iter_mut().zip(&*gate) {
            *e = -x;
        }
        kernels.exp_in_place(e);
        vectorised(
            #[inline(always)]
            || {
                for (((gate, up), g), e) in gate.iter_mut().zip(up).zip(grad).zip(&*e) {
                    let (x, u, s) = (*gate, *up, 1.0 / (1.0 + e));
                    *gate = g * u * s * (1.0 + x * (1.0 - s));
                    *up = g * x * s;
                }
            },
        );
    }
}

/// With `r = max(gate, 0)`: `dgate = 2 · g · r · up`, `dup = g · r²`.
fn relu2_back(gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
    vectorised(
        #[inline(always)]
        || {
            for ((gate, up), g) in gate.iter_mut().zip(up).zip(grad) {
                let r = gate.max(0.0);
                *gate = 2.0 * g * r * *up;
                *up = g * r * r;
            }
        },
    );
}

/// Column sums of `[tokens, width]`, as partial sums `[chunks, width]` still to be added up: gradient of a bias.
pub(super) fn column_sums(engine: &Engine, grad: &[f32], width: usize) -> Floats {
    let rows = rows_per_chunk(width);
    let mut partial = engine.scratch(grad.len().div_ceil(rows * width) * width);
    engine.pool.run_chunks_mut(&mut partial, width, |i, partial| {
        let grad = &grad[i * rows * width..];
        vectorised(
            #[inline(always)]
            || {
                partial.fill(0.0);
                for row in grad.chunks_exact(width).take(rows) {
                    for (p, g) in partial.iter_mut().zip(row) {
                        *p += g;
                    }
                }
            },
        );
    });
    partial
}

//! RMS norm.

use std::sync::Arc;

use super::{Tape, Var};
use crate::engine::{Floats, add_assign, fold, rows_per_chunk, sum2, vectorised};
use crate::params::ParamId;

impl Tape<'_> {
    /// `y = x · r · w` with `r = 1 / sqrt(mean(x²) + eps)`, by the kernel that inference uses; over each part of a row that is as
    /// long as `w` (heads).
    pub(super) fn norm_rows(&mut self, x: &Var, weight: ParamId, eps: f32) -> Var {
        let on = self.on;
        let width = on.params[weight].values.len();
        let mut y = on.engine.scratch(x.value.len());
        let rows = rows_per_chunk(width);
        on.engine.pool.run_chunks_mut(&mut y, rows * width, |i, y| {
            let x = &x.value[i * rows * width..];
            let weight = &on.params[weight].values;
            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                on.engine.kernels.rms_norm(x, Some(weight), eps, y);
            }
        });
        let y = self.var(y, x.width);
        let (saved, from, to) = (x.value.clone(), x.id, y.id);
        self.record(move |tape| {
            let Some(grad) = tape.take_owned(to) else { return };
            let grad = tape.norm_back(&saved, grad, weight, eps);
            drop(saved);
            tape.give(from, grad);
        });
        y
    }

    /// Turns `g = dL/dy` into `dL/dx = r · (g·w) - x · r³ · mean(g·w·x)` and adds `Σ g·x·r` over rows to the weight's.
    fn norm_back(&mut self, x: &Arc<Floats>, mut g: Floats, weight: ParamId, eps: f32) -> Floats {
        let on = self.on;
        let w = &on.params[weight].values;
        let width = w.len();
        let rows = rows_per_chunk(width);
        let mut partial = on.engine.scratch(g.len().div_ceil(rows * width) * width);
        let items = g.chunks_mut(rows * width).zip(partial.chunks_exact_mut(width)).collect();
        on.engine.pool.run_items(items, |i, (g, dw): (&mut [f32], &mut [f32])| {
            let x = &x[i * rows * width..];
            vectorised(
                #[inline(always)]
                || {
                    dw.fill(0.0);
                    for (g, x) in g.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        row_back(g, x, w, dw, eps);
                    }
                },
            );
        });
        if self.trains(weight) {
            add_rows(self.param_grad(weight), &partial);
        }
        g
    }
}

#[inline(always)]
fn row_back(g: &mut [f32], x: &[f32], w: &[f32], dw: &mut [f32], eps: f32) {
    let n = x.len() as f32;
    let r = 1.0 / (sum2(x, x, |a, b| a * b) / n + eps).sqrt();
    let mut lanes = [0f32; 16];
    let chunks = g.as_chunks::<16>().0.iter().zip(x.as_chunks::<16>().0).zip(w.as_chunks::<16>().0);
    for ((g, x), w) in chunks {
        for i in 0..16 {
            lanes[i] += g[i] * w[i] * x[i];
        }
    }
    let done = x.len() / 16 * 16;
    let rest: f32 = (done..x.len()).map(|i| g[i] * w[i] * x[i]).sum();
    let factor = (fold(lanes) + rest) * r * r * r / n;
    for (((g, x), w), dw) in g.iter_mut().zip(x).zip(w).zip(dw) {
        *dw += *g * x * r;
        *g = *g * w * r - x * factor;
    }
}

/// `sum += Σ rows`, in the order of the rows.
pub(super) fn add_rows(sum: &mut [f32], rows: &[f32]) {
    for row in rows.chunks_exact(sum.len().max(1)) {
        add_assign(sum, row);
    }
}

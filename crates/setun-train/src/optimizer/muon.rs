//! Muon: momentum made orthogonal (Jordan et al., 2024, <https://kellerjordan.github.io/posts/muon/>).
//!
//! Scaled as in "Muon is Scalable for LLM Training" (<https://arxiv.org/abs/2502.16982>, section 2.2), so that learning rates and
//! weight decay of AdamW carry over. Masters of ternary layers stay in f32, like all others.

use setun::model::Role;
use setun_kernels::gemm::{Into, View, ViewMut, gemm_on};

use crate::engine::{CHUNK, Engine, Floats, sum2, vectorised};
use crate::params::{Kind, Param};

/// Coefficients of the quintic iteration, which takes singular values from (0, 1] to about 1.
const QUINTIC: [f32; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
/// Root mean square of an AdamW update, which Muon's is scaled to.
const ADAMW_RMS: f32 = 0.2;

/// Whether Muon changes this parameter: a matrix of a block.
pub(super) fn takes(param: &Param) -> bool {
    matches!(param.kind, Kind::Matrix(Role::Ternary | Role::Float)) && param.name != "lm_head.weight"
}

/// The numbers of a step.
#[derive(Clone, Copy)]
pub(super) struct Muon {
    /// Decay rate of the momentum.
    pub(super) beta: f32,
    /// What clipping multiplies gradients with.
    pub(super) scale: f32,
    /// What weight decay leaves.
    pub(super) keep: f32,
    /// Learning rate.
    pub(super) lr: f32,
}

/// One step: `m ← β m + g`, `w ← keep · w − lr · 0.2 · sqrt(max(rows, cols)) · orthogonal(g + β m)`.
pub(super) fn step(engine: &Engine, with: Muon, param: &mut Param, momentum: &mut [f32], gradient: &[f32]) {
    let Muon { beta, scale, keep, lr } = with;
    let mut direction = engine.scratch(gradient.len());
    let parts = direction.chunks_mut(CHUNK).zip(momentum.chunks_mut(CHUNK)).zip(gradient.chunks(CHUNK));
    engine.pool.run_items(parts.collect(), |_, ((direction, m), g)| {
        vectorised(
            #[inline(always)]
            || {
                for ((direction, m), g) in direction.iter_mut().zip(m).zip(g) {
                    let g = g * scale;
                    *m = beta * *m + g;
                    *direction = g + beta * *m;
                }
            },
        );
    });
    let direction = orthogonal(engine, direction, param.rows, param.cols);
    let rate = lr * ADAMW_RMS * (param.rows.max(param.cols) as f32).sqrt();
    let parts = param.values.chunks_mut(CHUNK).zip(direction.chunks(CHUNK));
    engine.pool.run_items(parts.collect(), |_, (w, direction)| {
        vectorised(
            #[inline(always)]
            || {
                for (w, direction) in w.iter_mut().zip(direction) {
                    *w = *w * keep - rate * direction;
                }
            },
        );
    });
}

/// About `U Vᵀ` of `x = U Σ Vᵀ`, `[rows, cols]`; zeros of zeros.
fn orthogonal(engine: &Engine, x: Floats, rows: usize, cols: usize) -> Floats {
    let pool = &engine.pool;
    // Products of the short side with itself are the small ones.
    let tall = rows > cols;
    let (n, m) = if tall { (cols, rows) } else { (rows, cols) };
    let mut x = if tall { transposed(engine, &x, rows, cols) } else { x };
    let mut sums = vec![0f64; x.len().div_ceil(CHUNK)];
    pool.run_chunks_mut(&mut sums, 1, |i, sum| {
        let part = &x[i * CHUNK..x.len().min((i + 1) * CHUNK)];
        sum[0] = f64::from(vectorised(
            #[inline(always)]
            || sum2(part, part, |a, b| a * b),
        ));
    });
    let scale = 1.0 / (sums.iter().sum::<f64>().sqrt() + 1e-7) as f32;
    multiplied(engine, &mut x, scale);
    let [a, b, c] = QUINTIC;
    let (mut gram, mut square) = (engine.scratch(n * n), engine.scratch(n * n));
    for _ in 0..ITERATIONS {
        let view = View::new(&x, n, m, m);
        gemm_on(pool, ViewMut::new(&mut gram, n, n, n), Into::Set, 1.0, view, view.t());
        let view = View::new(&gram, n, n, n);
        gemm_on(pool, ViewMut::new(&mut square, n, n, n), Into::Set, c, view, view);
        pool.run_chunks_mut(&mut square, CHUNK, |i, square| {
            let gram = &gram[i * CHUNK..][..square.len()];
            vectorised(
                #[inline(always)]
                || {
                    for (square, gram) in square.iter_mut().zip(gram) {
                        *square += b * gram;
                    }
                },
            );
        });
        let mut next = engine.copy(&x);
        multiplied(engine, &mut next, a);
        let (square, x_view) = (View::new(&square, n, n, n), View::new(&x, n, m, m));
        gemm_on(pool, ViewMut::new(&mut next, n, m, m), Into::Add, 1.0, square, x_view);
        x = next;
    }
    if tall { transposed(engine, &x, n, m) } else { x }
}

fn multiplied(engine: &Engine, x: &mut [f32], by: f32) {
    engine.pool.run_chunks_mut(x, CHUNK, |_, x| {
        vectorised(
            #[inline(always)]
            || crate::engine::multiply(x, by),
        );
    });
}

fn transposed(engine: &Engine, x: &[f32], rows: usize, cols: usize) -> Floats {
    let mut out = engine.scratch(x.len());
    engine.pool.run_chunks_mut(&mut out, rows.max(1), |col, out| {
        for (out, row) in out.iter_mut().zip(x.chunks_exact(cols)) {
            *out = row[col];
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{mix, unit};

    const MUON: Muon = Muon { beta: 0.95, scale: 1.0, keep: 1.0, lr: 0.1 };

    fn random(len: usize) -> Vec<f32> {
        (0..len as u64).map(|i| unit(mix(i)) as f32 - 0.5).collect()
    }

    /// `x xᵀ` of the short side, whose eigenvalues are the squared singular values.
    fn gram(x: &[f32], rows: usize, cols: usize) -> Vec<f64> {
        let (n, m) = (rows.min(cols), rows.max(cols));
        let at = |i: usize, k: usize| f64::from(if rows <= cols { x[i * cols + k] } else { x[k * cols + i] });
        let dot = |i: usize, j: usize| (0..m).map(|k| at(i, k) * at(j, k)).sum();
        (0..n * n).map(|i| dot(i / n, i % n)).collect()
    }

    #[test]
    fn directions_are_nearly_orthogonal_for_wide_tall_and_square_matrices() {
        for (rows, cols) in [(8, 24), (24, 8), (16, 16), (1, 5), (5, 1)] {
            let engine = Engine::new(2);
            let x = engine.copy(&random(rows * cols));
            let y = orthogonal(&engine, x, rows, cols);
            let (gram, n) = (gram(&y, rows, cols), rows.min(cols));
            let trace: f64 = (0..n).map(|i| gram[i * n + i]).sum();
            // The published coefficients leave singular values between about 0.7 and 1.2.
            assert!(trace / n as f64 > 0.45 && trace / (n as f64) < 1.5, "{rows}x{cols}: {gram:?}");
            let off = (0..n * n).filter(|i| i / n != i % n).map(|i| gram[i].abs()).fold(0.0, f64::max);
            assert!(off < 0.4, "{rows}x{cols}: {off}");
        }
    }

    #[test]
    fn a_step_follows_the_direction_with_the_size_of_an_adamw_step_and_the_same_bits_on_any_threads() {
        let (rows, cols) = (48, 16);
        let kind = Kind::Matrix(Role::Ternary);
        let param = Param { name: "w".into(), rows, cols, kind, values: random(rows * cols) };
        let gradient: Vec<f32> = random(2 * rows * cols).split_off(rows * cols);
        let run = |threads| {
            let (mut param, mut momentum) = (param.clone(), vec![0.0; rows * cols]);
            for _ in 0..2 {
                let with = Muon { lr: 0.01, ..MUON };
                step(&Engine::new(threads), with, &mut param, &mut momentum, &gradient);
            }
            (param.values, momentum)
        };
        let (after, momentum) = run(1);
        assert_eq!((&after, &momentum), (&run(3).0, &run(3).1));
        assert!(momentum.iter().zip(&gradient).all(|(m, g)| (m - 1.95 * g).abs() < 1e-6));
        let change: Vec<f64> = after.iter().zip(&param.values).map(|(a, b)| f64::from(a - b)).collect();
        let rms = (change.iter().map(|x| x * x).sum::<f64>() / change.len() as f64).sqrt() / 2.0;
        assert!((0.0014..0.0026).contains(&rms), "{rms}");
        let along: f64 = change.iter().zip(&gradient).map(|(c, g)| c * f64::from(*g)).sum();
        assert!(along < 0.0, "uphill");
    }

    #[test]
    fn a_gradient_of_zeros_changes_nothing() {
        let kind = Kind::Matrix(Role::Float);
        let mut param = Param { name: "w".into(), rows: 2, cols: 3, kind, values: random(6) };
        step(&Engine::new(1), MUON, &mut param, &mut [0.0; 6], &[0.0; 6]);
        assert_eq!(param.values, random(6));
    }
}

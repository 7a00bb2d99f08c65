//! The gated delta rule: a linear-attention layer whose memory of the past is one matrix per head.
//!
//! Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (<https://arxiv.org/abs/2412.06464>), as Qwen3.5 computes it:
//! a short causal convolution over time with SiLU, then, per value head with its state `M` `[keys, values]`,
//!
//! ```text
//! M ← e^g M;  d = β (v − kᵀM);  M ← M + k dᵀ;  o = qᵀM        q, k of unit length, q also over sqrt(head_dim)
//! ```
//!
//! Tokens are taken one after another and every column of `M` by itself, so bits depend neither on how a prompt was cut
//! into pieces nor on threads: keys are summed in order from 0, lanes run over columns. The decay is multiplied into the
//! sum `kᵀM` rather than into `M` first, which saves writing `M` twice.

use crate::Kernels;
use crate::float::{dot_lanes, exp, exp_lanes};
use crate::lanes::{Chunk, LANES, Lanes, chunk_at, job};
use crate::scratch::{Parts, with_scratch};
use crate::threads::Pool;

/// Added to the squared length of a query or key before the root.
const L2_EPS: f32 = 1e-6;

/// What the delta rule needs to know about a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaShape {
    /// Query and key heads.
    pub key_heads: usize,
    /// Value heads, a multiple of `key_heads`.
    pub value_heads: usize,
    /// Elements of a head, of keys and values alike.
    pub head_dim: usize,
    /// Value head `h` belongs to key head `h % key_heads`; otherwise to `h / (value_heads / key_heads)`.
    pub tiled: bool,
}

impl DeltaShape {
    /// Elements of a token's queries, keys and values together.
    pub fn width(&self) -> usize {
        (2 * self.key_heads + self.value_heads) * self.head_dim
    }

    /// Floats of the state of all heads; rows are padded to whole lanes.
    pub fn state_len(&self) -> usize {
        self.value_heads * self.head_dim * self.head_dim.next_multiple_of(LANES)
    }

    fn key_head(&self, value_head: usize) -> usize {
        match self.tiled {
            true => value_head % self.key_heads,
            false => value_head / (self.value_heads / self.key_heads),
        }
    }
}

/// What steers the state of each value head, token by token.
#[derive(Debug, Clone, Copy)]
pub struct DeltaGates<'a> {
    /// `[tokens, value_heads]`: the decay is `g = rate · softplus(alpha + dt_bias)`.
    pub alpha: &'a [f32],
    /// `[tokens, value_heads]`: `β` before its sigmoid.
    pub beta: &'a [f32],
    /// `[value_heads]`, negative: `−exp(A_log)`.
    pub rate: &'a [f32],
    /// `[value_heads]`.
    pub dt_bias: &'a [f32],
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `ln(1 + e^x)`: `ln(1 + e)` for `e = e^-|x|` by `2 artanh(e / (2 + e))` in f64, so that no platform's `ln` is involved.
fn softplus(x: f32) -> f32 {
    let e = f64::from(exp(-x.abs()));
    let t = e / (2.0 + e);
    let square = t * t;
    let mut series = 0.0;
    for odd in [17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * square + 1.0 / odd;
    }
    (f64::from(x.max(0.0)) + 2.0 * t * series) as f32
}

job!(ShortConv { rows: &'a [&'a [f32]], weight: &'a [f32], out: &'a mut [f32] } -> (), |s| {
    let (taps, one) = (rows.len(), s.splat(1.0));
    for (i, out) in out.chunks_mut(LANES).enumerate() {
        let mut sum = s.zero();
        for (tap, row) in rows.iter().enumerate() {
            let mut w = [0.0; LANES];
            for (channel, w) in w[..out.len()].iter_mut().enumerate() {
                *w = weight[(i * LANES + channel) * taps + tap];
            }
            sum = s.fma(s.load(&w), s.load(&chunk_at(row, i)), sum);
        }
        let silu = s.div(sum, s.add(one, exp_lanes(s, s.sub(s.zero(), sum))));
        let mut chunk = [0.0; LANES];
        s.store(silu, &mut chunk);
        out.copy_from_slice(&chunk[..out.len()]);
    }
});

/// One token of one head.
struct Token<'a> {
    /// Of unit length, the query scaled too.
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    decay: f32,
    beta: f32,
}

/// `N` chunks of columns from `first`, in registers.
#[inline(always)]
fn columns<S: Lanes, const N: usize>(
    s: S,
    token: &Token,
    state: &mut [Chunk],
    dims: usize,
    first: usize,
    out: &mut [f32],
) {
    let mut seen = [s.zero(); N];
    for (&k, row) in token.k.iter().zip(state.chunks_exact(dims)) {
        let k = s.splat(k);
        for (seen, m) in seen.iter_mut().zip(&row[first..first + N]) {
            *seen = s.fma(k, s.load(m), *seen);
        }
    }
    let (decay, beta) = (s.splat(token.decay), s.splat(token.beta));
    let mut delta = seen;
    for (n, delta) in delta.iter_mut().enumerate() {
        let v = s.load(&chunk_at(token.v, first + n));
        *delta = s.mul(beta, s.sub(v, s.mul(decay, *delta)));
    }
    let mut sums = [s.zero(); N];
    for ((&q, &k), row) in token.q.iter().zip(token.k).zip(state.chunks_exact_mut(dims)) {
        let (q, k) = (s.splat(q), s.splat(k));
        for ((m, delta), sum) in row[first..first + N].iter_mut().zip(&delta).zip(&mut sums) {
            let new = s.fma(k, *delta, s.mul(decay, s.load(m)));
            s.store(new, m);
            *sum = s.fma(q, new, *sum);
        }
    }
    for (sum, out) in sums.iter().zip(out[first * LANES..].chunks_mut(LANES)) {
        let mut chunk = [0.0; LANES];
        s.store(*sum, &mut chunk);
        out.copy_from_slice(&chunk[..out.len()]);
    }
}

/// `out = x · factor / sqrt(Σx² + ε)`.
#[inline(always)]
fn unit<S: Lanes>(s: S, x: &[f32], factor: f32, out: &mut [Chunk]) {
    let factor = s.splat(factor / (dot_lanes(s, x, x) + L2_EPS).sqrt());
    for (i, out) in out.iter_mut().enumerate() {
        s.store(s.mul(s.load(&chunk_at(x, i)), factor), out);
    }
}

job!(Step {
    q: &'a [f32], k: &'a [f32], v: &'a [f32], gates: (f32, f32), state: &'a mut [Chunk], scratch: &'a mut [Chunk],
    out: &'a mut [f32],
} -> (), |s| {
    let (d, dims) = (q.len(), q.len().div_ceil(LANES));
    let (queries, keys) = scratch.split_at_mut(dims);
    unit(s, q, 1.0 / (d as f32).sqrt(), queries);
    unit(s, k, 1.0, keys);
    let (decay, beta) = gates;
    let token = Token { q: &queries.as_flattened()[..d], k: &keys.as_flattened()[..d], v, decay, beta };
    for first in (0..dims).step_by(4) {
        match dims - first {
            1 => columns::<S, 1>(s, &token, state, dims, first, out),
            2 => columns::<S, 2>(s, &token, state, dims, first, out),
            3 => columns::<S, 3>(s, &token, state, dims, first, out),
            _ => columns::<S, 4>(s, &token, state, dims, first, out),
        }
    }
});

impl Kernels {
    /// A causal convolution over time, each channel by itself, for one token: `out = silu(Σ_j weight[·][j] · rows[j])`.
    ///
    /// - `rows`: the channels of as many tokens as the kernel has taps, the current one last.
    /// - `weight`: `[channels, taps]`. Taps are summed from the oldest on.
    pub fn short_conv(&self, rows: &[&[f32]], weight: &[f32], out: &mut [f32]) {
        assert!(rows.iter().all(|row| row.len() == out.len()), "short_conv: lengths differ");
        assert_eq!(weight.len(), rows.len() * out.len(), "short_conv: weight is not [channels, taps]");
        self.lanes(ShortConv { rows, weight, out });
    }

    /// The gated delta rule for consecutive tokens, whose number follows from the lengths.
    ///
    /// - `qkv`: `[tokens, shape.width()]`, queries, keys, values, as they come from the convolution.
    /// - `state`: [`DeltaShape::state_len`] floats, zeros before the first token; left as the next token needs it.
    /// - `out`: `[tokens, value_heads * head_dim]`.
    ///
    /// Panics where lengths do not fit the shape or value heads do not share key heads.
    pub fn delta_rule(
        &self,
        shape: &DeltaShape,
        qkv: &[f32],
        gates: &DeltaGates,
        state: &mut [f32],
        out: &mut [f32],
        pool: &Pool,
    ) {
        let DeltaShape { key_heads, value_heads, head_dim: d, .. } = *shape;
        let (width, out_width) = (shape.width(), value_heads * d);
        assert!(key_heads > 0 && d > 0, "delta_rule: the shape has no heads");
        assert!(value_heads.is_multiple_of(key_heads), "delta_rule: value heads do not share key heads");
        let tokens = qkv.len() / width;
        assert!(
            qkv.len() == tokens * width && out.len() == tokens * out_width,
            "delta_rule: not whole tokens"
        );
        assert!(gates.alpha.len() == tokens * value_heads && gates.beta.len() == gates.alpha.len());
        assert!(gates.rate.len() == value_heads && gates.dt_bias.len() == value_heads);
        assert_eq!(state.len(), shape.state_len(), "delta_rule: the state has another shape");
        let dims = d.div_ceil(LANES);
        let out = Parts::new(out);
        let states = state.as_chunks_mut().0.chunks_exact_mut(d * dims).collect();
        pool.run_items(states, |head, state: &mut [Chunk]| {
            let key_head = shape.key_head(head);
            with_scratch(2 * dims, |scratch| {
                for (t, row) in qkv.chunks_exact(width).enumerate() {
                    let at = |head: usize| &row[head * d..(head + 1) * d];
                    let gate = t * value_heads + head;
                    let g = gates.rate[head] * softplus(gates.alpha[gate] + gates.dt_bias[head]);
                    self.lanes(Step {
                        q: at(key_head),
                        k: at(key_heads + key_head),
                        v: at(2 * key_heads + head),
                        gates: (exp(g), sigmoid(gates.beta[gate])),
                        state: &mut *state,
                        scratch: &mut *scratch,
                        // SAFETY: a task owns its head's elements of every token.
                        out: unsafe { out.get(t * out_width + head * d, d) },
                    });
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, seed: u32, scale: f32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..len).map(|_| next() * scale).collect()
    }

    struct Case {
        shape: DeltaShape,
        qkv: Vec<f32>,
        steer: [Vec<f32>; 4],
    }

    fn case(shape: DeltaShape, tokens: usize) -> Case {
        let heads = shape.value_heads;
        let rate = noise(heads, 3, 2.0).iter().map(|a| -a.abs() - 0.01).collect();
        let steer =
            [noise(tokens * heads, 1, 3.0), noise(tokens * heads, 2, 3.0), rate, noise(heads, 4, 1.0)];
        Case { shape, qkv: noise(tokens * shape.width(), 5, 1.5), steer }
    }

    impl Case {
        /// Fed in pieces of `step` tokens.
        fn run(&self, kernels: &Kernels, threads: usize, step: usize) -> (Vec<f32>, Vec<f32>) {
            let (shape, pool) = (&self.shape, Pool::new(threads));
            let (width, heads) = (shape.width(), shape.value_heads);
            let (mut state, mut all) = (vec![0.0; shape.state_len()], Vec::new());
            for (i, qkv) in self.qkv.chunks(step * width).enumerate() {
                let tokens = qkv.len() / width;
                let steer = i * step * heads..(i * step + tokens) * heads;
                let gates = DeltaGates {
                    alpha: &self.steer[0][steer.clone()],
                    beta: &self.steer[1][steer],
                    rate: &self.steer[2],
                    dt_bias: &self.steer[3],
                };
                let mut out = vec![f32::NAN; tokens * heads * shape.head_dim];
                kernels.delta_rule(shape, qkv, &gates, &mut state, &mut out, &pool);
                all.extend(out);
            }
            (all, state)
        }

        /// The rule as it is written, in f64.
        fn reference(&self) -> Vec<f64> {
            let DeltaShape { key_heads, value_heads, head_dim: d, tiled } = self.shape;
            let tokens = self.qkv.len() / self.shape.width();
            let mut out = vec![0.0; tokens * value_heads * d];
            for head in 0..value_heads {
                let key_head = if tiled { head % key_heads } else { head * key_heads / value_heads };
                let mut m = vec![0.0f64; d * d];
                for (t, row) in self.qkv.chunks(self.shape.width()).enumerate() {
                    let of = |head: usize| -> Vec<f64> {
                        row[head * d..(head + 1) * d].iter().map(|&x| f64::from(x)).collect()
                    };
                    let unit = |x: Vec<f64>, by: f64| -> Vec<f64> {
                        let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                        x.iter().map(|x| x * by / length).collect()
                    };
                    let q = unit(of(key_head), 1.0 / (d as f64).sqrt());
                    let k = unit(of(key_heads + key_head), 1.0);
                    let v = of(2 * key_heads + head);
                    let at = |i: usize, j: usize| f64::from(self.steer[i][j]);
                    let gate = t * value_heads + head;
                    let g = at(2, head) * (at(0, gate) + at(3, head)).exp().ln_1p();
                    let beta = 1.0 / (1.0 + (-at(1, gate)).exp());
                    m.iter_mut().for_each(|m| *m *= g.exp());
                    for j in 0..d {
                        let seen: f64 = (0..d).map(|i| k[i] * m[i * d + j]).sum();
                        let delta = beta * (v[j] - seen);
                        (0..d).for_each(|i| m[i * d + j] += k[i] * delta);
                        out[(t * value_heads + head) * d + j] = (0..d).map(|i| q[i] * m[i * d + j]).sum();
                    }
                }
            }
            out
        }
    }

    const SHAPES: [(usize, usize, usize, bool); 5] =
        [(2, 4, 64, true), (2, 6, 16, false), (1, 1, 128, false), (3, 3, 5, true), (1, 2, 100, true)];

    fn shapes() -> impl Iterator<Item = DeltaShape> {
        let shape = |(key_heads, value_heads, head_dim, tiled)| DeltaShape {
            key_heads,
            value_heads,
            head_dim,
            tiled,
        };
        SHAPES.into_iter().map(shape)
    }

    #[test]
    fn the_rule_agrees_with_its_definition_in_double_precision() {
        for shape in shapes() {
            let case = case(shape, 40);
            let expected = case.reference();
            let (found, _) = case.run(Kernels::best(), 2, 40);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let gap = (f64::from(*found) - expected).abs();
                assert!(gap < 2e-6, "{shape:?}, element {i}: {found} instead of {expected}");
            }
            assert!(expected.iter().any(|x| x.abs() > 0.01));
        }
    }

    #[test]
    fn bits_depend_neither_on_the_instruction_set_nor_on_threads_nor_on_pieces() {
        for shape in shapes() {
            let case = case(shape, 19);
            let bits = |(a, b): (Vec<f32>, Vec<f32>)| {
                [a, b].concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let expected = bits(case.run(Kernels::by_name("scalar").unwrap(), 1, 19));
            for kernels in Kernels::available() {
                for (threads, step) in [(1, 1), (3, 7), (2, 19)] {
                    assert_eq!(
                        bits(case.run(kernels, threads, step)),
                        expected,
                        "{} {shape:?}",
                        kernels.name()
                    );
                }
            }
        }
    }

    #[test]
    fn the_convolution_is_a_sum_over_taps_and_silu_on_every_instruction_set() {
        for (channels, taps) in [(1, 1), (16, 4), (37, 4), (130, 3)] {
            let rows: Vec<Vec<f32>> = (0..taps).map(|t| noise(channels, t as u32 + 1, 2.0)).collect();
            let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
            let weight = noise(channels * taps, 9, 1.0);
            let mut first = vec![0.0; channels];
            Kernels::by_name("scalar").unwrap().short_conv(&rows, &weight, &mut first);
            for (c, found) in first.iter().enumerate() {
                let sum: f64 =
                    (0..taps).map(|t| f64::from(weight[c * taps + t]) * f64::from(rows[t][c])).sum();
                assert!((f64::from(*found) - sum / (1.0 + (-sum).exp())).abs() < 1e-6, "channel {c}");
            }
            for kernels in Kernels::available() {
                let mut out = vec![0.0; channels];
                kernels.short_conv(&rows, &weight, &mut out);
                assert_eq!(out, first, "{}, {channels} channels", kernels.name());
            }
        }
    }

    #[test]
    fn softplus_keeps_its_precision_at_both_ends() {
        for x in [-80.0, -20.0, -3.0, -0.1, 0.0, 0.7, 5.0, 30.0, 1e30] {
            let (found, expected) = (f64::from(softplus(x)), f64::from(x).exp().ln_1p());
            let expected = if expected.is_finite() { expected } else { f64::from(x) };
            assert!((found - expected).abs() <= 3e-7 * expected, "{x}: {found}, {expected}");
        }
        assert!(softplus(f32::NAN).is_nan());
    }
}

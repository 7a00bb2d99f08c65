//! AdamW with global-norm clipping, in one pass over masters, moments and gradients; Muon for the matrices of the blocks, where asked.

mod muon;

use muon::Muon;

use crate::config::{OptimizerKind, OptimizerSection};
use crate::engine::{CHUNK, Engine, sum2, vectorised};
use crate::params::{Param, Params};
use crate::schedule::Rates;
use crate::tape::Gradients;

/// AdamW (Loshchilov and Hutter, 2019, <https://arxiv.org/abs/1711.05101>), its moments in f32; with [`OptimizerKind::Muon`] for all but
/// the matrices of the blocks, which Muon changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer {
    kind: OptimizerKind,
    momentum: f32,
    betas: [f64; 2],
    eps: f64,
    clip: f64,
    /// Steps taken.
    pub(crate) steps: u64,
    /// First and second moment of every parameter. Muon's matrices have a momentum and no second moment.
    pub(crate) moments: [Vec<Vec<f32>>; 2],
}

impl Optimizer {
    /// With zero moments.
    pub fn new(settings: &OptimizerSection, params: &Params) -> Self {
        let OptimizerSection { kind, momentum, betas, eps, clip, .. } = *settings;
        let momentum = momentum as f32;
        let mut this = Self { kind, momentum, betas, eps, clip, steps: 0, moments: Default::default() };
        for id in params.ids() {
            for (names, moments) in this.moment_names(&params[id]).into_iter().zip(&mut this.moments) {
                moments.push(vec![0.0; names.map_or(0, |_| params.trained(id))]);
            }
        }
        this
    }

    /// What checkpoints call the first and the second moment of a parameter, where it has them.
    pub(crate) fn moment_names(&self, param: &Param) -> [Option<&'static str>; 2] {
        match self.kind == OptimizerKind::Muon && muon::takes(param) {
            true => [Some("muon_m"), None],
            false => [Some("adam_m"), Some("adam_v")],
        }
    }

    /// Changes `params` along `gradients`; returns their global norm before clipping.
    ///
    /// A norm that is not finite changes nothing: the caller decides what that means for the run. Weight decay applies
    /// as [`crate::params::Kind::decays`] says.
    pub fn step(&mut self, engine: &Engine, params: &mut Params, gradients: &Gradients, rates: Rates) -> f64 {
        let norm = gradient_norm(engine, gradients);
        if !norm.is_finite() {
            return norm;
        }
        self.steps += 1;
        let clipped = if self.clip > 0.0 && norm > self.clip { self.clip / norm } else { 1.0 };
        let [b1, b2] = self.betas;
        let correct = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let rule = Rule {
            scale: clipped as f32,
            b1: b1 as f32,
            b2: b2 as f32,
            c1: (1.0 - b1) as f32,
            c2: (1.0 - b2) as f32,
            // lr / (1 - b1^t) · m / (sqrt(v / (1 - b2^t)) + eps), with one division per element.
            rate: (rates.lr / correct(b1) * correct(b2).sqrt()) as f32,
            eps: (self.eps * correct(b2).sqrt()) as f32,
            keep: 1.0,
        };
        let [first, second] = &mut self.moments;
        let mut pieces = Vec::new();
        for (((param, m), v), g) in params.iter_mut().zip(first).zip(second).zip(gradients.iter()) {
            let keep = if param.kind.decays() { (1.0 - rates.lr * rates.weight_decay) as f32 } else { 1.0 };
            if v.len() != m.len() {
                let with = Muon { beta: self.momentum, scale: rule.scale, keep, lr: rates.lr as f32 };
                muon::step(engine, with, param, m, g);
                continue;
            }
            let rule = Rule { keep, ..rule };
            let parts = param.values.chunks_mut(CHUNK).zip(m.chunks_mut(CHUNK)).zip(v.chunks_mut(CHUNK));
            pieces.extend(parts.zip(g.chunks(CHUNK)).map(|(((w, m), v), g)| (rule, w, m, v, g)));
        }
        engine.pool.run_items(pieces, |_, (rule, w, m, v, g)| rule.apply(w, m, v, g));
        norm
    }
}

#[derive(Clone, Copy)]
struct Rule {
    scale: f32,
    b1: f32,
    b2: f32,
    c1: f32,
    c2: f32,
    rate: f32,
    eps: f32,
    keep: f32,
}

impl Rule {
    fn apply(self, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        let Self { scale, b1, b2, c1, c2, rate, eps, keep } = self;
        vectorised(
            #[inline(always)]
            || {
                for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
                    let g = g * scale;
                    *m = b1 * *m + c1 * g;
                    *v = b2 * *v + c2 * g * g;
                    *w = *w * keep - rate * *m / (v.sqrt() + eps);
                }
            },
        );
    }
}

/// `sqrt(Σ g²)` over all parameters: chunks in f32, their sum in f64, in a fixed order.
fn gradient_norm(engine: &Engine, gradients: &Gradients) -> f64 {
    let chunks: Vec<&[f32]> = gradients.iter().flat_map(|g| g.chunks(CHUNK)).collect();
    let mut sums = vec![0f64; chunks.len()];
    engine.pool.run_chunks_mut(&mut sums, 1, |i, sum| {
        sum[0] = f64::from(vectorised(
            #[inline(always)]
            || sum2(chunks[i], chunks[i], |a, b| a * b),
        ));
    });
    sums.iter().sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Kind, Param};

    fn one(values: &[f32]) -> Params {
        let mut params = Params::default();
        let (name, rows, kind, values) = ("w".to_owned(), values.len(), Kind::Norm, values.to_vec());
        params.add(Param { name, rows, cols: 1, kind, values });
        params
    }

    fn gradients(params: &Params, values: &[f32]) -> Gradients {
        let mut gradients = Gradients::new(params);
        gradients.get_mut(params.ids().next().unwrap()).copy_from_slice(values);
        gradients
    }

    #[test]
    fn two_steps_follow_the_published_formula() {
        let mut params = one(&[1.0, -2.0, 0.5]);
        let settings = OptimizerSection { clip: 0.0, ..OptimizerSection::default() };
        let mut optimizer = Optimizer::new(&settings, &params);
        let (mut w, mut m, mut v) = ([1.0f64, -2.0, 0.5], [0.0; 3], [0.0; 3]);
        let ([b1, b2], engine) = (settings.betas, Engine::new(1));
        for (t, g) in [[0.3f32, -4.0, 0.0], [0.1, 1.0, 1e-4]].iter().enumerate() {
            let gradients = gradients(&params, g);
            optimizer.step(&engine, &mut params, &gradients, Rates { lr: 0.01, weight_decay: 0.3 });
            for i in 0..3 {
                let g = f64::from(g[i]);
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let correct = |x: f64, beta: f64| x / (1.0 - beta.powi(t as i32 + 1));
                w[i] -= 0.01 * correct(m[i], b1) / (correct(v[i], b2).sqrt() + settings.eps);
            }
        }
        for (found, expected) in params.iter().next().unwrap().values.iter().zip(w) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn clipping_scales_the_gradient_down_to_the_limit_and_reports_the_norm_before() {
        let mut params = one(&[0.0, 0.0]);
        let settings = OptimizerSection { clip: 1.0, ..OptimizerSection::default() };
        let mut optimizer = Optimizer::new(&settings, &params);
        let gradients = gradients(&params, &[3.0, 4.0]);
        let norm =
            optimizer.step(&Engine::new(1), &mut params, &gradients, Rates { lr: 0.01, weight_decay: 0.0 });
        assert_eq!(norm, 5.0);
        let m = &optimizer.moments[0][0];
        assert!((m[0] - 0.06).abs() < 1e-7 && (m[1] - 0.08).abs() < 1e-7, "{m:?}");
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let mut params = one(&[1.0, 2.0]);
        let mut optimizer = Optimizer::new(&OptimizerSection::default(), &params);
        let before = (params.clone(), optimizer.clone());
        let gradients = gradients(&params, &[f32::NAN, 1.0]);
        let norm =
            optimizer.step(&Engine::new(1), &mut params, &gradients, Rates { lr: 0.1, weight_decay: 0.0 });
        assert!(!norm.is_finite());
        assert_eq!((params, optimizer), before);
    }
}

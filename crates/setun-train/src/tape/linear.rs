//! Linear layers: BitLinear where the weight is ternary, plain floats elsewhere.
//!
//! BitLinear (<https://arxiv.org/abs/2402.17764>, section 2) multiplies int8 activations with ternary weights, exactly,
//! on the kernels of inference. Backwards both roundings count as the identity ("straight-through"): with the dequantised
//! `x'` and `W'`, `dx = dy · W'` and `dW = dyᵀ · x'`, and nothing flows through the scales. Weights alone being ternary, or rounding
//! growing in ([`crate::weights::Recipe`]), `x'` and `W'` are floats, multiplied as such.

use std::sync::Arc;

use setun_kernels::gemm::{Into, View, ViewMut, gemm_on};
use setun_kernels::{Activations, PackedMatrix};

use super::{Tape, Var, elementwise};
use crate::engine::{CHUNK, Engine, Floats, rows_per_chunk, vectorised};
use crate::params::ParamId;
use crate::weights::blend;

/// What the gradient of the weight needs of the input.
#[derive(Clone)]
enum Input {
    Float(Arc<Floats>),
    Int8(Arc<Activations>),
}

impl Input {
    /// `x'` in floats.
    fn dense(&self, engine: &Engine) -> Arc<Floats> {
        match self {
            Input::Float(x) => x.clone(),
            Input::Int8(x) => Arc::new(dequantize(engine, x)),
        }
    }
}

impl Tape<'_> {
    /// `x · Wᵀ + b` for several layers of one input; see [`setun::ops::Ops::linear`].
    pub(super) fn linear_group<const N: usize>(
        &mut self,
        x: &Var,
        layers: [(ParamId, Option<ParamId>); N],
    ) -> [Var; N] {
        let on = self.on;
        let (tokens, cols) = (self.tokens(), x.width);
        let recipe = on.weights.recipe();
        let ternary = |matrix: ParamId| on.weights.get(matrix).is_some();
        let rounding = recipe.activations.rounding();
        let rounding = rounding.filter(|_| layers.iter().any(|&(matrix, _)| ternary(matrix)));
        let quantised = rounding.map(|rounding| {
            let mut activations = Activations::rounded(rounding);
            activations.quantize(on.engine.kernels, &x.value, tokens, cols, Some(&on.engine.pool));
            Arc::new(activations)
        });
        // What float products of ternary layers read; of others, `x`.
        let blended = quantised.as_ref().filter(|_| !recipe.exact()).map(|activations| {
            let mut blended = dequantize(on.engine, activations);
            on.engine.pool.run_chunks_mut(&mut blended, CHUNK, |i, part| {
                blend(&x.value[i * CHUNK..], part, recipe.strength);
            });
            Arc::new(blended)
        });
        let input = |matrix: ParamId| blended.as_ref().filter(|_| ternary(matrix)).unwrap_or(&x.value);
        let mut out = layers.map(|(matrix, _)| on.engine.scratch(tokens * on.params[matrix].rows));

        let mut packed: Vec<&PackedMatrix> = Vec::new();
        let mut exact: Vec<&mut [f32]> = Vec::new();
        for (&(matrix, _), y) in layers.iter().zip(&mut out) {
            let rows = on.params[matrix].rows;
            let weight = on.weights.get(matrix);
            if let Some(weight) = weight.and_then(|weight| weight.packed.as_ref()) {
                packed.push(weight);
                exact.push(y);
            } else {
                let w = weight.map_or(&on.params[matrix].values, |weight| &weight.dense);
                let (w, y) = (View::new(w, rows, cols, cols), ViewMut::new(y, tokens, rows, rows));
                let x = View::new(input(matrix), tokens, cols, cols);
                gemm_on(&on.engine.pool, y, Into::Set, 1.0, x, w.t());
            }
        }
        if let Some(activations) = quantised.as_ref().filter(|_| !packed.is_empty()) {
            PackedMatrix::matmul_group(&packed, activations, &mut exact, &on.engine.pool);
        }
        for (&(_, bias), y) in layers.iter().zip(&mut out) {
            if let Some(bias) = bias {
                add_bias(on.engine, y, &on.params[bias].values);
            }
        }

        let out = layers.map(|(matrix, _)| on.params[matrix].rows).into_iter().zip(out);
        let out: Vec<Var> = out.map(|(width, y)| self.var(y, width)).collect();
        let inputs = layers.map(|(matrix, _)| match &quantised {
            Some(activations) if recipe.exact() && ternary(matrix) => Input::Int8(activations.clone()),
            _ => Input::Float(input(matrix).clone()),
        });
        let (from, to) = (x.id, out.iter().map(|y| y.id).collect::<Vec<_>>());
        self.record(move |tape| tape.linear_back(from, cols, layers.iter().zip(&to).zip(inputs)));
        out.try_into().expect("one result per layer")
    }

    fn linear_back<'l>(
        &mut self,
        from: usize,
        cols: usize,
        layers: impl Iterator<Item = ((&'l (ParamId, Option<ParamId>), &'l usize), Input)>,
    ) {
        let on = self.on;
        let tokens = self.tokens();
        let mut dx = self.take_owned(from);
        let mut shared: Option<Arc<Floats>> = None;
        for (((matrix, bias), to), input) in layers {
            let Some(dy) = self.take(*to) else { continue };
            let rows = on.params[*matrix].rows;
            let dy_view = View::new(&dy, tokens, rows, rows);

            // A frozen layer keeps its two bits per weight: floats of it exist for this product only.
            let thawed = on.weights.get(*matrix).filter(|w| w.dense.is_empty()).map(|w| w.thaw(on.engine));
            let weight = match &thawed {
                Some(dense) => dense,
                None => on.weights.get(*matrix).map_or(&on.params[*matrix].values[..], |w| &w.dense),
            };
            let weight = View::new(weight, rows, cols, cols);
            let into = if dx.is_some() { Into::Add } else { Into::Set };
            let sum = dx.get_or_insert_with(|| on.engine.scratch(tokens * cols));
            gemm_on(&on.engine.pool, ViewMut::new(sum, tokens, cols, cols), into, 1.0, dy_view, weight);

            drop(thawed);
            if let Some(bias) = bias.filter(|bias| self.trains(*bias)) {
                let sums = elementwise::column_sums(on.engine, &dy, rows);
                super::norm::add_rows(self.param_grad(bias), &sums);
            }
            if !self.trains(*matrix) {
                continue;
            }
            // Layers of one group share their int8 input, and so its float form.
            let x = match (&input, shared.take()) {
                (Input::Int8(_), Some(dense)) => dense,
                (input, _) => input.dense(on.engine),
            };
            let dw = ViewMut::new(self.param_grad(*matrix), rows, cols, cols);
            gemm_on(&on.engine.pool, dw, Into::Add, 1.0, dy_view.t(), View::new(&x, tokens, cols, cols));
            if matches!(input, Input::Int8(_)) {
                shared = Some(x);
            }
        }
        if let Some(dx) = dx {
            self.give(from, dx);
        }
    }
}

fn add_bias(engine: &Engine, y: &mut [f32], bias: &[f32]) {
    let rows = rows_per_chunk(bias.len());
    engine.pool.run_chunks_mut(y, rows * bias.len(), |_, y| {
        for row in y.chunks_exact_mut(bias.len()) {
            engine.kernels.add_assign(row, bias);
        }
    });
}

/// `q / a`, row by row.
fn dequantize(engine: &Engine, x: &Activations) -> Floats {
    let width = x.cols();
    let mut dense = engine.scratch(x.tokens() * width);
    let rows = rows_per_chunk(width);
    engine.pool.run_chunks_mut(&mut dense, rows * width, |i, dense| {
        vectorised(
            #[inline(always)]
            || {
                for (row, out) in dense.chunks_exact_mut(width).enumerate() {
                    let token = i * rows + row;
                    let inverse = x.inverse(token);
                    for (out, &q) in out.iter_mut().zip(x.row(token)) {
                        *out = f32::from(q) * inverse;
                    }
                }
            },
        );
    });
    dense
}

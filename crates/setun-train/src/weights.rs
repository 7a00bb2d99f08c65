//! The ternary form of the masters: made once per optimiser step, read by every pass of that step.

use setun::config::ActivationType;
use setun::model::Role;
use setun_kernels::{PackedMatrix, TernaryMatrix};

use crate::engine::{Engine, rows_per_chunk, vectorised};
use crate::params::{Kind, Param, ParamId, Params};

/// How masters become weights, and what those multiply.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Columns of a row that share a scale; `None`: one scale per matrix, BitNet's.
    pub group: Option<usize>,
    /// Whether inputs are rounded per token, to int8 (W1.58A8) or int4 (W1.58A4), or stay floats (W1.58A16).
    pub activations: ActivationType,
    /// λ of <https://huggingface.co/blog/1_58_llm_extreme_quantization>, from 0 to 1: weights are `w + λ (t γ − w)`, rounded inputs
    /// `x + λ (x' − x)`.
    pub strength: f32,
}

impl Default for Recipe {
    /// BitNet b1.58.
    fn default() -> Self {
        Self { group: None, activations: ActivationType::Int8, strength: 1.0 }
    }
}

impl Recipe {
    /// The ternary form of a matrix of masters.
    ///
    /// # Errors
    /// When it has not `rows · cols` values.
    pub fn quantize(
        &self,
        engine: &Engine,
        param: &Param,
    ) -> Result<TernaryMatrix, setun_kernels::matrix::MatrixError> {
        let Param { values, rows, cols, .. } = param;
        match self.group {
            Some(group) => {
                TernaryMatrix::quantize_groups(engine.kernels, values, *rows, *cols, group, &engine.pool)
            }
            None => TernaryMatrix::quantize(engine.kernels, values, *rows, *cols, &engine.pool),
        }
    }

    /// Whether products are those of integers, exactly as in inference.
    pub fn exact(&self) -> bool {
        self.activations != ActivationType::Float && self.strength >= 1.0
    }
}

/// One ternary matrix as the forward and the backward pass read it.
#[derive(Debug)]
pub struct TernaryWeight {
    matrix: TernaryMatrix,
    /// In the layout of the integer kernel, where products are exact.
    pub(crate) packed: Option<PackedMatrix>,
    /// `t · γ` in floats, on the way there from the masters while the strength is below 1; `[rows, cols]`.
    pub(crate) dense: Vec<f32>,
}

/// For every parameter its ternary form, if it has one.
#[derive(Debug, Default)]
pub struct Weights {
    list: Vec<Option<TernaryWeight>>,
    recipe: Recipe,
}

impl Weights {
    /// Quantises and packs what is ternary in `params`, as BitNet b1.58 does.
    pub fn new(engine: &Engine, params: &Params) -> Self {
        Self::with(engine, params, Recipe::default())
    }

    /// The same by another recipe.
    pub fn with(engine: &Engine, params: &Params, recipe: Recipe) -> Self {
        let mut weights = Self { list: params.iter().map(|_| None).collect(), recipe };
        weights.refresh(engine, params);
        weights
    }

    /// How they are made.
    pub fn recipe(&self) -> Recipe {
        self.recipe
    }

    /// Another strength, from the next [`Weights::refresh`] on.
    pub fn set_strength(&mut self, strength: f32) {
        self.recipe.strength = strength;
    }

    /// The same for masters that have changed.
    pub fn refresh(&mut self, engine: &Engine, params: &Params) {
        let (pool, kernels, recipe) = (&engine.pool, engine.kernels, self.recipe);
        for (slot, param) in self.list.iter_mut().zip(params.iter()) {
            if param.kind != Kind::Matrix(Role::Ternary) {
                continue;
            }
            if let Some(weight) = slot {
                weight.matrix.requantize(kernels, &param.values, pool);
            }
            let weight = slot.get_or_insert_with(|| {
                let matrix = recipe.quantize(engine, param).expect("a parameter has rows * cols values");
                TernaryWeight { matrix, packed: None, dense: vec![0.0; param.values.len()] }
            });
            let TernaryWeight { matrix, packed, dense } = weight;
            match packed {
                _ if !recipe.exact() => *packed = None,
                Some(packed) => packed.repack(matrix, pool),
                None => *packed = Some(PackedMatrix::pack(matrix, kernels, pool)),
            }
            let rows = rows_per_chunk(param.cols);
            pool.run_chunks_mut(dense, rows * param.cols, |i, dense| {
                for (row, out) in dense.chunks_exact_mut(param.cols).enumerate() {
                    matrix.dequantize_row(i * rows + row, out);
                }
                blend(&param.values[i * rows * param.cols..], dense, recipe.strength);
            });
        }
    }

    /// The ternary form of a parameter.
    pub(crate) fn get(&self, id: ParamId) -> Option<&TernaryWeight> {
        self.list.get(id.0).and_then(Option::as_ref)
    }

    /// The canonical matrix of a parameter, if it is ternary.
    pub fn matrix(&self, id: ParamId) -> Option<&TernaryMatrix> {
        self.get(id).map(|weight| &weight.matrix)
    }
}

/// `rounded = x + λ (rounded − x)`; exactly what it was where λ is 1.
pub(crate) fn blend(x: &[f32], rounded: &mut [f32], strength: f32) {
    if strength >= 1.0 {
        return;
    }
    vectorised(
        #[inline(always)]
        || {
            for (rounded, x) in rounded.iter_mut().zip(x) {
                *rounded = x + strength * (*rounded - x);
            }
        },
    );
}

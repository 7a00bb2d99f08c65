//! The ternary form of the masters: made once per optimiser step, read by every pass of that step.

use setun::config::ActivationType;
use setun::model::Role;
use setun_kernels::{PackedMatrix, TernaryMatrix};

use crate::engine::{Engine, Floats, rows_per_chunk, vectorised};
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
    /// `t · γ` in floats, on the way there from the masters while the strength is below 1; `[rows, cols]`, and empty where the
    /// layer is frozen.
    pub(crate) dense: Vec<f32>,
}

impl TernaryWeight {
    /// What [`TernaryWeight::dense`] would hold.
    pub(crate) fn thaw(&self, engine: &Engine) -> Floats {
        let mut dense = engine.scratch(self.matrix.rows() * self.matrix.cols());
        dequantize(&self.matrix, &mut dense, engine);
        dense
    }
}

fn dequantize(matrix: &TernaryMatrix, dense: &mut [f32], engine: &Engine) {
    let cols = matrix.cols();
    let rows = rows_per_chunk(cols);
    engine.pool.run_chunks_mut(dense, rows * cols, |i, dense| {
        for (row, out) in dense.chunks_exact_mut(cols).enumerate() {
            matrix.dequantize_row(i * rows + row, out);
        }
    });
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

    /// Another way of making them, from the next [`Weights::refresh`] on; only the strength may change once there are any.
    pub fn set_recipe(&mut self, recipe: Recipe) {
        self.recipe = recipe;
    }

    /// The same for masters that have changed.
    pub fn refresh(&mut self, engine: &Engine, params: &Params) {
        let (pool, kernels, recipe) = (&engine.pool, engine.kernels, self.recipe);
        self.list.resize_with(params.len(), || None);
        for (slot, param) in self.list.iter_mut().zip(params.iter()) {
            // What is frozen was set once.
            if param.kind != Kind::Matrix(Role::Ternary) || param.values.is_empty() {
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
            dequantize(matrix, dense, engine);
            let rows = rows_per_chunk(param.cols) * param.cols;
            if recipe.strength < 1.0 {
                pool.run_chunks_mut(dense, rows, |i, dense| {
                    blend(&param.values[i * rows..], dense, recipe.strength);
                });
            }
        }
    }

    /// Sets the ternary form of a frozen parameter.
    pub(crate) fn set_frozen(&mut self, engine: &Engine, id: ParamId, matrix: TernaryMatrix) {
        if self.list.len() <= id.0 {
            self.list.resize_with(id.0 + 1, || None);
        }
        let packed = Some(PackedMatrix::pack(&matrix, engine.kernels, &engine.pool));
        self.list[id.0] = Some(TernaryWeight { matrix, packed, dense: Vec::new() });
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

//! The ternary form of the masters: made once per optimiser step, read by every pass of that step.

use setun::model::Role;
use setun_kernels::{PackedMatrix, TernaryMatrix};

use crate::engine::{Engine, Floats, rows_per_chunk};
use crate::params::{Kind, ParamId, Params};

/// One ternary matrix as the forward and the backward pass read it.
#[derive(Debug)]
pub struct TernaryWeight {
    matrix: TernaryMatrix,
    /// In the layout of the integer kernel.
    pub(crate) packed: PackedMatrix,
    /// `t · γ` in floats, `[rows, cols]`; empty where the layer is frozen.
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
}

impl Weights {
    /// Quantises and packs what is ternary in `params`.
    pub fn new(engine: &Engine, params: &Params) -> Self {
        let mut weights = Self { list: params.iter().map(|_| None).collect() };
        weights.refresh(engine, params);
        weights
    }

    /// The same for masters that have changed.
    pub fn refresh(&mut self, engine: &Engine, params: &Params) {
        let (pool, kernels) = (&engine.pool, engine.kernels);
        self.list.resize_with(params.len(), || None);
        for (slot, param) in self.list.iter_mut().zip(params.iter()) {
            // What is frozen was set once.
            if param.kind != Kind::Matrix(Role::Ternary) || param.values.is_empty() {
                continue;
            }
            if let Some(weight) = slot {
                weight.matrix.requantize(kernels, &param.values, pool);
                weight.packed.repack(&weight.matrix, pool);
            } else {
                let matrix = TernaryMatrix::quantize(kernels, &param.values, param.rows, param.cols, pool)
                    .expect("a parameter has rows * cols values");
                let packed = PackedMatrix::pack(&matrix, kernels, pool);
                *slot = Some(TernaryWeight { matrix, packed, dense: vec![0.0; param.values.len()] });
            }
            if let Some(TernaryWeight { matrix, dense, .. }) = slot {
                dequantize(matrix, dense, engine);
            }
        }
    }

    /// Sets the ternary form of a frozen parameter.
    pub(crate) fn set_frozen(&mut self, engine: &Engine, id: ParamId, matrix: TernaryMatrix) {
        if self.list.len() <= id.0 {
            self.list.resize_with(id.0 + 1, || None);
        }
        let packed = PackedMatrix::pack(&matrix, engine.kernels, &engine.pool);
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

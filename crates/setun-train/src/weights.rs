//! The ternary form of the masters: made once per optimiser step, read by every pass of that step.

use setun::model::Role;
use setun_kernels::{PackedMatrix, TernaryMatrix};

use crate::engine::{Engine, rows_per_chunk};
use crate::params::{Kind, ParamId, Params};

/// One ternary matrix as the forward and the backward pass read it.
#[derive(Debug)]
pub struct TernaryWeight {
    matrix: TernaryMatrix,
    /// In the layout of the integer kernel.
    pub(crate) packed: PackedMatrix,
    /// `t · γ` in floats, `[rows, cols]`.
    pub(crate) dense: Vec<f32>,
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
            if param.kind != Kind::Matrix(Role::Ternary) {
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
                let rows = rows_per_chunk(param.cols);
                pool.run_chunks_mut(dense, rows * param.cols, |i, dense| {
                    for (row, out) in dense.chunks_exact_mut(param.cols).enumerate() {
                        matrix.dequantize_row(i * rows + row, out);
                    }
                });
            }
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

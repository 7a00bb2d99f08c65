//! BitLinear forwards and backwards against PyTorch's (golden/bitlinear-ops).

mod common;

use std::path::Path;

use common::{Bench, assert_close};
use safetensors::{Dtype, SafeTensors};
use setun::model::Role;
use setun::ops::{Linear, Ops};
use setun_kernels::{Activations, PackedMatrix};
use setun_train::params::Kind;
use setun_train::tape::Tape;
use setun_train::weights::Weights;

struct Golden<'a>(SafeTensors<'a>);

impl Golden<'_> {
    fn floats(&self, name: &str) -> Vec<f32> {
        let tensor = self.0.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F32);
        tensor.data().as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
    }

    fn integers(&self, name: &str) -> Vec<i32> {
        let tensor = self.0.tensor(name).unwrap();
        match tensor.dtype() {
            Dtype::I8 => tensor.data().iter().map(|&x| i32::from(x as i8)).collect(),
            _ => tensor.data().as_chunks::<4>().0.iter().map(|x| i32::from_le_bytes(*x)).collect(),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.0.tensor(name).is_ok()
    }
}

#[test]
fn bitlinear_equals_pytorch_in_integers_outputs_and_gradients() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/bitlinear-ops");
    let bytes = std::fs::read(folder.join("bitlinear.safetensors")).unwrap();
    let golden = Golden(SafeTensors::deserialize(&bytes).unwrap());
    for case in ["basic", "batch3d", "rms"] {
        let floats = |name: &str| golden.floats(&format!("{case}.{name}"));
        let shape = golden.0.tensor(&format!("{case}.w")).unwrap().shape().to_vec();
        let (rows, cols) = (shape[0], shape[1]);
        let x = floats("x");
        let tokens = x.len() / cols;

        let mut bench = Bench::new(2);
        let weight = bench.add("w", rows, cols, Kind::Matrix(Role::Ternary), floats("w"));
        let bias = golden
            .has(&format!("{case}.bias"))
            .then(|| bench.add("bias", rows, 1, Kind::Bias, floats("bias")));
        let norm = golden
            .has(&format!("{case}.rms_weight"))
            .then(|| bench.add("norm", cols, 1, Kind::Norm, floats("rms_weight")));

        let mut gradients = bench.gradients();
        let mut tape = Tape::new(bench.setting(1, tokens), &mut gradients);
        let input = tape.input(&x, cols);
        let normed = norm.map_or(input.clone(), |weight| tape.rms_norm(&input, &weight, 1e-6));

        let weights = Weights::new(&bench.engine, &bench.params);
        let matrix = weights.matrix(weight).unwrap();
        let trits: Vec<i32> =
            (0..rows).flat_map(|r| (0..cols).map(move |c| i32::from(matrix.trit(r, c)))).collect();
        assert_eq!(trits, golden.integers(&format!("{case}.w_ternary")), "{case}: weights");
        let (kernels, pool) = (bench.engine.kernels, &bench.engine.pool);
        let mut codes = Activations::new();
        codes.quantize(kernels, normed.values(), tokens, cols, None);
        let found: Vec<i32> = (0..tokens).flat_map(|t| codes.row(t).iter().map(|&q| i32::from(q))).collect();
        assert_eq!(found, golden.integers(&format!("{case}.x_int8")), "{case}: activations");
        let mut sums = vec![0; tokens * rows];
        PackedMatrix::pack(matrix, kernels, pool).matmul_i32(&codes, &mut sums, pool);
        assert_eq!(sums, golden.integers(&format!("{case}.acc_int32")), "{case}: sums");

        let [y] = tape.linear(&normed, [&Linear { bias, ..Linear::plain(weight) }]);
        let expect = |what: &str, found: &[f32]| {
            let expected: Vec<f64> = floats(what).into_iter().map(f64::from).collect();
            assert_close(&format!("{case}, {what}"), found, &expected, 1e-5);
        };
        expect("y", y.values());
        tape.seed(&y, &floats("grad_y"));
        drop(normed);
        let [dx] = tape.backward_to([&input]);
        expect("grad_x", &dx.unwrap());
        expect("grad_w", gradients.get(weight));
        if let Some(bias) = bias {
            expect("grad_bias", gradients.get(bias));
        }
        if let Some(norm) = norm {
            expect("grad_rms_weight", gradients.get(norm));
        }
    }
}

//! Attention over packed documents against PyTorch's (golden/packed-attention).

mod common;

use std::path::Path;

use common::{Bench, assert_close};
use safetensors::SafeTensors;
use setun::ops::{Attention, Ops};
use setun_train::tape::Tape;

#[test]
fn attention_within_documents_equals_pytorch_under_a_mask_with_its_gradients() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/packed-attention/packed.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let words =
        |name: &str| -> Vec<[u8; 4]> { golden.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec() };
    let floats = |name: &str| -> Vec<f32> { words(name).into_iter().map(f32::from_le_bytes).collect() };
    let starts: Vec<u32> = words("starts").into_iter().map(u32::from_le_bytes).collect();
    for (case, window) in [("whole", None), ("window", Some(20))] {
        let bench = Bench::new(2);
        let mut gradients = bench.gradients();
        let mut tape = Tape::new(bench.setting(1, starts.len()), &mut gradients);
        tape.documents(&starts);
        let [q, k, v] = [("q", 32), ("k", 16), ("v", 16)]
            .map(|(name, width)| tape.input(&floats(&format!("{case}.{name}")), width));
        let [rq, rk] = [tape.rope(q.clone(), 4, 8), tape.rope(k.clone(), 2, 8)];
        let shape = Attention { layer: 0, heads: 4, kv_heads: 2, head_dim: 8, scale: 0.4, window };
        let out = tape.attention(rq, rk, v.clone(), shape);
        tape.seed(&out, &floats(&format!("{case}.slope")));
        let out = out.values().to_vec();
        let found = tape.backward_to([&q, &k, &v]).map(Option::unwrap);
        let all = std::iter::once(&out).chain(&found).zip(["out", "dq", "dk", "dv"]);
        for (found, name) in all {
            let expected: Vec<f64> = floats(&format!("{case}.{name}")).into_iter().map(f64::from).collect();
            assert_close(&format!("{case}.{name}"), found, &expected, 2e-6);
        }
    }
}

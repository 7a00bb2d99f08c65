use super::*;

#[test]
fn names_of_both_worlds_have_a_layer_a_kind_and_a_part() {
    for (name, layer, kind, part) in [
        ("model.layers.12.self_attn.q_proj.weight", Some(12), "q_proj", Part::Attention),
        ("model.layers.0.mlp.experts.7.up_proj.weight", Some(0), "experts.*.up_proj", Part::FeedForward),
        ("model.layers.0.mlp.up_proj.weight_scale", Some(0), "up_proj.weight_scale", Part::FeedForward),
        ("model.layers.3.linear_attn.conv1d.weight", Some(3), "conv1d", Part::Attention),
        ("model.layers.3.self_attn.inner_attn_ln.weight", Some(3), "inner_attn_ln", Part::Norms),
        ("model.layers.3.self_attn.q_proj.rms_norm.weight", Some(3), "q_proj.rms_norm", Part::Norms),
        ("model.embed_tokens.weight", None, "embed_tokens", Part::Embedding),
        ("blk.5.ffn_gate_exps.weight", Some(5), "ffn_gate_exps", Part::FeedForward),
        ("blk.5.attn_sub_norm.weight", Some(5), "attn_sub_norm", Part::Norms),
        ("blk.5.ssm_out.weight", Some(5), "ssm_out", Part::Attention),
        ("token_embd.weight", None, "token_embd", Part::Embedding),
        ("output_norm.weight", None, "output_norm", Part::Norms),
        ("output.weight", None, "output", Part::Head),
        ("lm_head.weight", None, "lm_head", Part::Head),
        ("rope_freqs.weight", None, "rope_freqs", Part::Other),
    ] {
        assert_eq!((place(name), part_of(name)), ((layer, kind.to_owned()), part), "{name}");
    }
}

#[test]
fn trits_are_counted_without_those_that_fill_up_a_row() {
    let trits = [1, 0, -1, 0, 1, 1, -1, 0, 0, 1].repeat(7); // 14 rows of 5: three codes fill each up.
    let scales = Scales::Row((0..14).map(|i| i as f32).collect());
    let matrix = TernaryMatrix::from_trits(14, 5, &trits, scales).unwrap();
    let Values::Ternary { minus, zero, plus, scale_per, scales, bad_scales, scale_count } = ternary(&matrix)
    else {
        panic!("a ternary matrix")
    };
    assert_eq!((minus, zero, plus), (14, 28, 28));
    assert_eq!((scale_per.as_str(), scale_count, bad_scales), ("row", 14, 0));
    assert_eq!(scales, Spread { min: 1.0, median: 7.0, max: 13.0 }, "zero is no scale of a weight");
}

#[test]
fn values_that_are_no_numbers_are_found_in_every_plain_type() {
    let tensor = |encoding: Encoding, data: Vec<u8>| {
        let spec = crate::format::TensorSpec { name: "t".into(), shape: vec![2, 2], encoding };
        floats(&Tensor::new(spec, data), 2)
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let values = [1.0, 2.0, bad, 4.0];
        let f32s: Vec<u8> = values.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
        let f16s = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        let bf16s = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes());
        assert!(tensor(Encoding::F32, f32s).1 && tensor(Encoding::F16, f16s).1);
        assert!(tensor(Encoding::BF16, bf16s.collect()).1);
    }
    let fine: Vec<u8> = [1.0f32, -1.0, 5.0, -5.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let expected = Values::Float { rms: 13f32.sqrt(), largest: 5.0 };
    assert_eq!(tensor(Encoding::F32, fine), (Some(expected), false));
}

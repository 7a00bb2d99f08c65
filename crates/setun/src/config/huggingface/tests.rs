use super::super::rope::RopeScaling;
use super::*;

fn read(class: &str, changes: Value) -> Result<ModelConfig, ModelError> {
    let mut json = json!({
        "architectures": [class], "hidden_act": "silu", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    });
    for (key, value) in changes.as_object().unwrap() {
        match value.as_str() {
            Some("absent") => json.as_object_mut().unwrap().remove(key),
            _ => json.as_object_mut().unwrap().insert(key.clone(), value.clone()),
        };
    }
    ModelConfig::from_json(&json)
}

#[test]
fn keys_that_a_file_leaves_out_have_their_class_defaults() {
    let absent = json!({
        "rope_theta": "absent", "hidden_act": "absent", "max_position_embeddings": "absent", "num_key_value_heads": "absent",
    });
    let llama = read("LlamaForCausalLM", absent.clone()).unwrap();
    assert_eq!((llama.rope.theta, llama.activation, llama.max_positions), (10000.0, Activation::Silu, 2048));
    assert_eq!(llama.kv_heads, 8);
    let mistral = read("MistralForCausalLM", absent).unwrap();
    assert_eq!((mistral.max_positions, mistral.kv_heads, mistral.windows[0]), (131_072, 8, Some(4096)));
    let qwen = json!({"use_sliding_window": true, "num_hidden_layers": 30, "sliding_window": 16});
    let qwen = read("Qwen2ForCausalLM", qwen).unwrap();
    assert_eq!((qwen.windows[27], qwen.windows[28]), (None, Some(16)));
}

#[test]
fn null_is_not_the_class_default() {
    let null = json!({
        "num_key_value_heads": null, "sliding_window": null, "head_dim": null, "rope_scaling": null,
        "quantization_config": null, "eos_token_id": null, "layer_types": null,
    });
    let config = read("MistralForCausalLM", null).unwrap();
    assert_eq!((config.kv_heads, config.windows[0], config.head_dim), (8, None, 4));
    let config =
        read("Qwen2ForCausalLM", json!({"use_sliding_window": true, "sliding_window": null})).unwrap();
    assert_eq!(config.windows, vec![None; 4]);
    assert!(read("x", json!({"architectures": null, "model_type": "llama"})).is_ok());
}

#[test]
fn windows_survive_the_way_through_json_in_every_family() {
    for class in ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        for windows in [vec![None; 4], vec![Some(7); 4], vec![None, Some(7), None, Some(7)]] {
            let config = ModelConfig { windows, ..read(class, json!({})).unwrap() };
            assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
        }
    }
}

#[test]
fn qwen3_has_heads_of_their_own_width_and_norms_on_them() {
    let given = read("Qwen3ForCausalLM", json!({"head_dim": 64, "attention_bias": true})).unwrap();
    assert_eq!((given.head_dim, given.qk_norm, given.qkv_bias, given.output_bias), (64, true, true, true));
    // The class's own width, unless null says that it follows from the others.
    assert_eq!(read("Qwen3ForCausalLM", json!({})).unwrap().head_dim, 128);
    assert_eq!(read("Qwen3ForCausalLM", json!({"head_dim": null})).unwrap().head_dim, 4);
    assert!(!read("Qwen2ForCausalLM", json!({})).unwrap().qk_norm);
    let window = json!({"use_sliding_window": false, "sliding_window": 16, "max_window_layers": 0});
    assert_eq!(read("Qwen3ForCausalLM", window).unwrap().windows, vec![None; 4]);
    let new = json!({"architectures": null, "model_type": "qwen3", "rope_theta": "absent",
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}});
    let rope = read("x", new).unwrap().rope;
    assert_eq!(rope.theta, 1e6);
    let RopeScaling::Yarn { attention_factor, original, .. } = rope.scaling else { panic!("{rope:?}") };
    assert!((attention_factor - 1.138_629).abs() < 1e-6 && original == 32, "{attention_factor}");
}

#[test]
fn whole_numbers_may_be_spelled_as_floats() {
    let config = json!({"vocab_size": 1e4, "max_position_embeddings": 2048.0, "rope_theta": 1000042});
    let config = read("LlamaForCausalLM", config).unwrap();
    assert_eq!((config.vocab_size, config.max_positions, config.rope.theta), (10000, 2048, 1_000_042.0));
    for wrong in [json!(64.5), json!(-1), json!(1e300), json!("64"), json!([64])] {
        let error = read("LlamaForCausalLM", json!({"vocab_size": wrong})).unwrap_err().to_string();
        assert!(error.contains("`vocab_size`"), "{error}");
    }
}

#[test]
fn a_value_of_the_wrong_type_names_its_field() {
    for (field, value) in [
        ("hidden_size", json!("32")),
        ("tie_word_embeddings", json!(1)),
        ("rope_scaling", json!({"rope_type": "linear", "factor": "2"})),
        ("quantization_config", json!("bitnet")),
        ("layer_types", json!("full_attention")),
    ] {
        let error = read("LlamaForCausalLM", json!({field: value})).unwrap_err().to_string();
        assert!(error.contains(&format!("`{field}`")), "{error}");
    }
    assert!(ModelConfig::from_json(&json!([1])).unwrap_err().to_string().contains("config.json"));
}

#[test]
fn rope_sections_per_kind_of_layer_are_read_where_they_agree_and_refused_where_not() {
    let section = |theta: f64| json!({"rope_type": "linear", "factor": 2.0, "rope_theta": theta});
    let both = |a, b| {
        let sections = json!({"full_attention": section(a), "sliding_attention": section(b)});
        read("LlamaForCausalLM", json!({"rope_theta": "absent", "rope_parameters": sections}))
    };
    let config = both(5000.0, 5000.0).unwrap();
    assert_eq!((config.rope.theta, config.rope.scaling), (5000.0, RopeScaling::Linear { factor: 2.0 }));
    let error = both(5000.0, 6000.0).unwrap_err().to_string();
    assert!(error.contains("`rope_parameters`"), "{error}");
}

#[test]
fn whole_heads_rotate_whatever_the_partial_factor_which_a_scaled_rope_refuses() {
    let half = json!({"partial_rotary_factor": 0.5});
    assert_eq!(
        read("LlamaForCausalLM", half).unwrap().rope,
        read("LlamaForCausalLM", json!({})).unwrap().rope
    );
    let scaled =
        json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}});
    let error = read("Qwen3ForCausalLM", scaled).unwrap_err().to_string();
    assert!(error.contains("`partial_rotary_factor` is 0.5"), "{error}");
}

#[test]
fn a_model_type_of_another_family_than_the_class_is_refused() {
    let error = read("LlamaForCausalLM", json!({"model_type": "bitnet"})).unwrap_err().to_string();
    assert!(error.contains("`model_type` is bitnet") && error.contains("LlamaForCausalLM"), "{error}");
    assert_eq!(read("LlamaForCausalLM", json!({"model_type": "a-fork"})).unwrap().family, Family::Llama);
    let older = json!({"model_type": "llama", "weight_bits": 1, "input_bits": 8});
    assert_eq!(read("BitnetForCausalLM", older).unwrap().family, Family::BitNetSilu);
}

#[test]
fn classes_without_a_head_are_embedding_models() {
    let config = read("Qwen3Model", json!({})).unwrap();
    assert_eq!((config.family, config.pooling), (Family::Qwen3, Some(Pooling::Unstated)));
    assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    assert_eq!(
        pooling(&json!({"pooling_mode_cls_token": true, "pooling_mode_lasttoken": false})),
        Pooling::First
    );
    assert_eq!(
        pooling(&json!({"pooling_mode_cls_token": true, "pooling_mode_lasttoken": true})),
        Pooling::Unstated
    );
}

#[test]
fn an_inner_norm_needs_a_usable_epsilon() {
    let q = |eps: f64| {
        let q = json!({"quant_method": "bitnet", "use_rms_norm": true, "rms_norm_eps": eps});
        read("LlamaForCausalLM", json!({"quantization_config": q}))
    };
    assert_eq!(q(1e-6).unwrap().inner_norm_eps, Some(1e-6));
    assert!(q(-1.0).unwrap_err().to_string().contains("quantization_config.rms_norm_eps"));
}

#[test]
fn four_bits_and_rotated_inputs_are_read_and_written_and_half_of_them_refused() {
    let q = |more: Value| {
        let mut q = json!({"quant_method": "bitnet", "linear_class": "autobitlinear"});
        q.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        read("BitNetForCausalLM", json!({"quantization_config": q, "num_key_value_heads": 2}))
    };
    let config = q(json!({"activation_bits": 4})).unwrap();
    assert_eq!(config.activations(), ActivationType::Int4);
    assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    assert!(q(json!({"activation_bits": 5})).unwrap_err().to_string().contains("activation_bits` is 5"));
    let rotated = |block: usize, modules: &[&str]| {
        q(json!({"quant_method": "bitnet_hadamard", "hadamard": {"block_size": block, "modules": modules}}))
    };
    let config = rotated(8, &["o_proj", "down_proj"]).unwrap();
    assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    let rotation = config.rotation.unwrap();
    assert_eq!(rotation.of_linear("model.layers.0.mlp.down_proj", 16).unwrap().unwrap().block, 8);
    assert_eq!(rotation.of_linear("model.layers.0.mlp.up_proj", 16).unwrap(), None);
    assert!(
        rotated(12, &["o_proj"])
            .unwrap_err()
            .to_string()
            .contains("`quantization_config.hadamard.block_size` is 12")
    );
    assert!(rotated(8, &["q_proj"]).unwrap_err().to_string().contains("`o_proj`, `down_proj` or both"));
    let error = q(json!({"quant_method": "bitnet_hadamard"})).unwrap_err().to_string();
    assert!(error.contains("`quantization_config.hadamard`"), "{error}");
    let error = q(json!({"hadamard": {"block_size": 8, "modules": ["o_proj"]}})).unwrap_err().to_string();
    assert!(error.contains("unless quant_method is `bitnet_hadamard`"), "{error}");
}

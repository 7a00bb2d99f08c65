//! Families that people have ternary models of and that this version does not build: recognised, so that the refusal says what
//! is missing instead of listing what is not.

/// A family by its names in `config.json` (class, `model_type`) and GGUF (`general.architecture`).
struct Known {
    classes: &'static [&'static str],
    types: &'static [&'static str],
    architectures: &'static [&'static str],
    /// What a person calls it.
    name: &'static str,
    missing: &'static str,
}

const KNOWN: &[Known] = &[
    Known {
        classes: &["Qwen3NextForCausalLM"],
        types: &["qwen3_next"],
        architectures: &["qwen3next"],
        name: "Qwen3-Next",
        missing: "the joint projections of its gated DeltaNets and experts that all tokens share",
    },
    Known {
        classes: &["Qwen3_5ForConditionalGeneration"],
        types: &["qwen3_5"],
        architectures: &[],
        name: "Qwen3.5 with images",
        missing: "its image encoder and the settings nested in `text_config` (take the text model's own folder or GGUF file)",
    },
    Known {
        classes: &[],
        types: &["prism_hadamard_qwen35"],
        architectures: &[],
        name: "the MLX pack of Ternary-Bonsai-2-27B",
        missing: "rotations outside of GGUF (take the model's GGUF file)",
    },
    Known {
        classes: &["Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"],
        types: &["qwen3_5_moe", "qwen3_5_moe_text"],
        architectures: &["qwen35moe"],
        name: "the Qwen3.5-MoE hybrid",
        missing: "experts that all tokens share",
    },
    Known {
        classes: &["Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3Model", "Gemma3ForConditionalGeneration"],
        types: &["gemma3", "gemma3_text"],
        architectures: &["gemma3", "gemma-embedding"],
        name: "Gemma 3 (bitnet-embedding-270m)",
        missing: "GELU gates, norms after each block and scaled embeddings",
    },
    Known {
        classes: &["MiniCPMForCausalLM", "MiniCPM3ForCausalLM", "MiniCPM4ForCausalLM"],
        types: &["minicpm", "minicpm3", "minicpm4"],
        architectures: &["minicpm", "minicpm3"],
        name: "MiniCPM (BitCPM)",
        missing: "its factors on embeddings, residuals and logits",
    },
    Known {
        classes: &["OLMoForCausalLM", "OlmoForCausalLM", "OlmoModelForCausalLM"],
        types: &["olmo", "hf_olmo"],
        architectures: &["olmo"],
        name: "OLMo (OLMo-Bitnet-1B)",
        missing: "layer norms without weights, and for its ternary layers a definition outside the code that came with it,",
    },
    Known {
        classes: &["Olmo2ForCausalLM", "Olmo3ForCausalLM"],
        types: &["olmo2", "olmo3"],
        architectures: &["olmo2"],
        name: "OLMo 2",
        missing: "norms after attention and feed-forward instead of before",
    },
    Known {
        classes: &["FalconH1ForCausalLM"],
        types: &["falcon_h1"],
        architectures: &["falcon-h1"],
        name: "Falcon-H1",
        missing: "its state-space (Mamba) layers",
    },
    Known {
        classes: &["LLaDAModelLM"],
        types: &["llada"],
        architectures: &["llada", "dream"],
        name: "a masked diffusion model",
        missing: "attention to later tokens and generation by unmasking",
    },
    Known {
        classes: &["LlavaForConditionalGeneration", "OpenVLAForActionPrediction"],
        types: &["llava", "openvla"],
        architectures: &["clip"],
        name: "a vision-language model",
        missing: "image encoders",
    },
    Known {
        classes: &["HGRNBitForCausalLM", "RWKV7ForCausalLM"],
        types: &["hgrn_bit", "rwkv7"],
        architectures: &["rwkv7"],
        name: "a linear-recurrent model (MatMul-free LM)",
        missing: "its recurrent layers",
    },
    Known {
        classes: &[],
        types: &["maple"],
        architectures: &["maple"],
        name: "Maple",
        missing: "clamped gates, norms on heads in windowed layers and scales per row in experts",
    },
    Known {
        classes: &["MixtralForCausalLM"],
        types: &["mixtral"],
        architectures: &[],
        name: "Mixtral",
        missing: "its own names of experts and routers",
    },
    Known {
        classes: &["BertModel", "BertForMaskedLM", "BertForSequenceClassification"],
        types: &["bert"],
        architectures: &["bert"],
        name: "BERT",
        missing: "encoders",
    },
    Known {
        classes: &["T5ForConditionalGeneration", "T5EncoderModel"],
        types: &["t5"],
        architectures: &["t5", "t5encoder"],
        name: "T5",
        missing: "encoders and decoders that read them",
    },
];

/// Models whose classes have no settled spelling, by a part of it in lower case: that part, name, what is missing.
const BY_PART: &[(&str, &str, &str)] = &[
    ("maple", "Maple", "clamped gates, norms on heads in windowed layers and scales per row in experts"),
    ("mdlm", "a masked diffusion model (echo-mdlm)", "attention to later tokens and generation by unmasking"),
    ("bitvla", "BitVLA", "image encoders and its action head"),
    ("bitmar", "BitMar", "image encoders and its episodic memory"),
    (
        "qtea",
        "QTEA",
        "its sparse float columns beside the ternary weights, which only its own program defines,",
    ),
    ("sherry", "Sherry (AngelSlim)", "its 3-of-4 sparse packing (STQ)"),
    ("tequila", "Tequila (AngelSlim)", "its reactivated zero weights"),
];

/// The end of a refusal of the family with this class or `model_type`: empty, or what it is and what it lacks here.
pub(super) fn in_config(class: Option<&str>, model_type: Option<&str>) -> String {
    let names = [class, model_type];
    clause(names.into_iter().flatten(), |known| {
        class.is_some_and(|class| known.classes.contains(&class))
            || model_type.is_some_and(|kind| known.types.contains(&kind))
    })
}

/// The same for a GGUF architecture.
pub(super) fn in_gguf(architecture: &str) -> String {
    clause([architecture].into_iter(), |known| known.architectures.contains(&architecture))
}

fn clause<'a>(names: impl Iterator<Item = &'a str>, is: impl Fn(&Known) -> bool) -> String {
    let names: Vec<String> = names.map(str::to_lowercase).collect();
    let listed = KNOWN.iter().find(|known| is(known)).map(|known| (known.name, known.missing));
    let by_part = || BY_PART.iter().find(|(part, ..)| names.iter().any(|name| name.contains(part)));
    match listed.or_else(|| by_part().map(|&(_, name, missing)| (name, missing))) {
        Some((name, missing)) => {
            format!("; {name} is recognised, but not supported: {missing} are missing here")
        }
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    #[test]
    fn known_families_are_refused_by_name_with_what_they_lack() {
        for known in KNOWN {
            for class in known.classes {
                let json = serde_json::json!({"architectures": [class]});
                let error = ModelConfig::from_json(&json).unwrap_err().to_string();
                assert!(error.contains(known.name) && error.contains(known.missing), "{error}");
            }
            for kind in known.types {
                let json = serde_json::json!({"model_type": kind});
                let error = ModelConfig::from_json(&json).unwrap_err().to_string();
                assert!(error.contains(known.name), "{error}");
            }
            for architecture in known.architectures {
                assert!(in_gguf(architecture).contains(known.missing), "{architecture}");
            }
        }
        for (class, named) in [
            ("MapleForCausalLM", "Maple"),
            ("EchoMDLM", "diffusion"),
            ("BitVLAForActionPrediction", "BitVLA"),
        ] {
            let json = serde_json::json!({"architectures": [class]});
            let error = ModelConfig::from_json(&json).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("missing here"), "{error}");
        }
        assert_eq!(in_gguf("llama"), "");
    }
}

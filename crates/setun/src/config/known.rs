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
        missing: "the joint projections of its gated DeltaNets and the expert that all tokens share",
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
        missing: "the expert that all tokens share",
    },
    Known {
        classes: &["Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3ForConditionalGeneration"],
        types: &["gemma3", "gemma3_text"],
        architectures: &["gemma3", "gemma-embedding"],
        name: "Gemma 3",
        missing: "GELU gates, norms after each block and scaled embeddings",
    },
    Known {
        classes: &["MiniCPMForCausalLM", "MiniCPM3ForCausalLM"],
        types: &["minicpm", "minicpm3", "minicpm4"],
        architectures: &["minicpm", "minicpm3"],
        name: "MiniCPM (BitCPM)",
        missing: "its factors on embeddings, residuals and logits",
    },
    Known {
        classes: &["OLMoForCausalLM", "OlmoForCausalLM", "OlmoModelForCausalLM"],
        types: &["olmo", "hf_olmo"],
        architectures: &["olmo"],
        name: "OLMo",
        missing: "layer norms without weights",
    },
    Known {
        classes: &[],
        types: &["maple"],
        architectures: &["maple"],
        name: "Maple",
        missing: "its clamped gates",
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

/// The end of a refusal of the family with this class or `model_type`: empty, or what it is and what it lacks here.
pub(super) fn in_config(class: Option<&str>, model_type: Option<&str>) -> String {
    clause(|known| {
        class.is_some_and(|class| known.classes.contains(&class))
            || model_type.is_some_and(|kind| known.types.contains(&kind))
    })
}

/// The same for a GGUF architecture.
pub(super) fn in_gguf(architecture: &str) -> String {
    clause(|known| known.architectures.contains(&architecture))
}

fn clause(is: impl Fn(&Known) -> bool) -> String {
    KNOWN.iter().find(|known| is(known)).map_or(String::new(), |known| {
        format!("; {} is recognised, but not supported: {} are missing here", known.name, known.missing)
    })
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
        assert_eq!(in_gguf("llama"), "");
    }
}

//! A trained model as a Hugging Face folder, which Setun and transformers load.
//!
//! | file | holds |
//! |---|---|
//! | `config.json` | shape and numerics |
//! | `model.safetensors` | the weights, see [`TernaryForm`] |
//! | `tokenizer.json`, `tokenizer_config.json` | the tokenizer |
//! | `generation_config.json` | which tokens start and end a text |
//!
//! Each file is written beside its place and renamed, `config.json` last: a folder with one is complete.

use std::path::Path;

use serde_json::{Value, json};
use setun::config::{ActivationType, Exceptions, Family, ModelConfig, Numerics, Storage, Ternary};
use setun::error::ModelError;
use setun::format::{
    Encoding, SafetensorsWriter, ScaleConvention, Scaling, TensorSpec, encode_floats, encode_hf_packed,
};
use setun::model::Role;
use setun::recommended::Recommended;

use crate::engine::Engine;
use crate::error::TrainError;
use crate::finetune::Base;
use crate::params::{Kind, Param, Params};
use crate::vocabulary::{Vocabulary, write_whole};
use crate::weights::Recipe;

/// How ternary layers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TernaryForm {
    /// Four codes to a byte and the scale γ (`autobitlinear`, `offline`), as microsoft/bitnet-b1.58-2B-4T: what
    /// inference needs. Of weight-only models floats that are 0 or ± their group's scale, as Ternary-Bonsai's "unpacked" files:
    /// loaders of packed layers round activations.
    #[default]
    Packed,
    /// The full-precision masters (`autobitlinear`, `online`): what further training needs.
    Masters,
}

/// What an export chooses.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportOptions {
    /// Form of the ternary layers; a float model has none.
    pub ternary: TernaryForm,
    /// [`Encoding::F32`] or [`Encoding::BF16`] for embeddings, norms, masters and float layers. F32, the default, keeps
    /// every bit of what was trained, so that the trainer's logits are reproduced; BF16 halves what is not ternary.
    /// The scales of packed layers are F32 in both.
    pub floats: Encoding,
    /// Weights that share a scale in a weight-only model ([`Recipe::group`]).
    pub group: Option<usize>,
    /// Sampling recommended to those who run the model.
    pub sampling: Recommended,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            ternary: TernaryForm::Packed,
            floats: Encoding::F32,
            group: None,
            sampling: Recommended::default(),
        }
    }
}

/// Writes the model into `folder`, which is created if need be.
///
/// # Errors
/// When a packed layer has a number of rows that is not a multiple of 4, a value is not finite, `floats` is
/// neither F32 nor BF16, or a file cannot be written.
pub fn export(
    folder: &Path,
    config: &ModelConfig,
    params: &Params,
    vocabulary: &Vocabulary,
    options: &ExportOptions,
) -> Result<(), TrainError> {
    check(params, options)?;
    std::fs::create_dir_all(folder).map_err(|e| TrainError::write(folder, e))?;
    let config_file = folder.join("config.json");
    match std::fs::remove_file(&config_file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(TrainError::write(&config_file, e));
        }
        _ => {}
    }
    let weight_only =
        matches!(&config.numerics, Numerics::Ternary(t) if t.activations == ActivationType::Float);
    write_weights(&folder.join("model.safetensors"), params, weight_only, options)?;
    vocabulary.save(&folder.join("tokenizer.json"))?;
    write_json(&folder.join("tokenizer_config.json"), &tokenizer_config(config, vocabulary)?)?;
    write_json(&folder.join("generation_config.json"), &generation_config(config, &options.sampling))?;
    write_json(&config_file, &config_json(config, options)?)
}

/// Writes a fine-tuned model into `folder`, with the tokenizer, templates and recommended sampling of the one it was made of. The
/// folder is made beside its place and renamed; one that is there is replaced.
///
/// # Errors
/// As [`export`].
pub fn export_of(
    base: &Base,
    folder: &Path,
    params: &Params,
    options: &ExportOptions,
) -> Result<(), TrainError> {
    check(params, options)?;
    crate::finetune::replace_folder(folder, |made| {
        write_weights(&made.join("model.safetensors"), params, false, options)?;
        base.write_companions(made)?;
        write_json(&made.join("config.json"), &config_json(base.config(), options)?)
    })
}

/// What could not be written is found before anything is.
fn check(params: &Params, options: &ExportOptions) -> Result<(), TrainError> {
    if !matches!(options.floats, Encoding::F32 | Encoding::BF16) {
        return Err(TrainError::setting("floats", &options.floats, "F32 or BF16"));
    }
    match params.iter().find_map(not_finite) {
        None => Ok(()),
        Some((param, index)) => {
            let what = format!("value {index} is not a finite number, so the model cannot be exported");
            Err(ModelError::Tensor { name: param.name.clone(), what }.into())
        }
    }
}

fn not_finite(param: &Param) -> Option<(&Param, usize)> {
    let index = param.values.iter().position(|v| !v.is_finite())?;
    Some((param, index))
}

fn write_weights(
    path: &Path,
    params: &Params,
    weight_only: bool,
    options: &ExportOptions,
) -> Result<(), TrainError> {
    let ternary = |p: &Param| p.kind == Kind::Matrix(Role::Ternary) && options.ternary == TernaryForm::Packed;
    let packed = |p: &Param| ternary(p) && !weight_only;
    let spec = |name: String, shape: Vec<usize>, encoding: Encoding| TensorSpec { name, shape, encoding };
    let mut specs = Vec::new();
    for param in params.iter() {
        if packed(param) {
            let shape = vec![param.rows / 4, param.cols];
            specs.push(spec(param.name.clone(), shape, Encoding::U8));
            specs.push(spec(scale_name(param), vec![1], Encoding::F32));
        } else {
            specs.push(spec(param.name.clone(), param.shape(), options.floats.clone()));
        }
    }
    // Small enough that one thread and two passes over the scales do.
    let (engine, recipe) = (Engine::new(1), Recipe { group: options.group, ..Recipe::default() });
    let quantized = |param: &Param| {
        recipe
            .quantize(&engine, param)
            .map_err(|e| ModelError::Tensor { name: param.name.clone(), what: e.to_string() })
    };
    let encoded = |param: &Param| -> Result<(Vec<u8>, Vec<u8>), TrainError> {
        let matrix = quantized(param)?;
        let (convention, f32) = (ScaleConvention::Multiply, Encoding::F32);
        Ok(encode_hf_packed(&param.name, &matrix, convention, &f32, Scaling::Exact)?)
    };
    let mut writer = SafetensorsWriter::create(path, &[], specs)?;
    while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
        let owner = |p: &&Param| p.name == name || packed(p) && scale_name(p) == name;
        let param = params.iter().find(owner).expect("every spec was made from a parameter");
        let bytes = match (packed(param), param.name == name) {
            (true, true) => encoded(param)?.0,
            (true, false) => encoded(param)?.1,
            (false, _) if ternary(param) => {
                let matrix = quantized(param)?;
                let mut copies = vec![0.0; param.values.len()];
                for (row, out) in copies.chunks_exact_mut(param.cols).enumerate() {
                    matrix.dequantize_row(row, out);
                }
                encode_floats(&name, &copies, param.cols, &options.floats)?
            }
            (false, _) => match params.iter().find(|layer| packed(layer) && is_bias_of(param, layer)) {
                // Readers of this form add the bias before they multiply by the scale.
                Some(layer) => {
                    let scale = setun_kernels::quant::absmean_scale(&layer.values);
                    let values: Vec<f32> = param.values.iter().map(|b| b / scale).collect();
                    encode_floats(&name, &values, param.cols, &options.floats)?
                }
                None => encode_floats(&name, &param.values, param.cols, &options.floats)?,
            },
        };
        writer.tensor(&bytes)?;
    }
    Ok(writer.finish()?)
}

fn is_bias_of(param: &Param, layer: &Param) -> bool {
    param.kind == Kind::Bias && param.name.strip_suffix("bias") == layer.name.strip_suffix("weight")
}

/// Every linear layer, as `modules_to_not_convert` names them.
const FLOAT_TWIN: [&str; 8] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"];

/// `….q_proj.weight` → `….q_proj.weight_scale`.
fn scale_name(param: &Param) -> String {
    format!("{}_scale", param.name)
}

fn config_json(config: &ModelConfig, options: &ExportOptions) -> Result<Value, ModelError> {
    let mut stored = config.clone();
    match &mut stored.numerics {
        // What its tensors hold says that it is ternary, no field of the configuration.
        Numerics::Ternary(ternary) if ternary.activations == ActivationType::Float => {}
        Numerics::Ternary(ternary) => {
            ternary.storage = match options.ternary {
                TernaryForm::Packed => Storage::Multiply,
                TernaryForm::Masters => Storage::Masters,
            };
        }
        // A BitNet block says outright that its layers are float: without a quantization_config it would be one whose
        // metadata got lost, and readers differ in what they make of that.
        Numerics::Float if matches!(config.family, Family::BitNet | Family::BitNetSilu) => {
            let all = FLOAT_TWIN.map(str::to_owned).to_vec();
            let exceptions = Some(Exceptions::new(all)?);
            let storage = Storage::Masters;
            stored.numerics = Numerics::Ternary(Ternary::bitnet(storage, exceptions));
        }
        Numerics::Float => {}
    }
    let mut json = stored.to_json();
    json["torch_dtype"] = match options.floats {
        Encoding::BF16 => "bfloat16".into(),
        _ => "float32".into(),
    };
    Ok(json)
}

fn tokenizer_config(config: &ModelConfig, vocabulary: &Vocabulary) -> Result<Value, TrainError> {
    let end = vocabulary.end_of_text_token()?;
    Ok(json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.max_positions,
    }))
}

fn generation_config(config: &ModelConfig, sampling: &Recommended) -> Value {
    let mut json = sampling.to_json();
    json.insert("bos_token_id".into(), json!(config.bos));
    json.insert("eos_token_id".into(), json!(config.eos));
    json.into()
}

fn write_json(path: &Path, json: &Value) -> Result<(), TrainError> {
    write_whole(path, format!("{json:#}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::initialise;
    use setun::config::{Activation, Shape};
    use setun::format::{Checkpoint, hf_packed_to_ternary};
    use setun_kernels::{Kernels, Pool, TernaryMatrix};

    fn shape() -> Shape {
        Shape {
            vocab_size: 300,
            hidden_size: 64,
            intermediate_size: 96,
            num_layers: 2,
            heads: 4,
            kv_heads: 2,
            max_positions: 128,
            rope_theta: 10_000.0,
            tied: true,
            sub_norms: true,
            activation: Activation::Relu2,
        }
    }

    fn vocabulary() -> Vocabulary {
        let text = ["a cat and a hat", "a cat and a mat", "the cat sat"];
        Vocabulary::train(text.into_iter().map(|t| Ok(t.to_owned())), 270).unwrap()
    }

    fn exported(ternary: bool, options: &ExportOptions) -> (tempfile::TempDir, Params, ModelConfig) {
        let mut config = ModelConfig::fresh(&shape(), ternary).unwrap();
        (config.bos, config.eos) = (Some(0), vec![0]);
        let (_, params) = initialise(config.clone(), 3).unwrap();
        let folder = tempfile::tempdir().unwrap();
        export(folder.path(), &config, &params, &vocabulary(), options).unwrap();
        (folder, params, config)
    }

    #[test]
    fn a_packed_folder_holds_the_trained_trits_and_scales_to_the_bit() {
        let (folder, params, config) = exported(true, &ExportOptions::default());
        let file = Checkpoint::open(folder.path()).unwrap();
        let read = ModelConfig::of(&file).unwrap();
        assert!(matches!(&read.numerics, Numerics::Ternary(t) if t.storage == Storage::Multiply));
        assert_eq!((read.heads, read.eos), (config.heads, vec![0]));
        let (kernels, pool) = (Kernels::best(), Pool::new(1));
        let mut ternary = 0;
        for param in params.iter() {
            let tensor = file.tensor(&param.name).unwrap();
            if param.kind == Kind::Matrix(Role::Ternary) {
                let scale = file.tensor(&scale_name(param)).unwrap();
                let found =
                    hf_packed_to_ternary(&tensor, &scale, ScaleConvention::Multiply, param.rows, param.cols)
                        .unwrap();
                let trained = TernaryMatrix::quantize(kernels, &param.values, param.rows, param.cols, &pool);
                assert_eq!(found, trained.unwrap(), "{}", param.name);
                ternary += 1;
            } else {
                assert_eq!(tensor.to_f32().unwrap(), param.values, "{}", param.name);
            }
        }
        assert_eq!(ternary, 14);
        assert_eq!(file.tensors().len(), params.len() + ternary);
    }

    #[test]
    fn masters_and_floats_keep_every_bit_and_say_what_they_are() {
        let masters = ExportOptions { ternary: TernaryForm::Masters, ..ExportOptions::default() };
        for (ternary, options) in [(true, &masters), (false, &ExportOptions::default())] {
            let (folder, params, config) = exported(ternary, options);
            let file = Checkpoint::open(folder.path()).unwrap();
            let mut read = ModelConfig::of(&file).unwrap();
            for param in params.iter() {
                let module = param.name.trim_end_matches(".weight");
                let expected = param.kind == Kind::Matrix(Role::Ternary);
                let linear = matches!(param.kind, Kind::Matrix(Role::Ternary | Role::Float));
                assert!(!linear || read.is_ternary(module) == expected, "{module}");
            }
            read.numerics = config.numerics.clone();
            assert_eq!(read, config);
            for param in params.iter() {
                let tensor = file.tensor(&param.name).unwrap();
                assert_eq!(tensor.to_f32().unwrap(), param.values, "{}", param.name);
                assert_eq!(tensor.shape(), param.shape());
            }
        }
    }

    #[test]
    fn bf16_rounds_what_is_not_ternary_and_the_config_says_so() {
        let options = ExportOptions { floats: Encoding::BF16, ..ExportOptions::default() };
        let (folder, params, _) = exported(true, &options);
        let file = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(file.config_json().unwrap().unwrap()["torch_dtype"], "bfloat16");
        let tensor = file.tensor("model.embed_tokens.weight").unwrap();
        let pairs = tensor.to_f32().unwrap();
        let embed = params.iter().next().unwrap();
        for (found, trained) in pairs.iter().zip(&embed.values) {
            assert!((found - trained).abs() <= trained.abs() / 256.0);
        }
    }

    #[test]
    fn the_tokenizer_travels_with_the_model() {
        let sampling = Recommended { temperature: Some(0.5), ..Recommended::default() };
        let (folder, ..) = exported(true, &ExportOptions { sampling, ..ExportOptions::default() });
        let end = crate::vocabulary::END_OF_TEXT;
        let found = Vocabulary::load(&folder.path().join("tokenizer.json"), end).unwrap();
        assert_eq!(found.json(), vocabulary().json());
        let text = std::fs::read_to_string(folder.path().join("tokenizer_config.json")).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["eos_token"], end);
        let file = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(Recommended::of(&file).unwrap(), sampling);
    }

    #[test]
    fn what_cannot_be_exported_is_named_and_leaves_no_config() {
        let config = ModelConfig::fresh(&Shape { intermediate_size: 98, ..shape() }, true).unwrap();
        let (_, mut params) = initialise(config.clone(), 3).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let attempt = |params: &Params, options: &ExportOptions| {
            let done = export(folder.path(), &config, params, &vocabulary(), options);
            assert!(!folder.path().join("config.json").exists());
            done.unwrap_err().to_string()
        };
        let error = attempt(&params, &ExportOptions::default());
        assert!(error.contains("gate_proj") && error.contains("multiple of 4"), "{error}");
        let odd = ExportOptions { floats: Encoding::Q8_0, ..ExportOptions::default() };
        assert!(attempt(&params, &odd).contains("F32 or BF16"));
        params.iter_mut().next().unwrap().values[7] = f32::NAN;
        let error = attempt(&params, &ExportOptions::default());
        assert!(error.contains("model.embed_tokens.weight") && error.contains("value 7"), "{error}");
    }
}

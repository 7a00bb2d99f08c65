//! LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapter adds `(α / r) · B (A x)` to the output of a linear layer, `A` being `[r, in_features]` and `B` `[out_features, r]`
//! (Hu et al., <https://arxiv.org/abs/2106.09685>, section 4.1). `x` is the layer's input in floats, also where the layer itself
//! rounds it to int8. What a configuration says beyond that (DoRA, biases, embeddings) changes the model, so it is refused.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::ModelError;
use crate::format::Checkpoint;

/// Name of the configuration in an adapter's folder.
pub const CONFIG: &str = "adapter_config.json";
/// Name of the weights there.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before a module's name.
pub const PREFIX: &str = "base_model.model.";

/// An adapter for some layers of a model.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    pairs: BTreeMap<String, Pair>,
}

#[derive(Debug)]
struct Pair {
    a: Matrix,
    b: Matrix,
    scale: f32,
    used: Cell<bool>,
}

#[derive(Debug)]
struct Matrix {
    shape: [usize; 2],
    values: Vec<f32>,
}

/// The two matrices of one layer, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// `r`.
    pub rank: usize,
    /// `A`, `[rank, in_features]`.
    pub a: &'a [f32],
    /// `B`, `[out_features, rank]`.
    pub b: &'a [f32],
    /// `α / r`, or `α / √r` with `use_rslora`.
    pub scale: f32,
}

impl Adapter {
    /// Reads an adapter's folder.
    ///
    /// # Errors
    /// When a file is missing or damaged, or says something that is not supported: the error names file and key.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, ModelError> {
        let folder = folder.as_ref();
        let path = folder.join(CONFIG);
        let text = std::fs::read(&path).map_err(|source| ModelError::read(&path, source))?;
        let json: Value = serde_json::from_slice(&text)
            .map_err(|e| ModelError::unsupported(&path, format!("it is no JSON: {e}")))?;
        let settings = Settings::of(&json)?;
        let file = Checkpoint::open(folder.join(WEIGHTS))?;
        let mut halves: BTreeMap<String, [Option<Matrix>; 2]> = BTreeMap::new();
        for info in file.tensors() {
            let (module, half) = half(&info.name).ok_or_else(|| {
                let what = "it is no `lora_A.weight` or `lora_B.weight` of a linear layer, which is all that is supported in an \
                            adapter";
                ModelError::tensor(&info.name, what)
            })?;
            let tensor = file.tensor(&info.name)?;
            let &[rows, cols] = tensor.shape() else {
                let (name, found) = (info.name.clone(), tensor.shape().to_vec());
                return Err(ModelError::Shape { name, expected: vec![settings.rank; 2], found });
            };
            let values = tensor.to_f32()?;
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(ModelError::tensor(&info.name, format!("value {at} is not a finite number")));
            }
            halves.entry(module.to_owned()).or_default()[half] = Some(Matrix { shape: [rows, cols], values });
        }
        let pairs = halves.into_iter().map(|(module, halves)| match halves {
            [Some(a), Some(b)] => Ok((module, Pair { a, b, scale: settings.scale, used: Cell::new(false) })),
            [a, _] => {
                let (there, missing) = if a.is_some() { ("A", "B") } else { ("B", "A") };
                let what =
                    format!("it has a lora_{there}.weight in the adapter, but no lora_{missing}.weight");
                Err(ModelError::tensor(&module, what))
            }
        });
        let pairs: BTreeMap<String, Pair> = pairs.collect::<Result<_, _>>()?;
        for (module, pair) in &pairs {
            let (name, rank) = (format!("{PREFIX}{module}.lora_A.weight"), settings.rank);
            if pair.a.shape[0] != rank {
                let (expected, found) = (vec![rank, pair.a.shape[1]], pair.a.shape.to_vec());
                return Err(ModelError::Shape { name, expected, found });
            }
        }
        if pairs.is_empty() {
            return Err(ModelError::unsupported(&folder.join(WEIGHTS), "it holds no tensor"));
        }
        Ok(Self { path: folder.to_owned(), pairs })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Layers that it changes, by their names in the model.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.pairs.keys().map(String::as_str)
    }

    /// What it adds to the layer `module` (`model.layers.0.self_attn.q_proj`), whose weights are `[rows, cols]`.
    ///
    /// # Errors
    /// When its matrices have other shapes.
    pub fn update(&self, module: &str, rows: usize, cols: usize) -> Result<Option<Update<'_>>, ModelError> {
        let Some(pair) = self.pairs.get(module) else { return Ok(None) };
        let rank = pair.a.shape[0];
        for (half, matrix, expected) in [("A", &pair.a, [rank, cols]), ("B", &pair.b, [rows, rank])] {
            if matrix.shape != expected {
                let name = format!("{PREFIX}{module}.lora_{half}.weight");
                let (expected, found) = (expected.to_vec(), matrix.shape.to_vec());
                return Err(ModelError::Shape { name, expected, found });
            }
        }
        pair.used.set(true);
        Ok(Some(Update { rank, a: &pair.a.values, b: &pair.b.values, scale: pair.scale }))
    }

    /// Refuses an adapter of which the model that was just built has used a part only.
    ///
    /// # Errors
    /// With a layer that the model does not have.
    pub fn check_all_used(&self) -> Result<(), ModelError> {
        match self.pairs.iter().find(|(_, pair)| !pair.used.get()) {
            None => Ok(()),
            Some((module, _)) => {
                let what = format!(
                    "it changes the layer `{module}`, which the model does not have: it was made for another model"
                );
                Err(ModelError::unsupported(&self.path, what))
            }
        }
    }
}

/// `base_model.model.MODULE.lora_A.weight` as the module and 0, `lora_B` as 1. PEFT's own saved states may name the adapter in
/// between.
fn half(name: &str) -> Option<(&str, usize)> {
    let name = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let name = name.strip_suffix(".default").unwrap_or(name);
    let a = name.strip_suffix(".lora_A").map(|module| (module, 0));
    a.or_else(|| name.strip_suffix(".lora_B").map(|module| (module, 1)))
}

struct Settings {
    rank: usize,
    scale: f32,
}

impl Settings {
    fn of(json: &Value) -> Result<Self, ModelError> {
        let refuse = |field: &str, found: &Value, expected: &str| {
            let (field, expected) = (format!("{CONFIG}: {field}"), expected.to_owned());
            Err(ModelError::ConfigValue { field, found: found.to_string(), expected })
        };
        if json["peft_type"] != "LORA" {
            return refuse("peft_type", &json["peft_type"], "\"LORA\"");
        }
        for field in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
            if json[field] == true {
                return refuse(field, &json[field], "false, since nothing else is supported");
            }
        }
        if !matches!(json["bias"].as_str(), None | Some("none")) {
            return refuse("bias", &json["bias"], "\"none\", since nothing else is supported");
        }
        for field in ["modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"] {
            let empty = match &json[field] {
                Value::Null => true,
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            };
            if !empty {
                return refuse(field, &json[field], "empty, since nothing else is supported");
            }
        }
        let rank = json["r"].as_u64().filter(|r| (1..=1 << 16).contains(r));
        let Some(rank) = rank else { return refuse("r", &json["r"], "a whole number from 1") };
        let alpha = json["lora_alpha"].as_f64().filter(|a| a.is_finite());
        let Some(alpha) = alpha else { return refuse("lora_alpha", &json["lora_alpha"], "a number") };
        let by = if json["use_rslora"] == true { libm::sqrt(rank as f64) } else { rank as f64 };
        Ok(Self { rank: rank as usize, scale: (alpha / by) as f32 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "modules_to_save": null })
    }

    #[test]
    fn the_scale_is_alpha_over_the_rank_or_its_root() {
        assert_eq!(Settings::of(&config()).unwrap().scale, 2.0);
        let mut root = config();
        root["use_rslora"] = true.into();
        assert_eq!(Settings::of(&root).unwrap().scale, 4.0);
    }

    #[test]
    fn what_would_make_another_model_is_refused_by_its_name() {
        for (field, value) in [
            ("peft_type", json!("IA3")),
            ("use_dora", json!(true)),
            ("bias", json!("all")),
            ("modules_to_save", json!(["lm_head"])),
            ("rank_pattern", json!({ "q_proj": 2 })),
            ("r", json!(0)),
            ("lora_alpha", json!("8")),
        ] {
            let mut config = config();
            config[field] = value;
            let error = Settings::of(&config).err().unwrap().to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn keys_are_pefts() {
        let module = "model.layers.0.self_attn.q_proj";
        assert_eq!(half(&format!("{PREFIX}{module}.lora_A.weight")), Some((module, 0)));
        assert_eq!(half(&format!("{PREFIX}{module}.lora_B.default.weight")), Some((module, 1)));
        assert_eq!(half(&format!("{PREFIX}{module}.weight")), None);
        assert_eq!(half(&format!("{module}.lora_A.weight")), None);
    }
}

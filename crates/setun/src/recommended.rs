//! How a model's makers say that it should be sampled, from wherever its files keep it.
//!
//! | setting | `generation_config.json` | GGUF key |
//! |---|---|---|
//! | temperature | `temperature` | `general.sampling.temp` |
//! | top-k, 0 or less: off | `top_k` | `general.sampling.top_k` |
//! | top-p | `top_p` | `general.sampling.top_p` |
//! | min-p | `min_p` | `general.sampling.min_p` |
//! | repetition penalty | `repetition_penalty` | `general.sampling.penalty_repeat` |
//!
//! The GGUF keys are those of llama.cpp (pull request 17120). `do_sample` is ignored, as it is there: too many files leave it at
//! false beside settings that only sampling has.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::error::ModelError;
use crate::format::Checkpoint;
use crate::format::gguf::{Metadata, Value};
use crate::sampler::Sampling;

/// Settings that a model comes with; `None` where its files say nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recommended {
    /// See [`Sampling::temperature`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// See [`Sampling::top_k`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// See [`Sampling::top_p`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// See [`Sampling::min_p`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// See [`Sampling::repetition_penalty`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
}

/// A number of a file, and the key that it has there.
struct Found {
    key: String,
    number: Option<f64>,
}

impl Recommended {
    /// What `file`, or the `generation_config.json` beside it, recommends.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] for a setting that is no number or out of its range; as
    /// [`Checkpoint::json_beside`].
    pub fn of(file: &Checkpoint) -> Result<Self, ModelError> {
        Self::default().completed(file)
    }

    /// `self`, and what `file` recommends where it says nothing. Only what is used is read: a setting that `self` has may be
    /// anything in the file.
    ///
    /// # Errors
    /// As [`Recommended::of`].
    pub fn completed(&self, file: &Checkpoint) -> Result<Self, ModelError> {
        if let Some(metadata) = file.gguf_metadata() {
            return self.with_gguf(metadata);
        }
        match file.json_beside("generation_config.json")? {
            Some(json) => self.with_json(&json),
            None => Ok(*self),
        }
    }

    /// The keys `general.sampling.*` of a GGUF file.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] for one that is no number or out of its range.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, ModelError> {
        Self::default().with_gguf(metadata)
    }

    fn with_gguf(&self, metadata: &Metadata) -> Result<Self, ModelError> {
        let number = |value: &Value| {
            let float = value.as_f32().map(shortest);
            float.or_else(|| value.as_i64().map(|v| v as f64))
        };
        self.with(|_, key| {
            let key = format!("general.sampling.{key}");
            metadata.get(&key).map(|value| Found { number: number(value), key })
        })
    }

    /// The settings in a `generation_config.json`; null is absent.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] for one that is no number or out of its range.
    pub fn from_json(json: &Json) -> Result<Self, ModelError> {
        Self::default().with_json(json)
    }

    fn with_json(&self, json: &Json) -> Result<Self, ModelError> {
        self.with(|key, _| {
            let value = json.get(key).filter(|value| !value.is_null())?;
            Some(Found { key: format!("generation_config.json: {key}"), number: value.as_f64() })
        })
    }

    fn with(&self, find: impl Fn(&str, &str) -> Option<Found>) -> Result<Self, ModelError> {
        let number = |json, gguf, expected: &str, valid: fn(f64) -> bool| {
            let Some(found) = find(json, gguf) else { return Ok(None) };
            // In f32 too, as which it is used.
            match found.number.filter(|&n| (n as f32).is_finite() && valid(n) && valid(f64::from(n as f32))) {
                Some(number) => Ok(Some(number)),
                None => {
                    let shown = found.number.map_or("no number".into(), |n| n.to_string());
                    Err(ModelError::Metadata {
                        key: found.key,
                        what: format!("is {shown}, but {expected} is expected"),
                    })
                }
            }
        };
        let float = |own: Option<f32>, json, gguf, expected: &str, valid| match own {
            Some(own) => Ok(Some(own)),
            None => Ok(number(json, gguf, expected, valid)?.map(|n| n as f32)),
        };
        let whole = |n: f64| n.fract() == 0.0 && n.abs() <= 1e9;
        let share = |n: f64| (0.0..=1.0).contains(&n);
        Ok(Self {
            temperature: float(self.temperature, "temperature", "temp", "0 or more", |n| n >= 0.0)?,
            top_k: match self.top_k {
                Some(own) => Some(own),
                None => number("top_k", "top_k", "a whole number", whole)?.map(|n| n.max(0.0) as usize),
            },
            top_p: float(self.top_p, "top_p", "top_p", "more than 0, at most 1,", |n| n > 0.0 && n <= 1.0)?,
            min_p: float(self.min_p, "min_p", "min_p", "0 to 1", share)?,
            repetition_penalty: float(
                self.repetition_penalty,
                "repetition_penalty",
                "penalty_repeat",
                "more than 0",
                |n| n > 0.0,
            )?,
        })
    }

    /// `base` with what is recommended in its place.
    pub fn over(&self, base: Sampling) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            ..base
        }
    }

    fn floats(&self) -> [(&'static str, &'static str, Option<f32>); 4] {
        [
            ("temperature", "temp", self.temperature),
            ("top_p", "top_p", self.top_p),
            ("min_p", "min_p", self.min_p),
            ("repetition_penalty", "penalty_repeat", self.repetition_penalty),
        ]
    }

    /// Entries for a `generation_config.json`.
    pub fn to_json(&self) -> Map<String, Json> {
        let floats = self.floats().into_iter().filter_map(|(key, _, v)| Some((key, shortest(v?).into())));
        let top_k = self.top_k.map(|k| ("top_k", k.into()));
        floats.chain(top_k).map(|(key, value): (_, Json)| (key.to_owned(), value)).collect()
    }

    /// Keys for a GGUF file.
    pub fn to_gguf(&self) -> Vec<(String, Value)> {
        let floats = self.floats().into_iter().filter_map(|(_, key, v)| Some((key, Value::F32(v?))));
        let top_k = self.top_k.map(|k| ("top_k", Value::I32(i32::try_from(k).unwrap_or(i32::MAX))));
        floats.chain(top_k).map(|(key, value)| (format!("general.sampling.{key}"), value)).collect()
    }
}

impl std::fmt::Display for Recommended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let floats = self.floats().into_iter().filter_map(|(name, _, v)| Some(format!("{name} {}", v?)));
        let top_k = self.top_k.map(|k| format!("top_k {k}"));
        f.write_str(&floats.chain(top_k).collect::<Vec<_>>().join(", "))
    }
}

/// The double that is written as briefly as `value` is: 0.95, not 0.949999988079071.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().expect("floats are written as they are read")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn all() -> Recommended {
        Recommended {
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            min_p: Some(0.1),
            repetition_penalty: Some(1.05),
        }
    }

    #[test]
    fn settings_survive_both_kinds_of_file() {
        for settings in [all(), Recommended::default(), Recommended { top_k: Some(0), ..Default::default() }]
        {
            let json = Json::Object(settings.to_json());
            assert_eq!(Recommended::from_json(&json).unwrap(), settings, "{json}");
            let mut metadata = Metadata::new();
            for (key, value) in settings.to_gguf() {
                metadata.insert(key, value);
            }
            assert_eq!(Recommended::from_gguf(&metadata).unwrap(), settings);
        }
    }

    #[test]
    fn numbers_are_taken_in_any_type_and_null_is_absent() {
        let json = json!({ "temperature": 1, "top_k": -1, "top_p": null, "do_sample": false });
        let expected = Recommended { temperature: Some(1.0), top_k: Some(0), ..Default::default() };
        assert_eq!(Recommended::from_json(&json).unwrap(), expected);
        let mut metadata = Metadata::new();
        metadata.insert("general.sampling.top_k", Value::F32(20.0));
        assert_eq!(Recommended::from_gguf(&metadata).unwrap().top_k, Some(20));
    }

    #[test]
    fn settings_out_of_range_are_refused_with_their_key() {
        for (json, named) in [
            (json!({ "top_p": 1.5 }), "generation_config.json: top_p"),
            (json!({ "temperature": "hot" }), "no number"),
            (json!({ "top_k": 2.5 }), "a whole number"),
            (json!({ "repetition_penalty": 0 }), "more than 0"),
        ] {
            let message = Recommended::from_json(&json).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        let mut metadata = Metadata::new();
        metadata.insert("general.sampling.temp", Value::F32(f32::NAN));
        let message = Recommended::from_gguf(&metadata).unwrap_err().to_string();
        assert!(message.contains("general.sampling.temp"), "{message}");
    }

    #[test]
    fn a_bad_setting_is_no_matter_where_another_takes_its_place() {
        let json = json!({ "top_p": 1.5, "temperature": 0.5 });
        let asked = Recommended { top_p: Some(0.9), ..Default::default() };
        let expected = Recommended { temperature: Some(0.5), ..asked };
        assert_eq!(asked.with_json(&json).unwrap(), expected);
        let other = Recommended { temperature: Some(0.9), ..Default::default() };
        assert!(other.with_json(&json).unwrap_err().to_string().contains("top_p"));
    }

    #[test]
    fn what_is_not_recommended_stays() {
        let sampling = Recommended { min_p: Some(0.2), ..Default::default() }.over(Sampling::default());
        assert_eq!(sampling, Sampling { min_p: 0.2, ..Sampling::default() });
    }
}

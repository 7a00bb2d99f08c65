//! Fine-tuning: a [`Trainer`] that starts from a model instead of random numbers.
//!
//! [`Base`] reads the model, [`masters`] gives its ternary layers something to train, [`read`] and [`chat`] turn files into
//! [`examples`], and the trainer, its checkpoints and its metrics are those of every other run.

pub mod chat;
pub mod examples;
pub mod lora;
pub mod masters;
pub mod merge;
pub mod preferences;
pub mod read;
mod settings;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use setun::chat::Chat;
use setun::config::{ActivationType, ModelConfig, RopeTable};
use setun::error::ModelError;
use setun::format::Checkpoint;
use setun::model::{Model, Role, Source};
use setun::tokenizer::Tokenizer;
use setun::weights::{Master, Weights as Tensors};

use crate::config::TrainConfig;
use crate::data::{Batch, HeldOut};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::feed::Feed;
use crate::finetune::examples::{Example, Examples};
use crate::finetune::lora::{Adapters, Frozen, LoraSection};
use crate::finetune::preferences::Pairs;
use crate::params::{self, Kind, Param, ParamId, Params, TrainModel};
use crate::tape::{Setting, Tape};
use crate::trainer::{Parts, Trainer, head, newest_checkpoint, no_checkpoint};
use crate::weights::Weights;
pub use settings::{DEFAULT_LR, LORA_LR, Length, Settings};

/// What a fine-tuning run starts from, as its checkpoints remember it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseSection {
    /// Hash of the model's tensors.
    pub fingerprint: String,
    /// Adapters, if they are trained instead of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSection>,
    /// `β` of preference optimisation, if that is the objective.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
}

/// A model to start from.
#[derive(Debug)]
pub struct Base<'f> {
    file: &'f Checkpoint,
    config: ModelConfig,
    tokenizer: &'f Tokenizer,
    template: Option<String>,
    fingerprint: String,
}

impl<'f> Base<'f> {
    /// The model in `file`, with its tokenizer and, if it is not to be the model's own, the source of a chat template.
    ///
    /// # Errors
    /// When it cannot be trained, or the tokenizer belongs to another model.
    pub fn new(
        file: &'f Checkpoint,
        tokenizer: &'f Tokenizer,
        template: Option<String>,
    ) -> Result<Self, TrainError> {
        let config = ModelConfig::of(file)?;
        params::check_trainable(&config)?;
        let refuse = |field: &str, found: &str, expected: &str| {
            let (field, found, expected) = (field.into(), found.into(), expected.into());
            Err(ModelError::ConfigValue { field, found, expected }.into())
        };
        if config.pooling.is_some() {
            return refuse(
                "pooling",
                "that of an embedding model",
                "absent: it has no output head to train with",
            );
        }
        if config.has_ternary_layers() && config.activations() == ActivationType::Float {
            let expected = "int8, as in BitNet: models of ternary weights and float activations are run, but this version \
                            cannot train them";
            return refuse("activations", "float", expected);
        }
        if config.activations() == ActivationType::Int4 {
            let expected = "int8: models of four-bit activations are trained from text (setun train) and run, but this version \
                            cannot train them further";
            return refuse("activations", "int4", expected);
        }
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(TrainError::tokenizer(format!(
                "it has {} entries, but the model's embedding has {} rows, so it belongs to another model",
                tokenizer.vocab_size(),
                config.vocab_size
            )));
        }
        let tensors = Tensors::new(file, &config);
        tensors.check_all_used()?;
        tensors.check_scale_convention()?;
        let fingerprint = fingerprint(file)?;
        Ok(Self { file, config, tokenizer, template, fingerprint })
    }

    /// The model's shape and numerics.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The model's conversations: by the template that was given, else its own.
    ///
    /// # Errors
    /// When the template cannot be parsed.
    pub fn chat(&self) -> Result<Option<Chat<'f>>, ModelError> {
        match &self.template {
            Some(source) => Chat::with_template(self.tokenizer, source, "the template given").map(Some),
            None => Chat::of(self.tokenizer, Some(&self.config), None),
        }
    }

    /// The model with masters for all its weights.
    ///
    /// # Errors
    /// When a tensor is missing or damaged, or has scales that cannot be trained.
    pub fn load(&self) -> Result<(TrainModel, Params), TrainError> {
        let mut source =
            Masters { tensors: Tensors::new(self.file, &self.config), params: Params::default() };
        let model = Model::build(self.config.clone(), &mut source)?;
        Ok((model, source.params))
    }

    /// Writes tokenizer, templates and recommended sampling into `folder`, for the weights that were made of this model.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_companions(&self, folder: &Path) -> Result<(), TrainError> {
        setun::convert::write_companions(self.file, &self.config, self.tokenizer, folder)?;
        if let Some(template) = &self.template {
            crate::vocabulary::write_whole(&folder.join("chat_template.jinja"), template.as_bytes())?;
        }
        Ok(())
    }

    /// A run of `settings` on documents and conversations: from its newest checkpoint if there is one, else from the beginning.
    /// `note` receives what is worth knowing about the data.
    ///
    /// # Errors
    /// When a file, a setting or the model cannot be used; before anything is trained or written.
    pub fn train(
        &self,
        settings: &Settings,
        note: &mut dyn FnMut(String),
    ) -> Result<Trainer<Examples>, TrainError> {
        let seq_len = self.seq_len(settings)?;
        let chat = self.chat()?;
        let load = |paths: &[PathBuf]| read::examples(paths, self.tokenizer, &self.config, chat.as_ref());
        let loaded = load(&settings.data)?;
        let (batch, seed) = (settings.batch, settings.seed);
        let data = Examples::new(loaded, seq_len, batch, seed, note)?;
        let held_out = match settings.valid.is_empty() {
            true => Vec::new(),
            false => vec![Self::held_out(&load(&settings.valid)?, seq_len)?],
        };
        let config = self.train_config(settings, seq_len, data.rows_per_epoch(), None)?;
        let loaded = self.load_for(settings)?;
        self.assemble(config, data, held_out, loaded)
    }

    /// A run on preference pairs: as [`Base::train`], with [`Settings::data`] of pairs ([`preferences`]). `valid` is still
    /// documents and conversations, whose loss shows what else is lost.
    ///
    /// # Errors
    /// As [`Base::train`].
    pub fn prefer(
        &self,
        settings: &Settings,
        note: &mut dyn FnMut(String),
    ) -> Result<Trainer<Pairs>, TrainError> {
        let seq_len = self.seq_len(settings)?;
        let chat = self.chat()?;
        let list = preferences::read(&settings.data, self.tokenizer, &self.config, chat.as_ref())?;
        let mut data = Pairs::new(list, seq_len, settings.batch.max(1), settings.seed, settings.beta, note)?;
        let held_out = match settings.valid.is_empty() {
            true => Vec::new(),
            false => {
                let set = read::examples(&settings.valid, self.tokenizer, &self.config, chat.as_ref())?;
                vec![Self::held_out(&set, seq_len)?]
            }
        };
        let config = self.train_config(settings, seq_len, data.len(), Some(settings.beta))?;
        let loaded = self.load_for(settings)?;
        let mut rope = RopeTable::new(&self.config.rope);
        rope.prepare(seq_len.next_multiple_of(32));
        let Loaded { engine, model, params, weights } = &loaded;
        let mut own = Weights::default();
        let weights = match settings.lora {
            Some(_) => weights,
            None => {
                own.refresh(engine, params);
                &own
            }
        };
        data.refer_to(|batch| {
            let Batch { batch: sequences, seq_len, ref ids, ref targets, .. } = *batch;
            let mut tape =
                Tape::forward_only(Setting { engine, params, weights, rope: &rope, sequences, seq_len });
            let hidden = model.hidden(&mut tape, ids);
            preferences::row_sums(&tape.token_losses(&hidden, head(model), targets), seq_len)
        });
        drop(own);
        self.assemble(config, data, held_out, loaded)
    }

    /// The model, trainable or frozen with adapters, as the settings say.
    fn load_for(&self, settings: &Settings) -> Result<Loaded, TrainError> {
        let threads = settings.threads.unwrap_or_else(setun_kernels::threads::physical_cores_allowed);
        let engine = Engine::new(threads);
        match &settings.lora {
            None => {
                let (model, params) = self.load()?;
                Ok(Loaded { engine, model, params, weights: Weights::default() })
            }
            Some(section) => {
                section.check()?;
                self.load_frozen(engine, Adapters::Fresh(section, settings.seed))
            }
        }
    }

    fn load_frozen(&self, engine: Engine, adapters: Adapters) -> Result<Loaded, TrainError> {
        let tensors = Tensors::new(self.file, &self.config);
        let mut source = Frozen { tensors, adapters, params: Params::default(), ternary: Vec::new() };
        let model = Model::build(self.config.clone(), &mut source)?;
        let Frozen { params, ternary, .. } = source;
        let mut weights = Weights::default();
        for (id, matrix) in ternary {
            weights.set_frozen(&engine, id, matrix);
        }
        Ok(Loaded { engine, model, params, weights })
    }

    /// Writes what a run with adapters has trained into `folder`, in PEFT's layout; `model` is what the adapter says it belongs
    /// to. The folder is made beside its place and renamed; one that is there is replaced.
    ///
    /// # Errors
    /// When a value is not finite or a file cannot be written.
    pub fn export_adapter<F: Feed>(
        &self,
        trainer: &Trainer<F>,
        folder: &Path,
        model: &Path,
    ) -> Result<(), TrainError> {
        let section = trainer.config().base.as_ref().and_then(|base| base.lora.as_ref());
        let Some(section) = section else {
            return Err(TrainError::setting(
                "--lora",
                "absent",
                "a rank, since only adapters are saved this way",
            ));
        };
        replace_folder(folder, |made| {
            if let Some(template) = &self.template {
                crate::vocabulary::write_whole(&made.join("chat_template.jinja"), template.as_bytes())?;
            }
            lora::save(made, trainer.params(), section, model)
        })
    }

    fn held_out(examples: &[Example], seq_len: usize) -> Result<HeldOut, TrainError> {
        let rows = examples::held_out_rows(examples, seq_len);
        if rows.is_empty() {
            return Err(TrainError::setting(
                "--valid",
                "without any text",
                "files with something to predict",
            ));
        }
        Ok(HeldOut::of_rows("valid", rows))
    }

    fn seq_len(&self, settings: &Settings) -> Result<usize, TrainError> {
        let limit = self.config.max_positions;
        match settings.seq_len {
            None => Ok(limit.min(512)),
            Some(n) if (2..=limit).contains(&n) => Ok(n),
            Some(n) => Err(TrainError::setting(
                "--seq-len",
                n,
                format!("from 2 to {limit}, the positions of the model"),
            )),
        }
    }

    fn assemble<F: Feed>(
        &self,
        config: TrainConfig,
        data: F,
        held_out: Vec<HeldOut>,
        loaded: Loaded,
    ) -> Result<Trainer<F>, TrainError> {
        let begun = !crate::checkpoint::Checkpoints::of(&config.train.out).steps()?.is_empty();
        let checkpoint = match begun {
            true => Some(newest_checkpoint(&config)?),
            false => {
                no_checkpoint(&config)?;
                None
            }
        };
        let Loaded { engine, model, params, weights } = loaded;
        Trainer::assemble(config, Parts { engine, data, held_out, model, params, weights }, checkpoint)
    }

    /// The settings as every run has them. They are made from their written form, so that whatever else a run may be told keeps
    /// its default.
    fn train_config(
        &self,
        settings: &Settings,
        seq_len: usize,
        rows_per_epoch: usize,
        beta: Option<f64>,
    ) -> Result<TrainConfig, TrainError> {
        let c = &self.config;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let per_step = settings.batch.saturating_mul(settings.accumulation).max(1);
        let steps = match settings.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) if positive(epochs) && epochs < 1e6 => {
                (epochs * rows_per_epoch as f64 / per_step as f64).ceil() as u64
            }
            Length::Epochs(epochs) => {
                return Err(TrainError::setting("--epochs", epochs, "a number above 0 and below a million"));
            }
        };
        let json = serde_json::json!({
            "base": BaseSection { fingerprint: self.fingerprint.clone(), lora: settings.lora.clone(), beta },
            "model": {
                "vocab_size": c.vocab_size,
                "hidden_size": c.hidden_size,
                "intermediate_size": c.intermediate_size,
                "num_layers": c.num_layers,
                "heads": c.heads,
                "kv_heads": c.kv_heads,
                "max_positions": c.max_positions,
                "tied": c.tied,
                "sub_norms": c.sub_norms,
                "activation": c.activation,
                "precision": if c.has_ternary_layers() { "ternary" } else { "float" },
            },
            "data": {
                "sources": [{ "name": "data", "path": settings.data }],
                "valid": if settings.valid.is_empty() { vec![] } else {
                    vec![serde_json::json!({ "name": "valid", "path": settings.valid })]
                },
                "seq_len": seq_len,
            },
            "optimizer": {
                "schedule": "cosine",
                "lr": settings.lr,
                "warmup_steps": (steps / 15).clamp(1, 100),
                "weight_decay": settings.weight_decay,
            },
            "train": {
                "steps": steps,
                "batch": settings.batch,
                "accumulation": settings.accumulation,
                "seed": settings.seed,
                "threads": settings.threads,
                "eval_every": settings.eval_every,
                "checkpoint_every": settings.checkpoint_every,
                "log_every": settings.log_every,
                "out": settings.out,
            },
        });
        let config: TrainConfig =
            serde_json::from_value(json).map_err(|e| TrainError::Syntax { what: e.to_string() })?;
        config.check()?;
        Ok(config)
    }
}

/// A model in memory, with what computes on it.
struct Loaded {
    engine: Engine,
    model: TrainModel,
    params: Params,
    /// Ternary forms of what is frozen.
    weights: Weights,
}

/// A hash of all tensors, with their names.
fn fingerprint(file: &Checkpoint) -> Result<String, ModelError> {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for info in file.tensors() {
        hash.update(info.name.as_bytes());
        hash.update(&file.tensor(&info.name)?.data);
        file.release(info);
    }
    Ok(format!("{:016x}", hash.digest()))
}

/// Reads a checkpoint's tensors as parameters.
struct Masters<'a> {
    tensors: Tensors<'a>,
    params: Params,
}

impl Source for Masters<'_> {
    type Matrix = ParamId;
    type Vector = ParamId;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<ParamId, ModelError> {
        let values = match (self.tensors.master(name, rows, cols, role)?, role) {
            (Master::Float(values), _) => values,
            (Master::Ternary(matrix), Role::Ternary) => masters::masters_of(name, &matrix)?,
            (Master::Ternary(_), _) => {
                let what =
                    "it is ternary, but only the layers inside the blocks can be so where they are trained";
                return Err(ModelError::Tensor { name: name.to_owned(), what: what.to_owned() });
            }
        };
        finite(name, &values)?;
        Ok(self.params.add(Param { name: name.to_owned(), rows, cols, kind: Kind::Matrix(role), values }))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<ParamId, ModelError> {
        let kind = if name.ends_with(".bias") { Kind::Bias } else { Kind::Norm };
        let values = self.tensors.vector(name, len)?;
        finite(name, &values)?;
        Ok(self.params.add(Param { name: name.to_owned(), rows: len, cols: 1, kind, values }))
    }
}

fn finite(name: &str, values: &[f32]) -> Result<(), ModelError> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let what = format!("value {at} is not a finite number");
            Err(ModelError::Tensor { name: name.to_owned(), what })
        }
    }
}

/// Makes a folder beside its place and renames it; one that is there is replaced.
pub(crate) fn replace_folder(
    folder: &Path,
    make: impl FnOnce(&Path) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut name = folder.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let made = std::fs::create_dir_all(&temporary).map_err(|e| TrainError::write(&temporary, e));
    let made = made.and_then(|()| make(&temporary)).and_then(|()| {
        if folder.exists() {
            std::fs::remove_dir_all(folder).map_err(|e| TrainError::write(folder, e))?;
        }
        std::fs::rename(&temporary, folder).map_err(|e| TrainError::write(folder, e))
    });
    if made.is_err() {
        let _ = std::fs::remove_dir_all(&temporary);
    }
    made
}

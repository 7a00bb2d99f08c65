//! The training loop: batches in, checkpoints, metrics and held-out scores out.

use std::path::PathBuf;
use std::time::Instant;

use setun::config::RopeTable;

use crate::census::{Census, LayerLine};
use crate::checkpoint::{Best, Checkpoint, Checkpoints, FORMAT, State};
use crate::config::{SourceSection, TrainConfig};
use crate::data::{Batch, Batches, HeldOut, Preparing, Score, documents};
use crate::divergence::{Divergence, Watch};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::feed::{Feed, Pretraining};
use crate::lines::LineWriter;
use crate::loss::Loss;
use crate::metrics::{Metrics, MetricsWriter, Window};
use crate::optimizer::Optimizer;
use crate::params::{self, ParamId, Params, TrainModel};
use crate::schedule;
use crate::tape::{Gradients, Setting, Tape};
use crate::tensorboard::EventWriter;
use crate::vocabulary::Vocabulary;
use crate::weights::Weights;
use crate::work::{Peaks, Work};

/// A run in memory: of a new model on text, unless `F` says otherwise.
#[derive(Debug)]
pub struct Trainer<F = Pretraining> {
    config: TrainConfig,
    engine: Engine,
    data: F,
    held_out: Vec<HeldOut>,
    model: TrainModel,
    params: Params,
    weights: Weights,
    gradients: Gradients,
    optimizer: Optimizer,
    rope: RopeTable,
    checkpoints: Checkpoints,
    step: u64,
    tokens: u64,
    elapsed: f64,
    window: Window,
    watch: Watch,
    census: Census,
    best: Option<Best>,
}

/// What one optimiser step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Steps taken, this one included.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Cross-entropy of this step's tokens before the step, nats per token.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Training tokens seen so far.
    pub tokens: u64,
    /// Speed of this step.
    pub tokens_per_s: f64,
    /// Seconds of training so far, over all sessions of the run.
    pub elapsed: f64,
}

/// Who watches a run. All methods may be left out.
pub trait Progress {
    /// After every step.
    fn step(&mut self, _report: &StepReport) {}
    /// After a held-out measurement: sets by name.
    fn evaluated(&mut self, _step: u64, _scores: &[(String, Score)]) {}
    /// After a line was written to the metrics.
    fn logged(&mut self, _line: &Metrics) {}
    /// After a checkpoint was written.
    fn saved(&mut self, _folder: &std::path::Path) {}
    /// Asked after every step; with `true` the run writes a checkpoint and returns early.
    fn stop(&mut self) -> bool {
        false
    }
}

/// Watches nothing.
impl Progress for () {}

impl Trainer {
    /// A run from its beginning: prepares the tokenizer and the data, initialises the model.
    ///
    /// # Errors
    /// When the settings or the data cannot be used, or the output folder holds checkpoints of an earlier run.
    pub fn new(config: TrainConfig) -> Result<Self, TrainError> {
        Self::new_watched(config, &mut |_| ())
    }

    fn new_watched(config: TrainConfig, watch: &mut dyn FnMut(Preparing)) -> Result<Self, TrainError> {
        no_checkpoint(&config)?;
        Self::start(config, None, watch)
    }

    /// Goes on from the newest checkpoint: the next step has the same bits as if the run had never stopped.
    ///
    /// # Errors
    /// When there is none, it is damaged, or the settings that steps depend on have changed.
    pub fn resume(config: TrainConfig) -> Result<Self, TrainError> {
        Self::resume_watched(config, &mut |_| ())
    }

    fn resume_watched(config: TrainConfig, watch: &mut dyn FnMut(Preparing)) -> Result<Self, TrainError> {
        let checkpoint = newest_checkpoint(&config)?;
        Self::start(config, Some(checkpoint), watch)
    }

    /// [`Trainer::resume`] where there is a checkpoint, else [`Trainer::new`].
    ///
    /// # Errors
    /// Those of both.
    pub fn open(config: TrainConfig) -> Result<Self, TrainError> {
        Self::open_watched(config, &mut |_| ())
    }

    /// [`Trainer::open`], telling `watch` how the preparation of the data goes.
    ///
    /// # Errors
    /// Those of [`Trainer::open`].
    pub fn open_watched(config: TrainConfig, watch: &mut dyn FnMut(Preparing)) -> Result<Self, TrainError> {
        let begun = !Checkpoints::of(&config.train.out).steps()?.is_empty();
        if begun { Self::resume_watched(config, watch) } else { Self::new_watched(config, watch) }
    }

    fn start(
        config: TrainConfig,
        checkpoint: Option<Checkpoint>,
        watch: &mut dyn FnMut(Preparing),
    ) -> Result<Self, TrainError> {
        documents::check_held_out(&config.data)?;
        let vocabulary = Vocabulary::prepare(&config)?;
        let data = Batches::watched(&config, &vocabulary, watch)?;
        let sets = config.data.valid.iter();
        let held_out = sets
            .map(|set| {
                let loaded = HeldOut::load(set, &vocabulary, config.data.seq_len)?;
                Ok(loaded.packed(config.data.packing))
            })
            .collect::<Result<_, TrainError>>()?;
        let threads = config.train.threads.unwrap_or_else(setun_kernels::threads::physical_cores_allowed);
        let engine = Engine::new(threads);
        let shape = config.model_config(vocabulary.end_of_text())?;
        let (model, params) = params::initialise(shape, config.train.seed)?;
        let data = Pretraining { vocabulary, batches: data };
        let weights = Weights::default();
        Self::assemble(config, Parts { engine, data, held_out, model, params, weights }, checkpoint)
    }

    /// The run's tokenizer.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.data.vocabulary
    }

    /// The run's training data.
    pub fn data(&self) -> &Batches {
        &self.data.batches
    }
}

/// What a run is made of.
#[derive(Debug)]
pub(crate) struct Parts<F> {
    pub(crate) engine: Engine,
    pub(crate) data: F,
    pub(crate) held_out: Vec<HeldOut>,
    pub(crate) model: TrainModel,
    pub(crate) params: Params,
    /// Ternary forms of what is not trained.
    pub(crate) weights: Weights,
}

impl<F: Feed> Trainer<F> {
    pub(crate) fn assemble(
        config: TrainConfig,
        parts: Parts<F>,
        checkpoint: Option<Checkpoint>,
    ) -> Result<Self, TrainError> {
        let Parts { engine, data, held_out, model, params, weights } = parts;
        let mut rope = RopeTable::new(&model.config.rope);
        rope.prepare(config.data.seq_len);
        let mut trainer = Self {
            weights,
            gradients: Gradients::new(&params),
            optimizer: Optimizer::new(&config.optimizer, &params),
            checkpoints: Checkpoints::of(&config.train.out),
            step: 0,
            tokens: 0,
            elapsed: 0.0,
            window: Window::default(),
            watch: Watch::default(),
            census: Census::default(),
            best: None,
            config,
            engine,
            data,
            held_out,
            model,
            params,
            rope,
        };
        let mut codes = None;
        if let Some(mut checkpoint) = checkpoint {
            codes = Some((std::mem::take(&mut checkpoint.codes), checkpoint.codes_path()));
            trainer.restore(checkpoint)?;
        }
        let recipe = trainer.config.recipe(trainer.step);
        trainer.weights.set_recipe(recipe);
        trainer.weights.refresh(&trainer.engine, &trainer.params);
        let (params, weights) = (&trainer.params, &trainer.weights);
        trainer.census = match codes {
            Some((codes, path)) => Census::restore(params, weights, codes, &path)?,
            None => Census::new(params, weights),
        };
        Ok(trainer)
    }

    fn restore(&mut self, mut checkpoint: Checkpoint) -> Result<(), TrainError> {
        let frozen: Vec<bool> = self.params.ids().map(|id| self.params.is_frozen(id)).collect();
        for (i, param) in self.params.iter_mut().enumerate().filter(|(i, _)| !frozen[*i]) {
            let shape = param.shape();
            param.values = checkpoint.take("param", &param.name, &shape)?;
            for (name, moments) in
                self.optimizer.moment_names(param).into_iter().zip(&mut self.optimizer.moments)
            {
                if let Some(name) = name {
                    moments[i] = checkpoint.take(name, &param.name, &shape)?;
                }
            }
        }
        let State { step, tokens, elapsed, window, watch, data, best, .. } = checkpoint.state;
        self.data.restore(&data)?;
        self.optimizer.steps = step;
        (self.step, self.tokens, self.elapsed, self.best) = (step, tokens, elapsed, best);
        (self.window, self.watch) = (window, watch);
        Ok(())
    }

    /// One optimiser step.
    ///
    /// # Errors
    /// When the loss has risen and stayed high, as `train.spike_…` say, or it or the gradient is not a finite number: the
    /// weights stay as they were, and the message says where it began and names the last checkpoint from before.
    pub fn step(&mut self) -> Result<StepReport, TrainError> {
        let started = Instant::now();
        let total_steps = self.config.total_steps();
        let progress = self.step as f64 / total_steps.max(1) as f64;
        let batches: Vec<F::Item> =
            (0..self.config.train.accumulation).map(|_| self.data.next_batch(progress)).collect();
        let counted: usize = batches.iter().map(|batch| self.data.counted(batch)).sum();
        self.gradients.clear(&self.engine);
        let mut loss = Loss::default();
        for batch in &batches {
            loss += self.pass(batch, 1.0 / counted.max(1) as f32);
        }
        let rates = schedule::rates(&self.config.optimizer, self.step, total_steps);
        let (step, mean) = (self.step + 1, loss.mean());
        self.watch.look(&self.config.train, step, mean).map_err(|found| self.diverged(found))?;
        let grad_norm = self.optimizer.step(&self.engine, &mut self.params, &self.gradients, rates);
        if !grad_norm.is_finite() {
            let what = format!("the loss is {mean:.3}, but the gradient's norm is {grad_norm}");
            return Err(self.diverged(self.watch.not_finite(step, what)));
        }
        self.step += 1;
        self.weights.set_recipe(self.config.recipe(self.step));
        self.weights.refresh(&self.engine, &self.params);
        let tokens = batches.iter().map(|b| b.as_ref().ids.len() as u64).sum::<u64>();
        self.tokens += tokens;
        let seconds = started.elapsed().as_secs_f64();
        self.elapsed += seconds;
        Ok(StepReport {
            step: self.step,
            total_steps,
            loss: mean,
            grad_norm,
            lr: rates.lr,
            tokens: self.tokens,
            tokens_per_s: tokens as f64 / seconds,
            elapsed: self.elapsed,
        })
    }

    /// Adds the gradients of one batch, each token's loss weighted.
    fn pass(&mut self, item: &F::Item, weight: f32) -> Loss {
        let batch = item.as_ref();
        let on = Setting {
            engine: &self.engine,
            params: &self.params,
            weights: &self.weights,
            rope: &self.rope,
            sequences: batch.batch,
            seq_len: batch.seq_len,
        };
        let mut tape = Tape::new(on, &mut self.gradients);
        let loss = self.data.objective(&self.model, &mut tape, item, weight);
        tape.backward();
        loss
    }

    /// The error of a step that is not taken.
    fn diverged(&self, Divergence { began, good_before, what }: Divergence) -> TrainError {
        let steps = self.checkpoints.steps().unwrap_or_default();
        let good = steps.iter().rfind(|&&step| step < good_before);
        let way_out = match good {
            Some(&step) if steps.last() == Some(&step) => {
                format!("the last good checkpoint is {}", self.checkpoints.path(step).display())
            }
            Some(&step) => {
                let folder = self.checkpoints.path(step);
                format!("the last good checkpoint is {}, not the newest", folder.display())
            }
            None => "there is no checkpoint from before that".to_owned(),
        };
        TrainError::Diverged { began, step: self.step + 1, what, way_out }
    }

    /// Cross-entropy of a held-out set, or of about `limit` tokens taken evenly from it.
    pub fn evaluate(&self, set: &HeldOut, limit: Option<usize>) -> Score {
        let Self { engine, params, weights, rope, .. } = self;
        let on = Setting { engine, params, weights, rope, sequences: 0, seq_len: 0 };
        score(&self.model, on, set, self.config.train.batch, limit)
    }

    /// Every held-out set by name, see [`Trainer::evaluate`].
    pub fn evaluate_all(&self, limit: Option<usize>) -> Vec<(String, Score)> {
        self.held_out.iter().map(|set| (set.name().to_owned(), self.evaluate(set, limit))).collect()
    }

    /// Trains to the end (or until `progress` asks to stop), writing `metrics.jsonl` and checkpoints into the output folder.
    ///
    /// # Errors
    /// When a step diverges or a file cannot be written.
    pub fn run(&mut self, progress: &mut dyn Progress) -> Result<(), TrainError> {
        let out = &self.config.train.out;
        std::fs::create_dir_all(out).map_err(|e| TrainError::write(out, e))?;
        let mut metrics = MetricsWriter::open(&out.join("metrics.jsonl"), self.step)?;
        let layers = || LineWriter::<LayerLine>::open(&out.join("layers.jsonl"), self.step);
        let mut layers = (!self.census.is_empty()).then(layers).transpose()?;
        let mut events = EventWriter::open(out, self.step)?;
        let peaks = Peaks::measure(&self.engine);
        let settings = self.config.train.clone();
        let total = self.config.total_steps();
        let due = |step: u64, every: u64| step == total || (every > 0 && step.is_multiple_of(every));
        let mut last = None;
        let mut owed = false;
        while self.step < total {
            let report = match (self.step(), last) {
                (Ok(report), _) => report,
                // What led to a divergence is evidence: the steps since the last line are written too.
                (Err(error @ TrainError::Diverged { .. }), Some(last)) if !self.window.is_empty() => {
                    let line = self.take_line(&last, &peaks).0;
                    metrics.write(&line)?;
                    events.write(&line)?;
                    return Err(error);
                }
                (Err(error), _) => return Err(error),
            };
            last = Some(report);
            self.window.add(&report, self.config.tokens_per_step());
            progress.step(&report);
            let step = report.step;
            let stop = progress.stop();

            let mut line = None;
            if due(step, settings.log_every) {
                let (made, matrices) = self.take_line(&report, &peaks);
                line = Some(made);
                if let Some(layers) = &mut layers {
                    layers.write(&matrices)?;
                }
            }
            let mut improved = false;
            if due(step, settings.eval_every) && !self.held_out.is_empty() {
                let limit = (step < total).then_some(settings.eval_tokens);
                let scores = self.evaluate_all(limit);
                let line = line.get_or_insert_with(|| Metrics { step, ..Metrics::default() });
                scores.iter().for_each(|(name, score)| line.add_eval(name, score));
                improved = self.compare(step, &scores);
                progress.evaluated(step, &scores);
            }
            if let Some(line) = &mut line
                && line.loss.is_some()
            {
                let others = self.data.measures();
                line.other.extend(others.into_iter().map(|(name, value)| (name.to_owned(), value.into())));
            }
            if let Some(line) = line {
                metrics.write(&line)?;
                events.write(&line)?;
                progress.logged(&line);
            }
            // No checkpoint takes the place of a good one while the loss is high; it is made up for when that has passed.
            owed |= due(step, settings.checkpoint_every);
            if improved || stop || step == total || (owed && !self.watch.suspects()) {
                let folder = self.save()?;
                owed = false;
                progress.saved(&folder);
            }
            if stop {
                break;
            }
        }
        Ok(())
    }

    /// The line of the metrics after the step `report`, and what is known of every ternary matrix.
    fn take_line(&mut self, report: &StepReport, peaks: &Peaks) -> (Metrics, LayerLine) {
        let mut line = self.window.take_line(report);
        let work = Work::per_token(&self.model, &self.params, &self.weights, self.config.data.seq_len);
        line.peak_share = line.tokens_per_s.map(|speed| peaks.share(work, speed));
        let mut layers = Vec::new();
        if let Some((total, matrices)) = self.census.look(&self.params, &self.weights) {
            line.add_ternary(&total);
            layers = matrices;
        }
        (line, LayerLine { step: report.step, layers })
    }

    /// Whether these scores are the best so far.
    fn compare(&mut self, step: u64, scores: &[(String, Score)]) -> bool {
        let bits_per_byte = scores.iter().map(|(_, s)| s.bits_per_byte()).sum::<f64>() / scores.len() as f64;
        let improved = self.best.is_none_or(|best| bits_per_byte < best.bits_per_byte);
        if improved {
            self.best = Some(Best { step, bits_per_byte });
        }
        improved
    }

    /// Writes a checkpoint of this moment; returns its folder.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&mut self) -> Result<PathBuf, TrainError> {
        let state = State {
            format: FORMAT,
            step: self.step,
            tokens: self.tokens,
            elapsed: self.elapsed,
            window: self.window,
            watch: self.watch.clone(),
            data: self.data.state(),
            best: self.best,
            config: self.config.clone(),
        };
        let folder = self.checkpoints.save(
            &state,
            &self.params,
            &self.optimizer,
            &self.census,
            self.config.train.keep,
        )?;
        Ok(folder)
    }

    /// The run's settings.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// What the run reads.
    pub fn feed(&self) -> &F {
        &self.data
    }

    /// Ternary forms, of trained and of frozen layers.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The held-out sets.
    pub fn held_out(&self) -> &[HeldOut] {
        &self.held_out
    }

    /// The model; its parameters are in [`Trainer::params`].
    pub fn model(&self) -> &TrainModel {
        &self.model
    }

    /// Full-precision masters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Optimiser steps taken so far.
    pub fn steps_taken(&self) -> u64 {
        self.step
    }

    /// The best held-out measurement so far; its checkpoint is kept.
    pub fn best(&self) -> Option<Best> {
        self.best
    }
}

/// Refuses an output folder with checkpoints: a run that begins would mix with them.
pub(crate) fn no_checkpoint(config: &TrainConfig) -> Result<(), TrainError> {
    let Some(step) = Checkpoints::of(&config.train.out).steps()?.pop() else { return Ok(()) };
    let found = format!("{}, which holds a checkpoint after step {step}", config.train.out.display());
    Err(TrainError::setting("train.out", found, "an empty folder, unless that run is to be resumed"))
}

/// The newest checkpoint of this run.
pub(crate) fn newest_checkpoint(config: &TrainConfig) -> Result<Checkpoint, TrainError> {
    let checkpoints = Checkpoints::of(&config.train.out);
    let Some(&step) = checkpoints.steps()?.last() else {
        let what = format!("{} holds no checkpoint; start the run anew", config.train.out.display());
        return Err(TrainError::Resume { what });
    };
    let checkpoint = checkpoints.load(step).map_err(|damage| {
        let folder = checkpoints.path(step);
        let what = format!("{damage}; delete {} to go on from the checkpoint before it", folder.display());
        TrainError::Resume { what }
    })?;
    same_run(&checkpoint.state.config, config)?;
    Ok(checkpoint)
}

/// Cross-entropy of a held-out set, `batch` sequences at a time; how many and how long they are is not read from `on`.
pub(crate) fn score(
    model: &TrainModel,
    on: Setting,
    set: &HeldOut,
    batch: usize,
    limit: Option<usize>,
) -> Score {
    let mut score = Score::default();
    for held_out in set.batches(batch, limit) {
        let on = Setting { sequences: held_out.batch.batch, seq_len: held_out.batch.seq_len, ..on };
        let loss = forward(model, &mut Tape::forward_only(on), &held_out.batch, 0.0);
        score.add(loss.sum, &held_out);
    }
    score
}

/// The parameter that the output head reads: the embedding when tied.
pub fn head(model: &TrainModel) -> ParamId {
    model.head.as_ref().unwrap_or(&model.embed).matrix
}

/// Loss of a batch; with a recording tape, its gradient is ready to flow back.
pub fn forward(model: &TrainModel, tape: &mut Tape, batch: &Batch, weight: f32) -> Loss {
    tape.documents(&batch.starts);
    let hidden = model.hidden(tape, &batch.ids);
    tape.cross_entropy(&hidden, head(model), &batch.targets, weight)
}

/// Refuses settings that would make the next step another one. What is only measured, kept or logged may change, and so
/// may the run's length and thread count.
fn same_run(saved: &TrainConfig, now: &TrainConfig) -> Result<(), TrainError> {
    let section = |name: &str, equal: bool| match equal {
        true => Ok(()),
        false => Err(TrainError::Resume {
            what: format!("`{name}` differs from the checkpoint's; restore it, or name another train.out"),
        }),
    };
    section("base", saved.base == now.base)?;
    section("model", saved.model == now.model)?;
    section("optimizer", saved.optimizer == now.optimizer)?;
    let mixture = |c: &TrainConfig| {
        let part = |s: &SourceSection| (s.name.clone(), s.weight, s.weight_end);
        c.data.sources.iter().map(part).collect::<Vec<_>>()
    };
    section("data.sources", mixture(saved) == mixture(now))?;
    section("data.seq_len", saved.data.seq_len == now.data.seq_len)?;
    section("data.packing", saved.data.packing == now.data.packing)?;
    section("train.batch", saved.train.batch == now.train.batch)?;
    let warmup = |c: &TrainConfig| c.train.quantization_warmup_steps;
    section("train.quantization_warmup_steps", warmup(saved) == warmup(now))?;
    section("train.accumulation", saved.train.accumulation == now.train.accumulation)?;
    section("train.seed", saved.train.seed == now.train.seed)
}

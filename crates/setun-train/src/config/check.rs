//! What a run's settings must be, so that later code may rely on it.

use setun::sampler::Sampling;

use super::{Precision, TrainConfig};
use crate::error::TrainError;

impl TrainConfig {
    /// What later code relies on.
    ///
    /// # Errors
    /// Naming the field, its value and what it must be.
    pub fn check(&self) -> Result<(), TrainError> {
        self.check_model()?;
        self.check_data()?;
        self.check_optimizer()?;
        self.check_train()?;
        // Its errors name the setting.
        Ok(self.sampling.over(Sampling::default()).validate()?)
    }

    fn check_model(&self) -> Result<(), TrainError> {
        let model = &self.model;
        // Its file was checked when it was read, and may be of shapes that a fresh model cannot have.
        if self.base.is_some() {
            return Ok(());
        }
        let counts = [
            ("vocab_size", model.vocab_size),
            ("hidden_size", model.hidden_size),
            ("intermediate_size", model.intermediate_size),
            ("num_layers", model.num_layers),
            ("heads", model.heads),
            ("max_positions", model.max_positions),
        ];
        if let Some((field, _)) = counts.iter().find(|(_, n)| *n == 0) {
            return Err(TrainError::setting(format!("model.{field}"), 0, "at least 1"));
        }
        if !model.hidden_size.is_multiple_of(2 * model.heads) {
            let expected =
                format!("a multiple of twice model.heads = {}, since RoPE rotates pairs", model.heads);
            return Err(TrainError::setting("model.hidden_size", model.hidden_size, expected));
        }
        if let Some(kv_heads) = model.kv_heads
            && (kv_heads == 0 || !model.heads.is_multiple_of(kv_heads))
        {
            let expected = format!("a divisor of model.heads = {}", model.heads);
            return Err(TrainError::setting("model.kv_heads", kv_heads, expected));
        }
        // The shape's other rules; the field names of its errors are those of config.json.
        self.fresh()?;
        // Packed Hugging Face tensors hold four rows per byte.
        let sizes =
            [("hidden_size", self.model.hidden_size), ("intermediate_size", self.model.intermediate_size)];
        for (field, size) in sizes {
            if self.model.precision != Precision::Float && !size.is_multiple_of(4) {
                return Err(TrainError::setting(
                    format!("model.{field}"),
                    size,
                    "a multiple of 4 in a ternary model",
                ));
            }
        }
        let alone = model.precision == Precision::TernaryWeights;
        if alone && model.sub_norms {
            let expected =
                "false with precision = \"ternary-weights\", whose files are those of Llama-like models";
            return Err(TrainError::setting("model.sub_norms", true, expected));
        }
        if let (Some(group), false) = (model.group_size, alone) {
            let expected = "absent, unless precision = \"ternary-weights\"";
            return Err(TrainError::setting("model.group_size", group, expected));
        }
        let group = model.group_size.unwrap_or(super::GROUP_SIZE);
        let divides = |size: usize| size.is_multiple_of(group);
        if alone && (group < 32 || !divides(model.hidden_size) || !divides(model.intermediate_size)) {
            let expected = format!(
                "a divisor of model.hidden_size = {} and model.intermediate_size = {}, and at least 32, or readers of the file do \
                 not find the groups",
                model.hidden_size, model.intermediate_size
            );
            return Err(TrainError::setting("model.group_size", group, expected));
        }
        let ternary = model.precision == Precision::Ternary;
        if let Some(bits) = model.activation_bits.filter(|bits| !ternary || ![4, 8].contains(bits)) {
            let expected = if ternary { "8 or 4" } else { "absent, unless precision = \"ternary\"" };
            return Err(TrainError::setting("model.activation_bits", bits, expected));
        }
        if model.hadamard && !ternary {
            let expected = "false, unless precision = \"ternary\"";
            return Err(TrainError::setting("model.hadamard", true, expected));
        }
        if self.tokenizer.end_of_text.is_empty() {
            return Err(TrainError::setting("tokenizer.end_of_text", "empty", "the text of a token"));
        }
        if let (Some(_), Some(size)) = (&self.tokenizer.path, self.tokenizer.vocab_size) {
            let expected = "absent when tokenizer.path is given, since only a trained tokenizer has a choice";
            return Err(TrainError::setting("tokenizer.vocab_size", size, expected));
        }
        if let Some(size) = self.tokenizer.vocab_size
            && size > self.model.vocab_size
        {
            let expected = format!("at most model.vocab_size = {}", self.model.vocab_size);
            return Err(TrainError::setting("tokenizer.vocab_size", size, expected));
        }
        let entries = self.tokenizer.vocab_size.unwrap_or(self.model.vocab_size);
        if self.tokenizer.path.is_none() && entries < crate::vocabulary::SMALLEST {
            let field =
                if self.tokenizer.vocab_size.is_some() { "tokenizer.vocab_size" } else { "model.vocab_size" };
            let expected =
                format!("at least {}: every byte and the end of text", crate::vocabulary::SMALLEST);
            return Err(TrainError::setting(field, entries, expected));
        }
        Ok(())
    }

    fn check_data(&self) -> Result<(), TrainError> {
        let data = &self.data;
        if data.seq_len == 0 || data.seq_len > self.model.max_positions {
            let expected = format!("from 1 to model.max_positions = {}", self.model.max_positions);
            return Err(TrainError::setting("data.seq_len", data.seq_len, expected));
        }
        if data.sources.is_empty() {
            return Err(TrainError::setting("data.sources", "empty", "at least one [[data.sources]]"));
        }
        let lists = [
            ("data.sources", data.sources.iter().map(|s| (&s.name, &s.path)).collect::<Vec<_>>()),
            ("data.valid", data.valid.iter().map(|s| (&s.name, &s.path)).collect()),
        ];
        for (list, entries) in &lists {
            for (n, (name, paths)) in entries.iter().enumerate() {
                let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                if name.is_empty() || !name.chars().all(plain) {
                    let expected = "letters, digits, `-` and `_`, since files and metrics are named by it";
                    return Err(TrainError::setting(format!("{list}.name"), format!("`{name}`"), expected));
                }
                if entries[..n].iter().any(|(other, _)| other == name) {
                    return Err(TrainError::setting(
                        format!("{list}.name"),
                        format!("`{name}` twice"),
                        "unique",
                    ));
                }
                if paths.is_empty() {
                    let field = format!("{list}.path of `{name}`");
                    return Err(TrainError::setting(field, "empty", "at least one file or folder"));
                }
            }
        }
        let [(_, training), (_, held_out)] = &lists;
        for (name, paths) in held_out {
            if let Some(path) = paths.iter().find(|p| training.iter().any(|(_, t)| t.contains(p))) {
                let field = format!("data.valid.path of `{name}`");
                return Err(TrainError::setting(field, path.display(), "a file that is not trained on"));
            }
        }
        let fields = data.sources.iter().map(|s| ("data.sources", &s.name, &s.text_field));
        let fields = fields.chain(data.valid.iter().map(|s| ("data.valid", &s.name, &s.text_field)));
        for (list, name, field) in fields {
            if field.as_ref().is_some_and(String::is_empty) {
                let field = format!("{list}.text_field of `{name}`");
                return Err(TrainError::setting(field, "empty", "the name of a field or column, or absent"));
            }
        }
        let mut sums = [0.0; 2];
        for source in &data.sources {
            let end = source.weight_end.unwrap_or(source.weight);
            for (field, weight, sum) in [("weight", source.weight, 0), ("weight_end", end, 1)] {
                if !(weight.is_finite() && weight >= 0.0) {
                    let field = format!("data.sources.{field} of `{}`", source.name);
                    return Err(TrainError::setting(field, weight, "a number from 0 up"));
                }
                sums[sum] += weight;
            }
        }
        if sums.iter().any(|&sum| sum <= 0.0) {
            let expected = "above 0 for some source, at the start and at the end";
            return Err(TrainError::setting("data.sources.weight", "0 for every source", expected));
        }
        Ok(())
    }

    fn check_optimizer(&self) -> Result<(), TrainError> {
        let o = &self.optimizer;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        let unit = |x: f64| (0.0..=1.0).contains(&x);
        let below_one = |x: f64| (0.0..1.0).contains(&x);
        let rules = [
            ("lr", o.lr, positive(o.lr), "a positive number"),
            ("lr_second", o.second_lr(), positive(o.second_lr()), "a positive number"),
            ("switch", o.switch, unit(o.switch), "a fraction from 0 to 1"),
            ("final_fraction", o.final_fraction, unit(o.final_fraction), "a fraction from 0 to 1"),
            ("weight_decay", o.weight_decay, not_negative(o.weight_decay), "a number from 0 up"),
            ("betas", o.betas[0], below_one(o.betas[0]), "two numbers from 0 to below 1"),
            ("betas", o.betas[1], below_one(o.betas[1]), "two numbers from 0 to below 1"),
            ("momentum", o.momentum, below_one(o.momentum), "a number from 0 to below 1"),
            ("eps", o.eps, positive(o.eps), "a positive number"),
            ("clip", o.clip, not_negative(o.clip), "a number from 0 (no limit) up"),
        ];
        match rules.iter().find(|(.., good, _)| !good) {
            Some((field, found, _, expected)) => {
                Err(TrainError::setting(format!("optimizer.{field}"), found, *expected))
            }
            None => Ok(()),
        }
    }

    fn check_train(&self) -> Result<(), TrainError> {
        let t = &self.train;
        for (field, value) in [("batch", t.batch), ("accumulation", t.accumulation), ("keep", t.keep)] {
            if value == 0 || value > 1 << 20 {
                let expected = "a number from 1 to a million";
                return Err(TrainError::setting(format!("train.{field}"), value, expected));
            }
        }
        let length = match (t.steps, t.tokens) {
            (Some(_), Some(_)) => Some("both steps and tokens"),
            (None, None) => Some("neither steps nor tokens"),
            (Some(0), _) | (_, Some(0)) => Some("0 steps"),
            _ => None,
        };
        if let Some(found) = length {
            return Err(TrainError::setting("train.steps", found, "one of `steps` and `tokens`, at least 1"));
        }
        let warmup = t.quantization_warmup_steps;
        if warmup > 0 && self.model.precision == Precision::Float {
            let expected = "0 in a float run, which rounds nothing";
            return Err(TrainError::setting("train.quantization_warmup_steps", warmup, expected));
        }
        if warmup >= self.total_steps() {
            let expected =
                format!("below the run's {} steps, or the model would never be ternary", self.total_steps());
            return Err(TrainError::setting("train.quantization_warmup_steps", warmup, expected));
        }
        if t.threads == Some(0) {
            return Err(TrainError::setting("train.threads", 0, "at least 1, or absent"));
        }
        if t.log_every == 0 {
            return Err(TrainError::setting("train.log_every", 0, "at least 1"));
        }
        if !(t.spike_deviations.is_finite() && t.spike_deviations >= 0.0) {
            let expected = "a number from 0 (no limit) up";
            return Err(TrainError::setting("train.spike_deviations", t.spike_deviations, expected));
        }
        if t.spike_steps == 0 {
            return Err(TrainError::setting("train.spike_steps", 0, "at least 1"));
        }
        if !(8..=10_000).contains(&t.spike_window) {
            return Err(TrainError::setting("train.spike_window", t.spike_window, "from 8 to 10000"));
        }
        if t.eval_tokens == 0 {
            return Err(TrainError::setting("train.eval_tokens", 0, "at least 1"));
        }
        Ok(())
    }
}

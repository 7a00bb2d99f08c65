//! What a conversion changes or leaves out: found before anything is written, since headers come first, and named in
//! the output.
//!
//! Nothing is lost unasked: a narrower float type is a request of its own, everything else needs
//! [`ConvertOptions::allow_loss`](super::ConvertOptions::allow_loss).

use std::collections::BTreeMap;

use super::encode::Encoder;
use super::plan::{Item, Part, Planned};
use super::{Job, MaxError};
use crate::error::ModelError;
use crate::format::{Checkpoint, Encoding, ScaleConvention};

/// The GGUF key, an array of strings.
pub(super) const GGUF_KEY: &str = "setun.convert.losses";
/// The key in `config.json`, a list of strings.
pub(super) const JSON_KEY: &str = "setun_convert_losses";

/// What the conversions that made `file` changed or left out, a sentence each; empty where nothing was, or where
/// another program made it.
///
/// # Errors
/// When the `config.json` beside the weights is not JSON.
pub fn losses(file: &Checkpoint) -> Result<Vec<String>, ModelError> {
    if let Some(metadata) = file.gguf_metadata() {
        let list = metadata.get(GGUF_KEY).and_then(|value| value.as_array()?.as_strings());
        return Ok(list.map_or_else(Vec::new, <[String]>::to_vec));
    }
    let json = file.config_json()?;
    let list = json.as_ref().and_then(|json| json.get(JSON_KEY)?.as_array());
    Ok(list.into_iter().flatten().filter_map(|line| line.as_str().map(str::to_owned)).collect())
}

/// How far numbers moved, by tensor; only tensors in which some did.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Largest difference of floats, and the type that they were rounded to.
    pub floats: BTreeMap<String, (Encoding, f32)>,
    /// Largest relative change of a ternary scale that was rounded.
    pub scales: BTreeMap<String, f32>,
    /// Largest relative change of a ternary scale that gave way to the mean of a larger group.
    pub groups: BTreeMap<String, f32>,
    /// Largest relative change of a bias that no number times its scale gives.
    pub biases: BTreeMap<String, f32>,
}

impl Tally {
    pub(super) fn note(changes: &mut BTreeMap<String, f32>, name: &str, change: f32) {
        if change > 0.0 {
            let largest = changes.entry(name.to_owned()).or_insert(0.0);
            *largest = largest.max(change);
        }
    }

    pub(super) fn note_floats(&mut self, name: &str, to: &Encoding, error: f32) {
        if error > 0.0 {
            let largest = self.floats.entry(name.to_owned()).or_insert((to.clone(), 0.0));
            largest.1 = largest.1.max(error);
        }
    }

    pub(super) fn max_error(&self) -> Option<MaxError> {
        let (tensor, (_, error)) = self.floats.iter().max_by(|a, b| a.1.1.total_cmp(&b.1.1))?;
        Some(MaxError { tensor: tensor.clone(), error: *error })
    }

    /// Largest relative change of a ternary scale.
    pub(super) fn scale_error(&self, name: Option<&str>) -> f32 {
        let of = |changes: &BTreeMap<String, f32>| match name {
            Some(name) => changes.get(name).copied().unwrap_or(0.0),
            None => largest(changes).map_or(0.0, |(_, change)| change),
        };
        of(&self.scales) + of(&self.groups)
    }

    /// A sentence for each kind of change.
    fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut types: BTreeMap<&str, BTreeMap<String, f32>> = BTreeMap::new();
        for (name, (to, error)) in &self.floats {
            types.entry(to.name()).or_default().insert(name.clone(), *error);
        }
        for (to, changes) in &types {
            let what = format!("floats of {} rounded to {to}, largest error", tensors(changes.len()));
            lines.extend(line(changes, &what));
        }
        let many = |changes: &BTreeMap<String, f32>, what: &str, change: &str| {
            line(changes, &format!("{what} of {}{change}, largest relative change", tensors(changes.len())))
        };
        lines.extend(many(&self.scales, "ternary scales", " rounded"));
        lines.extend(many(
            &self.groups,
            "ternary scales of groups",
            " replaced by the mean of larger groups",
        ));
        lines.extend(many(&self.biases, "biases", " rounded"));
        lines
    }
}

fn tensors(count: usize) -> String {
    if count == 1 { "1 tensor".into() } else { format!("{count} tensors") }
}

fn largest(changes: &BTreeMap<String, f32>) -> Option<(&String, f32)> {
    changes.iter().max_by(|a, b| a.1.total_cmp(b.1)).map(|(name, change)| (name, *change))
}

fn line(changes: &BTreeMap<String, f32>, what: &str) -> Option<String> {
    largest(changes).map(|(name, change)| format!("{what} {change:.2e} in {name}"))
}

/// Encodes whatever may lose something, without writing it, to say what it loses.
pub(super) fn survey(
    job: &Job,
    items: &[Item],
    convention: ScaleConvention,
) -> Result<Vec<String>, ModelError> {
    let mut encoder = Encoder::new(job, convention);
    for item in items.iter().filter(|item| may_lose(job, item)) {
        encoder.encode(item, &mut |_| Ok(()))?;
    }
    Ok(encoder.tally.describe())
}

fn may_lose(job: &Job, item: &Item) -> bool {
    let (to, allowed) = (&item.spec.encoding, job.options.allow_loss);
    let copied = matches!(item.part, Part::Verbatim(_));
    !copied
        && item.part.planned().iter().any(|&index| planned_may_lose(job, &job.planned[index], to, allowed))
}

fn planned_may_lose(job: &Job, planned: &Planned, to: &Encoding, allowed: bool) -> bool {
    match (planned.role, planned.ternary) {
        (None, _) => allowed && planned.name.ends_with(".bias"),
        (Some(_), true) => allowed || !to.is_ternary() && *to != Encoding::F32 && *to != Encoding::U8,
        (Some(_), false) => *to != Encoding::F32 && (*to != planned.stored || job.config.rotation.is_some()),
    }
}

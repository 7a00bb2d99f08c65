//! `--ladder`: one shape with weights of 32, 16, 8 and 4 bits and in trits, run by the same engine one after the other.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use setun::engine::EngineOptions;
use setun::head::HeadMode;

use super::energy::{Estimate, SOURCE};
use super::machine::{Machine, available_memory};
use super::measure::{self, Measured, Peaks, Plan};
use super::random::{self, Kind, NamedShape};
use super::{busy, work};
use crate::{memory, output};

const KINDS: [Kind; 6] = [Kind::F32, Kind::F16, Kind::Bf16, Kind::Q8_0, Kind::Q4_0, Kind::Ternary];
/// Memory beside the weights: cache, buffers, and what the machine's limits are measured with.
const ROOM: f64 = 1.2e9;

/// All rungs; the shape of `--ladder --json`.
#[derive(Serialize)]
pub struct Ladder {
    pub machine: Machine,
    pub shape: &'static str,
    pub energy_source: &'static str,
    pub warnings: Vec<String>,
    pub rungs: Vec<Rung>,
    /// Weights that were left out, and why.
    pub skipped: Vec<Skipped>,
}

#[derive(Serialize)]
pub struct Skipped {
    pub weights: &'static str,
    pub why: String,
}

#[derive(Serialize)]
pub struct Rung {
    pub weights: &'static str,
    /// Of a weight in the blocks.
    pub bits: f64,
    pub load_seconds: f64,
    pub peak_rss_bytes: Option<usize>,
    pub energy_estimate_per_token: Estimate,
    #[serde(flatten)]
    pub peaks: Peaks,
    pub results: Vec<Measured>,
}

impl Rung {
    /// The first result of a phase.
    pub fn phase(&self, phase: &str) -> Option<&Measured> {
        self.results.iter().find(|r| r.phase == phase)
    }
}

pub fn climb(
    shape: &'static NamedShape,
    options: &EngineOptions,
    plan: &Plan,
    say: &dyn Fn(String),
) -> Result<Ladder> {
    let (watch, mut drift) = (busy::Watch::start(), Vec::new());
    let (mut rungs, mut skipped) = (Vec::new(), Vec::new());
    for kind in KINDS {
        let weights = kind.name();
        if let Some(why) = obstacle(shape, kind)? {
            eprintln!("note: {weights} is left out: {why}");
            skipped.push(Skipped { weights, why });
            continue;
        }
        say(format!("{weights}: loading"));
        let (memory, started) = (memory::Watch::start(), Instant::now());
        let plan = &Plan { memory: &memory, ..*plan };
        // Other engines read the whole head of a dense model, so this one does too.
        let head = if kind == Kind::Ternary { options.head } else { HeadMode::Exact };
        let engine = random::engine(shape, kind, &EngineOptions { head, ..*options }, plan.seed)?;
        let load_seconds = started.elapsed().as_secs_f64();
        let runs = measure::all(&engine, plan, &|what| say(format!("{weights}: {what}")))?;
        let peak_rss_bytes = memory.peak();
        drift.extend(runs.iter().flat_map(measure::Run::peaks).map(Peaks::drifting));
        let peaks = Peaks::of(&runs).unwrap_or_else(|| Peaks::measure(&engine));
        rungs.push(Rung {
            weights,
            bits: kind.bits(),
            load_seconds,
            peak_rss_bytes,
            energy_estimate_per_token: work::energy(engine.config(), Some(kind), plan.precision),
            peaks,
            results: runs.iter().map(measure::Run::measured).collect(),
        });
    }
    let warnings = watch.warnings(&drift);
    Ok(Ladder {
        machine: Machine::here(),
        shape: shape.name,
        energy_source: SOURCE,
        warnings,
        rungs,
        skipped,
    })
}

/// Why weights of this kind cannot be measured here.
fn obstacle(shape: &NamedShape, kind: Kind) -> Result<Option<String>> {
    let c = shape.config(kind)?;
    if matches!(kind, Kind::Q8_0 | Kind::Q4_0) {
        let widths = [c.hidden_size, c.intermediate_size, c.heads * c.head_dim];
        if let Some(width) = widths.iter().find(|width| !width.is_multiple_of(32)) {
            return Ok(Some(format!("rows of {width} weights are no whole blocks of 32")));
        }
    }
    let needed = c.parameters() as f64 * kind.bits() / 8.0 + ROOM;
    Ok(match available_memory() {
        Some(free) if (free as f64) < needed => Some(format!(
            "it takes {} of memory, but {} are free",
            output::bytes(needed as usize),
            output::bytes(free)
        )),
        _ => None,
    })
}

pub fn table(ladder: &Ladder) -> String {
    let mut text = format!("{}, {}\n\n", ladder.shape, ladder.machine.title());
    text += "weights   bits    memory   read/token  decode tok/s  of bandwidth  prefill tok/s  of arithmetic    mJ/token 7 nm  45 nm\n";
    for rung in &ladder.rungs {
        let memory = rung.peak_rss_bytes.map_or("unknown".into(), output::bytes);
        let (mut read, mut decode, mut prefill) =
            (String::new(), [const { String::new() }; 2], [const { String::new() }; 2]);
        let columns = |r: &Measured| [output::rate(r.tokens_per_s), format!("{:.1} %", r.share * 100.0)];
        if let Some(r) = rung.phase("decode") {
            read = output::bytes(r.bytes_per_token as usize);
            decode = columns(r);
        }
        if let Some(r) = rung.phase("prefill") {
            prefill = columns(r);
        }
        text += &format!(
            "{:8} {:5.1} {memory:>9} {read:>12} {:>13} {:>13} {:>14} {:>14} {:>16.3} {:>6.2}\n",
            rung.weights,
            rung.bits,
            decode[0],
            decode[1],
            prefill[0],
            prefill[1],
            rung.energy_estimate_per_token.joules_7nm * 1e3,
            rung.energy_estimate_per_token.joules_45nm * 1e3,
        );
    }
    text + &format!("\nEnergy is an estimate: {SOURCE}.\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_no_whole_blocks_are_an_obstacle_for_block_types_only() {
        let tiny = random::shape("tiny").unwrap();
        assert!(obstacle(tiny, Kind::Q4_0).unwrap().unwrap().contains("688"));
        assert_eq!(obstacle(tiny, Kind::F32).unwrap(), None);
        assert_eq!(obstacle(random::shape("125m").unwrap(), Kind::Q8_0).unwrap(), None);
    }
}

//! Times of prefill and decode, and their shares of what the machine can do.

use std::time::Instant;

use serde::Serialize;
use setun::engine::{Engine, PREFILL_BATCH, Session};
use setun::error::ModelError;
use setun::head::LogitsNeed;
use setun::kv_cache::KvType;
use setun_kernels::peak;

use super::energy::Meter;
use super::random::Random;
use super::work::{Precision, Work};
use crate::memory;

/// What to measure.
pub struct Plan<'a> {
    pub prefill: &'a [usize],
    pub decode: &'a [usize],
    /// Tokens in the context before decoding starts.
    pub depths: &'a [usize],
    /// Sequences that are decoded at once.
    pub batches: &'a [usize],
    pub repeats: usize,
    pub kv: KvType,
    pub seed: u64,
    pub precision: Precision,
    /// Looks away while the machine is measured, which takes memory of its own.
    pub memory: &'a memory::Watch,
}

/// The machine's limits with one kernel set and number of threads.
#[derive(Serialize, Clone, Copy)]
pub struct Peaks {
    pub read_gb_per_s: f64,
    pub int8_gmac_per_s: f64,
    pub float_gflop_per_s: f64,
}

impl Peaks {
    pub fn measure(engine: &Engine) -> Self {
        let (kernels, pool) = (engine.kernels(), engine.pool());
        Self {
            read_gb_per_s: peak::read_bandwidth(pool) / 1e9,
            int8_gmac_per_s: peak::int8_peak(kernels, pool) / 1e9,
            float_gflop_per_s: peak::float_peak(kernels, pool) / 1e9,
        }
    }

    /// The highest around any repeat of `runs`.
    pub fn of(runs: &[Run]) -> Option<Self> {
        runs.iter().flat_map(Run::peaks).reduce(Self::highest)
    }

    /// The higher of each: a limit that noise lowered would flatter.
    pub fn highest(self, other: Self) -> Self {
        Self {
            read_gb_per_s: self.read_gb_per_s.max(other.read_gb_per_s),
            int8_gmac_per_s: self.int8_gmac_per_s.max(other.int8_gmac_per_s),
            float_gflop_per_s: self.float_gflop_per_s.max(other.float_gflop_per_s),
        }
    }

    /// What a change of tells that the machine was not free.
    pub fn drifting(self) -> [f64; 2] {
        [self.read_gb_per_s, self.float_gflop_per_s]
    }
}

/// One repeat: how long it took, and what the machine could do around it.
#[derive(Clone, Copy)]
struct Repeat {
    seconds: f64,
    peaks: Peaks,
}

/// Times of one phase, before they are compared with anything.
pub struct Run {
    phase: &'static str,
    tokens: usize,
    depth: usize,
    batch: usize,
    threads: usize,
    kernel: &'static str,
    weight_bytes: f64,
    kv_bytes: f64,
    /// Of all its tokens.
    work: Work,
    repeats: Vec<Repeat>,
    joules: Option<f64>,
}

/// One line of the results.
#[derive(Serialize, Clone)]
pub struct Measured {
    pub phase: &'static str,
    /// Tokens read, or written by each sequence.
    pub tokens: usize,
    /// Tokens in the context before.
    pub depth: usize,
    pub batch: usize,
    pub threads: usize,
    pub kernel: &'static str,
    /// Of the fastest repeat; of all sequences together.
    pub tokens_per_s: f64,
    pub tokens_per_s_median: f64,
    /// Of the slowest repeat.
    pub tokens_per_s_least: f64,
    /// Bytes read per token: weights, shared by what is computed in one pass, and cached keys and values.
    pub bytes_per_token: f64,
    pub weight_bytes_per_token: f64,
    pub kv_bytes_per_token: f64,
    pub gb_per_s: f64,
    /// Of the limit named in the command's help.
    pub share: f64,
    /// Of the read bandwidth.
    pub read_share: f64,
    /// Integer multiply-adds per second.
    pub int8_gmac_per_s_reached: f64,
    /// Of the integer peak.
    pub int8_share: f64,
    /// Of the time that integer and float arithmetic take at their peaks.
    pub arithmetic_share: f64,
    /// Multiply-adds, integer and float, per byte read.
    pub macs_per_byte: f64,
    /// Those multiply-adds per second.
    pub gmac_per_s: f64,
    /// By the processor's counters, over all repeats; all that the processor did counts.
    pub joules_per_token_measured: Option<f64>,
    pub repeats: usize,
    pub read_gb_per_s: f64,
    pub int8_gmac_per_s: f64,
    pub float_gflop_per_s: f64,
}

/// Seconds from nothing cached to the logits after a short prompt, of the first pass that a fresh engine runs.
pub fn first_pass(engine: &Engine, plan: &Plan) -> Result<f64, ModelError> {
    let ids = random_ids(engine, 16, plan.seed);
    let mut session = engine.session(plan.kv, Some(ids.len()));
    let started = Instant::now();
    session.feed(&ids)?;
    Ok(started.elapsed().as_secs_f64())
}

/// Everything in `plan`, on `engine`.
pub fn all(engine: &Engine, plan: &Plan, busy: &dyn Fn(String)) -> Result<Vec<Run>, ModelError> {
    let mut runs = Vec::new();
    let setting = format!("{}, {} threads", engine.kernels().name(), engine.pool().threads());
    for &tokens in plan.prefill.iter().filter(|&&tokens| tokens > 0) {
        busy(format!("{setting}: prefill {tokens}"));
        runs.push(prefill(engine, plan, tokens)?);
    }
    let per_position = kv_bytes_per_position(engine, plan.kv)?;
    for &tokens in plan.decode.iter().filter(|&&tokens| tokens > 0) {
        for &depth in plan.depths {
            for &batch in plan.batches {
                busy(format!("{setting}: decode {tokens} after {depth}, {batch} at once"));
                runs.push(decode(engine, plan, [tokens, depth, batch], per_position)?);
            }
        }
    }
    Ok(runs)
}

/// All repeats, and the energy of one of them, where it is counted. The machine is measured before and after each, and the higher
/// limits count: memory that others use comes and goes within seconds.
fn repeat(
    engine: &Engine,
    plan: &Plan,
    mut once: impl FnMut() -> Result<f64, ModelError>,
) -> Result<(Vec<Repeat>, Option<f64>), ModelError> {
    let measure = || plan.memory.aside(|| Peaks::measure(engine));
    let (mut repeats, mut joules, mut before) = (Vec::new(), Some(0.0), measure());
    for _ in 0..plan.repeats {
        let meter = Meter::start();
        let seconds = once()?;
        joules = joules.zip(meter.joules()).map(|(sum, more)| sum + more / plan.repeats as f64);
        let after = measure();
        repeats.push(Repeat { seconds, peaks: before.highest(after) });
        before = after;
    }
    Ok((repeats, joules))
}

fn prefill(engine: &Engine, plan: &Plan, tokens: usize) -> Result<Run, ModelError> {
    let ids = random_ids(engine, tokens, plan.seed);
    let mut session = engine.session(plan.kv, Some(tokens));
    session.feed(&ids)?; // Brings pages and caches into the state they keep.
    let (repeats, joules) = repeat(engine, plan, || {
        session.clear();
        let started = Instant::now();
        session.feed(&ids)?;
        Ok(started.elapsed().as_secs_f64())
    })?;
    // Every batch of the prompt reads all weights that it needs once.
    let passes = tokens.div_ceil(PREFILL_BATCH);
    let pass = engine.bytes_per_pass(tokens.min(PREFILL_BATCH));
    Ok(Run {
        phase: "prefill",
        tokens,
        depth: 0,
        batch: 1,
        threads: engine.pool().threads(),
        kernel: engine.kernels().name(),
        weight_bytes: (pass * passes) as f64 / tokens as f64,
        kv_bytes: 0.0,
        work: Work::of(engine.config(), [tokens, 0, 1], plan.precision),
        repeats,
        joules,
    })
}

fn decode(
    engine: &Engine,
    plan: &Plan,
    [tokens, depth, batch]: [usize; 3],
    per_position: f64,
) -> Result<Run, ModelError> {
    let ids = random_ids(engine, depth + tokens, plan.seed);
    let (context, ids) = ids.split_at(depth);
    let mut sessions: Vec<Session> =
        (0..batch).map(|_| engine.session(plan.kv, Some(depth + tokens))).collect();
    // As `run` does: of the head, what choosing the likeliest token needs.
    let greedy = LogitsNeed::greedy();
    let write = |sessions: &mut [Session], id: u32| match sessions {
        [one] => one.feed_for(&[id], 1, &greedy).map(|_| ()),
        many => engine.decode_batch_for(many, &vec![id; batch], &vec![&greedy; batch]),
    };
    for session in &mut sessions {
        session.feed(context)?;
    }
    write(&mut sessions, ids[0])?; // Brings pages and caches into the state they keep.
    let (repeats, joules) = repeat(engine, plan, || {
        for session in &mut sessions {
            let known = session.truncate(depth);
            if known < depth {
                session.feed(&context[known..])?; // Recurrent layers go back to the end of a prompt at best.
            }
        }
        let started = Instant::now();
        for &id in ids {
            write(&mut sessions, id)?;
        }
        Ok(started.elapsed().as_secs_f64())
    })?;
    let config = engine.config();
    let one = Work::of(config, [tokens, depth, tokens], plan.precision);
    // Layers with a window read no further back; the average over layers and tokens.
    let seen = |at: usize| -> usize { config.windows.iter().map(|w| w.map_or(at, |w| at.min(w))).sum() };
    let all: usize = (depth + 1..=depth + tokens).map(seen).sum();
    let positions = all as f64 / (tokens * config.num_layers) as f64;
    Ok(Run {
        phase: "decode",
        tokens,
        depth,
        batch,
        threads: engine.pool().threads(),
        kernel: engine.kernels().name(),
        weight_bytes: engine.bytes_per_step(batch) as f64 / batch as f64,
        kv_bytes: per_position * positions,
        work: Work { int8_macs: one.int8_macs * batch as f64, float_flops: one.float_flops * batch as f64 },
        repeats,
        joules,
    })
}

/// Bytes that the cache takes for one position: what a longer one takes more.
fn kv_bytes_per_position(engine: &Engine, kv: KvType) -> Result<f64, ModelError> {
    let bytes = |limit: usize| {
        let mut session = engine.session(kv, Some(limit));
        session.feed(&[0])?;
        Ok::<_, ModelError>(session.cache_bytes() as f64)
    };
    Ok((bytes(256)? - bytes(128)?) / 128.0)
}

fn random_ids(engine: &Engine, count: usize, seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    (0..count).map(|_| (random.next() % engine.config().vocab_size as u64) as u32).collect()
}

impl Run {
    /// The limits around each repeat.
    pub fn peaks(&self) -> impl Iterator<Item = Peaks> {
        self.repeats.iter().map(|repeat| repeat.peaks)
    }

    /// The result: the fastest repeat and its share of the limits around it, with the others beside it.
    pub fn measured(&self) -> Measured {
        let mut sorted = self.repeats.clone();
        sorted.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let seconds: Vec<f64> = sorted.iter().map(|repeat| repeat.seconds).collect();
        let peaks = sorted[0].peaks;
        let tokens = (self.tokens * self.batch) as f64;
        let rate = |seconds: f64| tokens / seconds.max(1e-12);
        let (best, median) = (seconds[0].max(1e-12), seconds[seconds.len() / 2]);
        let bytes = self.weight_bytes + self.kv_bytes;
        let read_share = bytes * rate(best) / (peaks.read_gb_per_s * 1e9);
        let least = self.work.seconds(peaks.int8_gmac_per_s * 1e9, peaks.float_gflop_per_s * 1e9);
        let arithmetic_share = least / best;
        let macs = self.work.int8_macs + self.work.float_flops / 2.0;
        let int8 = self.work.int8_macs / best / 1e9;
        Measured {
            phase: self.phase,
            tokens: self.tokens,
            depth: self.depth,
            batch: self.batch,
            threads: self.threads,
            kernel: self.kernel,
            tokens_per_s: rate(best),
            tokens_per_s_median: rate(median),
            tokens_per_s_least: rate(seconds[seconds.len() - 1]),
            bytes_per_token: bytes,
            weight_bytes_per_token: self.weight_bytes,
            kv_bytes_per_token: self.kv_bytes,
            gb_per_s: bytes * rate(best) / 1e9,
            share: if self.phase == "decode" { read_share } else { arithmetic_share },
            read_share,
            int8_gmac_per_s_reached: int8,
            int8_share: int8 / peaks.int8_gmac_per_s,
            arithmetic_share,
            macs_per_byte: macs / (bytes * tokens),
            gmac_per_s: macs / best / 1e9,
            joules_per_token_measured: self.joules.map(|joules| joules / tokens),
            repeats: seconds.len(),
            read_gb_per_s: peaks.read_gb_per_s,
            int8_gmac_per_s: peaks.int8_gmac_per_s,
            float_gflop_per_s: peaks.float_gflop_per_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use setun::config::ActivationType;

    use super::super::random;
    use super::*;

    #[test]
    fn a_token_reads_the_weights_its_batch_shares_and_its_own_cache() {
        let shape = random::shape("tiny").unwrap();
        let engine = random::engine(shape, random::Kind::Ternary, &Default::default(), 1).unwrap();
        // Two for keys and values, two bytes each.
        let per_position = kv_bytes_per_position(&engine, KvType::F16).unwrap();
        let config = engine.config();
        assert_eq!(per_position, (2 * 2 * config.num_layers * config.kv_heads * config.head_dim) as f64);
        let precision = Precision { activations: ActivationType::Int8, ternary_head: false };
        let plan = Plan {
            prefill: &[],
            decode: &[3],
            depths: &[5],
            batches: &[1, 4],
            repeats: 2,
            kv: KvType::F16,
            seed: 1,
            precision,
            memory: &memory::Watch::start(),
        };
        let runs = all(&engine, &plan, &|_| {}).unwrap();
        let highest = Peaks::of(&runs).unwrap();
        for (run, batch) in runs.iter().zip([1, 4]) {
            let measured = run.measured();
            assert!(run.peaks().all(|peaks| peaks.read_gb_per_s <= highest.read_gb_per_s));
            assert_eq!((measured.batch, measured.depth, measured.repeats), (batch, 5, 2));
            assert_eq!(measured.weight_bytes_per_token * batch as f64, engine.bytes_per_token() as f64);
            assert_eq!(measured.kv_bytes_per_token, 7.0 * per_position);
            assert!(measured.tokens_per_s >= measured.tokens_per_s_median);
            assert!(measured.tokens_per_s_median >= measured.tokens_per_s_least);
        }
    }
}

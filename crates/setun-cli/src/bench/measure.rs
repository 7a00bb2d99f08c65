//! Times of prefill and decode, and their shares of what the machine can do.

use std::time::Instant;

use serde::Serialize;
use setun::config::ActivationType;
use setun::config::ModelConfig;
use setun::engine::{Engine, PREFILL_BATCH};
use setun::error::ModelError;
use setun::head::LogitsNeed;
use setun::kv_cache::KvType;
use setun_kernels::peak;

use super::random::Random;

/// What to measure.
pub struct Plan<'a> {
    pub prefill: &'a [usize],
    pub decode: &'a [usize],
    /// Tokens in the context before decoding starts.
    pub depth: usize,
    pub repeats: usize,
    pub kv: KvType,
    pub seed: u64,
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
}

/// Times of one phase, before they are compared with anything.
pub struct Run {
    phase: &'static str,
    tokens: usize,
    threads: usize,
    kernel: &'static str,
    bytes_per_token: f64,
    seconds: Vec<f64>,
}

/// One line of the results.
#[derive(Serialize)]
pub struct Measured {
    pub phase: &'static str,
    pub tokens: usize,
    pub batch: usize,
    pub threads: usize,
    pub kernel: &'static str,
    /// Of the fastest repeat.
    pub tokens_per_s: f64,
    pub tokens_per_s_median: f64,
    /// Bytes of weights read, per token.
    pub bytes_per_token: f64,
    /// Of the limit named in the command's help.
    pub share: f64,
    pub repeats: usize,
    pub read_gb_per_s: f64,
    pub int8_gmac_per_s: f64,
    pub float_gflop_per_s: f64,
}

/// Everything in `plan`, on `engine`.
pub fn all(engine: &Engine, plan: &Plan, busy: &dyn Fn(String)) -> Result<Vec<Run>, ModelError> {
    let mut runs = Vec::new();
    let setting = format!("{}, {} threads", engine.kernels().name(), engine.pool().threads());
    for &tokens in plan.prefill.iter().filter(|&&tokens| tokens > 0) {
        busy(format!("{setting}: prefill {tokens}"));
        runs.push(prefill(engine, plan, tokens)?);
    }
    for &tokens in plan.decode.iter().filter(|&&tokens| tokens > 0) {
        busy(format!("{setting}: decode {tokens}"));
        runs.push(decode(engine, plan, tokens)?);
    }
    Ok(runs)
}

fn prefill(engine: &Engine, plan: &Plan, tokens: usize) -> Result<Run, ModelError> {
    let ids = random_ids(engine, tokens, plan.seed);
    let mut session = engine.session(plan.kv, Some(tokens));
    session.feed(&ids)?; // Brings pages and caches into the state they keep.
    let mut time = || {
        session.clear();
        let started = Instant::now();
        session.feed(&ids)?;
        Ok(started.elapsed().as_secs_f64())
    };
    let seconds = (0..plan.repeats).map(|_| time()).collect::<Result<_, ModelError>>()?;
    // Every batch of the prompt reads all weights that it needs once.
    let passes = tokens.div_ceil(PREFILL_BATCH);
    let pass = engine.bytes_per_pass(tokens.min(PREFILL_BATCH));
    let bytes_per_token = (pass * passes) as f64 / tokens as f64;
    Ok(Run::new("prefill", tokens, engine, bytes_per_token, seconds))
}

fn decode(engine: &Engine, plan: &Plan, tokens: usize) -> Result<Run, ModelError> {
    let ids = random_ids(engine, plan.depth + tokens, plan.seed);
    let (context, ids) = ids.split_at(plan.depth);
    let mut session = engine.session(plan.kv, Some(plan.depth + tokens));
    session.feed(context)?;
    session.feed(&ids[..1])?;
    let mut time = || {
        let known = session.truncate(plan.depth);
        if known < plan.depth {
            session.feed(&context[known..])?; // Recurrent layers go back to the end of a prompt at best.
        }
        let started = Instant::now();
        for id in ids {
            session.feed_for(std::slice::from_ref(id), 1, &LogitsNeed::greedy())?;
        }
        Ok(started.elapsed().as_secs_f64())
    };
    let seconds = (0..plan.repeats).map(|_| time()).collect::<Result<_, ModelError>>()?;
    Ok(Run::new("decode", tokens, engine, engine.bytes_per_token() as f64, seconds))
}

fn random_ids(engine: &Engine, count: usize, seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    (0..count).map(|_| (random.next() % engine.config().vocab_size as u64) as u32).collect()
}

impl Run {
    fn new(
        phase: &'static str,
        tokens: usize,
        engine: &Engine,
        bytes_per_token: f64,
        mut seconds: Vec<f64>,
    ) -> Self {
        seconds.sort_by(f64::total_cmp);
        let (threads, kernel) = (engine.pool().threads(), engine.kernels().name());
        Self { phase, tokens, threads, kernel, bytes_per_token, seconds }
    }

    /// The result, with its share of the limit that `peaks` set.
    pub fn against(&self, peaks: &Peaks, config: &ModelConfig, activations: ActivationType) -> Measured {
        let rate = |seconds: f64| self.tokens as f64 / seconds.max(1e-12);
        let (best, median) = (self.seconds[0], self.seconds[self.seconds.len() / 2]);
        let share = if self.phase == "decode" {
            self.bytes_per_token * rate(best) / (peaks.read_gb_per_s * 1e9)
        } else {
            let work = Work::of_prefill(config, self.tokens, activations);
            let least = work.int8_macs / (peaks.int8_gmac_per_s * 1e9)
                + work.float_flops / (peaks.float_gflop_per_s * 1e9);
            least / best.max(1e-12)
        };
        Measured {
            phase: self.phase,
            tokens: self.tokens,
            batch: 1,
            threads: self.threads,
            kernel: self.kernel,
            tokens_per_s: rate(best),
            tokens_per_s_median: rate(median),
            bytes_per_token: self.bytes_per_token,
            share,
            repeats: self.seconds.len(),
            read_gb_per_s: peaks.read_gb_per_s,
            int8_gmac_per_s: peaks.int8_gmac_per_s,
            float_gflop_per_s: peaks.float_gflop_per_s,
        }
    }
}

/// Arithmetic that a pass cannot do without: matrix products, attention's two products, and the head of the last
/// position. Norms, softmax and the like are overhead, so they count against the share.
struct Work {
    int8_macs: f64,
    float_flops: f64,
}

impl Work {
    fn of_prefill(c: &ModelConfig, tokens: usize, activations: ActivationType) -> Self {
        let mut work = Self { int8_macs: 0.0, float_flops: 0.0 };
        let mut product = |name: &str, rows: usize, macs: f64| match c.is_ternary(name)
            && activations == ActivationType::Int8
        {
            true => work.int8_macs += rows as f64 * macs,
            false => work.float_flops += 2.0 * rows as f64 * macs,
        };
        for n in 0..c.num_layers {
            for (name, outputs, inputs) in c.mixer_weights(n) {
                product(&format!("model.layers.{n}.{name}"), tokens, (inputs * outputs) as f64);
            }
            // One expert stands for all: the experts of a token are as wide together as their number says.
            let (mlp, width) = match c.experts_in(n) {
                None => (format!("model.layers.{n}.mlp"), c.intermediate_size),
                Some(experts) => {
                    product(
                        &format!("model.layers.{n}.mlp.gate"),
                        tokens,
                        (c.hidden_size * experts.count) as f64,
                    );
                    (format!("model.layers.{n}.mlp.experts.0"), experts.used * experts.intermediate_size)
                }
            };
            for name in ["gate_proj", "up_proj", "down_proj"] {
                product(&format!("{mlp}.{name}"), tokens, (c.hidden_size * width) as f64);
            }
        }
        product("lm_head", 1, (c.hidden_size * c.vocab_size) as f64);
        for (n, window) in c.windows.iter().enumerate() {
            work.float_flops += match c.delta_net(n) {
                // Two products with the state and its update, the decay in one of them.
                Some(net) => 7.0 * (tokens * net.values() * net.head_dim) as f64,
                None => {
                    let seen: usize = (1..=tokens).map(|t| window.map_or(t, |w| t.min(w))).sum();
                    4.0 * (seen * c.heads * c.head_dim) as f64
                }
            };
        }
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefill_of_one_token_multiplies_every_weight_once() {
        let shape = super::super::random::shape("tiny").unwrap();
        let engine = super::super::random::engine(shape, &Default::default(), 1).unwrap();
        let (config, tokens) = (engine.config(), 3);
        let work = Work::of_prefill(config, tokens, ActivationType::Int8);
        assert_eq!(work.int8_macs, (tokens * config.block_weights()) as f64);
        let head = 2 * config.hidden_size * config.vocab_size;
        let attention = config.num_layers * 4 * (1 + 2 + 3) * config.hidden_size;
        assert_eq!(work.float_flops, (head + attention) as f64);
        let float = Work::of_prefill(config, tokens, ActivationType::Float);
        assert_eq!(float.int8_macs, 0.0);
    }
}

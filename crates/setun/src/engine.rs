//! A loaded model and the sequences it runs: prefill in batches, decode token by token.

use std::path::Path;
use std::sync::Arc;

use setun_kernels::Kernels;
use setun_kernels::threads::{Pool, physical_cores_allowed};

use crate::config::{ActivationType, ModelConfig};
use crate::cpu::{Buf, CpuMatrix, CpuOps, CpuSource, Part, Workspace};
use crate::error::ModelError;
use crate::format::Checkpoint;
use crate::head::{Candidates, Head, HeadMode, HeadStats, HeadWork, LogitsNeed};
use crate::kv_cache::{KvCache, KvType};
use crate::lora::Adapter;
use crate::model::{FeedForward, Layer, Model};
use crate::ops::{Linear, Ops, Tap};
use crate::weights::Weights;

/// How to load and run a model. The defaults are the fastest that keep the model's own numerics.
///
/// Ternary matrices take their two bits per weight in memory with either kind of activations.
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineOptions {
    /// Kernel set, the fastest if `None`.
    pub kernels: Option<&'static Kernels>,
    /// Threads, one per physical core the process may use if `None`.
    pub threads: Option<usize>,
    /// What ternary layers multiply with, what the model is defined to ([`ModelConfig::activations`]) if `None`.
    pub activations: Option<ActivationType>,
    /// How the head is computed where a few logits are asked for ([`Session::feed_for`]).
    pub head: HeadMode,
}

/// Tokens that one prefill pass takes at most: long enough for matrix kernels, short enough that what a layer hands on stays in
/// the last-level cache (21 MB of a 2B model's feed-forward layer).
pub const PREFILL_BATCH: usize = 256;

/// A model in memory, ready to run any number of sequences.
#[derive(Debug)]
pub struct Engine {
    pub(crate) model: Model<CpuMatrix, Vec<f32>>,
    pub(crate) kernels: &'static Kernels,
    pub(crate) pool: Arc<Pool>,
    activations: ActivationType,
    head: Head,
}

impl Engine {
    /// Opens and loads the model at `path`: a file or a folder.
    ///
    /// # Errors
    /// When it cannot be read with certainty; the error names the file, tensor or field.
    pub fn open(path: impl AsRef<Path>, options: &EngineOptions) -> Result<Self, ModelError> {
        let file = Checkpoint::open(path)?;
        Self::load(&file, ModelConfig::of(&file)?, options)
    }

    /// Loads an opened checkpoint as `config` describes it.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, cannot be decoded, or is there though `config` has no place for it.
    pub fn load(file: &Checkpoint, config: ModelConfig, options: &EngineOptions) -> Result<Self, ModelError> {
        Self::load_telling(file, config, options, &mut |_| ())
    }

    /// [`Engine::load`], which calls `progress` with the number of weights of every matrix that it has read and packed; all together
    /// they are [`ModelConfig::parameters`] but for norms and the like.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load_telling(
        file: &Checkpoint,
        config: ModelConfig,
        options: &EngineOptions,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, ModelError> {
        Self::load_adapted(file, config, options, None, progress)
    }

    /// [`Engine::load_telling`] with what `adapter` adds to the model's layers, which stay as they are.
    ///
    /// # Errors
    /// As [`Engine::load`], and when the adapter was made for another model.
    pub fn load_adapted(
        file: &Checkpoint,
        config: ModelConfig,
        options: &EngineOptions,
        adapter: Option<&Adapter>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, ModelError> {
        let pool = Pool::new(options.threads.unwrap_or_else(physical_cores_allowed));
        Self::load_on(Arc::new(pool), file, config, options, adapter, progress)
    }

    /// [`Engine::load`] of another model that runs on this one's threads, in turn with it: a draft model.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load_beside(
        &self,
        file: &Checkpoint,
        config: ModelConfig,
        options: &EngineOptions,
    ) -> Result<Self, ModelError> {
        Self::load_on(Arc::clone(&self.pool), file, config, options, None, &mut |_| ())
    }

    fn load_on(
        pool: Arc<Pool>,
        file: &Checkpoint,
        config: ModelConfig,
        options: &EngineOptions,
        adapter: Option<&Adapter>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, ModelError> {
        let kernels = options.kernels.unwrap_or_else(Kernels::best);
        let weights = Weights::new(file, &config);
        weights.check_all_used()?;
        weights.check_scale_convention()?;
        let activations = options.activations.unwrap_or(config.activations());
        let mut source = CpuSource::new(weights.on(&pool), kernels, &pool, activations).telling(progress);
        source = source.adapted(adapter);
        let model = Model::build(config.clone(), &mut source)?;
        adapter.map_or(Ok(()), Adapter::check_all_used)?;
        let head = Head::new(&model, options.head, kernels, &pool);
        Ok(Self { model, kernels, pool, activations, head })
    }

    /// An engine around weights made elsewhere: random ones for a benchmark, a trainer's for a check.
    pub fn from_model(model: Model<CpuMatrix, Vec<f32>>, options: &EngineOptions) -> Self {
        let kernels = options.kernels.unwrap_or_else(Kernels::best);
        let pool = Pool::new(options.threads.unwrap_or_else(physical_cores_allowed));
        let activations = options.activations.unwrap_or(model.config.activations());
        let head = Head::new(&model, options.head, kernels, &pool);
        Self { model, kernels, pool: Arc::new(pool), activations, head }
    }

    /// The model's shape and numerics.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// The kernel set in use.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// What ternary layers multiply with.
    pub fn activations(&self) -> ActivationType {
        self.activations
    }

    /// The thread pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Whether a few logits are found by a shortlist; else by computing all.
    pub fn has_shortlist(&self) -> bool {
        self.head.has_shortlist()
    }

    /// What the head did for [`Session::feed_for`] so far.
    pub fn head_stats(&self) -> HeadStats {
        self.head.stats()
    }

    /// Bytes of weights that decoding one token reads: every matrix once, of experts the ones that a token goes through, one row
    /// of an embedding that is not the head. With a shortlist, of the head what choosing a token has read so far on average.
    pub fn bytes_per_token(&self) -> usize {
        self.bytes_per_step(1)
    }

    /// Bytes of weights that a pass reads which chooses a token for each of so many sequences.
    pub fn bytes_per_step(&self, sequences: usize) -> usize {
        let all = self.bytes_per_pass(sequences);
        let head = self.model.head.as_ref().unwrap_or(&self.model.embed).matrix.bytes();
        self.head.bytes_per_step(sequences).map_or(all, |read| all - head + read)
    }

    /// Bytes of weights that a pass over `tokens` tokens reads at most, all logits computed: if they need as many different experts
    /// as they can.
    pub fn bytes_per_pass(&self, tokens: usize) -> usize {
        let model = &self.model;
        let linear = |l: &Linear<CpuMatrix, Vec<f32>>| {
            let adapter = l.adapter.as_ref().map_or(0, |low| low.a.bytes() + low.b.bytes());
            l.matrix.bytes() + l.bias.as_ref().map_or(0, |b| 4 * b.len()) + adapter
        };
        let idle = |layer: &Layer<_, _>| match &layer.mlp {
            FeedForward::Gated(_) => 0,
            FeedForward::Experts(layer) => {
                let count = layer.experts.len();
                let used = layer.routing.used.saturating_mul(tokens).min(count);
                layer.total(linear) / count.max(1) * (count - used)
            }
        };
        let layers =
            model.layers.iter().map(|layer| layer.linears().map(linear).sum::<usize>() - idle(layer));
        layers.sum::<usize>() + linear(model.head.as_ref().unwrap_or(&model.embed))
    }

    /// What `needs` ask for of each row of `hidden`, into `out`.
    pub(crate) fn choose(
        &self,
        ops: &mut CpuOps,
        hidden: &Buf,
        needs: &[&LogitsNeed],
        work: &mut HeadWork,
        out: &mut [Candidates],
    ) {
        let compute = (self.kernels, &*self.pool);
        let exact = self.head.candidates(&self.model, compute, &hidden.data, needs, work, out);
        if !exact.is_empty() {
            let picked = ops.pick(hidden, exact.iter().copied());
            let logits = self.model.logits(ops, &picked);
            for (&t, logits) in exact.iter().zip(logits.data.chunks_exact(logits.width)) {
                out[t].set_all(logits);
            }
            ops.release(picked);
            ops.release(logits);
        }
    }

    /// A new sequence of at most `limit` positions (the model's own limit if `None`).
    pub fn session(&self, kv: KvType, limit: Option<usize>) -> Session<'_> {
        let config = self.config();
        let limit = limit.unwrap_or(config.max_positions);
        Session {
            engine: self,
            cache: KvCache::new(config, kv, limit),
            work: Workspace::new(config, self.activations),
            ids: Vec::new(),
            logits: Vec::new(),
            candidates: Vec::new(),
            head: HeadWork::default(),
        }
    }
}

/// What a pass records besides logits.
pub type Taps = Vec<(Tap, Vec<f32>)>;

/// One sequence: its cache, and the logits after its last token.
#[derive(Debug)]
pub struct Session<'e> {
    pub(crate) engine: &'e Engine,
    pub(crate) cache: KvCache,
    pub(crate) work: Workspace,
    pub(crate) ids: Vec<u32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) candidates: Vec<Candidates>,
    pub(crate) head: HeadWork,
}

impl<'e> Session<'e> {
    /// The engine it runs on.
    pub fn engine(&self) -> &'e Engine {
        self.engine
    }

    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// The tokens seen so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Whether no token was seen yet.
    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// Positions left before the context is full.
    pub fn room(&self) -> usize {
        self.cache.limit() - self.cache.len()
    }

    /// Bytes that the cache takes now.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Forgets everything after the first `len` tokens, and returns how many are still known: feed on from there.
    ///
    /// That is `len` where all layers are attention. A recurrent state cannot be rewound: such a model goes back to the end of the
    /// last prompt that [`Session::feed`] read, if that is not beyond `len`, and else forgets everything.
    #[must_use = "a model with recurrent layers may know less than was asked for"]
    pub fn truncate(&mut self, len: usize) -> usize {
        let known = self.cache.truncate(len);
        self.ids.truncate(known);
        known
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        let _ = self.truncate(0);
    }

    /// Logits `[vocab_size]` after the last token fed; none after [`Session::feed_for`].
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// What the last [`Session::feed_for`] returned.
    pub fn candidates(&self) -> &[Candidates] {
        &self.candidates
    }

    /// Reads `ids` in batches of [`PREFILL_BATCH`] and returns the logits after the last one.
    ///
    /// # Errors
    /// [`ModelError::ContextFull`] when they do not fit, [`ModelError::UnknownToken`] for an id outside the vocabulary;
    /// nothing is fed then. An empty prompt is [`ModelError::EmptyPrompt`].
    pub fn feed(&mut self, ids: &[u32]) -> Result<&[f32], ModelError> {
        self.feed_in_batches(ids, PREFILL_BATCH)
    }

    /// [`Session::feed`] with another batch size; the logits have the same bits whatever it is.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_in_batches(&mut self, ids: &[u32], batch: usize) -> Result<&[f32], ModelError> {
        self.read(ids, batch.max(1), Want::Last)?;
        Ok(&self.logits)
    }

    /// Reads `ids` as [`Session::feed`] does, and returns what `need` asks for of the last `n` positions (at least one, at most
    /// all): logits with the same bits, but of a large head only the part is read that can matter.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_for(
        &mut self,
        ids: &[u32],
        n: usize,
        need: &LogitsNeed,
    ) -> Result<&[Candidates], ModelError> {
        let n = n.clamp(1, ids.len().max(1));
        self.read(ids, PREFILL_BATCH, Want::Candidates(n, need))?;
        Ok(&self.candidates)
    }

    /// Feeds `ids` in batches, the last of which holds all rows that `want` asks for.
    fn read(&mut self, ids: &[u32], batch: usize, want: Want) -> Result<(), ModelError> {
        self.check(ids)?;
        let (length, rows) = (self.cache.len() + ids.len(), want.rows(ids.len()));
        let mut rest = ids;
        while rest.len() > batch && rest.len() - batch >= rows {
            let (chunk, after) = rest.split_at(batch);
            self.pass(chunk, length, Want::Nothing, None);
            rest = after;
        }
        self.pass(rest, length, want, None);
        // The next turn of a conversation most often comes back to the end of a prompt.
        if ids.len() > rows {
            self.cache.mark();
        }
        Ok(())
    }

    /// Logits of every position of `ids`, `[ids.len(), vocab_size]`, in one pass; with `taps`, block outputs too.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_all(&mut self, ids: &[u32], taps: Option<&mut Taps>) -> Result<&[f32], ModelError> {
        self.check(ids)?;
        let length = self.cache.len() + ids.len();
        self.pass(ids, length, Want::All, taps);
        Ok(&self.logits)
    }

    /// Logits of the positions of `ids` from `from` on, in batches, so that memory holds those of [`PREFILL_BATCH`] positions
    /// at most: `each` receives the index of a batch's first position and its logits. The same bits as [`Session::feed_all`].
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_each(
        &mut self,
        ids: &[u32],
        from: usize,
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        self.check(ids)?;
        let length = self.cache.len() + ids.len();
        let mut first = 0;
        for chunk in ids.chunks(PREFILL_BATCH) {
            if first + chunk.len() <= from {
                self.pass(chunk, length, Want::Nothing, None);
            } else {
                self.pass(chunk, length, Want::All, None);
                each(first, &self.logits);
            }
            first += chunk.len();
        }
        Ok(())
    }

    pub(crate) fn check(&self, ids: &[u32]) -> Result<(), ModelError> {
        if ids.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        if ids.len() > self.room() {
            return Err(ModelError::ContextFull {
                used: self.cache.len(),
                more: ids.len(),
                limit: self.cache.limit(),
            });
        }
        let vocab_size = self.engine.config().vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(ModelError::UnknownToken { id, vocab_size }),
            None => Ok(()),
        }
    }

    fn pass(&mut self, ids: &[u32], length: usize, want: Want<'_>, taps: Option<&mut Taps>) {
        let Engine { model, kernels, pool, .. } = self.engine;
        let mut parts = [Part { cache: &mut self.cache, tokens: ids.len(), length }];
        let mut ops = CpuOps::new(kernels, pool, &mut self.work, &mut parts, taps);
        let mut hidden = model.hidden(&mut ops, ids);
        let rows = want.rows(ids.len());
        if 0 < rows && rows < ids.len() {
            let last = ops.pick(&hidden, ids.len() - rows..ids.len());
            ops.release(std::mem::replace(&mut hidden, last));
        }
        self.logits.clear();
        match want {
            Want::Nothing => {}
            Want::Last | Want::All => {
                let logits = model.logits(&mut ops, &hidden);
                self.logits.extend_from_slice(&logits.data);
                ops.release(logits);
            }
            Want::Candidates(n, need) => {
                self.candidates.resize_with(n, Candidates::default);
                self.engine.choose(&mut ops, &hidden, &vec![need; n], &mut self.head, &mut self.candidates);
            }
        }
        ops.release(hidden);
        ops.finish();
        self.ids.extend_from_slice(ids);
    }
}

/// Which results of a pass are wanted.
#[derive(Clone, Copy)]
enum Want<'a> {
    Nothing,
    Last,
    All,
    /// Of so many last positions what is needed.
    Candidates(usize, &'a LogitsNeed),
}

impl Want<'_> {
    /// Of how many last positions, of `all` fed.
    fn rows(self, all: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Last => 1,
            Self::All => all,
            Self::Candidates(n, _) => n,
        }
    }
}

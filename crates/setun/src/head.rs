//! The output head at a fraction of its bytes: exact logits of the few tokens that can be chosen.
//!
//! Decoding reads the head `[vocab_size, hidden_size]` to choose one token. What the choice needs ([`LogitsNeed`]) is
//! most often a few of the largest logits, so [`setun_kernels::shortlist`] first bounds all of them from four bits for each
//! weight. Rows with the largest estimates are computed exactly; the `count`-th of these logits is one that the `count`-th
//! largest of all does at least reach, so rows whose upper bound lies below it are out, and the others are computed too.
//! The logits have the bits of the whole head's, and a choice from them is the choice from all.
//!
//! The exact head takes over by itself where the bounds leave too many rows, where inputs have none (not finite, or of
//! an extraordinary size), and where the whole distribution is asked for. docs/numerics.md has the proof and the figures.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use setun_kernels::Kernels;
use setun_kernels::dense::DenseMatrix;
use setun_kernels::shortlist::{Bounds, Shortlist, shortlist_bytes};
use setun_kernels::threads::Pool;

use crate::cpu::CpuMatrix;
use crate::model::Model;

/// How the head is computed where a few logits are asked for. The text is the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HeadMode {
    /// By a shortlist where that saves time and there is memory for it: a dense head of 16 MB or more.
    #[default]
    Auto,
    /// All logits, always.
    Exact,
    /// By a shortlist if the head is dense, whatever its size; a ternary head is small, and always exact.
    Shortlist,
}

impl std::str::FromStr for HeadMode {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "exact" => Ok(Self::Exact),
            "shortlist" => Ok(Self::Shortlist),
            _ => Err(format!("`{s}` is not a way to compute the head: use auto, exact or shortlist")),
        }
    }
}

/// Which logits a choice needs; [`Sampler::need`](crate::sampler::Sampler::need) knows.
#[derive(Debug, Clone, PartialEq)]
pub enum LogitsNeed {
    /// All of them.
    All,
    /// Among the ids that are not in `also`, each whose logit is one of the `count` largest (or equals the last of them) and
    /// lies within `within` of the largest; and those in `also`. More may come.
    Top {
        /// From 1; `usize::MAX` for no limit.
        count: usize,
        /// Not negative; infinite for no limit.
        within: f32,
        /// In rising order, each once. Ids outside of the vocabulary are passed over.
        also: Vec<u32>,
    },
}

impl LogitsNeed {
    /// The largest logit: greedy choice without penalties.
    pub fn greedy() -> Self {
        Self::Top { count: 1, within: f32::INFINITY, also: Vec::new() }
    }
}

/// Exact logits of one position: all, or what was needed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Candidates {
    /// In rising order; empty where all are there.
    ids: Vec<u32>,
    logits: Vec<f32>,
    all: bool,
}

impl Candidates {
    /// All logits, `[vocab_size]`, if they were computed.
    pub fn all(&self) -> Option<&[f32]> {
        self.all.then_some(&self.logits[..])
    }

    /// Ids with their logits, by rising id.
    pub fn iter(&self) -> impl Iterator<Item = (u32, f32)> {
        let id = |i: usize| if self.all { i as u32 } else { self.ids[i] };
        self.logits.iter().enumerate().map(move |(i, &logit)| (id(i), logit))
    }

    /// Where [`Candidates::iter`] comes to `id`, if it does.
    pub fn position(&self, id: u32) -> Option<usize> {
        match self.all {
            true => Some(id as usize).filter(|&i| i < self.logits.len()),
            false => self.ids.binary_search(&id).ok(),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.logits.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.logits.is_empty()
    }

    /// Whether all logits that are here are finite. Where they are not, all logits of the position are here.
    pub fn is_finite(&self) -> bool {
        self.logits.iter().all(|logit| logit.is_finite())
    }

    pub(crate) fn set_all(&mut self, logits: &[f32]) {
        self.ids.clear();
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.all = true;
    }

    fn set(&mut self, sorted: &[(u32, f32)]) {
        self.all = false;
        self.ids.clear();
        self.ids.extend(sorted.iter().map(|&(id, _)| id));
        self.logits.clear();
        self.logits.extend(sorted.iter().map(|&(_, logit)| logit));
    }
}

/// What the head did since the model was loaded, for positions of which a few logits were asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeadStats {
    /// Positions done by a shortlist.
    pub shortlisted: u64,
    /// Rows computed exactly for these, all together.
    pub rows: u64,
    /// Positions that were tried, and left too many rows or had no bounds: the exact head did them.
    pub fallbacks: u64,
    /// Positions that were not tried: (nearly) all logits were asked for, or those before them fell back.
    pub exact: u64,
}

impl HeadStats {
    /// Rows computed exactly for a position, on average.
    pub fn mean_rows(&self) -> f64 {
        self.rows as f64 / self.shortlisted.max(1) as f64
    }
}

/// Smallest head that [`HeadMode::Auto`] makes a shortlist for, in bytes: a smaller one stays in the cache.
const WORTH: usize = 16 << 20;
/// After this many fallbacks in a row, the exact head does the next [`PAUSE`] positions without another try.
const PATIENCE: u64 = 3;
const PAUSE: u64 = 61;
/// Positions bounded together: the four-bit copy is read once for them. Their bounds take 8 bytes for each of their logits.
const TOGETHER: usize = 8;

/// A shortlist and what it did.
#[derive(Debug)]
struct Listed {
    list: Shortlist,
    /// Rows that cost as much to compute one by one as the exact head saves.
    most: usize,
    /// Bytes of the matrix, and of one of its rows.
    bytes: usize,
    row_bytes: usize,
    /// Fallbacks and skipped positions since the last success.
    failing: AtomicU64,
    shortlisted: AtomicU64,
    rows: AtomicU64,
    fallbacks: AtomicU64,
    exact: AtomicU64,
}

/// How an engine computes its head.
#[derive(Debug)]
pub(crate) struct Head(Option<Listed>);

/// Memory that a session keeps for the head.
#[derive(Debug, Default)]
pub(crate) struct HeadWork {
    bounds: Bounds,
    ids: Vec<u32>,
    more: Vec<u32>,
    logits: Vec<f32>,
    found: Vec<(u32, f32)>,
    largest: Vec<f32>,
}

/// The head's matrix, if a product with it is all that the head does.
fn plain_matrix(model: &Model<CpuMatrix, Vec<f32>>) -> Option<&DenseMatrix> {
    let head = model.head.as_ref().unwrap_or(&model.embed);
    match &head.matrix {
        CpuMatrix::Dense(matrix)
            if [
                head.bias.is_none(),
                head.norm.is_none(),
                head.rotation.is_none(),
                head.adapter.is_none(),
            ] == [true; 4] =>
        {
            Some(matrix)
        }
        _ => None,
    }
}

/// Memory that programs may still take, where the system tells.
fn memory_available() -> Option<usize> {
    let facts = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = facts.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib.saturating_mul(1024))
}

impl Head {
    /// The head of `model`, as `mode` says.
    pub(crate) fn new(
        model: &Model<CpuMatrix, Vec<f32>>,
        mode: HeadMode,
        kernels: &Kernels,
        pool: &Pool,
    ) -> Self {
        Self(plain_matrix(model).and_then(|matrix| Listed::new(matrix, mode, kernels, pool)))
    }

    /// Whether there is a shortlist.
    pub(crate) fn has_shortlist(&self) -> bool {
        self.0.is_some()
    }

    /// See [`HeadStats`]; all zero without a shortlist.
    pub(crate) fn stats(&self) -> HeadStats {
        self.0.as_ref().map_or(HeadStats::default(), |l| HeadStats {
            shortlisted: l.shortlisted.load(Relaxed),
            rows: l.rows.load(Relaxed),
            fallbacks: l.fallbacks.load(Relaxed),
            exact: l.exact.load(Relaxed),
        })
    }

    /// Bytes that choosing a token for each of so many sequences reads, if there is a shortlist, as it went so far: without rows
    /// before the first one.
    pub(crate) fn bytes_per_step(&self, sequences: usize) -> Option<usize> {
        let listed = self.0.as_ref()?;
        let HeadStats { shortlisted, rows, fallbacks, exact } = self.stats();
        let (planes, tokens) = (sequences.div_ceil(TOGETHER), shortlisted + fallbacks + exact);
        let share = |count: u64| count as f64 / tokens.max(1) as f64;
        let tried = if tokens == 0 { 1.0 } else { share(shortlisted + fallbacks) };
        let read = tried * (planes * listed.list.bytes()) as f64
            + share(rows) * (sequences * listed.row_bytes) as f64
            + share(fallbacks + exact) * listed.bytes as f64;
        Some(read as usize)
    }

    /// What `needs` ask for of each row of `hidden`, `[out.len(), hidden_size]`, into `out`. Returns the rows for which the exact
    /// head is to be asked.
    pub(crate) fn candidates(
        &self,
        model: &Model<CpuMatrix, Vec<f32>>,
        (kernels, pool): (&Kernels, &Pool),
        hidden: &[f32],
        needs: &[&LogitsNeed],
        work: &mut HeadWork,
        out: &mut [Candidates],
    ) -> Vec<usize> {
        let (Some(listed), Some(matrix)) = (&self.0, plain_matrix(model)) else {
            return (0..out.len()).collect();
        };
        let width = matrix.cols();
        let mut exact = Vec::new();
        for first in (0..out.len()).step_by(TOGETHER) {
            let rows = first..out.len().min(first + TOGETHER);
            if needs[rows.clone()].iter().all(|need| listed.first(need).is_none())
                || !listed.worth_trying(rows.len())
            {
                listed.exact.fetch_add(rows.len() as u64, Relaxed);
                exact.extend(rows);
                continue;
            }
            let x = &hidden[rows.start * width..rows.end * width];
            listed.list.bounds(kernels, x, rows.len(), &mut work.bounds, pool);
            for (t, row) in rows.enumerate() {
                let x = &x[t * width..(t + 1) * width];
                match listed.select((matrix, x, t), (kernels, pool), needs[row], work) {
                    Ok(rows) => {
                        out[row].set(&work.found);
                        listed.failing.store(0, Relaxed);
                        listed.shortlisted.fetch_add(1, Relaxed);
                        listed.rows.fetch_add(rows as u64, Relaxed);
                    }
                    Err(tried) => {
                        listed.failing.fetch_add(u64::from(tried), Relaxed);
                        if tried { &listed.fallbacks } else { &listed.exact }.fetch_add(1, Relaxed);
                        exact.push(row);
                    }
                }
            }
        }
        exact
    }
}

impl Listed {
    fn new(matrix: &DenseMatrix, mode: HeadMode, kernels: &Kernels, pool: &Pool) -> Option<Self> {
        let (bytes, rows) = (matrix.bytes(), matrix.rows());
        let plane = shortlist_bytes(rows, matrix.cols());
        // Reading more than this altogether would save too little.
        let limit = bytes / 5 * 3;
        let wanted = match mode {
            HeadMode::Exact => false,
            HeadMode::Shortlist => true,
            HeadMode::Auto => {
                bytes >= WORTH && plane <= limit && memory_available().is_none_or(|free| free / 2 >= plane)
            }
        };
        if !wanted || rows == 0 || matrix.cols() == 0 {
            return None;
        }
        let row_bytes = bytes / rows;
        Some(Self {
            list: Shortlist::new(matrix, kernels, pool)?,
            most: (limit.saturating_sub(plane) / row_bytes.max(1)).max(rows / 16).max(1),
            bytes,
            row_bytes,
            failing: AtomicU64::new(0),
            shortlisted: AtomicU64::new(0),
            rows: AtomicU64::new(0),
            fallbacks: AtomicU64::new(0),
            exact: AtomicU64::new(0),
        })
    }

    /// Whether positions before these were not all in vain.
    fn worth_trying(&self, positions: usize) -> bool {
        if self.failing.load(Relaxed) < PATIENCE {
            return true;
        }
        if self.failing.fetch_add(positions as u64, Relaxed) < PATIENCE + PAUSE {
            return false;
        }
        self.failing.store(PATIENCE - 1, Relaxed); // One more failure, and the pause begins again.
        true
    }

    /// How many rows with the largest estimates to begin with, so that at least `count` (one, if it is no limit) are not in `also`.
    /// `None` if they are too many, or all are needed.
    fn first(&self, need: &LogitsNeed) -> Option<usize> {
        let LogitsNeed::Top { count, also, .. } = need else { return None };
        let counted = if *count == usize::MAX { 1 } else { *count };
        Some(counted.saturating_add(also.len())).filter(|&first| first <= self.most)
    }

    /// Exact logits of what `need` asks for at position `t`, with input `x`, into `work.found` by rising id: how many rows were
    /// computed. Else the exact head is to do it, and the error is whether that is known only now.
    fn select(
        &self,
        (matrix, x, t): (&DenseMatrix, &[f32], usize),
        (kernels, pool): (&Kernels, &Pool),
        need: &LogitsNeed,
        work: &mut HeadWork,
    ) -> Result<usize, bool> {
        let (LogitsNeed::Top { count, within, also }, Some(first)) = (need, self.first(need)) else {
            return Err(false);
        };
        let HeadWork { bounds, ids, more, logits, found, largest } = work;
        if !bounds.usable(t) {
            return Err(true);
        }
        bounds.likeliest(t, first, ids);
        ids.extend(also.iter().filter(|&&id| (id as usize) < matrix.rows()));
        ids.sort_unstable();
        ids.dedup();
        let mut dots = |ids: &[u32], found: &mut Vec<(u32, f32)>| {
            logits.resize(ids.len(), 0.0);
            matrix.dots(kernels, x, ids, logits, pool);
            found.extend(ids.iter().copied().zip(logits.iter().copied()));
        };
        found.clear();
        dots(ids, found);
        largest.clear();
        let counting = found.iter().filter(|(id, _)| also.binary_search(id).is_err());
        largest.extend(counting.map(|&(_, logit)| logit));
        largest.sort_unstable_by(|a, b| b.total_cmp(a));
        let best = *largest.first().ok_or(true)?;
        // What the last of `count` reaches at least, over all rows. A little lower for the rounding of the difference.
        let near = best - within - 1e-6 * (best.abs() + within);
        let limit = largest.get(count - 1).map_or(near, |&last| last.max(near));
        if !limit.is_finite() || !bounds.reaching(t, limit, self.most, more) {
            return Err(true);
        }
        more.retain(|id| ids.binary_search(id).is_err());
        dots(more, found);
        let rows = found.len();
        found.retain(|(id, logit)| *logit >= limit || also.binary_search(id).is_ok());
        found.sort_unstable_by_key(|&(id, _)| id);
        Ok(rows)
    }
}

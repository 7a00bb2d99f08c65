//! llama2.c checkpoints: the legacy float layout, and the ternary layout of its 1.58-bit descendant.
//!
//! Neither names its tensors; they get their Hugging Face names here. Both rotate neighbouring pairs of
//! each head, where the forward pass of this library rotates split halves, so the rows of the query
//! and key projections are reordered as they are read and nothing later needs to know.

use std::borrow::Cow;
use std::path::Path;

use super::tensor::{Encoding, Rewrite, TensorInfo};
use crate::error::ModelError;

/// First four bytes of files with a version number, as a little-endian number.
const MAGIC: u32 = 0x616b_3432;
/// Where the data of the ternary layout starts.
const TERNARY_HEADER: usize = 256;

/// Which of the two layouts a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Llama2cKind {
    /// llama2.c's legacy layout: float32 weights, norms in every layer.
    Float,
    /// Ternary linear layers with one scale each and no norm weights inside the layers: every linear
    /// normalises its own input to unit RMS (divided by its width), then quantises it to int8 per token.
    Ternary,
}

/// A checkpoint's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Llama2cFacts {
    /// The layout.
    pub kind: Llama2cKind,
    /// Width of the residual stream.
    pub dim: usize,
    /// Width of the feed-forward part.
    pub hidden_dim: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Vocabulary size.
    pub vocab: usize,
    /// Longest sequence.
    pub seq_len: usize,
    /// Whether the embedding is also the output head.
    pub tied: bool,
}

impl Llama2cFacts {
    fn from_ints(kind: Llama2cKind, ints: [i32; 7], tied: bool) -> Option<Self> {
        let mut sizes = [0usize; 7];
        for (size, int) in sizes.iter_mut().zip(ints) {
            // The limits keep every product below within an i64 and a loop over the layers short.
            *size = usize::try_from(int).ok().filter(|&n| (1..=1 << 24).contains(&n))?;
        }
        let [dim, hidden_dim, layers, heads, kv_heads, vocab, seq_len] = sizes;
        let pairs = dim.is_multiple_of(heads) && (dim / heads).is_multiple_of(2);
        (pairs && heads.is_multiple_of(kv_heads) && layers <= 4096).then_some(Self {
            kind,
            dim,
            hidden_dim,
            layers,
            heads,
            kv_heads,
            vocab,
            seq_len,
            tied,
        })
    }

    fn kv_dim(&self) -> usize {
        self.dim / self.heads * self.kv_heads
    }
}

fn ints(bytes: &[u8], at: usize) -> Option<[i32; 7]> {
    let (chunks, _) = bytes.get(at..at + 28)?.as_chunks::<4>();
    let mut values = [0; 7];
    for (value, &chunk) in values.iter_mut().zip(chunks) {
        *value = i32::from_le_bytes(chunk);
    }
    Some(values)
}

fn has_magic(bytes: &[u8]) -> bool {
    bytes.first_chunk::<4>().is_some_and(|b| u32::from_le_bytes(*b) == MAGIC)
}

/// The legacy header has no magic number: seven numbers that fit together must do.
fn legacy(bytes: &[u8]) -> Option<Llama2cFacts> {
    let mut numbers = ints(bytes, 0)?;
    let tied = numbers[5] > 0; // A negative vocabulary says that the head has its own weights.
    numbers[5] = numbers[5].checked_abs()?;
    Llama2cFacts::from_ints(Llama2cKind::Float, numbers, tied)
}

/// Whether the bytes start like one of the two layouts.
pub(crate) fn looks_like(bytes: &[u8]) -> bool {
    has_magic(bytes) || legacy(bytes).is_some()
}

/// Reads the header of `bytes`, the whole file, and lists its tensors; `path` is for messages.
pub(crate) fn read(path: &Path, bytes: &[u8]) -> Result<(Llama2cFacts, Vec<TensorInfo>), ModelError> {
    let (facts, plan) = if has_magic(bytes) {
        let version = bytes.get(4..8).map_or(0, |b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let tied = bytes.get(36).copied();
        let facts = ints(bytes, 8).zip(tied);
        let facts = facts.and_then(|(i, t)| Llama2cFacts::from_ints(Llama2cKind::Ternary, i, t == 1));
        match (version, facts) {
            (1, Some(facts)) => (facts, ternary_plan(&facts)),
            (1, None) => {
                let what = "not a valid llama2.c checkpoint: its header is cut short or its sizes do \
                            not fit together";
                return Err(ModelError::format(path, what));
            }
            (version, _) => {
                let what = format!(
                    "llama2.c checkpoint of version {version}: only the legacy layout and ternary version 1 are read"
                );
                return Err(ModelError::unsupported(path, what));
            }
        }
    } else {
        let facts = legacy(bytes).ok_or_else(|| {
            ModelError::format(path, "not a valid llama2.c checkpoint: its sizes do not fit together")
        })?;
        (facts, legacy_plan(&facts))
    };
    if plan.end != bytes.len() as u128 {
        let what = format!(
            "not a valid llama2.c checkpoint: its header asks for {} bytes, but the file has {}",
            plan.end,
            bytes.len()
        );
        return Err(ModelError::format(path, what));
    }
    if facts.kind == Llama2cKind::Ternary && !facts.tied {
        let what = "ternary llama2.c checkpoint with its own output head: only shared embeddings are read";
        return Err(ModelError::unsupported(path, what));
    }
    Ok((facts, plan.finish()))
}

/// A list of tensors with their places. Places are wide enough for any header, and become ranges only
/// once the end is known to be the end of the file.
struct Plan {
    end: u128,
    tensors: Vec<(TensorInfo, std::ops::Range<u128>)>,
}

impl Plan {
    fn float(&mut self, name: String, shape: &[usize], rewrite: Rewrite) {
        self.push(name, shape, Encoding::F32, rewrite, 4 * product(shape));
    }

    fn push(&mut self, name: String, shape: &[usize], encoding: Encoding, rewrite: Rewrite, bytes: u128) {
        let shape = shape.to_vec();
        let info = TensorInfo { name, shape, encoding, file: 0, range: 0..0, rewrite };
        self.tensors.push((info, self.end..self.end + bytes));
        self.end += bytes;
    }

    fn finish(self) -> Vec<TensorInfo> {
        let infos = self
            .tensors
            .into_iter()
            .map(|(info, range)| TensorInfo { range: range.start as usize..range.end as usize, ..info });
        infos.collect()
    }
}

fn product(shape: &[usize]) -> u128 {
    shape.iter().map(|&d| d as u128).product()
}

fn layer(index: usize, part: &str) -> String {
    format!("model.layers.{index}.{part}.weight")
}

fn legacy_plan(facts: &Llama2cFacts) -> Plan {
    let &Llama2cFacts { dim, hidden_dim, layers, heads, kv_heads, vocab, seq_len, .. } = facts;
    let kv_dim = facts.kv_dim();
    let parts: [(&str, &[usize], Rewrite); 9] = [
        ("input_layernorm", &[dim], Rewrite::None),
        ("self_attn.q_proj", &[dim, dim], Rewrite::SplitRotaryPairs { heads }),
        ("self_attn.k_proj", &[kv_dim, dim], Rewrite::SplitRotaryPairs { heads: kv_heads }),
        ("self_attn.v_proj", &[kv_dim, dim], Rewrite::None),
        ("self_attn.o_proj", &[dim, dim], Rewrite::None),
        ("post_attention_layernorm", &[dim], Rewrite::None),
        ("mlp.gate_proj", &[hidden_dim, dim], Rewrite::None),
        ("mlp.down_proj", &[dim, hidden_dim], Rewrite::None),
        ("mlp.up_proj", &[hidden_dim, dim], Rewrite::None),
    ];
    let mut plan = Plan { end: 28, tensors: Vec::new() };
    plan.float("model.embed_tokens.weight".into(), &[vocab, dim], Rewrite::None);
    for (part, shape, rewrite) in parts {
        for index in 0..layers {
            plan.float(layer(index, part), shape, rewrite);
        }
    }
    plan.float("model.norm.weight".into(), &[dim], Rewrite::None);
    // Rotary tables, cosines then sines, follow: they are computed, not read.
    plan.end += 4 * product(&[2, seq_len, dim / heads / 2]);
    if !facts.tied {
        plan.float("lm_head.weight".into(), &[vocab, dim], Rewrite::None);
    }
    plan
}

fn ternary_plan(facts: &Llama2cFacts) -> Plan {
    let &Llama2cFacts { dim, hidden_dim, layers, heads, kv_heads, vocab, .. } = facts;
    let kv_dim = facts.kv_dim();
    let parts = [
        ("self_attn.q_proj", [dim, dim], Some(heads)),
        ("self_attn.k_proj", [kv_dim, dim], Some(kv_heads)),
        ("self_attn.v_proj", [kv_dim, dim], None),
        ("self_attn.o_proj", [dim, dim], None),
        ("mlp.gate_proj", [hidden_dim, dim], None),
        ("mlp.down_proj", [dim, hidden_dim], None),
        ("mlp.up_proj", [hidden_dim, dim], None),
    ];
    let mut plan = Plan { end: TERNARY_HEADER as u128, tensors: Vec::new() };
    plan.float("model.norm.weight".into(), &[dim], Rewrite::None);
    plan.float("model.embed_tokens.weight".into(), &[vocab, dim], Rewrite::None);
    for (part, shape, heads) in parts {
        for index in 0..layers {
            let bytes = 4 + product(&shape).div_ceil(4);
            let rewrite = Rewrite::HighFirstTrits { heads };
            plan.push(layer(index, part), &shape, Encoding::Trit2, rewrite, bytes);
        }
    }
    plan
}

/// The bytes of a tensor as its encoding says, from the bytes in the file.
pub(crate) fn rewritten<'a>(info: &TensorInfo, stored: &'a [u8]) -> Result<Cow<'a, [u8]>, ModelError> {
    match info.rewrite {
        Rewrite::None => Ok(Cow::Borrowed(stored)),
        Rewrite::SplitRotaryPairs { heads } => {
            let rows = info.shape[0];
            let row_bytes = stored.len() / rows;
            let order = (0..rows).flat_map(|row| {
                let from = paired_row(row, rows / heads);
                &stored[from * row_bytes..(from + 1) * row_bytes]
            });
            Ok(Cow::Owned(order.copied().collect()))
        }
        Rewrite::Tiled { tl, tiles, scale } => {
            let codes = tl.decode(tiles, stored).map_err(|what| ModelError::tensor(&info.name, what))?;
            Ok(Cow::Owned([&codes[..], &scale.to_le_bytes()].concat()))
        }
        Rewrite::HighFirstTrits { heads } => high_first_trits(info, stored, heads).map(Cow::Owned),
    }
}

/// The row of the file that becomes row `row` when neighbouring pairs become split halves.
fn paired_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

/// Scale first, then codes from the highest bits down (00 = 0, 01 = +1, 11 = −1) become canonical
/// codes, then the scale.
fn high_first_trits(info: &TensorInfo, stored: &[u8], heads: Option<usize>) -> Result<Vec<u8>, ModelError> {
    let (rows, cols) = (info.shape[0], info.shape[1]);
    let (scale, packed) = stored.split_at(4);
    let row_bytes = cols.div_ceil(4);
    let mut out = vec![0u8; rows * row_bytes];
    let mut bad = 0usize;
    for (row, codes) in out.chunks_exact_mut(row_bytes).enumerate() {
        let from = heads.map_or(row, |heads| paired_row(row, rows / heads));
        for col in 0..cols {
            let flat = from * cols + col;
            let code = match packed[flat / 4] >> (6 - 2 * (flat % 4)) & 3 {
                0b00 => 1,
                0b01 => 2,
                0b11 => 0,
                _ => {
                    bad += 1;
                    1
                }
            };
            codes[col / 4] |= code << (2 * (col % 4));
        }
    }
    if bad > 0 {
        let what = format!("{bad} of {} codes are 10, which is no ternary value", rows * cols);
        return Err(ModelError::tensor(&info.name, what));
    }
    out.extend_from_slice(scale);
    Ok(out)
}

//! Reads a GGUF header. Nothing in it is believed before it is checked against the bytes that are there.
//!
//! Memory: every count is compared with the bytes left before anything is reserved for it, and arrays
//! keep their elements as small as the file does, so reading takes a small multiple of the header's size.

use std::collections::HashMap;
use std::path::Path;

use super::metadata::{Array, Metadata, Value};
use super::{DEFAULT_ALIGNMENT, MAGIC, collisions, types};
use crate::error::ModelError;
use crate::format::tensor::{Rewrite, TensorInfo, element_count};
use crate::format::{Encoding, OpenOptions, Tl, TlTiles};

/// Longest key or tensor name, in bytes; the format's own limit for keys.
const MAX_NAME: u64 = 65_535;
/// Dimensions of a tensor; the format's own limit.
const MAX_DIMS: u32 = 4;
/// Arrays inside arrays. Real files have none; the limit keeps the reader's stack small.
const MAX_DEPTH: usize = 4;
/// Largest accepted `general.alignment`, in bytes.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: Metadata,
    /// In file order, ranges absolute and inside the file.
    pub(crate) tensors: Vec<TensorInfo>,
    /// A sentence for each type whose number does not settle its layout.
    pub(crate) evidence: Vec<String>,
}

/// A tensor entry whose offset is not resolved yet.
struct Entry {
    name: String,
    shape: Vec<usize>,
    type_id: u32,
    offset: u64,
}

/// Reads and checks the header of `bytes`, the whole file; `path` is for messages.
pub(crate) fn read(path: &Path, bytes: &[u8], options: &OpenOptions) -> Result<Header, ModelError> {
    let mut cursor = Cursor { path, bytes, at: 0 };
    if cursor.take(4, "the magic bytes")? != MAGIC {
        return Err(cursor.broken("does not start with `GGUF`"));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        1 => {
            return Err(ModelError::unsupported(path, "GGUF version 1 is not read: convert it to version 3"));
        }
        v if (1..=0xffff).contains(&v.swap_bytes()) => {
            let what = "big-endian GGUF is not read: convert it to little-endian";
            return Err(ModelError::unsupported(path, what));
        }
        v => {
            let what = format!("GGUF version {v} is not known: versions 2 and 3 are read");
            return Err(ModelError::unsupported(path, what));
        }
    }
    // Smallest entries: a name's length, one byte of it, and the fixed fields.
    let n_tensors = cursor.count("tensors", 8 + 1 + 4 + 4 + 8)?;
    let n_keys = cursor.count("metadata keys", 8 + 1 + 4 + 1)?;

    let mut metadata = Metadata::new();
    for _ in 0..n_keys {
        let key = cursor.name("a metadata key")?;
        let type_id = cursor.u32(&format!("the type of key `{key}`"))?;
        let value = cursor.value(&key, type_id)?;
        if metadata.get(&key).is_some() {
            return Err(cursor.broken(&format!("metadata key `{key}` occurs twice")));
        }
        metadata.insert(key, value);
    }

    let mut entries = Vec::new();
    for _ in 0..n_tensors {
        entries.push(cursor.entry()?);
    }
    let alignment = alignment(&cursor, &metadata)?;
    let data_start = cursor.at.checked_next_multiple_of(alignment);
    let data_start = data_start.ok_or_else(|| cursor.broken("the header has no end"))?;
    let (tensors, evidence) = place(&cursor, entries, data_start, alignment, options)?;
    Ok(Header { metadata, tensors, evidence })
}

fn alignment(cursor: &Cursor<'_>, metadata: &Metadata) -> Result<usize, ModelError> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.as_u64() {
        Some(a) if a.is_power_of_two() && a <= MAX_ALIGNMENT => Ok(a as usize),
        found => {
            let found = found.map_or_else(|| format!("a {}", value.type_name()), |a| a.to_string());
            let what = format!("general.alignment is {found}, not a power of two up to {MAX_ALIGNMENT}");
            Err(cursor.broken(&what))
        }
    }
}

/// Turns offsets into ranges of the file and checks bounds, alignment and overlaps. Returns also the
/// evidence for types whose layout the number alone does not settle.
fn place(
    cursor: &Cursor<'_>,
    entries: Vec<Entry>,
    data_start: usize,
    alignment: usize,
    options: &OpenOptions,
) -> Result<(Vec<TensorInfo>, Vec<String>), ModelError> {
    let mut names: HashMap<&str, ()> = HashMap::with_capacity(entries.len());
    for entry in &entries {
        let name = &entry.name;
        if names.insert(name, ()).is_some() {
            return Err(cursor.broken(&format!("tensor `{name}` occurs twice")));
        }
        checked_count(cursor, entry)?;
        if !entry.offset.is_multiple_of(alignment as u64) {
            let what = format!(
                "tensor `{name}` starts at offset {}, not a multiple of the alignment {alignment}",
                entry.offset
            );
            return Err(cursor.broken(&what));
        }
    }
    drop(names);
    let data = cursor.bytes.get(data_start..).unwrap_or_default();
    let mut starts: Vec<u64> = entries.iter().map(|e| e.offset).collect();
    starts.sort_unstable();
    let settled = settle(cursor, &entries, data, &starts, alignment, options)?;
    let mut infos = Vec::with_capacity(entries.len());
    // (offset, bytes, entry), to find tensors that overlap.
    let mut spans = Vec::with_capacity(entries.len());
    let scales = tl_scales(&entries, data);
    for entry in entries {
        let encoding = match settled.iter().find(|s| s.id == entry.type_id) {
            Some(settled) => settled.encoding.clone(),
            None => types::encoding(entry.type_id),
        };
        let tiled = tiled(&entry, &encoding, options).map_err(|what| refused(cursor, &entry, what))?;
        let bytes = match tiled {
            Some((.., bytes)) => bytes as u64,
            None => stored_len(cursor, &entry, &encoding)?,
        };
        let end = entry.offset.checked_add(bytes);
        // A tensor of unknown size has no bytes here, but a place in the file like all others.
        if end.is_none_or(|end| end > data.len() as u64) || data_start > cursor.bytes.len() {
            let what = format!(
                "tensor `{}` needs {bytes} bytes at offset {} of the data, which has {}: \
                 the file is cut short or its header is wrong",
                entry.name,
                entry.offset,
                data.len()
            );
            return Err(cursor.broken(&what));
        }
        spans.push((entry.offset, bytes, infos.len()));
        let rewrite = match tiled {
            Some((tl, tiles, bytes)) => {
                fill(&entry, tl, bytes, data, &starts, alignment)
                    .map_err(|what| refused(cursor, &entry, what))?;
                let scale = scales.get(entry.name.as_str()).copied();
                let scale = scale.ok_or_else(|| {
                    let what =
                        format!("has no scale: `{}_scale`, one positive F32, is not in the file", entry.name);
                    refused(cursor, &entry, what)
                })?;
                Rewrite::Tiled { tl, tiles, scale: scale.to_bits() }
            }
            None => Rewrite::None,
        };
        let encoding = if tiled.is_some() { Encoding::Trit2 } else { encoding };
        let start = data_start + entry.offset as usize; // Both fit: checked against the file's length.
        infos.push(TensorInfo {
            name: entry.name,
            shape: entry.shape,
            encoding,
            file: 0,
            range: start..start + bytes as usize,
            rewrite,
        });
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        let ((start, bytes, a), (next, _, b)) = (pair[0], pair[1]);
        if start + bytes > next {
            let what = format!("tensors `{}` and `{}` overlap", infos[a].name, infos[b].name);
            return Err(cursor.broken(&what));
        }
    }
    Ok((infos, settled.into_iter().map(|s| s.evidence).collect()))
}

/// What a type number with several meanings means in this file, and the evidence for it.
struct Settled {
    id: u32,
    encoding: Encoding,
    evidence: String,
}

/// Decides every such number that the file uses.
fn settle(
    cursor: &Cursor<'_>,
    entries: &[Entry],
    data: &[u8],
    starts: &[u64],
    alignment: usize,
    options: &OpenOptions,
) -> Result<Vec<Settled>, ModelError> {
    let mut settled = Vec::new();
    for id in collisions::NUMBERS {
        let of_id = entries.iter().filter(|e| e.type_id == id);
        let spans: Vec<_> = of_id.map(|e| span(e, data, starts)).collect();
        if spans.is_empty() {
            continue;
        }
        let (encoding, evidence) = collisions::decide(id, &spans, alignment, options)
            .map_err(|what| ModelError::unsupported(cursor.path, what))?;
        settled.push(Settled { id, encoding, evidence });
    }
    Ok(settled)
}

/// A tensor with the bytes up to the next; `starts` are the offsets of all, sorted.
fn span<'a>(e: &'a Entry, data: &'a [u8], starts: &[u64]) -> collisions::Span<'a> {
    let next = starts.get(starts.partition_point(|&start| start <= e.offset));
    let end = next.map_or(data.len() as u64, |&next| next.min(data.len() as u64));
    // Both fit: at most the length of the data.
    let room = if e.offset > end { 0..0 } else { e.offset as usize..end as usize };
    collisions::Span { name: &e.name, shape: &e.shape, bytes: &data[room], last: next.is_none() }
}

fn refused(cursor: &Cursor<'_>, entry: &Entry, what: String) -> ModelError {
    ModelError::unsupported(cursor.path, format!("tensor `{}` {what}", entry.name))
}

/// The caller's tiles for a tensor of TL1 or TL2, and the bytes that it takes in them.
fn tiled(
    entry: &Entry,
    encoding: &Encoding,
    options: &OpenOptions,
) -> Result<Option<(Tl, TlTiles, usize)>, String> {
    let Some(tl) = collisions::tl(entry.type_id, encoding) else { return Ok(None) };
    let mut given = options.tl_tiles.iter().filter(|t| *entry.shape == [t.rows, t.cols]);
    let Some(&tiles) = given.next() else { return Ok(None) };
    if given.any(|&other| other != tiles) {
        return Err("has a shape for which the option `tl_tiles` gives several tiles".to_owned());
    }
    let bytes =
        tl.stored_len(tiles).map_err(|what| format!("{what}: the option `tl_tiles` must give others"))?;
    Ok(Some((tl, tiles, bytes)))
}

/// Checks that a tensor has the room that its codes take and no more: more might hold a scale, and which of two
/// counts is not known.
fn fill(
    entry: &Entry,
    tl: Tl,
    bytes: usize,
    data: &[u8],
    starts: &[u64],
    alignment: usize,
) -> Result<(), String> {
    let span = span(entry, data, starts);
    if span.takes(Some(bytes), alignment) {
        return Ok(());
    }
    Err(format!(
        "takes {} bytes, but the codes of {} take {bytes}: its scale may be behind them, which is not read",
        span.bytes.len(),
        tl.name()
    ))
}

/// The positive numbers in tensors `<name>_scale` of one F32, by `<name>`.
fn tl_scales(entries: &[Entry], data: &[u8]) -> HashMap<String, f32> {
    let scale = |e: &Entry| {
        let name = e.name.strip_suffix("_scale").filter(|_| e.type_id == 0)?;
        let at = usize::try_from(e.offset).ok()?;
        let value = f32::from_le_bytes(*data.get(at..)?.first_chunk()?);
        let one = e.shape.iter().all(|&d| d == 1) && value.is_finite() && value > 0.0;
        one.then(|| (name.to_owned(), value))
    };
    entries.iter().filter_map(scale).collect()
}

/// Elements of a tensor, if they can be counted.
fn checked_count(cursor: &Cursor<'_>, entry: &Entry) -> Result<usize, ModelError> {
    let count = element_count(&entry.shape).filter(|&n| i64::try_from(n).is_ok());
    count.ok_or_else(|| cursor.broken(&format!("tensor `{}` has absurd shape {:?}", entry.name, entry.shape)))
}

/// Bytes of a tensor's data; 0 for types of unknown size, whose data cannot be checked.
fn stored_len(cursor: &Cursor<'_>, entry: &Entry, encoding: &Encoding) -> Result<u64, ModelError> {
    let (name, count) = (&entry.name, checked_count(cursor, entry)?);
    let (block, bytes) = match encoding {
        _ if collisions::tl(entry.type_id, encoding).is_some() => return Ok(0),
        // Both layouts fit; this one is the larger.
        Encoding::Undecided { .. } => (64, Encoding::Q2_0G64.byte_len(&entry.shape)),
        Encoding::Other(_) => match types::unread_block(entry.type_id) {
            Some((elements, bytes)) => (elements, (count / elements).checked_mul(bytes)),
            None => return Ok(0),
        },
        _ => (encoding.block_len(), encoding.byte_len(&entry.shape)),
    };
    let row = entry.shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(block) {
        let mut what =
            format!("tensor `{name}` has rows of {row} elements, but {encoding} needs a multiple of {block}");
        if *encoding == Encoding::I2S && row.is_multiple_of(64) {
            what += ": if an ARM build wrote the file in blocks of 64, the option `i2s` must say neon64";
        }
        return Err(cursor.broken(&what));
    }
    if *encoding == Encoding::I2SRows4 && !(count / row.max(1)).is_multiple_of(4) {
        let what =
            format!("tensor `{name}` has {} rows, but {encoding} needs a multiple of 4", count / row.max(1));
        return Err(cursor.broken(&what));
    }
    let bytes = bytes.and_then(|b| u64::try_from(b).ok());
    bytes.ok_or_else(|| cursor.broken(&format!("tensor `{name}` has absurd shape {:?}", entry.shape)))
}

/// A place in the file. Every read says what it wanted, for the message about a short file.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn broken(&self, what: &str) -> ModelError {
        ModelError::format(self.path, format!("not a valid GGUF file: {what}"))
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8], ModelError> {
        if length > self.left() {
            let message = format!(
                "{what} at byte {} needs {length} bytes, but the file ends after {} more",
                self.at,
                self.left()
            );
            return Err(self.broken(&message));
        }
        let taken = &self.bytes[self.at..self.at + length];
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        Ok(self.take(N, what)?.try_into().expect("`take` returns the length asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `smallest` bytes each.
    fn count(&mut self, things: &str, smallest: usize) -> Result<usize, ModelError> {
        let at = self.at;
        let count = self.u64(&format!("the number of {things}"))?;
        if count > (self.bytes.len() / smallest) as u64 {
            let message = format!("{count} {things} (at byte {at}) do not fit in {} bytes", self.bytes.len());
            return Err(self.broken(&message));
        }
        Ok(count as usize)
    }

    fn string(&mut self, limit: u64, what: &str) -> Result<String, ModelError> {
        let at = self.at;
        let length = self.u64(what)?;
        if length > limit || length > self.left() as u64 {
            let message =
                format!("{what} at byte {at} claims {length} bytes, more than are there or allowed");
            return Err(self.broken(&message));
        }
        let bytes = self.take(length as usize, what)?;
        let text = std::str::from_utf8(bytes);
        text.map(str::to_owned).map_err(|_| self.broken(&format!("{what} at byte {at} is not UTF-8")))
    }

    fn name(&mut self, what: &str) -> Result<String, ModelError> {
        let at = self.at;
        let name = self.string(MAX_NAME, what)?;
        if name.is_empty() {
            return Err(self.broken(&format!("{what} at byte {at} is empty")));
        }
        Ok(name)
    }

    fn bool(&mut self, what: &str) -> Result<bool, ModelError> {
        match self.array::<1>(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.broken(&format!("{what} is a boolean of value {other}"))),
        }
    }

    fn value(&mut self, key: &str, type_id: u32) -> Result<Value, ModelError> {
        let what = &format!("the value of key `{key}`");
        Ok(match type_id {
            0 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(what)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => Value::Bool(self.bool(what)?),
            8 => Value::String(self.string(u64::MAX, what)?),
            9 => Value::Array(self.elements(what, 1)?),
            10 => Value::U64(u64::from_le_bytes(self.array(what)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            other => {
                return Err(self.broken(&format!("metadata key `{key}` has unknown value type {other}")));
            }
        })
    }

    fn elements(&mut self, what: &str, depth: usize) -> Result<Array, ModelError> {
        if depth > MAX_DEPTH {
            return Err(self.broken(&format!("{what} nests arrays deeper than {MAX_DEPTH}")));
        }
        let type_id = self.u32(what)?;
        let length = self.u64(what)?;
        let smallest = match type_id {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            other => {
                return Err(self.broken(&format!("{what} is an array of unknown type {other}")));
            }
        };
        if length > (self.left() / smallest) as u64 {
            let message = format!("{what} claims {length} elements, but only {} bytes are left", self.left());
            return Err(self.broken(&message));
        }
        let n = length as usize; // Fits: at most the bytes left.
        Ok(match type_id {
            0 => Array::U8(self.take(n, what)?.to_vec()),
            1 => Array::I8(self.numbers(n, what, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(n, what, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(n, what, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(n, what, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(n, what, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(n, what, f32::from_le_bytes)?),
            7 => Array::Bool((0..n).map(|_| self.bool(what)).collect::<Result<_, _>>()?),
            8 => Array::String((0..n).map(|_| self.string(u64::MAX, what)).collect::<Result<_, _>>()?),
            9 => {
                let inner = (0..n).map(|_| self.elements(what, depth + 1));
                Array::Array(inner.collect::<Result<_, _>>()?)
            }
            10 => Array::U64(self.numbers(n, what, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(n, what, i64::from_le_bytes)?),
            _ => Array::F64(self.numbers(n, what, f64::from_le_bytes)?),
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        count: usize,
        what: &str,
        convert: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, ModelError> {
        let (chunks, _) = self.take(count * N, what)?.as_chunks::<N>(); // No overflow: within the file.
        Ok(chunks.iter().map(|&chunk| convert(chunk)).collect())
    }

    fn entry(&mut self) -> Result<Entry, ModelError> {
        let name = self.name("a tensor name")?;
        let what = &format!("the entry of tensor `{name}`");
        let n_dims = self.u32(what)?;
        if n_dims > MAX_DIMS {
            let message = format!("tensor `{name}` has {n_dims} dimensions, more than {MAX_DIMS}");
            return Err(self.broken(&message));
        }
        let mut shape = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            let dim = self.u64(what)?;
            match usize::try_from(dim) {
                Ok(dim) if dim > 0 => shape.push(dim),
                _ => return Err(self.broken(&format!("tensor `{name}` has a dimension of {dim}"))),
            }
        }
        shape.reverse();
        let type_id = self.u32(what)?;
        let offset = self.u64(what)?;
        Ok(Entry { name, shape, type_id, offset })
    }
}

//! Reads a GGUF header. Nothing in it is believed before it is checked against the bytes that are there.
//!
//! Memory: every count is compared with the bytes left before anything is reserved for it, and arrays
//! keep their elements as small as the file does, so reading takes a small multiple of the header's size.

use std::collections::HashMap;
use std::path::Path;

use super::metadata::{Array, Metadata, Value};
use super::{DEFAULT_ALIGNMENT, MAGIC, types};
use crate::error::ModelError;
use crate::format::Encoding;
use crate::format::tensor::{Rewrite, TensorInfo, element_count};

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
}

/// A tensor entry whose offset is not resolved yet.
struct Entry {
    name: String,
    shape: Vec<usize>,
    type_id: u32,
    offset: u64,
}

/// Reads and checks the header of `bytes`, the whole file; `path` is for messages.
pub(crate) fn read(path: &Path, bytes: &[u8]) -> Result<Header, ModelError> {
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
    let tensors = place(&cursor, entries, data_start, alignment)?;
    Ok(Header { metadata, tensors })
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

/// Turns offsets into ranges of the file and checks bounds, alignment and overlaps.
fn place(
    cursor: &Cursor<'_>,
    entries: Vec<Entry>,
    data_start: usize,
    alignment: usize,
) -> Result<Vec<TensorInfo>, ModelError> {
    let available = cursor.bytes.len().saturating_sub(data_start) as u64;
    let mut names: HashMap<&str, ()> = HashMap::with_capacity(entries.len());
    for entry in &entries {
        if names.insert(&entry.name, ()).is_some() {
            return Err(cursor.broken(&format!("tensor `{}` occurs twice", entry.name)));
        }
    }
    // (offset, bytes, entry), to find each tensor's neighbour in the data.
    let mut spans = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let name = &entry.name;
        if !entry.offset.is_multiple_of(alignment as u64) {
            let what = format!(
                "tensor `{name}` starts at offset {}, not a multiple of the alignment {alignment}",
                entry.offset
            );
            return Err(cursor.broken(&what));
        }
        let bytes = stored_len(cursor, entry)?;
        let end = entry.offset.checked_add(bytes);
        if end.is_none_or(|end| end > available) {
            let what = format!(
                "tensor `{name}` needs {bytes} bytes at offset {} of the data, which has {available}: \
                 the file is cut short or its header is wrong",
                entry.offset
            );
            return Err(cursor.broken(&what));
        }
        spans.push((entry.offset, bytes, index));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        let ((start, bytes, a), (next, _, b)) = (pair[0], pair[1]);
        let (a, b) = (&entries[a], &entries[b]);
        if start + bytes > next {
            let what = format!("tensors `{}` and `{}` overlap", a.name, b.name);
            return Err(cursor.broken(&what));
        }
        // Type 36 once named a 4.5-bit type upstream: only its size tells the two apart.
        if a.type_id == 36 && next - start >= bytes.next_multiple_of(alignment as u64) + alignment as u64 {
            let what = format!(
                "tensor `{}` of type 36 takes {} bytes, but I2_S takes {bytes}: it is another type \
                 of that number, which is not read",
                a.name,
                next - start
            );
            return Err(ModelError::unsupported(cursor.path, what));
        }
    }
    let mut ranges = vec![0..0; entries.len()];
    for (offset, bytes, index) in spans {
        let start = data_start + offset as usize; // Both fit: checked against the file's length.
        ranges[index] = start..start + bytes as usize;
    }
    let infos = entries.into_iter().zip(ranges).map(|(entry, range)| TensorInfo {
        name: entry.name,
        shape: entry.shape,
        encoding: types::encoding(entry.type_id),
        file: 0,
        range,
        rewrite: Rewrite::None,
    });
    Ok(infos.collect())
}

/// Bytes of a tensor's data; 0 for types of unknown size, whose data cannot be checked.
fn stored_len(cursor: &Cursor<'_>, entry: &Entry) -> Result<u64, ModelError> {
    let name = &entry.name;
    let count = element_count(&entry.shape)
        .filter(|&n| i64::try_from(n).is_ok())
        .ok_or_else(|| cursor.broken(&format!("tensor `{name}` has absurd shape {:?}", entry.shape)))?;
    let encoding = types::encoding(entry.type_id);
    let block = match types::block(entry.type_id) {
        Some((elements, _)) => elements,
        // Rows of I2_S must hold whole blocks too, or its kernels and ours would disagree.
        None if encoding == Encoding::I2S => encoding.block_len(),
        None => return Ok(0),
    };
    let row = entry.shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(block) {
        let what =
            format!("tensor `{name}` has rows of {row} elements, but {encoding} needs a multiple of {block}");
        return Err(cursor.broken(&what));
    }
    let bytes = match types::block(entry.type_id) {
        Some((elements, bytes)) => (count / elements).checked_mul(bytes),
        None => encoding.byte_len(&entry.shape),
    };
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

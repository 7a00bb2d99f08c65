//! Writes GGUF version 3, one tensor at a time, so that memory holds no more than one of them.
//!
//! The same metadata and tensors give the same bytes: there is no time stamp, no hash order, and
//! every padding byte is zero.

use std::collections::HashSet;
use std::path::Path;

use super::metadata::{Array, Metadata, Value};
use super::{DEFAULT_ALIGNMENT, MAGIC, type42, types};
use crate::error::ModelError;
use crate::format::output::Output;
use crate::format::{Encoding, TensorSpec};

/// A GGUF file being written. It appears under its name when [`finish`](Self::finish) succeeds.
#[derive(Debug)]
pub struct GgufWriter {
    output: Output,
    specs: Vec<TensorSpec>,
    lengths: Vec<usize>,
    next: usize,
    /// Bytes of the pending tensor that are written.
    written: usize,
    alignment: usize,
}

impl GgufWriter {
    /// Writes the header. The tensors follow in the order of `specs`.
    ///
    /// # Errors
    /// [`ModelError::CannotEncode`] for an encoding that GGUF lacks or rows that are not whole
    /// blocks, [`ModelError::Format`] for duplicate names, more than four dimensions, a bad
    /// `general.alignment` or tensors of Q2_0 whose group size readers could not find out, [`ModelError::Write`] if the file cannot be created.
    pub fn create(path: &Path, metadata: &Metadata, specs: Vec<TensorSpec>) -> Result<Self, ModelError> {
        let alignment = match metadata.u64("general.alignment")? {
            None => DEFAULT_ALIGNMENT,
            Some(a) if a.is_power_of_two() && a <= 1 << 20 => a as usize,
            Some(a) => {
                let what = format!("cannot be written with general.alignment {a}, which is no power of two");
                return Err(ModelError::format(path, what));
            }
        };
        let mut header = Vec::new();
        header.extend_from_slice(MAGIC);
        put_u32(&mut header, 3);
        put_u64(&mut header, specs.len());
        put_u64(&mut header, metadata.len());
        for (key, value) in metadata.iter() {
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        let mut names = HashSet::new();
        let (mut offset, mut lengths) = (0usize, Vec::with_capacity(specs.len()));
        for spec in &specs {
            let fault = if spec.name.is_empty() || spec.name.len() > 65_535 {
                Some("has a name that is empty or longer than 65535 bytes")
            } else if !names.insert(spec.name.as_str()) {
                Some("occurs twice")
            } else if spec.shape.len() > 4 || spec.shape.contains(&0) {
                Some("has more than 4 dimensions, or one of 0")
            } else {
                None
            };
            if let Some(fault) = fault {
                let what = format!("cannot be written: tensor `{}` {fault}", spec.name);
                return Err(ModelError::format(path, what));
            }
            let refuse = |why: &str| ModelError::CannotEncode {
                name: spec.name.clone(),
                encoding: "GGUF".into(),
                why: format!("{} {why}", spec.encoding),
            };
            let id = types::id(&spec.encoding).ok_or_else(|| refuse("is no GGUF type"))?;
            let length = spec.encoding.byte_len(&spec.shape).ok_or_else(|| {
                refuse(&format!(
                    "needs rows of a multiple of {} elements, but the shape is {:?}",
                    spec.encoding.block_len(),
                    spec.shape
                ))
            })?;
            put_string(&mut header, &spec.name);
            put_u32(&mut header, spec.shape.len() as u32);
            for &dim in spec.shape.iter().rev() {
                put_u64(&mut header, dim);
            }
            put_u32(&mut header, id);
            put_u64(&mut header, offset);
            lengths.push(length);
            offset = offset
                .checked_add(length)
                .and_then(|end| end.checked_next_multiple_of(alignment))
                .ok_or_else(|| ModelError::format(path, "cannot be written: it is too large"))?;
        }
        check_type_42(path, &specs, alignment)?;
        let mut output = Output::create(path)?;
        output.write(&header)?;
        output.pad(header.len().next_multiple_of(alignment) - header.len())?;
        Ok(Self { output, specs, lengths, next: 0, written: 0, alignment })
    }

    /// The tensor whose bytes are to be written next.
    pub fn pending(&self) -> Option<&TensorSpec> {
        self.specs.get(self.next)
    }

    /// Writes the bytes of the [`pending`](Self::pending) tensor.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if they are too many or too few, [`ModelError::Write`] if the disk
    /// refuses, [`ModelError::Format`] if all tensors are written already.
    pub fn tensor(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        if let Some(spec) = self.specs.get(self.next)
            && self.written + bytes.len() != self.lengths[self.next]
        {
            return Err(wrong_length(spec, self.written + bytes.len(), self.lengths[self.next]));
        }
        self.part(bytes)
    }

    /// Writes the next bytes of the [`pending`](Self::pending) tensor, which is complete with the last of them.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if they are too many, else as [`tensor`](Self::tensor).
    pub fn part(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        let Some(spec) = self.specs.get(self.next) else {
            return Err(ModelError::format(self.output.path(), "all tensors are already written"));
        };
        let (found, expected) = (self.written + bytes.len(), self.lengths[self.next]);
        if found > expected {
            return Err(wrong_length(spec, found, expected));
        }
        self.output.write(bytes)?;
        self.written = found;
        if found == expected {
            self.output.pad(expected.next_multiple_of(self.alignment) - expected)?;
            (self.next, self.written) = (self.next + 1, 0);
        }
        Ok(())
    }

    /// Flushes and gives the file its name.
    ///
    /// # Errors
    /// [`ModelError::Format`] if a tensor is outstanding, [`ModelError::Write`] if the disk refuses.
    pub fn finish(self) -> Result<(), ModelError> {
        if let Some(spec) = self.pending() {
            let what = format!("cannot be finished: tensor `{}` was not written", spec.name);
            return Err(ModelError::format(self.output.path(), what));
        }
        self.output.finish()
    }
}

fn wrong_length(spec: &TensorSpec, found: usize, expected: usize) -> ModelError {
    ModelError::tensor(&spec.name, format!("{found} bytes to write, but its header entry says {expected}"))
}

/// Readers decide which Q2_0 a file holds from its sizes, so it must be one, and its sizes must tell.
fn check_type_42(path: &Path, specs: &[TensorSpec], alignment: usize) -> Result<(), ModelError> {
    let of = |encoding| specs.iter().filter(move |s| s.encoding == encoding);
    if let (Some(a), Some(b)) = (of(Encoding::Q2_0G64).next(), of(Encoding::Q2_0G128).next()) {
        let what = format!(
            "cannot be written: tensor `{}` is Q2_0 in groups of 64 and `{}` in groups of 128, which share a type number",
            a.name, b.name
        );
        return Err(ModelError::format(path, what));
    }
    let shapes = of(Encoding::Q2_0G64).chain(of(Encoding::Q2_0G128)).map(|s| &s.shape[..]);
    if type42::ambiguous(shapes, alignment) {
        let what = "cannot be written: its tensors of type Q2_0 are so small that groups of 64 and of 128 take the same \
                    space, and no reader could tell which they are";
        return Err(ModelError::format(path, what));
    }
    Ok(())
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: usize) {
    out.extend_from_slice(&(value as u64).to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let id = match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    };
    put_u32(out, id);
    match value {
        Value::U8(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I8(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::Array(v) => put_array(out, v),
        Value::U64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F64(v) => out.extend_from_slice(&v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    let id = match array {
        Array::U8(_) => 0,
        Array::I8(_) => 1,
        Array::U16(_) => 2,
        Array::I16(_) => 3,
        Array::U32(_) => 4,
        Array::I32(_) => 5,
        Array::F32(_) => 6,
        Array::Bool(_) => 7,
        Array::String(_) => 8,
        Array::Array(_) => 9,
        Array::U64(_) => 10,
        Array::I64(_) => 11,
        Array::F64(_) => 12,
    };
    put_u32(out, id);
    put_u64(out, array.len());
    match array {
        Array::U8(v) => out.extend_from_slice(v),
        Array::I8(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::U16(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::I16(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::U32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::I32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::F32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&x| u8::from(x))),
        Array::String(v) => v.iter().for_each(|x| put_string(out, x)),
        Array::Array(v) => v.iter().for_each(|x| put_array(out, x)),
        Array::U64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::I64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::F64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
    }
}

//! TensorBoard's event files: `events.out.tfevents.….setun` in the output folder, scalars of the run beside `metrics.jsonl`.
//!
//! A file is a row of records (TensorFlow's TFRecord, tensorflow/core/lib/io/record_writer.h): the length of the data as
//! `u64`, its masked CRC-32C, the data, the masked CRC-32C of the data, all little-endian. The data is a protocol buffer
//! `Event` (tensorflow/core/util/event.proto), of which a few fields are written here: `wall_time` = 1 (double), `step` = 2,
//! `file_version` = 3 (of the first record), `summary` = 5, with `value` = 1, `tag` = 1, `simple_value` = 2 (float).
//!
//! | tag | measure of [`crate::metrics`] |
//! |---|---|
//! | `train/loss`, `train/lr`, `train/grad_norm`, `train/tokens_per_s`, `train/peak_share` | of every run |
//! | `train/flip_rate`, `train/zero_fraction`, `train/scale`, `train/dead_rows` | of ternary runs |
//! | `eval/NAME/loss`, `eval/NAME/bits_per_byte` | of every held-out set |

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::TrainError;
use crate::metrics::Metrics;
use crate::vocabulary::write_whole;

const BEGINNING: &str = "events.out.tfevents.";
const ENDING: &str = ".setun";
const VERSION: &str = "brain.Event:2";

/// One record.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Event {
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Optimiser steps taken.
    pub step: u64,
    /// Of the first record of a file alone.
    pub file_version: Option<String>,
    /// Values by tag.
    pub scalars: Vec<(String, f32)>,
}

/// Appends to the event file of a run.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Opens the event file in `folder` to go on after `step`, without later events; with `step` 0, or where there is
    /// none, begins a new one. Files that others wrote into the folder stay as they are.
    ///
    /// # Errors
    /// When a file cannot be read or written, or is damaged before its end.
    pub fn open(folder: &Path, step: u64) -> Result<Self, TrainError> {
        let now = since_1970();
        let mut kept =
            frame(&Event { wall_time: now, file_version: Some(VERSION.into()), ..Event::default() }.encode());
        let mut found = event_files(folder)?;
        let path = match found.pop() {
            Some(path) if step > 0 => {
                let bytes = std::fs::read(&path).map_err(|e| TrainError::read(&path, e))?;
                let records = records(&path, &bytes)?;
                let earlier = records.iter().filter(|(_, event)| event.step <= step);
                let earlier: Vec<u8> = earlier.flat_map(|(record, _)| record.iter().copied()).collect();
                if !earlier.is_empty() {
                    kept = earlier;
                }
                path
            }
            old => {
                // Of a run that is begun anew: TensorBoard would draw both.
                for old in found.into_iter().chain(old) {
                    std::fs::remove_file(&old).map_err(|e| TrainError::write(&old, e))?;
                }
                folder.join(format!("{BEGINNING}{}{ENDING}", now as u64))
            }
        };
        write_whole(&path, &kept)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| TrainError::write(&path, e))?;
        Ok(Self { path, file })
    }

    /// Appends what a line of the metrics holds.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, line: &Metrics) -> Result<(), TrainError> {
        let event =
            Event { wall_time: since_1970(), step: line.step, file_version: None, scalars: scalars(line) };
        // One write call per record: a reader never waits for the rest of it.
        let written = self.file.write_all(&frame(&event.encode()));
        written.map_err(|e| TrainError::write(&self.path, e))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The event files that runs of this trainer wrote into `folder`, oldest first.
///
/// # Errors
/// When the folder cannot be read.
pub fn event_files(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| TrainError::read(folder, e))? {
        let path = entry.map_err(|e| TrainError::read(folder, e))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(BEGINNING) && name.ends_with(ENDING) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Reads an event file, checking every sum. A last record cut short, left by a killed run, is ignored; values other than
/// scalars are left out.
///
/// # Errors
/// When the file cannot be read, or with the record that is damaged.
pub fn read(path: &Path) -> Result<Vec<Event>, TrainError> {
    let bytes = std::fs::read(path).map_err(|e| TrainError::read(path, e))?;
    Ok(records(path, &bytes)?.into_iter().map(|(_, event)| event).collect())
}

/// What a line of the metrics holds, by tag.
fn scalars(line: &Metrics) -> Vec<(String, f32)> {
    let train = [
        ("loss", line.loss),
        ("lr", line.lr),
        ("grad_norm", line.grad_norm),
        ("tokens_per_s", line.tokens_per_s),
        ("peak_share", line.peak_share),
        ("flip_rate", line.flip_rate),
        ("zero_fraction", line.zero_fraction),
        ("scale", line.scale),
        ("dead_rows", line.dead_rows.map(|n| n as f64)),
    ];
    let train = train.into_iter().filter_map(|(tag, value)| Some((format!("train/{tag}"), value?)));
    let eval = line.eval_losses().flat_map(|(set, loss)| {
        let bits = line.bits_per_byte(set).map(|bits| (format!("eval/{set}/bits_per_byte"), bits));
        std::iter::once((format!("eval/{set}/loss"), loss)).chain(bits)
    });
    train.chain(eval).map(|(tag, value)| (tag, value as f32)).collect()
}

fn since_1970() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

impl Event {
    /// The protocol buffer.
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.push(1 << 3 | FIXED64);
        out.extend_from_slice(&self.wall_time.to_le_bytes());
        out.push(2 << 3 | VARINT);
        push_varint(&mut out, self.step);
        if let Some(version) = &self.file_version {
            push_bytes(&mut out, 3, version.as_bytes());
        }
        if !self.scalars.is_empty() {
            let mut summary = Vec::new();
            for (tag, value) in &self.scalars {
                let mut entry = Vec::new();
                push_bytes(&mut entry, 1, tag.as_bytes());
                entry.push(2 << 3 | FIXED32);
                entry.extend_from_slice(&value.to_le_bytes());
                push_bytes(&mut summary, 1, &entry);
            }
            push_bytes(&mut out, 5, &summary);
        }
        out
    }

    /// `None` for what is no such protocol buffer.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut event = Self::default();
        for field in Fields(bytes) {
            match field? {
                (1, Field::Fixed64(x)) => event.wall_time = f64::from_le_bytes(x),
                (2, Field::Varint(x)) => event.step = x,
                (3, Field::Bytes(x)) => event.file_version = Some(String::from_utf8(x.to_vec()).ok()?),
                (5, Field::Bytes(summary)) => {
                    for entry in Fields(summary) {
                        let (1, Field::Bytes(entry)) = entry? else { continue };
                        let (mut tag, mut value) = (None, None);
                        for field in Fields(entry) {
                            match field? {
                                (1, Field::Bytes(x)) => tag = Some(String::from_utf8(x.to_vec()).ok()?),
                                (2, Field::Fixed32(x)) => value = Some(f32::from_le_bytes(x)),
                                _ => {}
                            }
                        }
                        event.scalars.extend(tag.zip(value));
                    }
                }
                _ => {}
            }
        }
        Some(event)
    }
}

// How the value of a field is written, in the low three bits of its key.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// `field` below 16.
fn push_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | BYTES);
    push_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

enum Field<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

/// The fields of a protocol buffer, by number; ends with `None` inside where it is broken.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn fixed<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.varint()?;
        let value = match (key & 7) as u8 {
            VARINT => Field::Varint(self.varint()?),
            FIXED64 => Field::Fixed64(self.fixed()?),
            BYTES => {
                let length = usize::try_from(self.varint()?).ok()?;
                let (bytes, rest) = self.0.split_at_checked(length)?;
                self.0 = rest;
                Field::Bytes(bytes)
            }
            FIXED32 => Field::Fixed32(self.fixed()?),
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Field<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[]; // Nothing behind a broken field can be found.
        }
        Some(field)
    }
}

/// A record around `data`.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// The records of a file, with their frames, and the events in them.
fn records<'a>(path: &Path, bytes: &'a [u8]) -> Result<Vec<(&'a [u8], Event)>, TrainError> {
    let mut found = Vec::new();
    let mut rest = bytes;
    while let Some((head, _)) = rest.split_at_checked(12) {
        let damaged = |what: &str| {
            let number = found.len() + 1;
            TrainError::file(path, format!("record {number} {what}; delete the file to go on without it"))
        };
        let length: [u8; 8] = head[..8].try_into().expect("eight bytes");
        if head[8..] != masked_crc(&length) {
            return Err(damaged("has a length whose checksum is wrong"));
        }
        let whole = usize::try_from(u64::from_le_bytes(length)).ok().and_then(|n| n.checked_add(16));
        let Some((record, after)) = whole.and_then(|n| rest.split_at_checked(n)) else { break };
        let data = &record[12..record.len() - 4];
        if record[record.len() - 4..] != masked_crc(data) {
            return Err(damaged("has data whose checksum is wrong"));
        }
        let event = Event::decode(data).ok_or_else(|| damaged("is no event"))?;
        found.push((record, event));
        rest = after;
    }
    Ok(found)
}

/// CRC-32C, turned and shifted as TFRecord wants it, so that sums of sums do not go wrong.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Castagnoli's polynomial, reflected, a byte at a time: a line of the metrics is a few hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut n = 0;
        while n < 256 {
            let mut crc = n as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[n] = crc;
            n += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, &byte| TABLE[(crc as u8 ^ byte) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Score;

    fn line(step: u64) -> Metrics {
        let mut line = Metrics {
            step,
            loss: Some(8.0 / step as f64),
            lr: Some(1e-3),
            flip_rate: Some(0.25),
            dead_rows: Some(3),
            ..Metrics::default()
        };
        if step.is_multiple_of(2) {
            line.add_eval("books", &Score { nats: 20.0, tokens: 10, bytes: 40 });
        }
        line
    }

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        // Appendix B.4: 32 bytes of zeros, of ones, and rising; and the usual check value.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn what_is_written_is_read_back_record_by_record() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::open(folder.path(), 0).unwrap();
        (1..=2).for_each(|step| writer.write(&line(step)).unwrap());
        let events = read(writer.path()).unwrap();
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert_eq!(events.iter().map(|e| e.step).collect::<Vec<_>>(), [0, 1, 2]);
        let scalars: Vec<_> = events[2].scalars.iter().map(|(tag, value)| (tag.as_str(), *value)).collect();
        let expected = [
            ("train/loss", 4.0),
            ("train/lr", 1e-3),
            ("train/flip_rate", 0.25),
            ("train/dead_rows", 3.0),
            ("eval/books/loss", 2.0),
            ("eval/books/bits_per_byte", (0.5 / std::f64::consts::LN_2) as f32),
        ];
        assert_eq!(scalars, expected);
        assert!(events[1].wall_time > 1.7e9 && events[2].wall_time >= events[1].wall_time);
    }

    #[test]
    fn the_bytes_of_an_event_are_those_of_its_protocol_buffer() {
        let event =
            Event { wall_time: 1.0, step: 300, file_version: None, scalars: vec![("a/b".into(), 0.5)] };
        let summary = b"\x0a\x0a\x0a\x03a/b\x15\x00\x00\x00\x3f";
        let expected = [b"\x09\0\0\0\0\0\0\xf0\x3f\x10\xac\x02\x2a\x0c".as_slice(), summary].concat();
        assert_eq!(event.encode(), expected);
        assert_eq!(Event::decode(&expected).unwrap(), event);
    }

    #[test]
    fn going_on_drops_later_events_and_one_cut_short_and_keeps_the_rest_to_the_byte() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("events.out.tfevents.1.other");
        std::fs::write(&other, b"not ours").unwrap();
        let mut writer = EventWriter::open(folder.path(), 0).unwrap();
        (1..=5).for_each(|step| writer.write(&line(step)).unwrap());
        let path = writer.path().to_owned();
        let before = std::fs::read(&path).unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&frame(b"cut short")[..15]).unwrap();
        let mut writer = EventWriter::open(folder.path(), 3).unwrap();
        assert_eq!(writer.path(), path);
        let kept = std::fs::read(&path).unwrap();
        assert!(before.starts_with(&kept));
        writer.write(&line(4)).unwrap();
        assert_eq!(read(&path).unwrap().iter().map(|e| e.step).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(event_files(folder.path()).unwrap(), [path]);
        EventWriter::open(folder.path(), 0).unwrap();
        assert_eq!(event_files(folder.path()).unwrap().len(), 1, "of a run begun anew");
        assert_eq!(std::fs::read(&other).unwrap(), b"not ours");
    }

    #[test]
    fn any_flipped_byte_before_the_end_is_named_with_its_record() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::open(folder.path(), 0).unwrap();
        (1..=2).for_each(|step| writer.write(&line(step)).unwrap());
        let path = writer.path().to_owned();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            std::fs::write(&path, &bytes).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("record ") && error.contains("checksum is wrong"), "{at}: {error}");
        }
    }
}

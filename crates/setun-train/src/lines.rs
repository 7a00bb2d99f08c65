//! Files of one JSON object per line that a run appends to, and that a resumed run goes on with.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::TrainError;
use crate::vocabulary::write_whole;

/// What such a line says, and after which step.
pub trait Line: Serialize + DeserializeOwned {
    /// What an error calls it: "a metrics line".
    const WHAT: &str;

    /// Optimiser steps taken; rises from line to line.
    fn step(&self) -> u64;
}

/// Appends to a file of lines.
#[derive(Debug)]
pub struct LineWriter<T> {
    path: PathBuf,
    file: File,
    lines: PhantomData<T>,
}

impl<T: Line> LineWriter<T> {
    /// Opens `path` to go on after `step`: later lines, written by a run that was killed after its last checkpoint, are
    /// dropped, as is a line cut short. `step` 0 begins anew.
    ///
    /// # Errors
    /// When the file cannot be read or written, or holds a line that is none of these.
    pub fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) if step > 0 => bytes,
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(TrainError::read(path, e));
            }
            _ => Vec::new(),
        };
        let mut text = Vec::new();
        for (line, parsed) in parse::<T>(path, &bytes)? {
            if parsed.step() > step {
                break;
            }
            // The bytes as they are: numbers parsed and printed again might differ.
            text.extend_from_slice(line);
            text.push(b'\n');
        }
        write_whole(path, &text)?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.map_err(|e| TrainError::write(path, e))?;
        Ok(Self { path: path.to_owned(), file, lines: PhantomData })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, line: &T) -> Result<(), TrainError> {
        // Numbers, strings and maps with string keys always serialise; JSON has no NaN, so that becomes null.
        let mut text = serde_json::to_vec(line).expect("lines serialise");
        text.push(b'\n');
        // One write call per line: a reader never sees half of it, and nothing waits in a buffer.
        let written = self.file.write_all(&text);
        written.map_err(|e| TrainError::write(&self.path, e))
    }
}

/// Reads a file of lines. A last line without its end, left by a killed run, is ignored.
///
/// # Errors
/// When the file cannot be read, or with the line that is none of these.
pub fn read<T: Line>(path: &Path) -> Result<Vec<T>, TrainError> {
    let bytes = std::fs::read(path).map_err(|e| TrainError::read(path, e))?;
    Ok(parse(path, &bytes)?.into_iter().map(|(_, line)| line).collect())
}

/// The whole, non-empty lines of a file and what they say.
fn parse<'a, T: Line>(path: &Path, bytes: &'a [u8]) -> Result<Vec<(&'a [u8], T)>, TrainError> {
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |n| n + 1);
    let lines = bytes[..whole].split(|&b| b == b'\n').enumerate();
    let lines = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    let parsed = lines.map(|(number, line)| match serde_json::from_slice(line) {
        Ok(parsed) => Ok((line, parsed)),
        Err(e) => {
            let what = format!("line {} is no {}: {e}", number + 1, T::WHAT);
            Err(TrainError::file(path, what))
        }
    });
    parsed.collect()
}

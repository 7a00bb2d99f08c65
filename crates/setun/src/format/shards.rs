//! A safetensors checkpoint in several files with an index, as Hugging Face writers split large models.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::output::Output;
use super::safetensors::{INDEX_NAME, SafetensorsWriter};
use super::tensor::TensorSpec;
use crate::error::ModelError;

/// Bytes of tensors in one file, as `transformers` splits models (`5GB`).
pub const DEFAULT_SHARD_SIZE: u64 = 5_000_000_000;

/// Whether `name` is that of a file of a split model: `model-00001-of-00002.safetensors`.
pub(crate) fn is_shard_name(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers.and_then(|n| n.split_once("-of-")).is_some_and(|(one, of)| digits(one) && digits(of))
}

/// Safetensors files being written into a folder: `model.safetensors`, or `model-00001-of-0000N.safetensors` … and their
/// index. One is open at a time, and the index comes last.
#[derive(Debug)]
pub struct ShardedWriter {
    folder: PathBuf,
    metadata: Vec<(String, String)>,
    /// The tensors of each file; those of the files already begun are gone.
    shards: std::vec::IntoIter<Vec<TensorSpec>>,
    count: usize,
    begun: usize,
    current: Option<SafetensorsWriter>,
    places: Map<String, Value>,
    total: u64,
}

impl ShardedWriter {
    /// Opens the first file. Tensors are put into a file, in their order, while they take no more than `shard_size`
    /// bytes there; a larger one has a file of its own.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::create`].
    pub fn create(
        folder: &Path,
        metadata: &[(String, String)],
        specs: Vec<TensorSpec>,
        shard_size: u64,
    ) -> Result<Self, ModelError> {
        let (mut shards, mut total, mut here) = (vec![Vec::new()], 0, 0u64);
        for spec in specs {
            // What has no size is refused where its file is begun.
            let bytes = spec.encoding.byte_len(&spec.shape).unwrap_or(0) as u64;
            if here > 0 && here.saturating_add(bytes) > shard_size {
                shards.push(Vec::new());
                here = 0;
            }
            here += bytes;
            total += bytes;
            shards.last_mut().expect("there is always one").push(spec);
        }
        let mut this = Self {
            folder: folder.to_owned(),
            metadata: metadata.to_vec(),
            count: shards.len(),
            shards: shards.into_iter(),
            begun: 0,
            current: None,
            places: Map::new(),
            total,
        };
        this.next_file()?;
        Ok(this)
    }

    /// Names of the files, in order.
    fn name(&self, number: usize) -> String {
        match self.count {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{number:05}-of-{count:05}.safetensors"),
        }
    }

    fn next_file(&mut self) -> Result<(), ModelError> {
        if let Some(done) = self.current.take() {
            done.finish()?;
        }
        if let Some(specs) = self.shards.next() {
            self.begun += 1;
            let name = self.name(self.begun);
            for spec in &specs {
                if self.places.insert(spec.name.clone(), name.clone().into()).is_some() {
                    let what = format!("cannot be written: tensor `{}` occurs twice", spec.name);
                    return Err(ModelError::format(&self.folder, what));
                }
            }
            self.current = Some(SafetensorsWriter::create(&self.folder.join(name), &self.metadata, specs)?);
        }
        Ok(())
    }

    /// The tensor whose bytes are to be written next.
    pub fn pending(&self) -> Option<&TensorSpec> {
        self.current.as_ref().and_then(SafetensorsWriter::pending)
    }

    /// Writes the next bytes of the [`pending`](Self::pending) tensor, which is complete with the last of them.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::part`], and [`ModelError::Write`] if the next file cannot be created.
    pub fn part(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        let Some(current) = &mut self.current else {
            return Err(ModelError::format(&self.folder, "all tensors are already written"));
        };
        current.part(bytes)?;
        if current.pending().is_none() && self.begun < self.count {
            self.next_file()?;
        }
        Ok(())
    }

    /// Finishes the last file and writes the index, if there are several.
    ///
    /// # Errors
    /// [`ModelError::Format`] if a tensor is outstanding, [`ModelError::Write`] if the disk refuses.
    pub fn finish(mut self) -> Result<(), ModelError> {
        self.next_file()?;
        if self.count == 1 {
            return Ok(());
        }
        let index = json!({ "metadata": { "total_size": self.total }, "weight_map": self.places });
        let mut output = Output::create(&self.folder.join(INDEX_NAME))?;
        output.write(format!("{index:#}\n").as_bytes())?;
        output.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Checkpoint, Encoding};

    #[test]
    fn tensors_fill_files_up_to_the_size_and_larger_ones_stand_alone() {
        let spec =
            |name: &str, len| TensorSpec { name: name.into(), shape: vec![len], encoding: Encoding::U8 };
        let specs = vec![spec("a", 4), spec("b", 4), spec("c", 20), spec("d", 1), spec("e", 7)];
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardedWriter::create(folder.path(), &[], specs, 8).unwrap();
        while let Some(spec) = writer.pending() {
            let byte = spec.name.as_bytes()[0];
            let length = spec.shape[0];
            (0..length).for_each(|_| writer.part(&[byte]).unwrap());
        }
        writer.finish().unwrap();
        let index = std::fs::read(folder.path().join(INDEX_NAME)).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 36);
        let map = &index["weight_map"];
        assert_eq!(map["a"], "model-00001-of-00003.safetensors");
        assert_eq!(map["a"], map["b"]);
        assert_eq!(map["c"], "model-00002-of-00003.safetensors");
        assert_eq!(map["d"], map["e"]);
        let file = Checkpoint::open(folder.path()).unwrap();
        for (name, length) in [("a", 4), ("b", 4), ("c", 20), ("d", 1), ("e", 7)] {
            assert_eq!(*file.tensor(name).unwrap().data, vec![name.as_bytes()[0]; length]);
        }
    }

    #[test]
    fn one_file_has_no_index_and_an_unfinished_one_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let specs = |n| vec![TensorSpec { name: "a".into(), shape: vec![n], encoding: Encoding::U8 }];
        let mut writer = ShardedWriter::create(folder.path(), &[], specs(2), 1).unwrap();
        writer.part(&[1]).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("`a`"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let mut writer = ShardedWriter::create(folder.path(), &[], specs(2), 1).unwrap();
        assert!(writer.part(&[1, 2, 3]).unwrap_err().to_string().contains("3 bytes"));
        writer.part(&[1, 2]).unwrap();
        assert!(writer.part(&[1]).is_err());
        writer.finish().unwrap();
        assert!(folder.path().join("model.safetensors").is_file());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

//! Documents from text on disk, one at a time.
//!
//! - `NAME.jsonl`: the string in the `text` field of every line.
//! - any other file: UTF-8 text, documents separated by lines that say `<|endoftext|>`.
//! - a folder: its `.txt` and `.jsonl` files in the order of their names, each as above.
//!
//! Documents lose their surrounding white space; empty ones are skipped. The same files give the same
//! documents in the same order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::config::DataSection;
use crate::error::TrainError;
use crate::vocabulary::END_OF_TEXT;

/// The files that `paths` name, folders listed.
pub(crate) fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, TrainError> {
    let mut found = Vec::new();
    for path in paths {
        let meta = std::fs::metadata(path).map_err(|e| TrainError::read(path, e))?;
        if !meta.is_dir() {
            found.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|e| TrainError::read(path, e))?;
        let mut inside = Vec::new();
        for entry in entries {
            let file = entry.map_err(|e| TrainError::read(path, e))?.path();
            if ["txt", "jsonl"].iter().any(|kind| has_extension(&file, kind)) {
                inside.push(file);
            }
        }
        if inside.is_empty() {
            return Err(TrainError::file(path, "the folder holds no .txt and no .jsonl file"));
        }
        inside.sort();
        found.append(&mut inside);
    }
    Ok(found)
}

/// Refuses a held-out file that is trained on as well, whichever folder or symbolic link leads to it. Copies are not recognised.
pub(crate) fn check_held_out(data: &DataSection) -> Result<(), TrainError> {
    let real = |path: &PathBuf| std::fs::canonicalize(path).map_err(|e| TrainError::read(path, e));
    let mut trained = HashMap::new();
    for source in &data.sources {
        for file in files(&source.path)? {
            trained.insert(real(&file)?, &source.name);
        }
    }
    for set in &data.valid {
        for file in files(&set.path)? {
            if let Some(source) = trained.get(&real(&file)?) {
                let field = format!("data.valid.path of `{}`", set.name);
                let expected =
                    format!("a file that is not trained on, but the source `{source}` reads it too");
                return Err(TrainError::setting(field, file.display(), expected));
            }
        }
    }
    Ok(())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// A hash of the files' contents and of their boundaries.
pub(crate) fn fingerprint(files: &[PathBuf]) -> Result<u64, TrainError> {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let read = |e| TrainError::read(path, e);
        let mut file = File::open(path).map_err(read)?;
        let mut length = 0u64;
        loop {
            let n = file.read(&mut buffer).map_err(read)?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            length += n as u64;
        }
        // A text file and a JSONL file of the same bytes are different documents.
        hash.update(&[u8::from(has_extension(path, "jsonl"))]);
        hash.update(&length.to_le_bytes());
    }
    Ok(hash.digest())
}

/// Iterates over the documents of `files`. After an error it ends.
pub(crate) struct Documents {
    files: std::vec::IntoIter<PathBuf>,
    current: Option<Reader>,
    failed: bool,
}

struct Reader {
    path: PathBuf,
    lines: BufReader<File>,
    line: usize,
    json: bool,
    buffer: Vec<u8>,
}

impl Documents {
    pub(crate) fn new(files: Vec<PathBuf>) -> Self {
        Self { files: files.into_iter(), current: None, failed: false }
    }

    fn advance(&mut self) -> Result<Option<String>, TrainError> {
        loop {
            if self.current.is_none() {
                let Some(path) = self.files.next() else {
                    return Ok(None);
                };
                self.current = Some(Reader::open(path)?);
            }
            let reader = self.current.as_mut().expect("set above");
            match reader.document()? {
                Some(text) => return Ok(Some(text)),
                None => self.current = None,
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<String, TrainError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let item = self.advance().transpose();
        self.failed = matches!(item, Some(Err(_)));
        item
    }
}

impl Reader {
    fn open(path: PathBuf) -> Result<Self, TrainError> {
        let file = File::open(&path).map_err(|e| TrainError::read(&path, e))?;
        let json = has_extension(&path, "jsonl");
        let lines = BufReader::with_capacity(1 << 20, file);
        Ok(Self { path, lines, line: 0, json, buffer: Vec::new() })
    }

    /// The next line, without its end; `None` at the end of the file.
    fn line(&mut self) -> Result<Option<&str>, TrainError> {
        self.buffer.clear();
        let read = self.lines.read_until(b'\n', &mut self.buffer);
        if read.map_err(|e| TrainError::read(&self.path, e))? == 0 {
            return Ok(None);
        }
        self.line += 1;
        let bytes = if self.line == 1 {
            self.buffer.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&self.buffer)
        } else {
            &self.buffer
        };
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        std::str::from_utf8(bytes).map(Some).map_err(|e| {
            let what = format!("line {} is not UTF-8 from its byte {}", self.line, e.valid_up_to() + 1);
            TrainError::file(&self.path, what)
        })
    }

    fn document(&mut self) -> Result<Option<String>, TrainError> {
        if self.json {
            return self.json_document();
        }
        let mut text = String::new();
        while let Some(line) = self.line()? {
            if line.trim() != END_OF_TEXT {
                text.push_str(line);
                text.push('\n');
            } else if let Some(document) = trimmed(&text) {
                return Ok(Some(document));
            } else {
                text.clear();
            }
        }
        Ok(trimmed(&text))
    }

    fn json_document(&mut self) -> Result<Option<String>, TrainError> {
        #[derive(serde::Deserialize)]
        struct Line {
            text: String,
        }
        while let Some(line) = self.line()? {
            if line.trim().is_empty() {
                continue;
            }
            let parsed: Result<Line, _> = serde_json::from_str(line);
            let Line { text } = parsed.map_err(|e| {
                let what = format!("line {} is not a JSON object with a string `text`: {e}", self.line);
                TrainError::file(&self.path, what)
            })?;
            if let Some(document) = trimmed(&text) {
                return Ok(Some(document));
            }
        }
        Ok(None)
    }
}

fn trimmed(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(paths: &[PathBuf]) -> Result<Vec<String>, TrainError> {
        Documents::new(files(paths)?).collect()
    }

    #[test]
    fn separator_lines_end_documents_and_empty_ones_are_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(
            &path,
            "\u{feff}one\r\n\r\ntwo\n<|endoftext|>\n\n<|endoftext|>\r\n three <|endoftext|> here\n",
        )
        .unwrap();
        let found = read(&[path]).unwrap();
        assert_eq!(found, ["one\n\ntwo", "three <|endoftext|> here"]);
    }

    #[test]
    fn json_lines_and_folders_give_documents_in_name_order() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("b.txt"), "second").unwrap();
        std::fs::write(at("a.jsonl"), "{\"text\": \"fi\\nrst\", \"id\": 1}\n\n").unwrap();
        std::fs::write(at("ignored.md"), "no").unwrap();
        assert_eq!(read(&[folder.path().to_owned()]).unwrap(), ["fi\nrst", "second"]);
    }

    #[test]
    fn unusable_text_is_an_error_with_its_line_and_ends_the_iteration() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("a.txt"), b"fine\nbad \xff\n").unwrap();
        std::fs::write(at("b.jsonl"), "{\"words\": 1}\n").unwrap();
        let error = read(&[at("a.txt")]).unwrap_err().to_string();
        assert!(error.contains("a.txt: line 2 is not UTF-8 from its byte 5"), "{error}");
        let error = read(&[at("b.jsonl")]).unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("`text`"), "{error}");
        let mut documents = Documents::new(vec![at("b.jsonl"), at("a.txt")]);
        assert!(documents.next().unwrap().is_err());
        assert!(documents.next().is_none());
        std::fs::create_dir(at("empty")).unwrap();
        assert!(read(&[at("empty")]).unwrap_err().to_string().contains("no .txt"));
        assert!(read(&[at("absent.txt")]).unwrap_err().to_string().contains("absent.txt"));
    }

    #[test]
    fn fingerprint_sees_contents_and_file_boundaries() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let of = |paths: &[PathBuf]| fingerprint(paths).unwrap();
        let (ab, c) = (at("1.txt", "ab"), at("2.txt", "c"));
        let (a, bc) = (at("3.txt", "a"), at("4.txt", "bc"));
        assert_ne!(of(&[ab.clone(), c.clone()]), of(&[a, bc]));
        assert_eq!(of(&[ab.clone(), c.clone()]), of(&[ab, c]));
    }
}

//! A source's tokens: made once, in parallel, into a cache file that is mapped, never loaded.
//!
//! The file, little-endian: `SETUNTOK`, u32 version, u32 bytes per token (2 or 4), u64 key, u64 documents,
//! u64 tokens; then the tokens, padded with zeros to a multiple of 8 bytes; then for each document a u64, the token at which it ends.
//! The key hashes the tokenizer and the text, so a change to either makes the file anew; so does damage, which is
//! looked for whenever the file is opened. It is written beside its place and renamed.
//!
//! Making it holds one chunk of text and its ids in memory ([`CHUNK_BYTES`] and one document), reading it nothing: pages
//! come from the system's cache and go when memory is short.
//!
//! Every document begins with the end-of-text token, so documents joined in any order are separated by it, and a
//! model learns to begin a text from it.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use setun::format::MappedFile;
use setun_kernels::Pool;

use super::Preparing;
use super::documents::Documents;
use crate::error::TrainError;
use crate::vocabulary::Vocabulary;

const MAGIC: &[u8; 8] = b"SETUNTOK";
const VERSION: u32 = 2;
const HEADER: usize = 40;

/// Text handed to the threads at a time: enough to keep them busy, little enough to forget.
pub(crate) const CHUNK_BYTES: usize = 8 << 20;

/// Bytes checked before their pages are given back.
const CHECKED_BYTES: usize = 32 << 20;

/// Temporary files younger than this may be another run's that has not locked them yet.
const ABANDONED: Duration = Duration::from_secs(60);

/// Documents as ids, in a mapped file.
#[derive(Debug, Clone)]
pub(crate) struct Corpus {
    file: Arc<MappedFile>,
    /// Bytes per token.
    width: usize,
    documents: usize,
    tokens: usize,
    /// Hash of the tokenizer and the text.
    pub(crate) key: u64,
}

/// What a corpus is made of.
pub(crate) struct Text<'a> {
    /// Name of the source, for displays.
    pub(crate) source: &'a str,
    pub(crate) documents: Documents,
    /// Their hash.
    pub(crate) hash: u64,
    /// Text that is tokenised at a time, [`CHUNK_BYTES`] or less.
    pub(crate) chunk_bytes: usize,
}

impl Corpus {
    /// The corpus of `text` from the cache file `path`, made and written there if it is absent, stale or damaged.
    pub(crate) fn cached(
        path: &Path,
        text: Text,
        vocabulary: &Vocabulary,
        threads: usize,
        watch: &mut dyn FnMut(Preparing),
    ) -> Result<Self, TrainError> {
        let key = key(text.hash, vocabulary);
        if path.exists() {
            match Self::open(path, key, vocabulary.len()) {
                Ok(found) => return Ok(found),
                Err(reason) => watch(Preparing::Remaking { cache: path, reason: &reason }),
            }
        }
        let (documents, tokens) = make(path, text, key, vocabulary, threads, watch)?;
        let made = Self::open(path, key, vocabulary.len()).map_err(|reason| {
            TrainError::file(
                path,
                format!("written with {documents} documents and {tokens} tokens, but {reason}"),
            )
        })?;
        Ok(made)
    }

    /// Maps a cache file, if it is whole, of this key, and its ids are below `vocabulary`; else says why not.
    fn open(path: &Path, key: u64, vocabulary: usize) -> Result<Self, String> {
        let file = MappedFile::open(path).map_err(|e| e.to_string())?;
        let header = file.get(..HEADER).filter(|header| header.starts_with(MAGIC));
        let header = header.ok_or("it is no token cache")?;
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        if u32_at(8) != VERSION {
            return Err(format!("it is of format {}, this program's is {VERSION}", u32_at(8)));
        }
        if u64_at(16) != key {
            return Err("the text or the tokenizer has changed".into());
        }
        let damaged = || "it is damaged".to_owned();
        let count = |at: usize| usize::try_from(u64_at(at)).map_err(|_| damaged());
        let (width, documents, tokens) = (u32_at(12) as usize, count(24)?, count(32)?);
        if width != width_of(vocabulary) {
            return Err(damaged());
        }
        let length =
            ends_at(tokens, width).zip(documents.checked_mul(8)).and_then(|(at, ends)| at.checked_add(ends));
        if length != Some(file.len()) {
            return Err("its length is not the one that it says, so it was cut short or changed".into());
        }
        let made = Self { file: Arc::new(file), width, documents, tokens, key };
        made.is_sound(vocabulary).then_some(made).ok_or_else(damaged)
    }

    /// Whether all ids are known and documents follow each other, none of them empty.
    fn is_sound(&self, vocabulary: usize) -> bool {
        let (ends_at, mut last) = (HEADER + (self.tokens * self.width).next_multiple_of(8), 0);
        let pieces = |from: usize, to: usize| {
            let starts = (from..to).step_by(CHECKED_BYTES);
            starts.map(move |start| start..to.min(start + CHECKED_BYTES))
        };
        let known = pieces(HEADER, HEADER + self.tokens * self.width).all(|piece| {
            let bytes = &self.file[piece.clone()];
            let largest = match self.width {
                2 => chunks(bytes).map(u16::from_le_bytes).max().map(u32::from),
                _ => chunks(bytes).map(u32::from_le_bytes).max(),
            };
            self.file.release(piece);
            largest.is_none_or(|id| (id as usize) < vocabulary)
        });
        let rising = pieces(ends_at, self.file.len()).all(|piece| {
            let good = chunks(&self.file[piece.clone()]).map(u64::from_le_bytes).all(|end| {
                let good = end > last;
                last = end;
                good
            });
            self.file.release(piece);
            good
        });
        known && rising && last == self.tokens as u64
    }

    /// Number of documents.
    pub(crate) fn documents(&self) -> usize {
        self.documents
    }

    /// Number of tokens, one marker per document included.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens of document `index`, its marker included.
    pub(crate) fn length(&self, index: usize) -> usize {
        let range = self.range(index);
        range.end - range.start
    }

    fn range(&self, index: usize) -> std::ops::Range<usize> {
        let start = if index == 0 { 0 } else { self.end(index - 1) };
        start..self.end(index)
    }

    fn end(&self, index: usize) -> usize {
        let at = HEADER + (self.tokens * self.width).next_multiple_of(8) + 8 * index;
        u64::from_le_bytes(self.file[at..at + 8].try_into().expect("eight bytes")) as usize
    }

    /// Appends `count` tokens of document `index`, from its token `offset`, to `to`.
    pub(crate) fn copy(&self, index: usize, offset: usize, count: usize, to: &mut Vec<u32>) {
        let start = HEADER + (self.range(index).start + offset) * self.width;
        let bytes = &self.file[start..start + count * self.width];
        match self.width {
            2 => to.extend(chunks(bytes).map(|id| u32::from(u16::from_le_bytes(id)))),
            _ => to.extend(chunks(bytes).map(u32::from_le_bytes)),
        }
    }
}

/// Bytes per token of a vocabulary of so many ids.
fn width_of(vocabulary: usize) -> usize {
    if vocabulary <= 1 << 16 { 2 } else { 4 }
}

/// Where the ends of the documents begin in a file.
fn ends_at(tokens: usize, width: usize) -> Option<usize> {
    tokens.checked_mul(width)?.checked_next_multiple_of(8)?.checked_add(HEADER)
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|chunk| chunk.try_into().expect("chunks of N"))
}

fn key(text: u64, vocabulary: &Vocabulary) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    hash.update(&text.to_le_bytes());
    hash.update(&vocabulary.end_of_text().to_le_bytes());
    hash.update(vocabulary.json().as_bytes());
    hash.digest()
}

/// Tokenises `text` into the file `path`. Returns the numbers of documents and tokens.
fn make(
    path: &Path,
    mut text: Text,
    key: u64,
    vocabulary: &Vocabulary,
    threads: usize,
    watch: &mut dyn FnMut(Preparing),
) -> Result<(usize, u64), TrainError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| TrainError::write(folder, e))?;
    }
    clear_abandoned(path);
    let pool = Pool::new(threads);
    let mut writer = Writer::new(path, width_of(vocabulary.len()))?;
    loop {
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        while bytes < text.chunk_bytes
            && let Some(document) = text.documents.next().transpose()?
        {
            bytes += document.len();
            chunk.push(document);
        }
        let (documents, tokens) = (writer.documents, writer.tokens);
        if chunk.is_empty() {
            writer.finish(key)?;
            watch(Preparing::Tokenized { source: text.source, documents, tokens });
            return Ok((documents, tokens));
        }
        let (read, total) = text.documents.progress();
        watch(Preparing::Tokenizing { source: text.source, read, total });
        for ids in encode_all(&chunk, vocabulary, &pool)? {
            writer.push(vocabulary.end_of_text(), &ids)?;
        }
    }
}

/// Ids of every text, in order.
fn encode_all(texts: &[String], vocabulary: &Vocabulary, pool: &Pool) -> Result<Vec<Vec<u32>>, TrainError> {
    let mut all: Vec<Result<Vec<u32>, TrainError>> = texts.iter().map(|_| Ok(Vec::new())).collect();
    pool.run_items(all.iter_mut().zip(texts).collect(), |_, (ids, text): (&mut Result<_, _>, &String)| {
        let encoded = catch_unwind(AssertUnwindSafe(|| vocabulary.encode(text)));
        *ids = encoded.unwrap_or_else(|_| Err(TrainError::tokenizer("the library gave up on a document")));
    });
    all.into_iter().collect()
}

/// A cache file that is being written.
struct Writer {
    path: PathBuf,
    width: usize,
    tokens_to: Temporary,
    /// The ends follow the tokens, of which nobody knows the number before.
    ends_to: Temporary,
    documents: usize,
    tokens: u64,
}

impl Writer {
    fn new(path: &Path, width: usize) -> Result<Self, TrainError> {
        let (tokens_to, ends_to) = (Temporary::new(path, "tokens")?, Temporary::new(path, "ends")?);
        let mut made = Self { path: path.to_owned(), width, tokens_to, ends_to, documents: 0, tokens: 0 };
        made.tokens_to.write(&[0; HEADER])?;
        Ok(made)
    }

    fn push(&mut self, marker: u32, ids: &[u32]) -> Result<(), TrainError> {
        for id in std::iter::once(&marker).chain(ids) {
            // Two bytes only where every id of the vocabulary fits.
            self.tokens_to.write(&id.to_le_bytes()[..self.width])?;
        }
        self.documents += 1;
        self.tokens += 1 + ids.len() as u64;
        self.ends_to.write(&self.tokens.to_le_bytes())
    }

    fn finish(mut self, key: u64) -> Result<(), TrainError> {
        let bytes = self.tokens * self.width as u64;
        self.tokens_to.write(&[0; 8][..(bytes.next_multiple_of(8) - bytes) as usize])?;
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((self.width as u32).to_le_bytes());
        for number in [key, self.documents as u64, self.tokens] {
            header.extend(number.to_le_bytes());
        }
        let (tokens, ends) = (&mut self.tokens_to, &mut self.ends_to);
        let mut join = || {
            ends.to.flush()?;
            ends.to.seek(SeekFrom::Start(0))?;
            std::io::copy(ends.to.get_mut(), &mut tokens.to)?;
            tokens.to.seek(SeekFrom::Start(0))?;
            tokens.to.write_all(&header)?;
            tokens.to.flush()?;
            std::fs::rename(&tokens.path, &self.path)
        };
        join().map_err(|e| TrainError::write(&self.path, e))
    }
}

/// A locked file beside `path`, deleted when dropped, unless it was renamed.
struct Temporary {
    path: PathBuf,
    to: BufWriter<File>,
}

impl Temporary {
    fn new(target: &Path, what: &str) -> Result<Self, TrainError> {
        let mut path = target.as_os_str().to_owned();
        path.push(format!(".{}.{what}.tmp", std::process::id()));
        let path = PathBuf::from(path);
        let write = |e| TrainError::write(&path, e);
        let open =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).map_err(write)?;
        // Only a sign for [`clear_abandoned`]: where files cannot be locked, leftovers stay.
        let _ = open.try_lock();
        Ok(Self { to: BufWriter::with_capacity(1 << 20, open), path })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), TrainError> {
        self.to.write_all(bytes).map_err(|e| TrainError::write(&self.path, e))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Deletes what killed runs left of their work on `path`.
fn clear_abandoned(path: &Path) {
    let Some((folder, name)) = path.parent().zip(path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let ours =
            file.to_str().and_then(|f| f.strip_prefix(name)).is_some_and(|rest| rest.ends_with(".tmp"));
        let age = entry.metadata().ok().and_then(|meta| meta.modified().ok()?.elapsed().ok());
        let free = || File::open(entry.path()).is_ok_and(|open| open.try_lock().is_ok());
        if ours && age.is_some_and(|age| age > ABANDONED) && free() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::data::documents;

    /// A file of 200 short documents, and a vocabulary learnt from it.
    fn text(folder: &Path) -> (PathBuf, Vocabulary) {
        let path = folder.join("a.txt");
        let documents: Vec<String> = (0..200).map(|n| format!("the {} {n}", "cat ".repeat(n % 7))).collect();
        std::fs::write(&path, documents.join("\n<|endoftext|>\n")).unwrap();
        let vocabulary = Vocabulary::train(documents.into_iter().map(Ok), 300).unwrap();
        (path, vocabulary)
    }

    fn of(path: &Path, chunk_bytes: usize) -> Text<'static> {
        let files = documents::files(&[path.to_owned()], None).unwrap();
        Text { source: "a", documents: Documents::new(files), hash: 1, chunk_bytes }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn neither_threads_nor_chunks_change_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (path, vocabulary) = text(folder.path());
        let cache = folder.path().join("made/a.tokens");
        let mut first: Option<Vec<u8>> = None;
        for (threads, chunk_bytes) in [(1, CHUNK_BYTES), (2, CHUNK_BYTES), (3, 1), (2, 100), (1, 5000)] {
            let mut told = Vec::new();
            let mut watch = |now: Preparing| {
                if let Preparing::Tokenizing { read, total, .. } = now {
                    told.push((read, total));
                }
            };
            let made =
                Corpus::cached(&cache, of(&path, chunk_bytes), &vocabulary, threads, &mut watch).unwrap();
            assert_eq!(made.documents(), 200);
            assert!(told.is_sorted() && told.iter().all(|(read, total)| read <= total && *total > 0));
            assert!(chunk_bytes > 1 || told.len() == 200, "a chunk holds no more than it should");
            let bytes = std::fs::read(&cache).unwrap();
            assert!(first.get_or_insert_with(|| bytes.clone()) == &bytes, "{threads}, {chunk_bytes}");
            assert_eq!(names(&folder.path().join("made")), ["a.tokens"]);
            drop(made);
            std::fs::remove_file(&cache).unwrap();
        }
    }

    #[test]
    fn wide_and_narrow_ids_are_read_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tokens");
        for (vocabulary, ids) in [(65_536, [65_535, 7, 0]), (65_537, [65_536, 7, 1])] {
            let mut writer = Writer::new(&path, width_of(vocabulary)).unwrap();
            writer.push(9, &ids).unwrap();
            writer.push(9, &[]).unwrap();
            writer.finish(5).unwrap();
            let corpus = Corpus::open(&path, 5, vocabulary).unwrap();
            assert_eq!(
                (corpus.documents(), corpus.tokens(), corpus.length(0), corpus.length(1)),
                (2, 5, 4, 1)
            );
            let mut found = Vec::new();
            corpus.copy(0, 1, 3, &mut found);
            corpus.copy(1, 0, 1, &mut found);
            assert_eq!(found, [&ids[..], &[9]].concat());
            assert!(Corpus::open(&path, 6, vocabulary).unwrap_err().contains("has changed"));
            assert_eq!(Corpus::open(&path, 5, 100).unwrap_err(), "it is damaged");
        }
    }

    #[test]
    fn text_that_cannot_be_used_leaves_the_cache_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let (path, vocabulary) = text(folder.path());
        let cache = folder.path().join("made/a.tokens");
        let made = |path: &Path| Corpus::cached(&cache, of(path, 64), &vocabulary, 2, &mut |_| ());
        made(&path).unwrap();
        let stale = [std::fs::read(&cache).unwrap(), vec![0]].concat();
        std::fs::write(&cache, &stale).unwrap();
        std::fs::write(&path, [&std::fs::read(&path).unwrap()[..], b"\n\xff\n"].concat()).unwrap();
        assert!(made(&path).unwrap_err().to_string().contains("is not UTF-8"));
        assert_eq!(names(&folder.path().join("made")), ["a.tokens"]);
        assert_eq!(std::fs::read(&cache).unwrap(), stale);
    }

    #[test]
    fn what_a_killed_run_left_is_cleared_away_and_what_a_running_one_writes_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tokens");
        let old = SystemTime::now() - 2 * ABANDONED;
        let make = |name: &str, age: SystemTime| {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(age).unwrap();
            file
        };
        drop(make("a.tokens.1.ends.tmp", old));
        drop(make("a.tokens.2.tokens.tmp", SystemTime::now()));
        drop(make("b.tokens.3.ends.tmp", old));
        let running = make("a.tokens.4.ends.tmp", old);
        running.lock().unwrap();
        clear_abandoned(&path);
        let left = ["a.tokens.2.tokens.tmp", "a.tokens.4.ends.tmp", "b.tokens.3.ends.tmp"];
        assert_eq!(names(folder.path()), left);
    }
}

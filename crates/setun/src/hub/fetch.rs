//! One file from a hub into the cache: resumed, checked, and under its final name only when it is complete.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::time::Instant;

use ring::digest;
use ureq::http::{StatusCode, header};

use super::Event;
use super::Watch;
use super::cache::{RepoCache, create_parent, length};
use super::http::{Client, Failure, Metadata, is_html};
use super::name::{HubName, shown};
use crate::error::ModelError;

/// Progress that makes earlier failures count no more.
const ENOUGH: u64 = 1 << 20;
/// Bytes per second, over one timeout, below which a host counts as silent.
const SLOWEST: f64 = 1024.0;

/// What is fetched, and where to.
pub(super) struct Download<'a> {
    pub(super) client: &'a Client,
    pub(super) cache: &'a RepoCache,
    pub(super) name: &'a HubName,
    pub(super) file: &'a str,
    pub(super) about: &'a Metadata,
    /// Bytes of the files before this one.
    pub(super) before: u64,
}

/// Why one answer did not bring all the rest.
enum Cut {
    Network(Failure),
    Disk(std::io::Error),
}

impl From<Failure> for Cut {
    fn from(failure: Failure) -> Self {
        Self::Network(failure)
    }
}

impl Download<'_> {
    /// Fetches the blob unless it is there. Another program that fetches it is waited for.
    pub(super) fn run(&self, watch: &mut Watch) -> Result<(), ModelError> {
        let etag = &self.about.etag;
        let _lock = self.cache.lock(etag, || {
            watch(Event::Note(&format!("waiting for another program that fetches {}", self.file)));
        })?;
        let (blob, incomplete) = (self.cache.blob(etag), self.cache.incomplete(etag));
        create_parent(&blob).map_err(|e| ModelError::write(&blob, e))?;
        match length(&blob)? {
            Some(found) if found == self.about.size => return Ok(()),
            // Damaged or cut short by someone: no copy of what the hub has.
            Some(_) => fs::remove_file(&blob).map_err(|e| ModelError::write(&blob, e))?,
            None => {}
        }
        let mut last_chance = false;
        while let Err((expected, found)) = self.receive(watch)? {
            fs::remove_file(&incomplete).map_err(|e| ModelError::write(&incomplete, e))?;
            let what = format!("{} has the checksum {found}, but the hub names {expected}", self.file);
            if last_chance {
                return Err(self.failed(format!(
                    "{what}: it was fetched twice and deleted, because something on the way, or the hub, changes it"
                )));
            }
            watch(Event::Note(&format!("{what}; fetching it again from the start")));
            last_chance = true;
        }
        fs::rename(&incomplete, &blob).map_err(|e| ModelError::write(&blob, e))
    }

    /// Completes the `.incomplete` file; the inner error holds the checksum expected and the one found.
    fn receive(&self, watch: &mut Watch) -> Result<Result<(), (String, String)>, ModelError> {
        let (size, path) = (self.about.size, self.cache.incomplete(&self.about.etag));
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let partial = file.and_then(|file| Partial::resume(file, self.about));
        let mut partial = partial.map_err(|e| self.disk(e))?;
        let mut patience = self.client.patience();
        while partial.have < size {
            let had = partial.have;
            match self.stream(&mut partial, watch) {
                Ok(()) => {}
                Err(Cut::Disk(e)) => return Err(self.disk(e)),
                Err(Cut::Network(failure)) => {
                    if partial.have >= had.saturating_add(ENOUGH) {
                        patience.reset();
                    }
                    patience
                        .after(failure, watch)
                        .map_err(|what| self.failed(self.kept(what, partial.have)))?;
                }
            }
        }
        partial.file.sync_all().map_err(|e| self.disk(e))?;
        Ok(partial.sum.take().map_or(Ok(()), Sum::check))
    }

    /// One request, and as much of its answer as comes.
    fn stream(&self, partial: &mut Partial, watch: &mut Watch) -> Result<(), Cut> {
        let (size, file) = (self.about.size, self.file);
        let response = self.client.contents(self.name, self.about, file, partial.have)?;
        let headers = response.headers();
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let get = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        match response.status() {
            StatusCode::PARTIAL_CONTENT if partial.have > 0 => {
                let range = get(header::CONTENT_RANGE).unwrap_or_default();
                let parts = range.strip_prefix("bytes ").and_then(|r| r.split_once('/'));
                let start = parts.and_then(|(r, _)| number(r.split_once('-')?.0));
                let total = parts.map(|(_, total)| total);
                if start != Some(partial.have) || !total.is_some_and(|t| t == "*" || number(t) == Some(size))
                {
                    partial.restart(self.about).map_err(Cut::Disk)?;
                    let what = format!("the rest of {file} was asked for, but `{}` came", shown(range));
                    return Err(Failure::passing(what).into());
                }
            }
            StatusCode::OK => {}
            StatusCode::RANGE_NOT_SATISFIABLE if partial.have > 0 => {
                partial.restart(self.about).map_err(Cut::Disk)?;
                return Err(Failure::passing(format!("the rest of {file} is refused")).into());
            }
            other => return Err(Failure::fatal(format!("{file} is answered with status {other}")).into()),
        }
        let whole = response.status() == StatusCode::OK;
        let expected = if whole { size } else { size - partial.have };
        if let Some(announced) = get(header::CONTENT_LENGTH).and_then(number).filter(|&n| n != expected) {
            let page =
                if is_html(headers) { ", as a web page: does the network ask for a login" } else { "" };
            let what = format!("{file} should bring {expected} bytes, but {announced} are announced{page}");
            return Err(Failure::fatal(what).into());
        }
        if whole && partial.have > 0 {
            watch(Event::Note(&format!("{file} cannot be resumed here, so it starts again")));
            partial.restart(self.about).map_err(Cut::Disk)?;
        }
        let (mut body, mut buffer) = (response.into_body().into_reader(), vec![0; 128 << 10]);
        let timeout = self.client.settings.timeout;
        let (mut since, mut received) = (Instant::now(), 0usize);
        while partial.have < size {
            // What comes beyond the announced size is not read.
            let most = usize::try_from(size - partial.have).unwrap_or(usize::MAX).min(buffer.len());
            let broke = |why: &str| {
                Failure::passing(format!("{file} broke off after {} of {size} bytes{why}", partial.have))
            };
            let n = match body.read(&mut buffer[..most]) {
                Ok(0) => return Err(broke("").into()),
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(broke(&format!(": {}", shown(&e.to_string()))).into()),
            };
            partial.write(&buffer[..n]).map_err(Cut::Disk)?;
            watch(Event::Bytes { file, done: self.before + partial.have });
            received += n;
            let passed = since.elapsed();
            if passed >= timeout {
                if (received as f64) < SLOWEST * passed.as_secs_f64() {
                    let what = format!("{file} comes slower than 1 KB/s");
                    return Err(Failure::passing(what).into());
                }
                (since, received) = (Instant::now(), 0);
            }
        }
        Ok(())
    }

    fn failed(&self, what: impl Into<String>) -> ModelError {
        ModelError::hub(&self.name.to_string(), what)
    }

    fn kept(&self, what: String, have: u64) -> String {
        match have {
            0 => what,
            _ => format!(
                "{what}; {have} bytes of {} are kept, and the next attempt goes on from there",
                self.file
            ),
        }
    }

    fn disk(&self, error: std::io::Error) -> ModelError {
        let path = self.cache.incomplete(&self.about.etag);
        self.failed(format!(
            "cannot write {}: {error}; what was fetched is kept, so make room, or name another cache with HF_HOME, and pull again",
            path.display()
        ))
    }
}

/// The part of a file that is there, and its checksum so far.
struct Partial {
    file: File,
    have: u64,
    sum: Option<Sum>,
}

impl Partial {
    fn resume(file: File, about: &Metadata) -> std::io::Result<Self> {
        let mut this = Self { have: file.metadata()?.len(), file, sum: Sum::of(about) };
        if this.have > about.size {
            this.restart(about)?;
        }
        if this.have > 0
            && let Some(sum) = &mut this.sum
        {
            let (mut buffer, mut left) = (vec![0; 1 << 20], this.have);
            while left > 0 {
                let n = this.file.read(&mut buffer)?;
                if n == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                sum.context.update(&buffer[..n]);
                left = left.saturating_sub(n as u64);
            }
        }
        this.file.seek(SeekFrom::Start(this.have))?;
        Ok(this)
    }

    fn restart(&mut self, about: &Metadata) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.have, self.sum) = (0, Sum::of(about));
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.have += bytes.len() as u64;
        if let Some(sum) = &mut self.sum {
            sum.context.update(bytes);
        }
        Ok(())
    }
}

/// A checksum being computed: large files have their SHA-256 as ETag, small ones the SHA-1 that Git gives them.
struct Sum {
    context: digest::Context,
    expected: String,
}

impl Sum {
    /// `None` where the ETag is neither, so that only the length is checked.
    fn of(about: &Metadata) -> Option<Self> {
        let expected = about.etag.to_ascii_lowercase();
        if !expected.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let context = match expected.len() {
            64 => digest::Context::new(&digest::SHA256),
            40 => {
                let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", about.size).as_bytes());
                context
            }
            _ => return None,
        };
        Some(Self { context, expected })
    }

    fn check(self) -> Result<(), (String, String)> {
        let found: String = self.context.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect();
        if found == self.expected { Ok(()) } else { Err((self.expected, found)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etag_is_the_checksum_that_its_length_says() {
        let about = |etag: &str, size| Metadata { commit: "c".into(), etag: etag.into(), size };
        let of = |etag: &str, bytes: &[u8]| {
            let mut sum = Sum::of(&about(etag, bytes.len() as u64)).unwrap();
            sum.context.update(bytes);
            sum.check()
        };
        // `printf hello | sha256sum`, `printf hello | git hash-object --stdin`
        assert_eq!(of("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", b"hello"), Ok(()));
        assert_eq!(of("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", b"hello"), Ok(()));
        assert!(of("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", b"hellO").is_err());
        assert!(Sum::of(&about("abc", 1)).is_none() && Sum::of(&about(&"z".repeat(64), 1)).is_none());
    }
}

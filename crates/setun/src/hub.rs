//! Models from a hub: their names, the cache that other programs share, and fetching what is not there.
//!
//! [`HubName`] is what a user writes, [`Settings`] what the environment says, [`Hub`] does the work: [`Hub::cached`] never
//! touches the network, [`Hub::pull`] does. A file takes its name in the cache when all of it is there and its checksum is
//! the one that the hub names; until then it is `ETAG.incomplete`, from which the next attempt goes on. What the hub sends
//! is hostile until checked (docs/security.md).

mod cache;
mod choose;
mod fetch;
mod http;
mod name;
mod settings;

use std::path::PathBuf;

pub use name::HubName;
pub use settings::{Proxies, Settings};

use crate::error::ModelError;
use cache::RepoCache;
use choose::{Choice, Weights};
use fetch::Download;
use http::{Client, Failure, Metadata};

/// Bytes of a shard index that is read.
const MOST_INDEX: u64 = 64 << 20;

/// What happens while a model is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes are about to be fetched.
    Start {
        /// Files that are not in the cache.
        files: usize,
        /// Their bytes.
        bytes: u64,
        /// How many of these bytes an earlier attempt left.
        have: u64,
    },
    /// Some came.
    Bytes {
        /// The file they belong to.
        file: &'a str,
        /// Bytes so far, of all files; less than before where a file had to start again.
        done: u64,
    },
    /// Something that a user may want to know: a wait, another attempt.
    Note(&'a str),
}

/// Who is told of [`Event`]s.
pub type Watch<'a> = dyn FnMut(Event<'_>) + 'a;

/// A model that is in the cache now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// What `Checkpoint::open` takes: a file, or the folder of a model that is several.
    pub path: PathBuf,
    /// The commit it is.
    pub commit: String,
    /// Files that were fetched.
    pub files: usize,
    /// Bytes of these files.
    pub bytes: u64,
}

/// A hub and the cache of its models.
pub struct Hub {
    client: Client,
}

impl Hub {
    /// A hub as `settings` describe it. Nothing is asked yet.
    ///
    /// # Errors
    /// [`ModelError::Hub`] if the endpoint or a proxy is no address; [`ModelError::Read`] for certificates.
    pub fn new(settings: Settings) -> Result<Self, ModelError> {
        Ok(Self { client: Client::new(settings)? })
    }

    /// What it was made with.
    pub fn settings(&self) -> &Settings {
        &self.client.settings
    }

    /// A model as far as the cache has all of it, without asking the hub: of the revision as it was when last pulled, and
    /// of several GGUF files the one that is there.
    ///
    /// # Errors
    /// [`ModelError::Hub`] if the cache holds several models of that name.
    pub fn cached(&self, name: &HubName) -> Result<Option<PathBuf>, ModelError> {
        let cache = RepoCache::new(&self.client.settings.cache, &name.repo);
        let Some(commit) = cache.commit(&name.revision) else { return Ok(None) };
        let (files, snapshot) = (cache.files(&commit), cache.snapshot(&commit));
        let has = |file: &str| files.iter().any(|name| name == file);
        if let Some(file) = name.file.as_deref().filter(|file| choose::stands_alone(file) || !has(file)) {
            return Ok(has(file).then(|| snapshot.join(file)));
        }
        let several = files.iter().filter(|file| file.ends_with(".gguf")).count() > 1;
        let choice = match choose::choose(&files, name.file.as_deref()) {
            Ok(choice) => choice,
            Err(what) if several => return Err(self.failed(name, what)),
            Err(_) => return Ok(None),
        };
        let complete = match &choice.weights {
            Weights::File(file) => {
                let alone = !file.ends_with(".safetensors") && !file.ends_with("pytorch_model.bin");
                alone || choice.companions.iter().any(|name| name.ends_with("config.json"))
            }
            Weights::Index(index) => {
                let shards = std::fs::read(snapshot.join(index)).map_err(|e| e.to_string());
                let shards = shards.and_then(|json| choose::shards(index, &json));
                shards.is_ok_and(|shards| shards.iter().all(|shard| has(shard)))
            }
        };
        Ok(complete.then(|| opened(snapshot, &choice.weights)))
    }

    /// Brings a model up to date with the hub: asks which commit the revision is, and fetches what the cache lacks of it.
    /// Offline, what the cache has will do.
    ///
    /// # Errors
    /// [`ModelError::Hub`] with what the hub, the network or the disk refused; what was fetched by then is kept, under
    /// names that no program takes for complete files.
    pub fn pull(&self, name: &HubName, watch: &mut Watch) -> Result<Pulled, ModelError> {
        if self.client.settings.offline {
            return self.pulled_before(name);
        }
        let cache = RepoCache::new(&self.client.settings.cache, &name.repo);
        let mut pull = Pull { hub: self, cache: &cache, name, commit: None, files: 0, bytes: 0 };
        let weights = match name.file.as_deref().filter(|file| choose::stands_alone(file)) {
            Some(file) => {
                pull.files(std::slice::from_ref(&file.to_owned()), watch)?;
                Weights::File(file.to_owned())
            }
            None => pull.listed(watch)?,
        };
        let Pull { commit, files, bytes, .. } = pull;
        let commit = commit.ok_or_else(|| self.failed(name, "the hub names no commit"))?;
        // Last, so that a revision is never taken for a commit of which files are missing.
        cache.set_commit(&name.revision, &commit)?;
        Ok(Pulled { path: opened(cache.snapshot(&commit), &weights), commit, files, bytes })
    }

    /// What [`pull`](Self::pull) comes to without a network.
    fn pulled_before(&self, name: &HubName) -> Result<Pulled, ModelError> {
        let folder = &self.client.settings.cache;
        let commit = RepoCache::new(folder, &name.repo).commit(&name.revision);
        match (self.cached(name)?, commit) {
            (Some(path), Some(commit)) => Ok(Pulled { path, commit, files: 0, bytes: 0 }),
            _ => Err(self.failed(
                name,
                format!(
                    "it is not in the cache at {}, or not all of it, and HF_HUB_OFFLINE keeps it from being fetched",
                    folder.display()
                ),
            )),
        }
    }

    fn failed(&self, name: &HubName, what: impl Into<String>) -> ModelError {
        ModelError::hub(&name.to_string(), what)
    }

    /// Asks until there is an answer or patience ends.
    fn ask<T>(
        &self,
        name: &HubName,
        watch: &mut Watch,
        mut once: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, ModelError> {
        let mut patience = self.client.patience();
        loop {
            match once() {
                Ok(answer) => return Ok(answer),
                Err(failure) => patience.after(failure, watch).map_err(|what| self.failed(name, what))?,
            }
        }
    }
}

/// One model being fetched.
struct Pull<'a> {
    hub: &'a Hub,
    cache: &'a RepoCache,
    name: &'a HubName,
    /// Known from the first answer on, and the same from then on.
    commit: Option<String>,
    files: usize,
    bytes: u64,
}

impl Pull<'_> {
    /// Fetches what a list of the repository's files calls for.
    fn listed(&mut self, watch: &mut Watch) -> Result<Weights, ModelError> {
        let (hub, name) = (self.hub, self.name);
        let listing = hub.ask(name, watch, || hub.client.listing(name))?;
        self.commit = Some(listing.commit.clone());
        let names: Vec<String> = listing.names().map(str::to_owned).collect();
        let chosen = choose::choose(&names, name.file.as_deref());
        let Choice { weights, mut companions } = chosen.map_err(|what| hub.failed(name, what))?;
        match &weights {
            Weights::File(file) => companions.push(file.clone()),
            Weights::Index(index) => {
                self.files(std::slice::from_ref(index), watch)?;
                let path = self.cache.snapshot(&listing.commit).join(index);
                if cache::length(&path)?.is_some_and(|bytes| bytes > MOST_INDEX) {
                    return Err(hub.failed(name, format!("{index} has more than {MOST_INDEX} bytes")));
                }
                let json = std::fs::read(&path).map_err(|e| ModelError::read(&path, e))?;
                let shards = choose::shards(index, &json).map_err(|what| hub.failed(name, what))?;
                if let Some(missing) = shards.iter().find(|shard| !names.contains(shard)) {
                    return Err(
                        hub.failed(name, format!("{index} names `{missing}`, which the repository lacks"))
                    );
                }
                companions.extend(shards);
            }
        }
        self.files(&companions, watch)?;
        Ok(weights)
    }

    /// Fetches those of `files` that the cache lacks.
    fn files(&mut self, files: &[String], watch: &mut Watch) -> Result<(), ModelError> {
        let (hub, name, cache) = (self.hub, self.name, self.cache);
        let (mut wanted, mut total, mut have) = (Vec::new(), 0u64, 0u64);
        for file in files {
            let there = |commit: &String| cache.snapshot(commit).join(file).exists();
            if self.commit.as_ref().is_some_and(there) {
                continue;
            }
            let revision = self.commit.clone().unwrap_or_else(|| name.revision.clone());
            let about = hub.ask(name, watch, || hub.client.metadata(name, &revision, file))?;
            let commit = self.commit.get_or_insert_with(|| about.commit.clone());
            if *commit != about.commit {
                let what =
                    format!("{file} is said to be of commit {}, but {commit} was asked for", about.commit);
                return Err(hub.failed(name, what));
            }
            if there(commit) {
                continue;
            }
            let whole = cache::length(&cache.blob(&about.etag))? == Some(about.size);
            let part = cache::length(&cache.incomplete(&about.etag))?.filter(|&part| part <= about.size);
            have += if whole { about.size } else { part.unwrap_or(0) };
            total = total.saturating_add(about.size);
            wanted.push((file, about));
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let cache_folder = &hub.client.settings.cache;
        if let Some(room) = cache::room(cache_folder).filter(|&room| room < total.saturating_sub(have)) {
            return Err(hub.failed(
                name,
                format!(
                    "{} bytes are to be fetched, but only {room} are free at {}: make room, or name another cache with HF_HOME",
                    total - have,
                    cache_folder.display()
                ),
            ));
        }
        watch(Event::Start { files: wanted.len(), bytes: total, have });
        let mut before = 0;
        for (file, about) in &wanted {
            let Metadata { commit, etag, size } = about;
            Download { client: &hub.client, cache, name, file, about, before }.run(watch)?;
            cache.link(commit, file, etag)?;
            before += size;
            watch(Event::Bytes { file, done: before });
        }
        self.files += wanted.len();
        self.bytes += total;
        Ok(())
    }
}

fn opened(snapshot: PathBuf, weights: &Weights) -> PathBuf {
    match weights.opened() {
        "" => snapshot,
        inside => snapshot.join(inside),
    }
}

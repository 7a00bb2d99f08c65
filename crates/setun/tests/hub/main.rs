//! Fetching from a hub that behaves, breaks off, refuses or lies: each ends in a model or in a clear message, and never
//! in half a file under its final name.

mod broken;
mod hostile;
mod refused;
mod server;

use std::path::{Path, PathBuf};
use std::time::Duration;

use server::{Reply, Repo, Request, Server};
use setun::hub::{Event, Hub, HubName, Pulled, Settings};

/// Larger than every buffer on the way.
fn contents() -> Vec<u8> {
    (0..700_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn gguf_repo() -> Repo {
    Repo::new("org/name").small("README.md", "a model").large("x.gguf", contents())
}

/// A cache, and settings for a hub at `address`.
struct Place {
    folder: tempfile::TempDir,
    settings: Settings,
}

impl Place {
    fn new(address: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = Settings::new(address, folder.path());
        settings.timeout = Duration::from_millis(600);
        settings.backoff = Duration::from_millis(5);
        Self { folder, settings }
    }

    fn hub(&self) -> Hub {
        Hub::new(self.settings.clone()).unwrap()
    }

    fn pull(&self, name: &str) -> Result<Pulled, String> {
        self.watched(name).0
    }

    /// Also what was told on the way.
    fn watched(&self, name: &str) -> (Result<Pulled, String>, Vec<String>) {
        let (hub, mut told) = (self.hub(), Vec::new());
        let pulled = hub.pull(&HubName::parse(name).unwrap(), &mut |event| match event {
            Event::Note(text) => told.push(text.to_owned()),
            Event::Start { files, bytes, have } => told.push(format!("start {files} {bytes} {have}")),
            Event::Bytes { .. } => {}
        });
        (pulled.map_err(|e| e.to_string()), told)
    }

    fn cached(&self, name: &str) -> Option<PathBuf> {
        self.hub().cached(&HubName::parse(name).unwrap()).unwrap()
    }

    /// What the repository's folder holds under final names: blobs, snapshot entries, refs.
    fn final_names(&self) -> Vec<String> {
        let mut names = Vec::new();
        walk(self.folder.path(), &mut names);
        names.retain(|name| !name.ends_with(".lock") && !name.ends_with(".incomplete"));
        names
    }

    fn incomplete(&self, bytes: &[u8]) -> PathBuf {
        self.folder.path().join(format!("models--org--name/blobs/{}.incomplete", server::sha256(bytes)))
    }

    /// The message of a pull that must fail and leave nothing under a final name.
    fn failure(&self, name: &str) -> String {
        let error = self.pull(name).unwrap_err();
        assert_eq!(self.final_names(), [""; 0], "{error}");
        assert_eq!(self.cached(name), None, "{error}");
        assert!(!error.chars().any(char::is_control), "{error:?}");
        error
    }
}

fn walk(folder: &Path, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => walk(&entry.path(), names),
            false => names.push(entry.path().display().to_string()),
        }
    }
}

fn hub(repo: Repo) -> Server {
    Server::start(move |request, _| repo.answer(request))
}

/// A hub whose answer a test may replace.
fn hub_but(repo: Repo, but: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static) -> Server {
    Server::start(move |request, before| but(request, before).unwrap_or_else(|| repo.answer(request)))
}

fn is_contents(request: &Request) -> bool {
    request.method == "GET" && request.path.contains("/resolve/") && request.path.ends_with(".gguf")
}

#[test]
fn a_pulled_file_lies_where_other_programs_look_for_it() {
    let server = hub(gguf_repo());
    let place = Place::new(&server.address);
    let pulled = place.pull("org/name").unwrap();
    assert_eq!((pulled.files, pulled.bytes), (1, contents().len() as u64));
    let folder = place.folder.path().join("models--org--name");
    assert_eq!(pulled.path, folder.join("snapshots").join(&pulled.commit).join("x.gguf"));
    assert_eq!(std::fs::read(&pulled.path).unwrap(), contents());
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), pulled.commit);
    assert_eq!(std::fs::read(folder.join("blobs").join(server::sha256(&contents()))).unwrap(), contents());
    #[cfg(unix)]
    assert!(std::fs::read_link(&pulled.path).unwrap().starts_with("../../blobs"));

    assert_eq!(place.cached("org/name"), Some(pulled.path.clone()));
    assert_eq!(place.cached("org/name:x.gguf"), Some(pulled.path.clone()));
    assert_eq!(place.cached(&format!("org/name@{}", pulled.commit)), Some(pulled.path.clone()));
    assert_eq!(place.cached("org/name:README.md"), None);
    let again = place.pull("org/name").unwrap();
    assert_eq!((again.files, again.path), (0, pulled.path));
    assert_eq!(server.count("GET", "x.gguf"), 1, "what is there is not fetched again");
}

#[test]
fn a_named_file_needs_no_list_and_a_pull_request_is_a_revision() {
    let server = hub(gguf_repo().large("sub/y.gguf", "other"));
    let place = Place::new(&server.address);
    assert!(place.failure("org/name").contains("2 GGUF files: name one of x.gguf, sub/y.gguf"));
    let pulled = place.pull("org/name@refs/pr/1:sub/y.gguf").unwrap();
    assert!(pulled.path.ends_with("sub/y.gguf"));
    assert_eq!(std::fs::read(pulled.path).unwrap(), b"other");
    assert!(
        server.requests().iter().skip(1).all(|r| r.path.contains("/resolve/")),
        "{:?}",
        server.requests()
    );
    assert!(place.folder.path().join("models--org--name/refs/refs/pr/1").exists());
    assert!(place.cached("org/name").is_none(), "main was never pulled");
}

#[test]
fn a_checkpoint_is_weights_config_and_tokenizer_without_code_and_pickles() {
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let server = hub(Repo::new("org/name")
        .small("config.json", "{}")
        .small("tokenizer.json", "{\"t\":1}")
        .small("chat_template.jinja", "{{ x }}")
        .small("modeling.py", "import os")
        .small("model.safetensors.index.json", index)
        .large("model-1.safetensors", "one")
        .large("model-2.safetensors", "two")
        .large("optimizer.bin", "state")
        .large("pytorch_model.bin", "pickle"));
    let place = Place::new(&server.address);
    let (pulled, told) = place.watched("org/name");
    let pulled = pulled.unwrap();
    assert_eq!(pulled.path, place.folder.path().join("models--org--name/snapshots").join(&pulled.commit));
    let mut there: Vec<_> = std::fs::read_dir(&pulled.path)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    there.sort();
    assert_eq!(
        there,
        [
            "chat_template.jinja",
            "config.json",
            "model-1.safetensors",
            "model-2.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    assert_eq!(told, [format!("start 1 {} 0", index.len()), "start 5 22 0".into()]);
    assert_eq!(place.cached("org/name"), Some(pulled.path.clone()));

    // As an interrupted program leaves it: no longer a model, until it is completed.
    std::fs::remove_file(pulled.path.join("model-2.safetensors")).unwrap();
    assert_eq!(place.cached("org/name"), None);
    assert_eq!(place.pull("org/name").unwrap().path, pulled.path);
    assert_eq!(place.cached("org/name"), Some(pulled.path));
}

#[test]
fn files_that_other_programs_fetched_are_found_and_not_fetched_again() {
    let (repo, server) = (gguf_repo(), hub(gguf_repo()));
    let place = Place::new(&server.address);
    let folder = place.folder.path().join("models--org--name");
    let (blob, snapshot) = (server::sha256(&contents()), folder.join("snapshots").join(&repo.commit));
    for sub in ["blobs", "refs"] {
        std::fs::create_dir_all(folder.join(sub)).unwrap();
    }
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::write(folder.join("refs/main"), &repo.commit).unwrap();
    std::fs::write(folder.join("blobs").join(&blob), contents()).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(format!("../../blobs/{blob}"), snapshot.join("x.gguf")).unwrap();
    #[cfg(not(unix))]
    std::fs::copy(folder.join("blobs").join(&blob), snapshot.join("x.gguf")).unwrap();
    assert_eq!(place.cached("org/name"), Some(snapshot.join("x.gguf")));
    assert_eq!(place.pull("org/name").unwrap().files, 0);

    std::fs::remove_file(snapshot.join("x.gguf")).unwrap();
    place.pull("org/name").unwrap();
    assert_eq!(server.count("GET", "x.gguf"), 0, "the blob was there, so it was only linked");
}

#[test]
fn offline_the_cache_is_all_there_is() {
    let server = hub(gguf_repo());
    let mut place = Place::new(&server.address);
    place.settings.offline = true;
    let error = place.failure("org/name");
    assert!(error.contains("not in the cache") && error.contains("HF_HUB_OFFLINE"), "{error}");
    assert_eq!(server.requests().len(), 0);
    place.settings.offline = false;
    let pulled = place.pull("org/name").unwrap();
    place.settings.offline = true;
    assert_eq!(place.pull("org/name").unwrap(), Pulled { files: 0, bytes: 0, ..pulled });
}

#[test]
fn the_token_goes_to_the_hub_and_to_no_other_host() {
    let repo = gguf_repo();
    let content = Server::start(move |request, _| repo.content(request));
    let server = hub(Repo { elsewhere: Some(content.address.clone()), ..gguf_repo() });
    let mut place = Place::new(&server.address);
    place.settings.token = Some("hf_secret".into());
    let pulled = place.pull("org/name").unwrap();
    assert_eq!(std::fs::read(pulled.path).unwrap(), contents());
    assert!(server.requests().iter().all(|r| r.header("authorization") == Some("Bearer hf_secret")));
    assert_eq!(content.requests().len(), 1, "asked for the bytes alone");
    assert!(content.requests().iter().all(|r| r.header("authorization").is_none()));
}

#[test]
fn the_token_stays_away_even_when_another_host_sends_back_to_the_hub() {
    let (commit, bytes) = (gguf_repo().commit, contents());
    let (etag, size) = (server::sha256(&bytes), bytes.len());
    let content = Server::start(|request, _| {
        let back = request.path.trim_start_matches("/?to=").to_owned();
        Reply::new(302, "").with("Location", back)
    });
    let away = content.address.clone();
    let server = hub_but(gguf_repo(), move |request, _| {
        let back = format!("http://{}/final", request.header("host").unwrap());
        match request.path.as_str() {
            "/final" => Some(Reply::new(200, bytes.clone())),
            path if path.ends_with("x.gguf") => Some(
                Reply::new(302, "")
                    .with("Location", format!("{away}/?to={back}"))
                    .with("X-Repo-Commit", &commit)
                    .with("X-Linked-Etag", format!("\"{etag}\""))
                    .with("X-Linked-Size", size),
            ),
            _ => None,
        }
    });
    let mut place = Place::new(&server.address);
    place.settings.token = Some("hf_secret".into());
    place.pull("org/name").unwrap();
    let back = server.requests().into_iter().find(|r| r.path == "/final").unwrap();
    assert_eq!(back.header("authorization"), None);
}

#[test]
fn relative_redirects_are_followed_with_the_token() {
    let renamed = hub_but(gguf_repo(), |request, _| {
        let rest =
            request.path.strip_prefix("/api/models/old/place/").map(|r| format!("/api/models/org/name/{r}"));
        let rest = rest.or_else(|| Some(format!("/org/name/{}", request.path.strip_prefix("/old/place/")?)));
        Some(Reply::new(307, "").with("Location", rest?))
    });
    let mut place = Place::new(&renamed.address);
    place.settings.token = Some("hf_secret".into());
    let pulled = place.pull("old/place").unwrap();
    assert_eq!(std::fs::read(pulled.path).unwrap(), contents());
    assert!(renamed.requests().iter().all(|r| r.header("authorization").is_some()));
}

#[test]
fn a_proxy_is_asked_to_reach_the_hub() {
    let proxy = hub(gguf_repo());
    let mut place = Place::new("http://hub.invalid");
    place.settings.proxies.http = Some(proxy.address.clone());
    place.pull("org/name").unwrap();
    assert!(proxy.requests().iter().any(|r| r.method == "CONNECT" && r.path == "hub.invalid:80"));
    place.settings.proxies.none_for = vec!["invalid".into()];
    place.settings.backoff = Duration::ZERO;
    assert!(place.pull("org/name").unwrap_err().contains("hub.invalid"));
    place.settings.proxies.http = Some("nonsense://x y".into());
    assert!(Hub::new(place.settings.clone()).err().unwrap().to_string().contains("proxy"));
}

#[test]
fn several_at_once_fetch_a_file_once() {
    let server = Server::start({
        let repo = gguf_repo();
        move |request, _| {
            let mut reply = repo.answer(request);
            if is_contents(request) {
                std::thread::sleep(Duration::from_millis(200));
                reply.silent = Duration::from_millis(50);
            }
            reply
        }
    });
    let place = Place::new(&server.address);
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..4).map(|_| scope.spawn(|| place.watched("org/name"))).collect();
        let told: Vec<String> = pulls
            .into_iter()
            .flat_map(|pull| {
                let (pulled, told) = pull.join().unwrap();
                assert_eq!(std::fs::read(pulled.unwrap().path).unwrap(), contents());
                told
            })
            .collect();
        assert!(told.iter().any(|note| note.contains("waiting for another program")), "{told:?}");
    });
    assert_eq!(server.count("GET", "x.gguf"), 1);
}

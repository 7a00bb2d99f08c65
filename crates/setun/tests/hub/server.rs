//! Servers on the loopback that answer as a model hub does, or as wrongly as a test asks.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ring::digest;

/// One request, as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// One answer, and how it is sent.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Bytes of the body that are sent before the connection ends, or goes silent.
    pub cut: Option<usize>,
    /// Silence after the cut, in which the connection stays open.
    pub silent: Duration,
    /// Sent byte by byte with this pause between two.
    pub trickle: Option<Duration>,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub fn has(&self, name: &str) -> bool {
        self.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name))
    }

    /// In place of what was there.
    pub fn instead(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        self.with(name, value)
    }
}

/// A server with a handler, which is also told how often the same was asked before.
pub struct Server {
    /// `http://127.0.0.1:PORT`
    pub address: String,
    log: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

type Handler = dyn Fn(&Request, usize) -> Reply + Send + Sync;

impl Server {
    pub fn start(handler: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (log, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (handler, all, stopped): (Arc<Handler>, _, _) = (Arc::new(handler), log.clone(), stop.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (handler, log) = (handler.clone(), all.clone());
                // A client that hangs up early is part of the tests.
                std::thread::spawn(move || converse(stream, &*handler, &log).ok());
            }
        });
        Self { address, log, stop }
    }

    /// What was asked so far.
    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// How often a method and the end of a path were asked for.
    pub fn count(&self, method: &str, end: &str) -> usize {
        self.requests().iter().filter(|r| r.method == method && r.path.ends_with(end)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address.trim_start_matches("http://"));
    }
}

fn converse(stream: TcpStream, handler: &Handler, log: &Mutex<Vec<Request>>) -> std::io::Result<()> {
    let (mut reader, mut writer) = (BufReader::new(stream.try_clone()?), stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(1 << 16).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.by_ref().take(1 << 16).read_line(&mut line)?;
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
                None => break,
            }
        }
        let request = Request { method, path, headers };
        let before = {
            let mut log = log.lock().unwrap();
            log.push(request.clone());
            log.iter().filter(|r| r.method == request.method && r.path == request.path).count() - 1
        };
        if request.method == "CONNECT" {
            writer.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?; // A proxy that leads to this very server.
            continue;
        }
        return send(&mut writer, &request, handler(&request, before));
    }
}

fn send(writer: &mut TcpStream, request: &Request, reply: Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", reply.status);
    if !reply.has("content-length") && !reply.has("transfer-encoding") {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    writer.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
    match reply.trickle {
        None => writer.write_all(body)?,
        Some(pause) => {
            for byte in body {
                writer.write_all(&[*byte])?;
                std::thread::sleep(pause);
            }
        }
    }
    writer.flush()?;
    std::thread::sleep(reply.silent);
    Ok(())
}

/// A file of a repository: in Git, or large and kept elsewhere.
#[derive(Clone)]
pub struct Stored {
    pub name: String,
    pub bytes: Vec<u8>,
    pub large: bool,
}

impl Stored {
    pub fn etag(&self) -> String {
        if self.large { sha256(&self.bytes) } else { git_sha1(&self.bytes) }
    }
}

/// A repository with one commit.
#[derive(Clone)]
pub struct Repo {
    pub name: String,
    pub commit: String,
    pub files: Vec<Stored>,
    /// Address of the server that has the large files, if that is another one.
    pub elsewhere: Option<String>,
}

impl Repo {
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), commit: git_sha1(name.as_bytes()), files: Vec::new(), elsewhere: None }
    }

    pub fn small(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.push(Stored { name: name.into(), bytes: bytes.into(), large: false });
        self
    }

    pub fn large(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.push(Stored { name: name.into(), bytes: bytes.into(), large: true });
        self
    }

    /// As a hub answers.
    pub fn answer(&self, request: &Request) -> Reply {
        let (api, resolve) =
            (format!("/api/models/{}/revision/", self.name), format!("/{}/resolve/", self.name));
        let known =
            |revision: &str| revision == "main" || revision == "refs%2Fpr%2F1" || revision == self.commit;
        if let Some(revision) = request.path.strip_prefix(&api) {
            if !known(revision) {
                return Reply::new(404, "").with("X-Error-Code", "RevisionNotFound");
            }
            let names: Vec<String> =
                self.files.iter().map(|f| format!("{{\"rfilename\":{:?}}}", f.name)).collect();
            let json =
                format!("{{\"sha\":\"{}\",\"siblings\":[{}],\"gated\":false}}", self.commit, names.join(","));
            return Reply::new(200, json).with("Content-Type", "application/json");
        }
        let Some((revision, file)) =
            request.path.strip_prefix(&resolve).and_then(|rest| rest.split_once('/'))
        else {
            return Reply::new(401, "").with("X-Error-Code", "RepoNotFound");
        };
        if !known(revision) {
            return Reply::new(404, "").with("X-Error-Code", "RevisionNotFound");
        }
        let Some(file) = self.files.iter().find(|f| f.name == file) else {
            return Reply::new(404, "").with("X-Error-Code", "EntryNotFound");
        };
        let reply = match (&self.elsewhere, file.large) {
            (Some(address), true) => Reply::new(302, "Found")
                .with("Location", format!("{address}/{}?signature=x", file.etag()))
                .with("X-Linked-Size", file.bytes.len())
                .with("X-Linked-Etag", format!("\"{}\"", file.etag())),
            _ => ranged(request, &file.bytes).with("ETag", format!("\"{}\"", file.etag())),
        };
        reply.with("X-Repo-Commit", &self.commit)
    }

    /// As the other host answers, with ETags of its own.
    pub fn content(&self, request: &Request) -> Reply {
        let wanted = |f: &&Stored| request.path.starts_with(&format!("/{}?", f.etag()));
        match self.files.iter().find(wanted) {
            Some(file) => ranged(request, &file.bytes).with("ETag", "\"another\""),
            None => Reply::new(404, "no such object"),
        }
    }
}

/// All of `bytes`, or the rest that the request asks for.
pub fn ranged(request: &Request, bytes: &[u8]) -> Reply {
    let range = request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
    match range.map(|start| start.parse::<usize>().unwrap()) {
        None => Reply::new(200, bytes),
        Some(start) if start < bytes.len() => Reply::new(206, &bytes[start..])
            .with("Content-Range", format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len())),
        Some(_) => Reply::new(416, ""),
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn git_sha1(bytes: &[u8]) -> String {
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(format!("blob {}\0", bytes.len()).as_bytes());
    context.update(bytes);
    hex(context.finish().as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

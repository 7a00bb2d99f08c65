//! Requests to a hub: redirects, retries, and what its refusals mean.
//!
//! Redirects are followed here and not by the HTTP client, because the token must stay with the hub: from the first hop
//! to another origin on, no header that is meant for the hub is sent.

use std::io::Read;
use std::time::{Duration, Instant};

use serde::Deserialize;
use ureq::http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Error, Proxy};

use super::name::{HubName, is_safe_part, shown};
use super::settings::Settings;
use super::{Event, Watch};
use crate::error::ModelError;

const MOST_REDIRECTS: usize = 10;
/// Attempts without progress.
const ATTEMPTS: u32 = 5;
/// Longest wait that a hub may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
/// Bytes of a listing: the largest repositories have about ten megabytes.
const MOST_JSON: usize = 32 << 20;
/// Bytes of one file that are believed: 64 TiB.
const MOST_BYTES: u64 = 1 << 46;

/// Why a request failed, as the end of a sentence, and whether another attempt may help.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) what: String,
    again: Again,
}

#[derive(Debug)]
enum Again {
    Never,
    Later,
    After(Duration),
}

impl Failure {
    pub(super) fn fatal(what: impl Into<String>) -> Self {
        Self { what: what.into(), again: Again::Never }
    }

    pub(super) fn passing(what: impl Into<String>) -> Self {
        Self { what: what.into(), again: Again::Later }
    }
}

/// Counts failures in a row and waits between attempts.
pub(super) struct Patience {
    backoff: Duration,
    failures: u32,
}

impl Patience {
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Waits for the next attempt.
    ///
    /// # Errors
    /// The failure's sentence, if another attempt would not help or there were enough.
    pub(super) fn after(&mut self, failure: Failure, watch: &mut Watch) -> Result<(), String> {
        self.failures += 1;
        let wait = match failure.again {
            Again::Never => return Err(failure.what),
            _ if self.failures >= ATTEMPTS => {
                return Err(format!("{} ({ATTEMPTS} attempts)", failure.what));
            }
            Again::Later => self.backoff * 2u32.pow(self.failures - 1),
            Again::After(wait) if wait > LONGEST_WAIT => {
                return Err(format!("{}: try again in {} s", failure.what, wait.as_secs()));
            }
            Again::After(wait) => wait,
        };
        watch(Event::Note(&format!("{}; trying again in {:.0} s", failure.what, wait.as_secs_f64().ceil())));
        std::thread::sleep(wait);
        Ok(())
    }
}

/// What a hub tells about a file before it is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    pub(super) commit: String,
    pub(super) etag: String,
    pub(super) size: u64,
}

/// A revision of a repository: its commit and the names of its files.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    #[serde(rename = "sha")]
    pub(super) commit: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.siblings.iter().map(|file| file.rfilename.as_str())
    }
}

/// Scheme, host and port: whom a token belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Origin {
    https: bool,
    host: String,
    port: u16,
}

impl Origin {
    fn of(url: &Uri) -> Option<Self> {
        let https = match url.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = url.host().filter(|host| !host.is_empty())?.to_ascii_lowercase();
        Some(Self { https, host, port: url.port_u16().unwrap_or(if https { 443 } else { 80 }) })
    }
}

pub(super) struct Client {
    pub(super) settings: Settings,
    home: Origin,
    /// Without a proxy, and through those for `http:` and `https:`.
    agents: [Option<Agent>; 3],
}

impl Client {
    pub(super) fn new(settings: Settings) -> Result<Self, ModelError> {
        let wrong =
            |what: &str| ModelError::hub("HF_ENDPOINT", format!("`{}` {what}", shown(&settings.endpoint)));
        let url: Uri = settings.endpoint.parse().map_err(|_| wrong("is not an address"))?;
        let home = Origin::of(&url)
            .ok_or_else(|| wrong("is not an address that begins with https:// or http://"))?;
        if url.authority().is_some_and(|a| a.as_str().contains('@')) || url.query().is_some() {
            return Err(wrong("holds more than host, port and path: a token goes into HF_TOKEN"));
        }
        let roots = match &settings.certificates {
            None => RootCerts::WebPki,
            Some(path) => {
                let pem = std::fs::read(path).map_err(|e| ModelError::read(path, e))?;
                let certificates = parse_pem(&pem).filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                });
                RootCerts::new_with_certs(&certificates.collect::<Vec<_>>())
            }
        };
        let agent = |proxy: Option<Proxy>| {
            let timeout = Some(settings.timeout);
            let config = Agent::config_builder()
                .tls_config(TlsConfig::builder().root_certs(roots.clone()).build())
                .user_agent(concat!("setun/", env!("CARGO_PKG_VERSION")))
                .accept_encoding("identity") // Sizes and checksums are those of the file itself.
                .http_status_as_error(false)
                .max_redirects(0)
                .proxy(proxy)
                .timeout_resolve(timeout)
                .timeout_connect(timeout)
                .timeout_send_request(timeout)
                .timeout_recv_response(timeout)
                .timeout_per_read(timeout);
            Agent::new_with_config(config.build())
        };
        let through = |proxy: &Option<String>| -> Result<Option<Agent>, ModelError> {
            let Some(address) = proxy else { return Ok(None) };
            let proxy = Proxy::new(address);
            // The address may hold a password, so it is not shown.
            let proxy = proxy.map_err(|e| {
                ModelError::hub("proxy", format!("its address in the environment cannot be used: {e}"))
            })?;
            Ok(Some(agent(Some(proxy))))
        };
        let agents = [Some(agent(None)), through(&settings.proxies.http)?, through(&settings.proxies.https)?];
        Ok(Self { settings, home, agents })
    }

    pub(super) fn patience(&self) -> Patience {
        Patience { backoff: self.settings.backoff, failures: 0 }
    }

    /// The address of a repository's page, for messages.
    pub(super) fn page(&self, repo: &str) -> String {
        format!("{}/{repo}", self.settings.endpoint)
    }

    /// The files of the revision that `name` names.
    pub(super) fn listing(&self, name: &HubName) -> Result<Listing, Failure> {
        let url = format!(
            "{}/api/models/{}/revision/{}",
            self.settings.endpoint,
            name.repo,
            percent_encoded(&name.revision, "")
        );
        let response = self.send(&Method::GET, &url, &[], &mut |_| false)?;
        let response = self.accepted(response, name, None)?;
        let html = is_html(response.headers());
        let json = self.read_short(response.into_body())?;
        let listing: Listing = serde_json::from_slice(&json).map_err(|e| {
            Failure::fatal(match html || json.trim_ascii_start().starts_with(b"<") {
                true => format!(
                    "{} answers with a web page where JSON is expected: is HF_ENDPOINT right, or does the network ask for a login",
                    self.settings.endpoint
                ),
                false => format!("the list of files is not as expected: {}", shown(&e.to_string())),
            })
        })?;
        match is_safe_part(&listing.commit) {
            true => Ok(listing),
            false => Err(Failure::fatal(format!(
                "the hub names a commit `{}`, which is none",
                shown(&listing.commit)
            ))),
        }
    }

    /// What the hub tells about a file: from its own answer where that is a redirect to where the bytes are.
    pub(super) fn metadata(&self, name: &HubName, revision: &str, file: &str) -> Result<Metadata, Failure> {
        let (mut commit, mut etag, mut size) = (None, None, None);
        let mut take = |response: &Response<Body>| {
            let (headers, ok) = (response.headers(), response.status() == StatusCode::OK);
            let get = |name: &str| Some(headers.get(name)?.to_str().ok()?.to_owned());
            let of_body = |name: &str| get(name).filter(|_| ok);
            commit = commit.take().or_else(|| get("x-repo-commit"));
            etag = etag.take().or_else(|| get("x-linked-etag")).or_else(|| of_body("etag"));
            size = size.take().or_else(|| get("x-linked-size")).or_else(|| of_body("content-length"));
            commit.is_some() && etag.is_some() && size.is_some()
        };
        let response = self.send(&Method::HEAD, &self.file_url(name, revision, file), &[], &mut take)?;
        if !response.status().is_redirection() {
            self.accepted(response, name, Some(file))?;
        }
        let missing = |what: &str| {
            Failure::fatal(format!(
                "the answer about {file} has no {what}: {} does not answer as a model hub does",
                self.settings.endpoint
            ))
        };
        let commit = commit.ok_or_else(|| missing("commit (X-Repo-Commit)"))?;
        let etag = etag.ok_or_else(|| missing("ETag"))?;
        let size = size.ok_or_else(|| missing("size (Content-Length)"))?;
        let etag = etag.trim().trim_start_matches("W/").trim_matches('"').to_owned();
        for (what, value) in [("commit", &commit), ("ETag", &etag)] {
            if !is_safe_part(value) {
                return Err(Failure::fatal(format!(
                    "the {what} of {file} is `{}`, which is none",
                    shown(value)
                )));
            }
        }
        let size = size.trim().parse().ok().filter(|&size: &u64| size <= MOST_BYTES).ok_or_else(|| {
            Failure::fatal(format!("the size of {file} is `{}`, which no file has", shown(&size)))
        })?;
        Ok(Metadata { commit, etag, size })
    }

    /// The bytes of a file from `from` on, or all of them: the answer's status tells.
    pub(super) fn contents(
        &self,
        name: &HubName,
        about: &Metadata,
        file: &str,
        from: u64,
    ) -> Result<Response<Body>, Failure> {
        let mut headers = Vec::new();
        if from > 0 {
            headers.push((header::RANGE.as_str(), format!("bytes={from}-")));
            // For the hub's own answers: another host, to which it redirects, has ETags of its own.
            headers.push((header::IF_RANGE.as_str(), format!("\"{}\"", about.etag)));
        }
        let url = self.file_url(name, &about.commit, file);
        let response = self.send(&Method::GET, &url, &headers, &mut |_| false)?;
        match response.status() {
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            _ => self.accepted(response, name, Some(file)),
        }
    }

    fn file_url(&self, name: &HubName, revision: &str, file: &str) -> String {
        let (revision, file) = (percent_encoded(revision, ""), percent_encoded(file, "/"));
        format!("{}/{}/resolve/{revision}/{file}", self.settings.endpoint, name.repo)
    }

    /// One request with its redirects, until `enough` says so or an answer is none. Headers beside the range are the
    /// hub's alone.
    fn send(
        &self,
        method: &Method,
        url: &str,
        headers: &[(&str, String)],
        enough: &mut dyn FnMut(&Response<Body>) -> bool,
    ) -> Result<Response<Body>, Failure> {
        let bad = |url: &str| Failure::fatal(format!("`{}` is not an address that can be asked", shown(url)));
        let mut url: Uri = url.parse().map_err(|_| bad(url))?;
        let mut at_home = true;
        for _ in 0..=MOST_REDIRECTS {
            let origin = Origin::of(&url).ok_or_else(|| bad(&url.to_string()))?;
            at_home &= origin == self.home;
            let mut request = Request::builder().method(method).uri(&url);
            for (name, value) in headers.iter().filter(|(name, _)| at_home || *name == header::RANGE.as_str())
            {
                request = request.header(*name, value);
            }
            if let (true, Some(token)) = (at_home, &self.settings.token) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let request = request.body(()).map_err(|_| bad(&url.to_string()))?;
            let response = self.agent(&origin).run(request).map_err(|e| self.not_answered(&origin, &e))?;
            let redirected = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            if enough(&response) || !redirected {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| {
                Failure::fatal(format!(
                    "{} redirects ({}) without saying where to",
                    origin.host,
                    response.status()
                ))
            })?;
            url = joined(&url, location).ok_or_else(|| bad(location))?;
            if origin.https && url.scheme_str() == Some("http") {
                return Err(Failure::fatal(format!(
                    "{} redirects from https to http ({}), which is not followed",
                    origin.host,
                    shown(location)
                )));
            }
        }
        Err(Failure::fatal(format!("{} redirects more than {MOST_REDIRECTS} times", self.settings.endpoint)))
    }

    fn agent(&self, to: &Origin) -> &Agent {
        let [direct, http, https] = &self.agents;
        let proxied =
            self.settings.proxies.of(to.https, &to.host).and(if to.https { https } else { http }.as_ref());
        proxied.or(direct.as_ref()).expect("there is always a direct one")
    }

    fn not_answered(&self, origin: &Origin, error: &Error) -> Failure {
        let host = &origin.host;
        match error {
            Error::Timeout(_) => {
                Failure::passing(format!("{host} does not answer within {:.0?}", self.settings.timeout))
            }
            Error::HostNotFound => {
                Failure::passing(format!("no host is known as {host}: is there a network"))
            }
            // Certificates that are refused arrive as invalid data.
            Error::Io(e) if e.kind() != std::io::ErrorKind::InvalidData => {
                Failure::passing(format!("cannot reach {host}: {}", shown(&e.to_string())))
            }
            e => Failure::fatal(format!("cannot talk to {host}: {}", shown(&e.to_string()))),
        }
    }

    /// An answer that is the thing asked for, or what its refusal means.
    fn accepted(
        &self,
        response: Response<Body>,
        name: &HubName,
        file: Option<&str>,
    ) -> Result<Response<Body>, Failure> {
        let status = response.status();
        if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
            return Ok(response);
        }
        let get = |key: &str| response.headers().get(key).and_then(|value| value.to_str().ok());
        let code = get("x-error-code").unwrap_or_default();
        let said = get("x-error-message").map(|m| format!(": {}", shown(m))).unwrap_or_default();
        let (repo, page, host) = (&name.repo, self.page(&name.repo), &self.home.host);
        let token = self.settings.token.is_some();
        let fatal = |what: String| Err(Failure::fatal(what));
        match (status.as_u16(), code) {
            (401 | 403, "GatedRepo") => fatal(match token {
                true => format!(
                    "the repository is gated: accept its conditions at {page} with the account of the token in use"
                ),
                false => format!(
                    "the repository is gated: accept its conditions at {page}, then set HF_TOKEN to a token of that account"
                ),
            }),
            // Hubs answer 401 for what is not there too, so that names of private repositories stay private.
            (401 | 404, "RepoNotFound") => fatal(match token {
                true => format!(
                    "there is no repository {repo} at {host} that the token in use may see: check the name"
                ),
                false => format!(
                    "there is no public repository {repo} at {host}: check the name, or set HF_TOKEN if it is private"
                ),
            }),
            (404, "RevisionNotFound") => fatal(format!("the repository has no revision `{}`", name.revision)),
            (404, "EntryNotFound") => fatal(match file {
                Some(file) => {
                    format!("the repository has no file `{}` at revision {}", shown(file), name.revision)
                }
                None => format!("the hub has no list of files{said}"),
            }),
            (_, "DisabledRepo") => fatal(format!("the hub has disabled this repository{said}")),
            (401, _) => fatal(match token {
                true => format!(
                    "{host} does not accept the token in use (HF_TOKEN, or the token file in HF_HOME){said}"
                ),
                false => format!("{host} asks for a login: set HF_TOKEN to a token of yours{said}"),
            }),
            (403, _) => fatal(format!("{host} forbids access{said}")),
            (404, _) => fatal(match file {
                Some(file) => format!(
                    "there is no {} in {repo} at revision {} ({host} answers 404){said}",
                    shown(file),
                    name.revision
                ),
                None => format!(
                    "there is no repository {repo} with a revision {} ({host} answers 404){said}",
                    name.revision
                ),
            }),
            (429 | 500 | 502 | 503 | 504, _) => {
                let what = match status.as_u16() {
                    429 => format!("{host} answers that there were too many requests (429){said}"),
                    other => format!("{host} fails with status {other}{said}"),
                };
                let wait = get("retry-after").and_then(|text| text.trim().parse().ok());
                let again = wait.map_or(Again::Later, |seconds| Again::After(Duration::from_secs(seconds)));
                Err(Failure { what, again })
            }
            (other, _) => fatal(format!("{host} answers with status {other}, which is not expected{said}")),
        }
    }

    /// A body that is read into memory: bounded in bytes and in time.
    fn read_short(&self, body: Body) -> Result<Vec<u8>, Failure> {
        let started = Instant::now();
        let (mut reader, mut bytes, mut buffer) = (body.into_reader(), Vec::new(), [0; 16 << 10]);
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(bytes),
                Ok(n) => bytes.extend_from_slice(&buffer[..n]),
                Err(e) => {
                    return Err(Failure::passing(format!(
                        "the list of files broke off: {}",
                        shown(&e.to_string())
                    )));
                }
            }
            if bytes.len() > MOST_JSON || started.elapsed() > self.settings.timeout * 2 {
                return Err(Failure::fatal(format!(
                    "the list of files does not end: {} bytes came in {:.0?}",
                    bytes.len(),
                    started.elapsed()
                )));
            }
        }
    }
}

pub(super) fn is_html(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"))
}

/// The address that a `Location` header means, seen from `base`.
fn joined(base: &Uri, location: &str) -> Option<Uri> {
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let location = location.split('#').next()?;
    let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
    let absolute = if location.contains("://") && !location.starts_with(['/', '?']) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        format!("{scheme}://{authority}{folder}/{location}")
    };
    absolute.parse().ok()
}

/// `text` as part of an address; letters, digits, `-._~` and what is in `keep` stay as they are.
fn percent_encoded(text: &str, keep: &str) -> String {
    let stays = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b) || keep.as_bytes().contains(&b);
    text.bytes().map(|b| if stays(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_joined_to_the_address_it_came_from() {
        let base: Uri = "https://hub.example:8443/org/name/resolve/main/x.gguf".parse().unwrap();
        for (location, url) in [
            ("https://cdn.example/a?b=c", "https://cdn.example/a?b=c"),
            ("//cdn.example/a", "https://cdn.example/a"),
            ("/api/x?y", "https://hub.example:8443/api/x?y"),
            ("y.gguf", "https://hub.example:8443/org/name/resolve/main/y.gguf"),
        ] {
            assert_eq!(joined(&base, location).unwrap().to_string(), url, "{location}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |url: &str| Origin::of(&url.parse().unwrap());
        assert_eq!(origin("https://Hub.example/a"), origin("https://hub.example:443/b"));
        assert_ne!(origin("https://hub.example"), origin("http://hub.example:443"));
        assert_ne!(origin("http://hub.example"), origin("http://hub.example:8080"));
        assert_eq!(origin("ftp://hub.example"), None);
    }

    #[test]
    fn names_are_encoded_for_addresses() {
        assert_eq!(percent_encoded("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(percent_encoded("a b/ä?.gguf", "/"), "a%20b/%C3%A4%3F.gguf");
    }

    #[test]
    fn an_endpoint_that_is_none_is_refused() {
        for endpoint in
            ["huggingface.co", "ftp://x", "https://user:secret@x", "https://", "http://a b", "file:///x"]
        {
            let error = Client::new(Settings::new(endpoint, "/nowhere")).err().expect(endpoint).to_string();
            assert!(error.starts_with("HF_ENDPOINT"), "{error}");
        }
    }
}

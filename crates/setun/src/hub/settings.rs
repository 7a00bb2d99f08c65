//! Which hub, which cache, whose token: what the environment says, as other programs that share the cache read it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::ModelError;

/// Where models come from and where they are kept. [`Settings::from_env`] reads what users have set already.
#[derive(Clone)]
pub struct Settings {
    /// Address of the hub, with its scheme and without a final slash.
    pub endpoint: String,
    /// Sent to the hub itself, and to no other host that it names.
    pub token: Option<String>,
    /// Folder of the `models--OWNER--NAME` folders.
    pub cache: PathBuf,
    /// Use only what is in the cache.
    pub offline: bool,
    /// Longest wait for a connection, for an answer to begin, and for the next bytes of a file.
    pub timeout: Duration,
    /// Wait before the second attempt; each further wait is twice as long.
    pub backoff: Duration,
    /// Proxy for each scheme, and hosts reached without one.
    pub proxies: Proxies,
    /// Certificates to trust instead of the built-in ones: a PEM file.
    pub certificates: Option<PathBuf>,
}

/// Proxies as the environment names them.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    /// For `http:` addresses.
    pub http: Option<String>,
    /// For `https:` addresses.
    pub https: Option<String>,
    /// Hosts, or domains with all hosts below them, that need none; `*` is all.
    pub none_for: Vec<String>,
}

impl std::fmt::Debug for Settings {
    /// Without the token, and without proxies, which may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { endpoint, token, cache, offline, timeout, .. } = self;
        f.debug_struct("Settings")
            .field("endpoint", endpoint)
            .field("token", &token.as_ref().map(|_| "…"))
            .field("cache", cache)
            .field("offline", offline)
            .field("timeout", timeout)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// A hub at `endpoint` with its cache, and defaults for the rest: no token, no proxy, online.
    pub fn new(endpoint: impl Into<String>, cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: endpoint.into(),
            token: None,
            cache: cache.into(),
            offline: false,
            timeout: Duration::from_secs(30),
            backoff: Duration::from_secs(1),
            proxies: Proxies::default(),
            certificates: None,
        }
    }

    /// What the environment says: `HF_ENDPOINT`; `HF_TOKEN`, else the file at `HF_TOKEN_PATH` or `token` in `HF_HOME`;
    /// `HF_HUB_CACHE`, else `hub` in `HF_HOME` (default `~/.cache/huggingface`); `HF_HUB_OFFLINE`,
    /// `HF_HUB_DOWNLOAD_TIMEOUT`; the usual proxy variables and `SSL_CERT_FILE`.
    ///
    /// # Errors
    /// [`ModelError::Hub`] if a variable has no usable value, or nothing says where the cache is.
    pub fn from_env() -> Result<Self, ModelError> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    /// As [`from_env`](Self::from_env), with `variable` in the environment's place. An empty value counts as none.
    fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, ModelError> {
        let get = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let any = |names: &[&str]| names.iter().find_map(|name| get(name));
        let on = |name: &str| {
            get(name)
                .is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.trim().to_ascii_lowercase().as_str()))
        };
        let user = any(&["HOME", "USERPROFILE"]).map(PathBuf::from);
        let expand = |path: String| match (path.strip_prefix("~/"), &user) {
            (Some(rest), Some(user)) => user.join(rest),
            _ => PathBuf::from(path),
        };
        let home = match (get("HF_HOME"), get("XDG_CACHE_HOME"), &user) {
            (Some(home), ..) => Some(expand(home)),
            (None, Some(cache), _) => Some(expand(cache).join("huggingface")),
            (None, None, Some(user)) => Some(user.join(".cache/huggingface")),
            (None, None, None) => None,
        };
        let cache = any(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map(expand);
        let cache = cache.or_else(|| Some(home.as_ref()?.join("hub"))).ok_or_else(|| {
            ModelError::hub("cache", "no folder is named for it: set HF_HOME, HF_HUB_CACHE or HOME")
        })?;
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let token_file = get("HF_TOKEN_PATH").map(expand).or_else(|| Some(home?.join("token")));
        let token = match any(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]) {
            None if on("HF_HUB_DISABLE_IMPLICIT_TOKEN") => None,
            None => token_file.as_deref().map(token_in).transpose()?.flatten(),
            given => given,
        };
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|t| t.len() > 4096 || !t.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(ModelError::hub("HF_TOKEN", "it holds characters that no token has, or is too long"));
        }
        let all = any(&["ALL_PROXY", "all_proxy"]);
        let none_for = any(&["NO_PROXY", "no_proxy"]).unwrap_or_default();
        let hosts = none_for.split(',').map(|host| host.trim().trim_start_matches('.').to_ascii_lowercase());
        let mut settings = Self {
            token,
            offline: on("HF_HUB_OFFLINE"),
            proxies: Proxies {
                http: any(&["HTTP_PROXY", "http_proxy"]).or_else(|| all.clone()),
                https: any(&["HTTPS_PROXY", "https_proxy"]).or(all),
                none_for: hosts.filter(|host| !host.is_empty()).collect(),
            },
            certificates: get("SSL_CERT_FILE").map(PathBuf::from),
            ..Self::new(endpoint.trim().trim_end_matches('/'), cache)
        };
        if let Some(text) = get("HF_HUB_DOWNLOAD_TIMEOUT") {
            let seconds = text.trim().parse().ok().filter(|s: &f64| (0.01..=86_400.0).contains(s));
            settings.timeout = Duration::from_secs_f64(seconds.ok_or_else(|| {
                ModelError::hub(
                    "HF_HUB_DOWNLOAD_TIMEOUT",
                    format!("it is `{text}`, but a number of seconds is expected"),
                )
            })?);
        }
        Ok(settings)
    }
}

impl Proxies {
    /// The proxy through which `host` is reached.
    pub(super) fn of(&self, https: bool, host: &str) -> Option<&str> {
        let host = host.to_ascii_lowercase();
        let below = |domain: &String| {
            let domain = domain.trim_start_matches("*.");
            domain == "*" || host == domain || host.strip_suffix(domain).is_some_and(|h| h.ends_with('.'))
        };
        let proxy = if https { &self.https } else { &self.http };
        proxy.as_deref().filter(|_| !self.none_for.iter().any(below))
    }
}

fn token_in(path: &Path) -> Result<Option<String>, ModelError> {
    match std::fs::read_to_string(path) {
        Ok(token) => Ok(Some(token)),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(e) => Err(ModelError::read(path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Settings, ModelError> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Settings::from_variables(&find)
    }

    #[test]
    fn the_cache_is_where_other_programs_keep_it() {
        for (variables, cache) in [
            (&[("HOME", "/h")][..], "/h/.cache/huggingface/hub"),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HOME", "/h"), ("HF_HOME", "~/hf")], "/h/hf/hub"),
            (&[("HF_HOME", "/a"), ("HF_HUB_CACHE", "/b")], "/b"),
            (&[("HF_HOME", "/a"), ("HUGGINGFACE_HUB_CACHE", "/c")], "/c"),
        ] {
            assert_eq!(of(variables).unwrap().cache, Path::new(cache), "{variables:?}");
        }
        assert!(of(&[]).unwrap_err().to_string().contains("HF_HOME"));
    }

    #[test]
    fn a_token_comes_from_its_variable_or_its_file_and_is_not_printed() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let path = home.path().to_str().unwrap();
        let token = |more: &[(&str, &str)]| of(&[&[("HF_HOME", path)], more].concat()).unwrap().token;
        assert_eq!(token(&[]).as_deref(), Some("hf_file"));
        assert_eq!(token(&[("HF_TOKEN", " hf_given ")]).as_deref(), Some("hf_given"));
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert!(of(&[("HF_HOME", path), ("HF_TOKEN", "a\nb")]).unwrap_err().to_string().contains("HF_TOKEN"));
        assert!(!format!("{:?}", of(&[("HF_HOME", path)]).unwrap()).contains("hf_file"));
    }

    #[test]
    fn switches_and_numbers_are_read_or_refused() {
        let base = [("HOME", "/nowhere")];
        let with = |name, value| of(&[&base[..], &[(name, value)]].concat());
        assert_eq!(of(&base).unwrap().endpoint, "https://huggingface.co");
        assert_eq!(with("HF_ENDPOINT", "http://mirror:8080/").unwrap().endpoint, "http://mirror:8080");
        for (value, offline) in [("1", true), ("True", true), ("0", false), ("", false)] {
            assert_eq!(with("HF_HUB_OFFLINE", value).unwrap().offline, offline, "{value}");
        }
        assert_eq!(with("HF_HUB_DOWNLOAD_TIMEOUT", "2.5").unwrap().timeout, Duration::from_millis(2500));
        for wrong in ["-1", "soon", "1e300", "NaN"] {
            assert!(with("HF_HUB_DOWNLOAD_TIMEOUT", wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_proxy_is_used_for_its_scheme_and_not_for_excepted_domains() {
        let settings = of(&[
            ("HOME", "/nowhere"),
            ("https_proxy", "http://p:1"),
            ("NO_PROXY", "localhost, .corp.example,10.0.0.1"),
        ]);
        let proxies = settings.unwrap().proxies;
        assert_eq!(proxies.of(true, "huggingface.co"), Some("http://p:1"));
        assert_eq!(proxies.of(false, "huggingface.co"), None);
        for host in ["localhost", "a.corp.example", "corp.example", "10.0.0.1", "LOCALHOST"] {
            assert_eq!(proxies.of(true, host), None, "{host}");
        }
        assert!(proxies.of(true, "notcorp.example").is_some());
        let all = of(&[("HOME", "/n"), ("ALL_PROXY", "http://p:1"), ("NO_PROXY", "*")]).unwrap().proxies;
        assert_eq!((all.of(true, "a"), all.of(false, "b")), (None, None));
    }
}

//! How a model on a hub is named, and which names of files are safe to write.

use crate::error::ModelError;

/// File name endings that are fetched: models, tokenizers, their settings. Never code.
const FETCHED: [&str; 12] =
    ["gguf", "safetensors", "bin", "pt", "pth", "ckpt", "model", "json", "jinja", "txt", "md", "tiktoken"];

/// A model on a hub: `[hf:]OWNER/NAME[@REVISION][:FILE]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `OWNER/NAME`, or `NAME` alone for the hub's oldest repositories.
    pub repo: String,
    /// Branch, tag, pull request (`refs/pr/1`) or commit; `main` if none was named.
    pub revision: String,
    /// One file of the repository, with `/` between folders.
    pub file: Option<String>,
}

impl HubName {
    /// Reads a name that can be nothing else, with or without `hf:`.
    ///
    /// # Errors
    /// [`ModelError::Hub`] naming the part that is not as hubs allow.
    pub fn parse(text: &str) -> Result<Self, ModelError> {
        let refused = |what: String| ModelError::hub(text, format!("{what}; {}", Self::SYNTAX));
        if text.contains("://") {
            return Err(refused("an address is no name".into()));
        }
        let bare = text.strip_prefix("hf:").unwrap_or(text);
        let (head, file) = match bare.split_once(':') {
            Some((head, file)) => (head, Some(file)),
            None => (bare, None),
        };
        let (repo, revision) = head.split_once('@').unwrap_or((head, "main"));
        if !(1..=2).contains(&repo.split('/').count()) || !repo.split('/').all(is_repo_part) {
            return Err(refused(format!("`{}` is not the name of a repository", shown(repo))));
        }
        if !is_revision(revision) {
            return Err(refused(format!("`{}` is not the name of a revision", shown(revision))));
        }
        if let Some(file) = file {
            check_file(file).map_err(|what| refused(format!("`{}` {what}", shown(file))))?;
        }
        Ok(Self { repo: repo.to_owned(), revision: revision.to_owned(), file: file.map(str::to_owned) })
    }

    /// What the parse errors and the commands tell about names.
    pub const SYNTAX: &str =
        "a model on a hub is named OWNER/NAME, OWNER/NAME:FILE, OWNER/NAME@REVISION or hf:OWNER/NAME";

    /// Whether text that may be a path is spelled as a hub name is: `hf:…`, or two parts of which none is
    /// spelled as a path or a model file. Does not look at the disk.
    pub fn looks_like(text: &str) -> bool {
        let head = text.split([':', '@']).next().unwrap_or_default();
        let parts: Vec<&str> = head.split('/').collect();
        let file = |name: &str| FETCHED.iter().any(|end| extension(name).eq_ignore_ascii_case(end));
        text.starts_with("hf:")
            || (parts.len() == 2 && parts.iter().all(|part| is_repo_part(part)) && !file(parts[1]))
    }
}

impl std::fmt::Display for HubName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        self.file.iter().try_for_each(|file| write!(f, ":{file}"))
    }
}

/// The hub's own rule for each half of a repository's name. A `--` would also confuse the cache, whose folders are
/// named `models--OWNER--NAME`.
fn is_repo_part(part: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    part.len() <= 96
        && is_plain(part)
        && edge(part.chars().next())
        && edge(part.chars().next_back())
        && !part.contains("--")
        && !part.contains("..")
}

fn is_revision(text: &str) -> bool {
    text.len() <= 255 && text.split('/').all(is_safe_part)
}

/// A part of a path that means itself wherever it is written: letters, digits, `.`, `_`, `-`, and no dot in front.
pub(super) fn is_safe_part(text: &str) -> bool {
    (1..=255).contains(&text.len()) && is_plain(text) && !text.starts_with(['.', '-']) && !text.contains("..")
}

fn is_plain(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

fn extension(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(_, end)| end)
}

/// Whether a name leaves the folder it is joined to, on any system: no honest repository holds one.
pub(super) fn escapes(name: &str) -> bool {
    name.starts_with('/')
        || name.contains(['\\', '\0'])
        || name.as_bytes().get(1) == Some(&b':')
        || name.split('/').any(|part| part == "..")
}

/// Refuses names of files that cannot be written safely on every system, and of kinds that are not fetched.
///
/// # Errors
/// What is wrong, as the end of a sentence that begins with the name.
pub(super) fn check_file(name: &str) -> Result<(), String> {
    if escapes(name) {
        return Err("would be written outside of its folder".into());
    }
    let odd = |c: char| c.is_control() || r#"<>:"|?*"#.contains(c);
    let bad_part = |part: &str| {
        part.is_empty() || part == "." || part.len() > 255 || part.ends_with(['.', ' ']) || is_device(part)
    };
    if name.len() > 1024 || name.contains(odd) || name.split('/').any(bad_part) {
        return Err("is not a file name that every system can write".into());
    }
    if !FETCHED.iter().any(|end| extension(name).eq_ignore_ascii_case(end)) {
        return Err(format!("is not of a kind that is fetched ({})", FETCHED.join(", ")));
    }
    Ok(())
}

/// Names that Windows keeps for devices, whatever their ending.
fn is_device(part: &str) -> bool {
    let stem = part.split('.').next().unwrap_or_default().trim_end().to_ascii_uppercase();
    let numbered = |stem: &str| stem.len() == 4 && (stem.starts_with("COM") || stem.starts_with("LPT"));
    matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL")
        || (numbered(&stem) && stem.ends_with(|c: char| c.is_ascii_digit()))
}

/// Text from outside as a message may show it: no control characters, not too long.
pub(super) fn shown(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
    clean.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(repo: &str, revision: &str, file: Option<&str>) -> HubName {
        HubName { repo: repo.into(), revision: revision.into(), file: file.map(str::to_owned) }
    }

    #[test]
    fn every_form_of_a_name_is_read() {
        for (text, expected) in [
            ("org/name", name("org/name", "main", None)),
            ("hf:org/name", name("org/name", "main", None)),
            ("hf:gpt2", name("gpt2", "main", None)),
            ("org/name:a/b.gguf", name("org/name", "main", Some("a/b.gguf"))),
            ("org/name@v1.0", name("org/name", "v1.0", None)),
            ("org/name@refs/pr/1:x.gguf", name("org/name", "refs/pr/1", Some("x.gguf"))),
        ] {
            assert_eq!(HubName::parse(text).unwrap(), expected, "{text}");
        }
        assert_eq!(HubName::parse("hf:o/n@v:x.gguf").unwrap().to_string(), "o/n@v:x.gguf");
    }

    #[test]
    fn names_that_could_leave_the_cache_are_refused_naming_the_part() {
        for (text, part) in [
            ("../x", "repository"),
            ("a/../b", "repository"),
            ("a--b/c", "repository"),
            ("a/b/c", "repository"),
            ("", "repository"),
            ("a/b\u{1b}[2J", "repository"),
            ("https://huggingface.co/org/name", "address"),
            ("org/name@../../x", "revision"),
            ("org/name@", "revision"),
            ("org/name@-x", "revision"),
            ("org/name:../x.gguf", "outside"),
            ("org/name:/etc/x.gguf", "outside"),
            ("org/name:C:x.gguf", "outside"),
            ("org/name:a\\..\\x.gguf", "outside"),
            ("org/name:nul.gguf", "every system"),
            ("org/name:a//x.gguf", "every system"),
            ("org/name:modeling.py", "kind"),
            ("org/name:run", "kind"),
        ] {
            let error = HubName::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
            assert!(!error.contains('\u{1b}') || text.contains('\u{1b}'), "{error}");
        }
    }

    #[test]
    fn only_owner_slash_name_looks_like_a_hub_name() {
        for (text, hub) in [
            ("microsoft/bitnet-b1.58-2B-4T", true),
            ("microsoft/bitnet-b1.58-2B-4T-gguf:ggml-model-i2_s.gguf", true),
            ("org/name@main", true),
            ("hf:anything", true),
            ("./model", false),
            ("../model", false),
            ("models/x.gguf", false),
            ("models/x.GGUF", false),
            ("models/", false),
            ("model", false),
            ("/a/b", false),
            ("~/b", false),
            ("a/b/c", false),
            ("C:\\a/b", false),
        ] {
            assert_eq!(HubName::looks_like(text), hub, "{text}");
        }
    }
}

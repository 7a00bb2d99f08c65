//! What all commands print with: stdout that may be closed, errors on one line, sizes for people.

use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// Writes to stdout at once, so that a stream is seen as it grows.
///
/// # Errors
/// When stdout is closed, which ends the program quietly, or cannot be written.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Prints `value` as indented JSON and a line end.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    Ok(print(&text)?)
}

/// How the head found its logits: `exact`, or by a shortlist, and what that came to.
pub fn head(engine: &setun::engine::Engine) -> serde_json::Value {
    let stats = engine.head_stats();
    match engine.has_shortlist() {
        false => serde_json::json!({ "mode": "exact" }),
        true => serde_json::json!({
            "mode": "shortlist",
            "shortlisted": stats.shortlisted,
            "mean_rows": stats.mean_rows(),
            "fallbacks": stats.fallbacks,
            "exact": stats.exact,
        }),
    }
}

/// Refuses a picture of another type before anything is measured or read.
///
/// # Errors
/// [`WrongUsage`](crate::WrongUsage) unless the name ends in `.svg`.
pub fn check_svg(path: &Path) -> anyhow::Result<()> {
    match path.extension().and_then(|end| end.to_str()) {
        Some(end) if end.eq_ignore_ascii_case("svg") => Ok(()),
        _ => {
            let what =
                format!("the picture is written as SVG, so its name must end in .svg: {}", path.display());
            Err(crate::WrongUsage(what).into())
        }
    }
}

/// Writes a file beside its name and renames it, so that it is there whole or not at all.
///
/// # Errors
/// When it cannot be written; the error names it.
pub fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let written = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, path));
    written
        .inspect_err(|_| _ = std::fs::remove_file(&temporary))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Whether the only thing wrong is that nobody reads stdout any more.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<std::io::Error>(), Some(e) if e.kind() == ErrorKind::BrokenPipe)
}

/// An error and its causes on one line, each said once.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line += ": ";
        }
        line += &text;
    }
    flags(&line.replace('\n', " "))
}

/// Choices that the library leaves to its caller, by the flags that make them here.
pub fn flags(text: &str) -> String {
    ["type42", "i2s", "tl_tiles"].iter().fold(text.to_owned(), |text, name| {
        text.replace(&format!("the option `{name}`"), &format!("`--{}`", name.replace('_', "-")))
    })
}

/// `1.2 GB`, `310 MB`, `4.5 KB`: powers of ten.
pub fn bytes(n: usize) -> String {
    scaled(n as f64, &["B", "KB", "MB", "GB", "TB"], " ")
}

/// `2.41 B`, `6.3 M`, `320`: counts of parameters.
pub fn count(n: usize) -> String {
    scaled(n as f64, &["", "K", "M", "B", "T"], " ").trim_end().to_owned()
}

fn scaled(mut value: f64, units: &[&str], space: &str) -> String {
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$}{space}{}", units[unit])
}

/// Three significant digits of a rate: `1234`, `56.7`, `8.90`.
pub fn rate(value: f64) -> String {
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_svg_is_written() {
        assert!(check_svg(Path::new("a.svg")).is_ok() && check_svg(Path::new("a.SVG")).is_ok());
        for other in ["a.png", "svg", "a"] {
            assert!(check_svg(Path::new(other)).unwrap_err().to_string().contains(".svg"));
        }
    }

    #[test]
    fn sizes_have_three_digits_and_the_next_unit_from_1000() {
        let shown = [0, 999, 1000, 9_996, 123_456, 999_499, 999_999, 2_412_820_480].map(bytes);
        assert_eq!(shown, ["0 B", "999 B", "1.00 KB", "10.0 KB", "123 KB", "999 KB", "1.00 MB", "2.41 GB"]);
        assert_eq!([320, 6_300_000].map(count), ["320", "6.30 M"]);
    }

    #[test]
    fn a_cause_that_its_error_already_says_is_not_repeated() {
        let inner = anyhow::anyhow!("disk full");
        assert_eq!(one_line(&inner.context("cannot write x")), "cannot write x: disk full");
        assert_eq!(one_line(&anyhow::anyhow!("b").context("a b")), "a b");
    }

    #[test]
    fn the_librarys_options_are_told_by_the_names_of_their_flags() {
        let error = anyhow::anyhow!("both fit: the option `type42` must say group64 or group128");
        assert_eq!(one_line(&error), "both fit: `--type42` must say group64 or group128");
    }
}

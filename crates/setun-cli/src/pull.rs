//! `setun pull`, and hub names wherever a model is named.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use indicatif::ProgressBar;
use setun::hub::{Event, Hub, HubName, Pulled, Settings};

use crate::{output, progress};

/// Fetch a model from a hub into the cache that other programs share, and print where it is.
///
/// REPO is OWNER/NAME, with @REVISION (a branch, tag or commit) and :FILE if wanted. Without FILE the repository's GGUF file
/// is taken, and if it has several they are listed; else its safetensors with config, tokenizer and chat template; pickles
/// only where there is nothing else; code never.
///
/// Every command that takes a MODEL takes these names too. It fetches what is not in the cache and otherwise works without
/// a network; `setun pull` asks the hub for the revision's latest commit. A file or folder of that name comes first;
/// hf:OWNER/NAME always means the hub.
///
/// A broken download goes on where it stopped, and a file gets its name when its checksum is right. Settings are those of
/// the hub's other programs: HF_ENDPOINT, HF_TOKEN (or the file `token` in HF_HOME), HF_HUB_CACHE or HF_HOME (default
/// ~/.cache/huggingface), HF_HUB_OFFLINE=1, HF_HUB_DOWNLOAD_TIMEOUT (seconds without data), HTTPS_PROXY, NO_PROXY,
/// SSL_CERT_FILE.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  setun pull microsoft/bitnet-b1.58-2B-4T-gguf
  setun pull OWNER/NAME:model-tq2_0.gguf
  setun run OWNER/NAME@v1.0 -p 'Once upon a time'
  HF_HUB_OFFLINE=1 setun info OWNER/NAME")]
pub struct PullArgs {
    /// Name of the model on the hub: OWNER/NAME[@REVISION][:FILE]
    #[arg(value_name = "REPO[:FILE]", value_parser = hub_name)]
    name: HubName,
}

fn hub_name(text: &str) -> Result<HubName, String> {
    HubName::parse(text).map_err(|error| error.to_string())
}

pub fn pull(args: &PullArgs) -> Result<()> {
    let pulled = fetch(&Hub::new(Settings::from_env()?)?, &args.name)?;
    eprintln!(
        "{}: commit {}, {}",
        args.name,
        pulled.commit,
        match pulled.files {
            0 => "all of it was there".to_owned(),
            n => format!("{} fetched, {}", files(n), output::bytes(pulled.bytes as usize)),
        }
    );
    Ok(output::print(&format!("{}\n", pulled.path.display()))?)
}

/// Where the model, or tokenizer, is that the user named: a path as it is; for a hub name the place in the cache, fetched
/// if it is not there yet.
pub fn local(model: &Path) -> Result<PathBuf> {
    match std::fs::metadata(model) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
        // What is there but cannot be read is for whoever opens it to say.
        _ => return Ok(model.to_owned()),
    }
    let Some(text) = model.to_str().filter(|text| HubName::looks_like(text)) else {
        bail!("there is no file or folder `{}`; {}", model.display(), HubName::SYNTAX);
    };
    let owner = text.split('/').next().unwrap_or_default();
    if !text.contains(':') && !text.contains('@') && Path::new(owner).exists() {
        bail!(
            "there is no file or folder `{text}`, but there is `{owner}`: if a model on a hub is meant, name it hf:{text}"
        );
    }
    let name = HubName::parse(text)?;
    let hub = Hub::new(Settings::from_env()?)?;
    match hub.cached(&name)? {
        Some(path) => Ok(path),
        None => Ok(fetch(&hub, &name)?.path),
    }
}

/// Fetches with progress on stderr: a bar on a terminal, a line at the start anywhere.
fn fetch(hub: &Hub, name: &HubName) -> Result<Pulled> {
    let mut bar: Option<ProgressBar> = None;
    let pulled = hub.pull(name, &mut |event| match event {
        Event::Start { files, bytes, have } => {
            let there = match have {
                0 => String::new(),
                _ => format!(", {} of it fetched before", output::bytes(have as usize)),
            };
            say(
                bar.as_ref(),
                &format!("fetching {name}: {}, {}{there}", self::files(files), output::bytes(bytes as usize)),
            );
            let bar = bar.get_or_insert_with(progress::bytes);
            bar.set_length(bytes);
            bar.set_position(have);
            bar.reset_eta(); // Earlier bytes took no time of this attempt.
        }
        Event::Bytes { file, done } => {
            if let Some(bar) = &bar {
                bar.set_message(file.to_owned());
                bar.set_position(done);
            }
        }
        Event::Note(text) => say(bar.as_ref(), &format!("note: {text}")),
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(pulled?)
}

fn files(n: usize) -> String {
    if n == 1 { "1 file".into() } else { format!("{n} files") }
}

/// A line on stderr that does not tear the bar.
fn say(bar: Option<&ProgressBar>, line: &str) {
    match bar {
        Some(bar) => bar.suspend(|| eprintln!("{line}")),
        None => eprintln!("{line}"),
    }
}

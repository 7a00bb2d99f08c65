//! `setun pull`, and hub names where a model is named, as a user meets them; the hub is a server on the loopback.

#[path = "../../setun/tests/hub/server.rs"]
#[allow(dead_code, reason = "the library's own tests use the rest")]
mod server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use server::{Reply, Repo, Server};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/default.gguf");

fn model() -> Vec<u8> {
    std::fs::read(MODEL).unwrap()
}

fn repo() -> Repo {
    Repo::new("org/name").small("README.md", "# a model").large("story.gguf", model())
}

fn hub() -> Server {
    let repo = repo();
    Server::start(move |request, _| repo.answer(request))
}

/// A user's account: a home, an empty cache, and a hub.
struct Account {
    home: tempfile::TempDir,
    endpoint: String,
}

impl Account {
    fn with(server: &Server) -> Self {
        Self { home: tempfile::tempdir().unwrap(), endpoint: server.address.clone() }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let foreign = |name: &str| ["HF_", "HUGGING", "SSL_"].iter().any(|start| name.starts_with(start));
        for (name, _) in std::env::vars().filter(|(n, _)| foreign(n) || n.to_lowercase().ends_with("_proxy"))
        {
            command.env_remove(name);
        }
        command.env("HOME", self.home.path()).env("HF_HOME", self.home.path().join("hf"));
        command.env("HF_ENDPOINT", &self.endpoint).current_dir(self.home.path()).stdin(Stdio::null());
        command
    }

    fn setun(&self, args: &[&str]) -> Output {
        self.command(env!("CARGO_BIN_EXE_setun")).args(args).output().unwrap()
    }

    fn offline(&self, args: &[&str]) -> Output {
        self.command(env!("CARGO_BIN_EXE_setun")).env("HF_HUB_OFFLINE", "1").args(args).output().unwrap()
    }

    fn repo_folder(&self) -> PathBuf {
        self.home.path().join("hf/hub/models--org--name")
    }

    fn incomplete(&self) -> PathBuf {
        self.repo_folder().join(format!("blobs/{}.incomplete", server::sha256(&model())))
    }

    fn has_model(&self) -> bool {
        self.repo_folder().join("snapshots").exists()
            || self.repo_folder().join("blobs").join(server::sha256(&model())).exists()
    }
}

fn stdout(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn run_fetches_a_hub_model_once_and_then_needs_no_network() {
    let server = hub();
    let account = Account::with(&server);
    let story = ["-p", "Once upon a time", "-n", "24", "--seed", "1"];
    let run = |model| [&["run", model], &story[..]].concat();
    let first = account.setun(&run("org/name"));
    assert_eq!(stdout(&first), stdout(&account.setun(&run(MODEL))), "the same model tells the same");
    let told = stderr(&first);
    assert!(told.contains("fetching org/name: 1 file, ") && told.contains(" MB"), "{told}");
    let asked = server.requests().len();
    let second = account.offline(&run("org/name"));
    assert_eq!(stdout(&second), stdout(&first));
    assert!(!stderr(&second).contains("fetching"), "{}", stderr(&second));
    assert_eq!(stdout(&account.setun(&run("hf:org/name:story.gguf"))), stdout(&first));
    assert_eq!(server.requests().len(), asked, "what is in the cache is not asked for");

    for command in [
        &["info", "org/name", "--json"][..],
        &["tokenize", "org/name", "Once upon"],
        &["bench", "org/name", "--prefill", "8", "--decode", "2", "--repeats", "1", "--json"],
        &["convert", "org/name", "copy.gguf", "--to", "gguf"],
    ] {
        let output = account.offline(command);
        assert_eq!(output.status.code(), Some(0), "{command:?}: {}", stderr(&output));
    }
    let missing = account.offline(&run("org/other"));
    assert_eq!((missing.status.code(), missing.stdout.len()), (Some(1), 0));
    assert!(stderr(&missing).contains("HF_HUB_OFFLINE"), "{}", stderr(&missing));
}

#[test]
fn pull_prints_the_path_alone_on_stdout() {
    let server = hub();
    let account = Account::with(&server);
    let path = stdout(&account.setun(&["pull", "org/name"]));
    assert_eq!(std::fs::read(path.trim_end()).unwrap(), model());
    assert!(Path::new(path.trim_end()).starts_with(account.repo_folder()));
    let again = account.setun(&["pull", "org/name"]);
    assert_eq!(stdout(&again), path);
    assert!(stderr(&again).contains("all of it was there"));
    let wrong = account.setun(&["pull", "../name"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("not the name of a repository"));
}

#[test]
fn what_is_or_looks_like_a_path_is_never_asked_for() {
    let server = hub();
    let account = Account::with(&server);
    let home = account.home.path();
    for path in ["./org/name", "org/name.gguf", "/org/name", "name", "a/b/c"] {
        let output = account.setun(&["info", path]);
        assert_eq!(output.status.code(), Some(1), "{path}");
        let told = stderr(&output);
        assert!(told.contains("there is no file or folder") && told.contains("OWNER/NAME"), "{told}");
    }
    std::fs::create_dir(home.join("org")).unwrap();
    let told = stderr(&account.setun(&["info", "org/name"]));
    assert!(told.contains("name it hf:org/name"), "{told}");
    std::fs::copy(MODEL, home.join("org/name")).unwrap();
    assert!(!stdout(&account.setun(&["info", "org/name"])).is_empty(), "a local file comes first");
    assert_eq!(server.requests().len(), 0);
}

#[cfg(unix)]
#[test]
fn a_stopped_pull_leaves_a_part_that_the_next_one_goes_on_from() {
    let repo = repo();
    let server = Server::start(move |request, before| {
        let reply = repo.answer(request);
        match request.method == "GET" && request.path.contains("/resolve/") && before == 0 {
            true => Reply { cut: Some(1_000_000), silent: Duration::from_secs(30), ..reply },
            false => reply,
        }
    });
    let account = Account::with(&server);
    let mut pull = account.command(env!("CARGO_BIN_EXE_setun"));
    let mut pull =
        pull.args(["pull", "org/name"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while std::fs::metadata(account.incomplete()).map_or(0, |found| found.len()) < 1_000_000 {
        assert!(started.elapsed() < Duration::from_secs(20), "the first part does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
    // SIGTERM, since a background job may ignore what Ctrl-C sends; the program handles neither.
    Command::new("kill").args(["-TERM", &pull.id().to_string()]).status().unwrap();
    assert!(!pull.wait().unwrap().success());
    assert!(!account.has_model(), "half a file has its final name");
    let told = stderr(&account.setun(&["pull", "org/name"]));
    assert!(told.contains("1.00 MB of it fetched before"), "{told}");
    assert!(account.has_model() && !account.incomplete().exists());
    assert_eq!(server.requests().last().unwrap().header("range"), Some("bytes=1000000-"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_limit_on_file_sizes_ends_in_a_message_and_is_resumed_without_it() {
    let server = hub();
    let account = Account::with(&server);
    // As on a full disk, writes fail in the middle of the file.
    let limited =
        format!("trap '' XFSZ; ulimit -f 1000; exec '{}' pull org/name", env!("CARGO_BIN_EXE_setun"));
    let output = account.command("sh").args(["-c", &limited]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let told = stderr(&output);
    assert!(told.contains("cannot write") && told.contains("make room"), "{told}");
    assert!(!account.has_model() && account.incomplete().exists());
    assert_eq!(std::fs::read(stdout(&account.setun(&["pull", "org/name"])).trim_end()).unwrap(), model());
}

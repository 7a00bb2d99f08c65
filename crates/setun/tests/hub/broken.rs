//! Networks and disks that break: what came is kept, and the next attempt goes on from there.

use std::time::Duration;

use super::server::{Reply, Repo, Server};
use super::{Place, contents, gguf_repo, hub, hub_but, is_contents};

/// The hub with its first answers to the contents cut after `bytes`.
fn cut_after(bytes: usize, times: usize) -> Server {
    let repo = gguf_repo();
    hub_but(gguf_repo(), move |request, before| {
        let cut = (is_contents(request) && before < times).then_some(bytes);
        cut.map(|_| Reply { cut, ..repo.answer(request) })
    })
}

#[test]
fn a_cut_in_the_middle_is_resumed_from_there() {
    let server = cut_after(200_000, 2);
    let place = Place::new(&server.address);
    let (pulled, told) = place.watched("org/name");
    assert_eq!(std::fs::read(pulled.unwrap().path).unwrap(), contents());
    let ranges: Vec<_> = server.requests().iter().filter(|r| is_contents(r)).cloned().collect();
    let starts: Vec<_> = ranges.iter().map(|r| r.header("range").map(str::to_owned)).collect();
    assert_eq!(starts, [None, Some("bytes=200000-".into()), Some("bytes=400000-".into())]);
    assert_eq!(ranges[1].header("if-range"), Some(&*format!("\"{}\"", super::server::sha256(&contents()))));
    assert!(told[1].contains("broke off after 200000 of 700000 bytes"), "{told:?}");
}

#[test]
fn what_a_broken_pull_left_is_used_by_the_next_one() {
    let server = cut_after(100_000, usize::MAX);
    let place = Place::new(&server.address);
    let error = place.failure("org/name");
    assert!(error.contains("500000 bytes of x.gguf are kept"), "{error}");
    assert_eq!(std::fs::read(place.incomplete(&contents())).unwrap(), contents()[..500_000]);
    drop(server);

    let server = hub(gguf_repo());
    let place = Place {
        settings: setun::hub::Settings { endpoint: server.address.clone(), ..place.settings.clone() },
        ..place
    };
    let (pulled, told) = place.watched("org/name");
    assert_eq!(std::fs::read(pulled.unwrap().path).unwrap(), contents());
    assert_eq!(told, ["start 1 700000 500000"]);
    assert!(!place.incomplete(&contents()).exists());
}

#[test]
fn a_host_elsewhere_resumes_without_the_hubs_etag() {
    let repo = gguf_repo();
    let content = Server::start(move |request, before| Reply {
        cut: (before == 0).then_some(300_000),
        ..repo.content(request)
    });
    let server = hub(Repo { elsewhere: Some(content.address.clone()), ..gguf_repo() });
    let place = Place::new(&server.address);
    place.pull("org/name").unwrap();
    let second = &content.requests()[1];
    assert_eq!((second.header("range"), second.header("if-range")), (Some("bytes=300000-"), None));
}

#[test]
fn a_complete_part_is_checked_without_fetching() {
    let server = hub(gguf_repo());
    let place = Place::new(&server.address);
    let part = place.incomplete(&contents());
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, contents()).unwrap();
    place.pull("org/name").unwrap();
    assert_eq!(server.count("GET", "x.gguf"), 0);
}

#[test]
fn a_part_that_is_too_long_or_wrong_is_fetched_anew() {
    for part in [vec![7; 800_000], vec![7; 300_000]] {
        let server = hub(gguf_repo());
        let place = Place::new(&server.address);
        let path = place.incomplete(&contents());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, part).unwrap();
        assert_eq!(std::fs::read(place.pull("org/name").unwrap().path).unwrap(), contents());
    }
}

#[test]
fn a_server_without_ranges_sends_it_all_again() {
    let repo = gguf_repo();
    let server = hub_but(gguf_repo(), move |request, before| {
        let whole = Reply::new(200, contents()).with("ETag", "\"x\"").with("X-Repo-Commit", &repo.commit);
        is_contents(request).then(|| Reply { cut: (before == 0).then_some(250_000), ..whole })
    });
    let place = Place::new(&server.address);
    let (pulled, told) = place.watched("org/name");
    assert_eq!(std::fs::read(pulled.unwrap().path).unwrap(), contents());
    assert!(told.iter().any(|note| note.contains("cannot be resumed")), "{told:?}");
}

#[test]
fn a_wrong_or_refused_range_starts_again() {
    for wrong in [
        Reply::new(206, "abc").with("Content-Range", "bytes 5-7/700000"),
        Reply::new(206, contents()).with("Content-Range", "nonsense"),
        Reply::new(206, "abc"),
        Reply::new(416, ""),
    ] {
        let repo = gguf_repo();
        let server = hub_but(gguf_repo(), move |request, before| match (is_contents(request), before) {
            (true, 0) => Some(Reply { cut: Some(250_000), ..repo.answer(request) }),
            (true, 1) => Some(wrong.clone()),
            _ => None,
        });
        let place = Place::new(&server.address);
        assert_eq!(std::fs::read(place.pull("org/name").unwrap().path).unwrap(), contents());
        assert_eq!(server.requests().last().unwrap().header("range"), None);
    }
}

#[test]
fn a_host_that_falls_silent_is_not_waited_for_forever() {
    let repo = gguf_repo();
    let server = hub_but(gguf_repo(), move |request, before| {
        let silent = Reply { cut: Some(1000), silent: Duration::from_secs(20), ..repo.answer(request) };
        (is_contents(request) && before == 0).then_some(silent)
    });
    let place = Place::new(&server.address);
    let (pulled, told) = place.watched("org/name");
    pulled.unwrap();
    assert!(told[1].contains("broke off after 1000"), "{told:?}");
}

#[test]
fn a_host_that_sends_a_byte_now_and_then_is_given_up() {
    let repo = gguf_repo();
    let server = hub_but(gguf_repo(), move |request, _| {
        is_contents(request)
            .then(|| Reply { trickle: Some(Duration::from_millis(20)), ..repo.answer(request) })
    });
    let mut place = Place::new(&server.address);
    place.settings.timeout = Duration::from_millis(200);
    assert!(place.failure("org/name").contains("slower than 1 KB/s"));
}

#[test]
fn a_wrong_checksum_is_fetched_once_more_and_then_deleted() {
    let flipped = |times: usize| {
        hub_but(gguf_repo(), move |request, before| {
            let mut bytes = contents();
            bytes[123_456] ^= 1;
            (is_contents(request) && before < times).then(|| Reply::new(200, bytes))
        })
    };
    let server = flipped(1);
    let place = Place::new(&server.address);
    let (pulled, told) = place.watched("org/name");
    assert_eq!(std::fs::read(pulled.unwrap().path).unwrap(), contents());
    assert!(told[1].contains("checksum") && told[1].contains("again"), "{told:?}");

    let server = flipped(usize::MAX);
    let place = Place::new(&server.address);
    let error = place.failure("org/name");
    assert!(error.contains("checksum") && error.contains(&super::server::sha256(&contents())), "{error}");
    assert!(!place.incomplete(&contents()).exists(), "damaged bytes are not kept");
    assert_eq!(server.count("GET", "x.gguf"), 2);
}

#[test]
fn a_small_file_is_checked_as_git_names_it() {
    let server = hub_but(Repo::new("org/name").small("tokenizer.json", "{\"a\":1}"), |request, _| {
        (request.method == "GET").then(|| Reply::new(200, "{\"b\":1}"))
    });
    assert!(Place::new(&server.address).failure("org/name:tokenizer.json").contains("checksum"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said_and_what_was_there_is_kept() {
    let server = hub(gguf_repo());
    let place = Place::new(&server.address);
    let path = place.incomplete(&contents());
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &path).unwrap(); // Every write to it fails as on a full disk.
    let error = place.failure("org/name");
    assert!(error.contains("No space left on device") && error.contains("make room"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let server = hub(gguf_repo());
    let mut place = Place::new(&server.address);
    place.settings.cache = place.folder.path().join("file/below");
    std::fs::write(place.folder.path().join("file"), "").unwrap();
    let error = place.pull("org/name").unwrap_err();
    assert!(error.contains("cannot write") && error.contains("file/below"), "{error}");
}

//! A hub that lies: nothing is written outside of the cache, nothing runs forever, nothing grows without bound.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use super::server::{Reply, Repo, Server};
use super::{Place, contents, gguf_repo, hub, hub_but, is_contents};

#[test]
fn names_that_lead_out_of_the_cache_are_refused() {
    for name in ["../../evil.gguf", "/tmp/evil.gguf", "..\\evil.gguf", "C:\\evil.gguf", "a/../../evil.gguf"] {
        let server = hub(Repo::new("org/name").large(name, "x").large("good.gguf", "y"));
        let error = Place::new(&server.address).failure("org/name");
        assert!(error.contains("outside of its folder"), "{name}: {error}");
    }
    let server = hub(Repo::new("org/name").large("nul.gguf", "x"));
    assert!(Place::new(&server.address).failure("org/name").contains("every system"));
}

#[test]
fn an_index_cannot_name_files_elsewhere_or_missing_ones() {
    for (shard, told) in [("../../x.safetensors", "outside"), ("y.safetensors", "lacks"), ("run.py", "kind")]
    {
        let index = format!("{{\"weight_map\": {{\"a\": {shard:?}}}}}");
        let server = hub(Repo::new("org/name").small("model.safetensors.index.json", index));
        let place = Place::new(&server.address);
        let error = place.pull("org/name").unwrap_err();
        assert!(error.contains(told), "{shard}: {error}");
        assert_eq!(place.cached("org/name"), None);
    }
}

#[test]
fn commits_and_etags_that_are_paths_are_refused() {
    let with = |header: &'static str, value: &'static str| {
        let repo = gguf_repo();
        hub_but(gguf_repo(), move |request, _| {
            request.path.ends_with(".gguf").then(|| repo.answer(request).instead(header, value))
        })
    };
    for (header, value) in [
        ("ETag", "\"../../../evil\""),
        ("ETag", "\"\""),
        ("ETag", "\"a b\""),
        ("X-Repo-Commit", "../../evil"),
        ("X-Repo-Commit", ".."),
    ] {
        let server = with(header, value);
        let error = Place::new(&server.address).failure("org/name:x.gguf");
        assert!(error.contains("which is none"), "{header} {value}: {error}");
    }
    let server = Server::start(|_, _| Reply::new(200, r#"{"sha": "../..", "siblings": []}"#));
    assert!(Place::new(&server.address).failure("org/name").contains("names a commit `../..`"));
    let server = with("X-Repo-Commit", "0123456789012345678901234567890123456789");
    assert!(Place::new(&server.address).failure("org/name").contains("is said to be of commit"));
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_fetched() {
    for (size, told) in [
        ("99999999999999999999999999", "no file has"),
        ("9223372036854775807", "no file has"),
        ("-1", "no file has"),
        ("many", "no file has"),
        ("70000000000000", "are free"),
    ] {
        let commit = gguf_repo().commit;
        let server = hub_but(gguf_repo(), move |request, _| {
            let reply = Reply::new(302, "").with("Location", "/x").with("X-Repo-Commit", &commit);
            let reply = reply.with("X-Linked-Etag", "\"abc\"").with("X-Linked-Size", size);
            (request.method == "HEAD").then_some(reply)
        });
        let error = Place::new(&server.address).failure("org/name");
        assert!(error.contains(told), "{size}: {error}");
        assert_eq!(server.count("GET", ".gguf"), 0);
    }
}

#[test]
fn a_length_that_contradicts_the_hub_is_refused() {
    for length in ["5", "9999999999"] {
        let server = hub_but(gguf_repo(), move |request, _| {
            is_contents(request).then(|| Reply::new(200, contents()).with("Content-Length", length))
        });
        let error = Place::new(&server.address).failure("org/name");
        assert!(error.contains("700000 bytes") && error.contains(length), "{error}");
    }
}

#[test]
fn more_bytes_than_announced_are_not_read() {
    // Chunks without end: the file is complete after 700000 bytes, and right.
    let server = hub_but(gguf_repo(), |request, _| {
        let mut chunk = format!("{:x}\r\n", contents().len()).into_bytes();
        chunk.extend(contents());
        chunk.extend(b"\r\n");
        let more = [&b"20000\r\n"[..], &[7; 0x20000], b"\r\n"].concat();
        (0..200).for_each(|_| chunk.extend(&more));
        is_contents(request).then(|| Reply::new(200, chunk).with("Transfer-Encoding", "chunked"))
    });
    let place = Place::new(&server.address);
    assert_eq!(std::fs::read(place.pull("org/name").unwrap().path).unwrap(), contents());
}

#[test]
fn redirects_without_end_or_aim_are_given_up() {
    for (location, told) in [
        (Some("/again"), "more than 10 times"),
        (Some("file:///etc/passwd"), "not an address"),
        (Some("ftp://127.0.0.1/x"), "not an address"),
        (Some("http://"), "not an address"),
        (Some("gopher:x y"), "not an address"),
        (None, "without saying where to"),
    ] {
        let server = Server::start(move |_, _| {
            let reply = Reply::new(302, "");
            location.map_or(reply.clone(), |location| reply.with("Location", location))
        });
        let place = Place::new(&server.address);
        for name in ["org/name", "org/name:x.gguf"] {
            let error = place.failure(name);
            assert!(error.contains(told), "{location:?}: {error}");
        }
        assert!(server.requests().len() <= 22);
    }
}

#[test]
fn lists_that_are_none_or_do_not_end_are_refused() {
    for json in
        ["", "[]", "{}", "nonsense", r#"{"sha": 1}"#, "[[[[[[", r#"{"sha":"a","siblings":[{"rfilename":3}]}"#]
    {
        let server =
            Server::start(move |_, _| Reply::new(200, json).with("Content-Type", "application/json"));
        let error = Place::new(&server.address).failure("org/name");
        assert!(error.contains("not as expected"), "{json}: {error}");
    }
    let server = Server::start(|_, _| Reply {
        trickle: Some(Duration::from_millis(10)),
        ..Reply::new(200, vec![b' '; 100_000])
    });
    let mut place = Place::new(&server.address);
    place.settings.timeout = Duration::from_millis(100);
    let started = Instant::now();
    assert!(place.failure("org/name").contains("does not end"));
    assert!(started.elapsed() < Duration::from_secs(5));
    let server = Server::start(|_, _| Reply::new(200, vec![b' '; 33 << 20]));
    let mut place = Place::new(&server.address);
    place.settings.timeout = Duration::from_secs(20);
    assert!(place.failure("org/name").contains("does not end"));
}

#[test]
fn what_is_no_http_or_never_answers_is_refused() {
    for (answer, told) in [(&b"SSH-2.0-OpenSSH\r\n\r\n"[..], "127.0.0.1"), (b"", "does not answer within")] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let place = Place::new(&format!("http://{}", listener.local_addr().unwrap()));
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for mut stream in listener.incoming().flatten() {
                let _ = stream.read(&mut [0; 1000]);
                let _ = stream.write_all(answer);
                open.push(stream);
            }
        });
        let error = place.failure("org/name");
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn endless_headers_are_refused() {
    let server = Server::start(|_, _| Reply::new(200, "{}").with("X-Long", "y".repeat(1 << 20)));
    let error = Place::new(&server.address).failure("org/name");
    assert!(error.contains("cannot talk to 127.0.0.1"), "{error}");
}

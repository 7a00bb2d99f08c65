//! What a hub refuses, and what is told then.

use super::server::{Reply, Server};
use super::{Place, gguf_repo, hub, hub_but};

/// The message when the hub answers everything so.
fn told(reply: &Reply, token: bool) -> String {
    let reply = reply.clone();
    let server = Server::start(move |_, _| reply.clone());
    let mut place = Place::new(&server.address);
    place.settings.token = token.then(|| "hf_secret".to_owned());
    let (by_list, by_file) = (place.failure("org/name"), place.failure("org/name:x.gguf"));
    assert!(!by_list.contains("hf_secret") && !by_file.contains("hf_secret"));
    format!("{by_list} | {by_file}")
}

#[test]
fn each_refusal_says_what_is_refused_and_what_to_do() {
    let code = |status, code: &str| Reply::new(status, "").with("X-Error-Code", code);
    for (reply, token, parts) in [
        (code(401, "RepoNotFound"), false, &["no public repository org/name", "HF_TOKEN"][..]),
        (code(404, "RepoNotFound"), true, &["no repository org/name", "token in use may see"]),
        (code(401, "GatedRepo"), false, &["gated", "accept its conditions at http", "/org/name", "HF_TOKEN"]),
        (code(403, "GatedRepo"), true, &["gated", "account of the token"]),
        (code(404, "RevisionNotFound"), false, &["no revision `main`"]),
        (code(404, "EntryNotFound"), false, &["no file `x.gguf` at revision main"]),
        (code(403, "DisabledRepo"), false, &["disabled"]),
        (Reply::new(401, ""), false, &["asks for a login", "HF_TOKEN"]),
        (Reply::new(401, ""), true, &["does not accept the token"]),
        (
            Reply::new(403, "").with("X-Error-Message", "Access\t denied"),
            true,
            &["forbids access: Access  denied"],
        ),
        (
            Reply::new(404, ""),
            false,
            &["no repository org/name with a revision main", "no x.gguf in org/name"],
        ),
        (Reply::new(418, ""), false, &["status 418"]),
        (Reply::new(204, ""), false, &["status 204"]),
    ] {
        let told = told(&reply, token);
        for part in parts {
            assert!(told.contains(part), "{} {part}: {told}", reply.status);
        }
    }
}

#[test]
fn too_many_requests_are_waited_out_as_long_as_the_hub_says() {
    let busy = |status: u16| {
        hub_but(gguf_repo(), move |_, before| {
            (before == 0).then(|| Reply::new(status, "").with("Retry-After", "0"))
        })
    };
    for status in [429, 500, 502, 503, 504] {
        let server = busy(status);
        let (pulled, notes) = Place::new(&server.address).watched("org/name");
        pulled.unwrap();
        assert!(notes[0].contains(&status.to_string()) && notes[0].contains("trying again"), "{notes:?}");
    }
    let started = std::time::Instant::now();
    let server =
        hub_but(gguf_repo(), |_, before| (before == 0).then(|| Reply::new(429, "").with("Retry-After", "1")));
    Place::new(&server.address).pull("org/name:x.gguf").unwrap();
    assert!(started.elapsed().as_secs() >= 1, "Retry-After is obeyed");
}

#[test]
fn a_hub_that_stays_busy_is_given_up() {
    let server = Server::start(|_, _| Reply::new(429, ""));
    let error = Place::new(&server.address).failure("org/name");
    assert!(error.contains("too many requests (429)") && error.contains("5 attempts"), "{error}");
    assert_eq!(server.requests().len(), 5);
    let server = Server::start(|_, _| Reply::new(429, "").with("Retry-After", "86400"));
    assert!(Place::new(&server.address).failure("org/name").contains("try again in 86400 s"));
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_hub_that_is_not_there_is_named() {
    let gone = hub(gguf_repo()).address.clone(); // Dropped at once: nobody listens there.
    let error = Place::new(&gone).failure("org/name");
    assert!(error.contains("cannot reach 127.0.0.1"), "{error}");
}

#[test]
fn an_interrupted_login_page_is_not_taken_for_a_model() {
    let page =
        || Reply::new(200, "<!DOCTYPE html><p>Log in").with("Content-Type", "text/html; charset=utf-8");
    let server = Server::start(move |_, _| page());
    let error = Place::new(&server.address).failure("org/name");
    assert!(error.contains("web page where JSON is expected") && error.contains("HF_ENDPOINT"), "{error}");
    assert!(Place::new(&server.address).failure("org/name:x.gguf").contains("X-Repo-Commit"));

    let server = hub_but(gguf_repo(), move |request, _| super::is_contents(request).then(page));
    let error = Place::new(&server.address).failure("org/name");
    assert!(error.contains("700000 bytes") && error.contains("as a web page"), "{error}");
}

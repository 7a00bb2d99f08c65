//! Progress on stderr, for people only: nothing is drawn where stderr is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

/// A line that says what is being done, for work whose length is not known.
pub fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner(); // Draws to stderr, and hides itself where that is no terminal.
    bar.set_style(ProgressStyle::with_template("{spinner} {msg} [{elapsed}]").expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A bar of steps with rate and time left; `done` of them were done before.
pub fn steps(done: u64, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total).with_position(done);
    let template = "{wide_bar:.cyan} {pos}/{len} steps, {msg} [{elapsed} < {eta}]";
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
    bar.reset_eta(); // Earlier steps took no time of this session.
    bar
}

/// A message of several lines above such a bar.
pub fn training(done: u64, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total).with_position(done);
    let template = "{msg}\n{wide_bar:.cyan} {pos}/{len} steps [{elapsed} < {eta}]";
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
    bar.reset_eta();
    bar
}

/// A bar of bytes with rate and time left; the total is set when it is known.
pub fn bytes() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template = "{wide_bar:.cyan} {bytes}/{total_bytes} {bytes_per_sec}, {msg} [{elapsed} < {eta}]";
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
    bar
}

/// A bar of weights that are loaded, with rate and time left.
pub fn weights(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = "{msg} {wide_bar:.cyan} {percent} % {rate}, [{elapsed} < {eta}]";
    let rate = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let _ = write!(out, "{:.2} G weights/s", state.per_sec() / 1e9);
    };
    let style = ProgressStyle::with_template(template).expect("a valid template").with_key("rate", rate);
    bar.set_style(style);
    bar
}

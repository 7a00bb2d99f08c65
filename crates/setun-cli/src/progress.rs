//! Progress on stderr, for people only: nothing is drawn where stderr is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A line that says what is being done, for work whose length is not known.
pub fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner(); // Draws to stderr, and hides itself where that is no terminal.
    bar.set_style(ProgressStyle::with_template("{spinner} {msg} [{elapsed}]").expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

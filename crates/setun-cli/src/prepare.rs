//! What `setun train` shows before its first step: a spinner, and a bar once tokenising takes long.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget};
use setun_train::data::Preparing;

use crate::progress;

/// Work that is over sooner gets no bar.
const PATIENCE: Duration = Duration::from_secs(2);

pub struct Prepare {
    busy: ProgressBar,
    /// The source being tokenised, since when, and its bar, which is hidden at first.
    source: Option<(String, Instant, ProgressBar)>,
}

impl Prepare {
    pub fn new() -> Self {
        let busy = progress::spinner();
        busy.set_message("preparing tokenizer and text");
        Self { busy, source: None }
    }

    pub fn show(&mut self, now: Preparing) {
        match now {
            Preparing::Remaking { cache, reason } => {
                self.busy.suspend(|| eprintln!("note: {} is made again: {reason}", cache.display()));
            }
            Preparing::Tokenizing { source, read, total } => {
                if self.source.as_ref().is_none_or(|(name, ..)| name != source) {
                    let bar = progress::bytes();
                    bar.set_draw_target(ProgressDrawTarget::hidden());
                    bar.set_message(format!("tokenising {source}"));
                    self.source = Some((source.to_owned(), Instant::now(), bar));
                }
                let Some((_, since, bar)) = &self.source else { return };
                bar.set_length(total);
                bar.set_position(read);
                if since.elapsed() >= PATIENCE && !self.busy.is_finished() {
                    self.busy.finish_and_clear();
                }
                if since.elapsed() >= PATIENCE && bar.is_hidden() {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                }
            }
            Preparing::Tokenized { source, documents, tokens } => {
                let Some((_, since, bar)) = self.source.take() else { return };
                bar.finish_and_clear();
                if since.elapsed() >= PATIENCE {
                    let seconds = since.elapsed().as_secs_f64();
                    eprintln!("tokenised {source}: {documents} documents, {tokens} tokens in {seconds:.1} s");
                }
            }
        }
    }
}

impl Drop for Prepare {
    fn drop(&mut self) {
        self.busy.finish_and_clear();
    }
}

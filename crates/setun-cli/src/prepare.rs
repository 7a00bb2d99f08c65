//! What `setun train` shows before its first step: a spinner, and a bar once tokenising takes long.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use setun_train::data::Preparing;

use crate::progress;

/// Work that is over sooner gets no bar.
const PATIENCE: Duration = Duration::from_secs(2);

pub struct Prepare {
    busy: ProgressBar,
    /// The source being tokenised, since when, and its bar.
    source: Option<(String, Instant, Option<ProgressBar>)>,
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
                    self.source = Some((source.to_owned(), Instant::now(), None));
                }
                let Some((_, since, bar)) = &mut self.source else { return };
                if since.elapsed() < PATIENCE {
                    return;
                }
                let bar = bar.get_or_insert_with(|| {
                    self.busy.finish_and_clear();
                    let bar = progress::bytes().with_elapsed(since.elapsed()).with_position(read);
                    bar.reset_eta(); // What was read before is no step of the bar's.
                    bar.set_length(total);
                    bar.set_message(format!("tokenising {source}"));
                    bar
                });
                bar.set_position(read);
            }
            Preparing::Tokenized { source, documents, tokens } => {
                let Some((_, since, bar)) = self.source.take() else { return };
                if let Some(bar) = bar {
                    bar.finish_and_clear();
                }
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

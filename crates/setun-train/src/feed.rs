//! What a run reads and what it makes of it: the part of a [`crate::trainer::Trainer`] that differs between pre-training on
//! text, fine-tuning on conversations and preference pairs.

use serde_json::Value;

use crate::data::{Batch, Batches};
use crate::error::TrainError;
use crate::loss::{IGNORE, Loss};
use crate::params::TrainModel;
use crate::tape::Tape;
use crate::trainer::forward;
use crate::vocabulary::Vocabulary;

/// Training data without end, and its objective.
pub trait Feed {
    /// One pass's share: a batch, with whatever the objective needs beside it.
    type Item: AsRef<Batch>;

    /// The next share. `progress`, from 0 to 1, is how far the run is.
    fn next_batch(&mut self, progress: f64) -> Self::Item;

    /// What the objective is a mean over: the step's gradient is divided by the sum of these.
    fn counted(&self, item: &Self::Item) -> usize {
        item.as_ref().targets.iter().filter(|&&target| target != IGNORE).count()
    }

    /// The objective of one share, each counted thing weighted; its gradient is ready to flow back.
    fn objective(&mut self, model: &TrainModel, tape: &mut Tape, item: &Self::Item, weight: f32) -> Loss {
        forward(model, tape, item.as_ref(), weight)
    }

    /// Means of other things than the loss since this was last asked, by the name they have in the metrics file.
    fn measures(&mut self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }

    /// Everything that later shares depend on besides settings and files.
    fn state(&self) -> Value;

    /// Goes on where `state` was taken.
    ///
    /// # Errors
    /// When it is damaged, or of other data; then nothing changes.
    fn restore(&mut self, state: &Value) -> Result<(), TrainError>;
}

impl AsRef<Batch> for Batch {
    fn as_ref(&self) -> &Batch {
        self
    }
}

/// Text, tokenised for the run.
#[derive(Debug, Clone)]
pub struct Pretraining {
    pub(crate) vocabulary: Vocabulary,
    pub(crate) batches: Batches,
}

impl Feed for Pretraining {
    type Item = Batch;

    fn next_batch(&mut self, progress: f64) -> Batch {
        self.batches.next_batch(progress)
    }

    fn state(&self) -> Value {
        self.batches.state()
    }

    fn restore(&mut self, state: &Value) -> Result<(), TrainError> {
        self.batches.restore(state)
    }
}

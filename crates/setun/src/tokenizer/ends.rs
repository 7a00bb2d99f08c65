//! The tokens that end generation, each with the places that say so.

/// Names that end a turn or a text, whatever the file declares (as llama.cpp treats them).
pub(super) const NAMES: [&str; 13] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    "<|return|>",
    "<|call|>",
];

/// Ids in the order in which they were found, the declared one first.
#[derive(Debug, Default)]
pub(super) struct Ends {
    ids: Vec<u32>,
    /// Of each id: files and keys, without repetition.
    sources: Vec<Vec<&'static str>>,
}

impl Ends {
    pub(super) fn of(id: Option<u32>, source: &'static str) -> Self {
        let mut ends = Self::default();
        ends.extend(id, source);
        ends
    }

    pub(super) fn add(&mut self, id: u32, source: &'static str) {
        let place = self.ids.iter().position(|&known| known == id).unwrap_or_else(|| {
            self.ids.push(id);
            self.sources.push(Vec::new());
            self.ids.len() - 1
        });
        if !self.sources[place].contains(&source) {
            self.sources[place].push(source);
        }
    }

    pub(super) fn extend(&mut self, ids: impl IntoIterator<Item = u32>, source: &'static str) {
        ids.into_iter().for_each(|id| self.add(id, source));
    }

    /// Adds what was found earlier behind what is here.
    pub(super) fn append(&mut self, earlier: &Self) {
        for (&id, sources) in earlier.ids.iter().zip(&earlier.sources) {
            sources.iter().for_each(|source| self.add(id, source));
        }
    }

    pub(super) fn first(&self) -> Option<u32> {
        self.ids.first().copied()
    }

    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &[&'static str])> {
        self.ids.iter().copied().zip(self.sources.iter().map(Vec::as_slice))
    }
}

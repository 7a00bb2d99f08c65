//! Which tokens of a batch belong together: packed sequences hold several documents, and none sees another.

use std::ops::Range;
use std::sync::Arc;

/// The documents of every sequence of a batch.
#[derive(Debug, Clone)]
pub(super) struct Documents {
    /// For every token of the batch, where in its sequence its document starts; empty: every sequence is one document.
    starts: Arc<[u32]>,
    seq_len: usize,
}

impl Documents {
    /// Sequences of one document each.
    pub(super) fn whole(seq_len: usize) -> Self {
        Self { starts: Arc::default(), seq_len }
    }

    /// Panics unless each sequence's starts rise and each is the start of the token it names.
    pub(super) fn new(starts: &[u32], seq_len: usize) -> Self {
        for sequence in starts.chunks(seq_len.max(1)) {
            let known = |(i, &start): (usize, &u32)| {
                start as usize <= i
                    && sequence[start as usize] == start
                    && (i == 0 || sequence[i - 1] <= start)
            };
            assert!(sequence.iter().enumerate().all(known), "starts of no documents: {sequence:?}");
        }
        Self { starts: starts.into(), seq_len }
    }

    /// Position of token `i` of the batch in its document.
    pub(super) fn position(&self, i: usize) -> usize {
        i % self.seq_len - self.starts.get(i).map_or(0, |&start| start as usize)
    }

    /// The documents of one sequence, as its rows.
    pub(super) fn of(&self, sequence: usize) -> impl Iterator<Item = Range<usize>> {
        let starts = self.starts.get(sequence * self.seq_len..).unwrap_or(&[]);
        let (len, mut next) = (self.seq_len, 0);
        std::iter::from_fn(move || {
            let start = next;
            next = match starts.get(start..len) {
                Some(rest) => start + rest.iter().take_while(|&&s| s as usize == start).count(),
                None => len,
            };
            (start < next).then_some(start..next)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_positions_are_those_of_the_starts() {
        let documents = Documents::new(&[0, 0, 2, 2, 2, 0, 1, 2, 3, 3], 5);
        let of = |sequence| documents.of(sequence).collect::<Vec<_>>();
        assert_eq!(of(0), [0..2, 2..5]);
        assert_eq!(of(1), [0..1, 1..2, 2..3, 3..5]);
        let positions: Vec<usize> = (0..10).map(|i| documents.position(i)).collect();
        assert_eq!(positions, [0, 1, 0, 1, 2, 0, 0, 0, 0, 1]);
        let whole = Documents::whole(5);
        assert!(whole.of(1).eq(std::iter::once(0..5)));
        assert_eq!((whole.position(7), Documents::whole(0).of(0).count()), (2, 0));
    }

    #[test]
    #[should_panic(expected = "starts of no documents")]
    fn a_start_that_is_none_is_refused() {
        Documents::new(&[0, 0, 1, 1], 4);
    }
}

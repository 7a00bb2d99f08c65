//! The order in which an epoch reads a source's documents: a permutation that depends on the seed alone.
//!
//! Up to [`LISTED`] documents it is a list, shuffled. Beyond, it is computed place by place and takes no memory: a Feistel
//! network over the smallest even number of bits that counts the documents, applied again while the result is no document
//! (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 3).

use crate::random::mix;

/// Documents whose order is kept in memory: 16 MiB.
pub(super) const LISTED: usize = 1 << 22;

/// Four would do for a random function that nobody attacks; a round costs two nanoseconds.
const ROUNDS: u64 = 6;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Order {
    Listed(Vec<u32>),
    Keyed { count: u64, half_bits: u32, seed: u64 },
}

impl Order {
    /// An order of `0..count`, in memory if there are at most `listed`.
    pub(super) fn new(count: usize, seed: u64, listed: usize) -> Self {
        if count <= listed.min(u32::MAX as usize) {
            return Self::Listed(shuffled(count, seed));
        }
        let bits = u64::BITS - (count as u64).saturating_sub(1).leading_zeros();
        Self::Keyed { count: count as u64, half_bits: bits.div_ceil(2).max(1), seed }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Listed(list) => list.len(),
            Self::Keyed { count, .. } => *count as usize,
        }
    }

    /// Bytes that it holds beside itself.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Listed(list) => list.capacity() * size_of::<u32>(),
            Self::Keyed { .. } => 0,
        }
    }

    /// The document at `place`. Panics unless that is below the count.
    pub(super) fn at(&self, place: usize) -> usize {
        match *self {
            Self::Listed(ref list) => list[place] as usize,
            Self::Keyed { count, half_bits, seed } => {
                assert!((place as u64) < count, "place {place} of {count}");
                let mut x = place as u64;
                loop {
                    x = feistel(x, half_bits, seed);
                    if x < count {
                        return x as usize;
                    }
                }
            }
        }
    }
}

/// A permutation of the numbers of `2 * half_bits` bits.
fn feistel(x: u64, half_bits: u32, seed: u64) -> u64 {
    let mask = (1 << half_bits) - 1;
    let (mut left, mut right) = (x >> half_bits, x & mask);
    for round in 0..ROUNDS {
        (left, right) = (right, left ^ (mix(mix(seed.wrapping_add(round)) ^ right) & mask));
    }
    left << half_bits | right
}

/// `0..count` in an order that depends on `seed` alone (Fisher and Yates).
pub(crate) fn shuffled(count: usize, seed: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    for n in (1..count).rev() {
        // The bias of scaling instead of rejecting is below 2⁻³² for 2³² documents.
        let other = (u128::from(mix(seed.wrapping_add(n as u64))) * (n as u128 + 1)) >> 64;
        order.swap(n, other as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_order_name_every_document_once_and_seeds_differ() {
        for count in [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097] {
            for listed in [0, LISTED] {
                let of = |seed| -> Vec<usize> {
                    let order = Order::new(count, seed, listed);
                    (0..order.len()).map(|place| order.at(place)).collect()
                };
                let mut sorted = of(7);
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..count), "{count}, {listed}");
                assert!(count < 1000 || of(7) != of(8));
            }
        }
    }

    #[test]
    fn an_order_beyond_the_list_holds_no_memory_however_many_documents_there_are() {
        assert_eq!(Order::new(LISTED, 1, LISTED).bytes(), 16 << 20);
        for count in [LISTED + 1, 1 << 31, 1 << 45, usize::MAX >> 1] {
            let order = Order::new(count, 1, LISTED);
            assert_eq!((order.bytes(), order.len()), (0, count));
            assert!((0..100).map(|n| order.at(count / 100 * n)).all(|document| document < count));
        }
    }

    #[test]
    fn a_keyed_order_is_as_mixed_as_a_shuffle() {
        let count = 100_000;
        let order = Order::new(count, 3, 0);
        let found: Vec<f64> = (0..count).map(|place| order.at(place) as f64 / count as f64).collect();
        // Neighbours of a random order lie a third of it apart on average, and places say nothing of documents.
        let apart = found.windows(2).map(|pair| (pair[0] - pair[1]).abs()).sum::<f64>() / (count - 1) as f64;
        assert!((apart - 1.0 / 3.0).abs() < 0.005, "{apart}");
        let centred = |(place, x): (usize, &f64)| (place as f64 / count as f64 - 0.5) * (x - 0.5);
        let correlation = found.iter().enumerate().map(centred).sum::<f64>() / count as f64 * 12.0;
        assert!(correlation.abs() < 0.02, "{correlation}");
    }
}

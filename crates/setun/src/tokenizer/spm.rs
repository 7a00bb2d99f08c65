//! SentencePiece segmentation, BPE by scores and unigram, as google/sentencepiece and llama.cpp do it.
//!
//! BPE merges the adjacent pair whose joined text has the best *score*, the leftmost of equals, over
//! the whole text without splitting it into words first. A merge list (as `tokenizer.json` has) ranks
//! pairs instead and cannot express ties, so this loop is our own. Unigram takes the path of the
//! highest summed score. Both run on normalised text, in which a space is `▁` (U+2581).
//!
//! Control tokens written in the text (`<s>`) stand for themselves, as chat templates need.

use crate::error::ModelError;
use std::collections::{BinaryHeap, HashMap};

/// What stands for a space inside pieces.
pub(super) const SPACE: char = '\u{2581}';

/// A piece's role; the numbers are those of both SentencePiece files and GGUF's `token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Kind {
    pub(super) fn from_number(number: i64) -> Option<Self> {
        use Kind::*;
        [Normal, Unknown, Control, UserDefined, Unused, Byte].into_iter().find(|&kind| kind as i64 == number)
    }
}

/// One vocabulary entry.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) score: f32,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Bpe,
    Unigram,
}

/// How text becomes pieces, beyond the vocabulary.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) algorithm: Algorithm,
    /// A space is put before the text, and before text that follows a control token.
    pub(super) add_prefix: bool,
    /// Runs of spaces become one; leading and trailing ones go.
    pub(super) remove_extra_whitespaces: bool,
    /// Spaces are written as [`SPACE`].
    pub(super) escape_whitespaces: bool,
    pub(super) charsmap: Option<Charsmap>,
    /// User-defined pieces are part of the running text (SentencePiece) instead of cutting it (llama.cpp).
    pub(super) inline_user_defined: bool,
    /// The piece for characters outside the vocabulary, when there are no byte pieces.
    pub(super) unknown: Option<u32>,
}

/// A SentencePiece vocabulary, ready to encode.
#[derive(Debug)]
pub(super) struct Spm {
    pub(super) pieces: Vec<Piece>,
    pub(super) rules: Rules,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// Pieces that segmentation may produce from text.
    ids: HashMap<String, u32>,
    /// All pieces.
    names: HashMap<String, u32>,
    bytes: Option<Box<[u32; 256]>>,
    byte_of: HashMap<u32, u8>,
    /// Tokens that cut the text, longest first.
    cuts: Vec<u32>,
    /// Pieces matched before normalisation, longest first.
    inline: Vec<u32>,
    longest: usize,
    min_score: f32,
    max_score: f32,
}

impl Spm {
    /// # Errors
    /// A score that is not finite, a byte piece that is not `<0xXX>`, or no way to encode unknown text.
    pub(super) fn new(
        pieces: Vec<Piece>,
        rules: Rules,
        bos: Option<u32>,
        eos: Option<u32>,
    ) -> Result<Self, ModelError> {
        let (mut ids, mut names) = (HashMap::new(), HashMap::new());
        let (mut bytes, mut byte_of) = ([None; 256], HashMap::new());
        let (mut cuts, mut inline) = (Vec::new(), Vec::new());
        let (mut longest, mut min_score, mut max_score) = (0, f32::MAX, f32::MIN);
        for (id, piece) in pieces.iter().enumerate() {
            let id = id as u32; // Callers read at most 2^32 pieces.
            if !piece.score.is_finite() {
                let what = format!("piece {id} (`{}`) has the score {}", piece.text, piece.score);
                return Err(ModelError::Tokenizer { what });
            }
            names.entry(piece.text.clone()).or_insert(id);
            match piece.kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused if !piece.text.is_empty() => {
                    ids.entry(piece.text.clone()).or_insert(id);
                    longest = longest.max(piece.text.len());
                    if piece.kind == Kind::Normal {
                        min_score = min_score.min(piece.score);
                        max_score = max_score.max(piece.score);
                    }
                }
                Kind::Byte => {
                    let byte = parse_byte_piece(&piece.text).ok_or_else(|| {
                        let what = format!("byte piece {id} is `{}`, not `<0xXX>`", piece.text);
                        ModelError::Tokenizer { what }
                    })?;
                    bytes[usize::from(byte)].get_or_insert(id);
                    byte_of.insert(id, byte);
                }
                _ => {}
            }
            let cuts_text = match piece.kind {
                Kind::Control | Kind::Unknown => true,
                Kind::UserDefined => !rules.inline_user_defined,
                _ => false,
            };
            if cuts_text && !piece.text.is_empty() {
                cuts.push(id);
            } else if piece.kind == Kind::UserDefined && !piece.text.is_empty() {
                inline.push(id);
            }
        }
        if min_score > max_score {
            (min_score, max_score) = (0.0, 0.0); // No normal piece at all.
        }
        let complete: Option<Vec<u32>> = bytes.into_iter().collect();
        let bytes = complete.and_then(|all| Box::<[u32; 256]>::try_from(all.into_boxed_slice()).ok());
        if bytes.is_none() && rules.unknown.is_none() {
            let what = "the vocabulary has neither all 256 byte pieces nor an unknown piece";
            return Err(ModelError::Tokenizer { what: what.to_owned() });
        }
        let longest_first = |id: &u32| std::cmp::Reverse(pieces[*id as usize].text.len());
        cuts.sort_by_key(longest_first);
        inline.sort_by_key(longest_first);
        Ok(Self {
            pieces,
            rules,
            bos,
            eos,
            ids,
            names,
            bytes,
            byte_of,
            cuts,
            inline,
            longest,
            min_score,
            max_score,
        })
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.names.get(text).copied()
    }

    pub(super) fn has_byte_fallback(&self) -> bool {
        self.bytes.is_some()
    }

    pub(super) fn byte_of(&self, id: u32) -> Option<u8> {
        self.byte_of.get(&id).copied()
    }

    /// Ids of `text`, without BOS or EOS.
    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let (mut start, mut at) = (0, 0);
        while at < text.len() {
            if let Some(cut) = self.longest_match(&self.cuts, &text[at..]) {
                self.encode_span(&text[start..at], &mut ids);
                ids.push(cut);
                at += self.pieces[cut as usize].text.len();
                start = at;
            } else {
                at += next_char(&text[at..]);
            }
        }
        self.encode_span(&text[start..], &mut ids);
        ids
    }

    fn longest_match(&self, candidates: &[u32], text: &str) -> Option<u32> {
        let starts = |&&id: &&u32| text.starts_with(self.pieces[id as usize].text.as_str());
        candidates.iter().find(starts).copied()
    }

    /// Text between control tokens.
    fn encode_span(&self, text: &str, ids: &mut Vec<u32>) {
        let (normal, frozen) = self.normalise(text);
        let spans = match self.rules.algorithm {
            Algorithm::Bpe => self.merge(&normal, &frozen),
            Algorithm::Unigram => self.best_path(&normal),
        };
        let mut after_unknown = false;
        for (start, end) in spans {
            let piece = &normal[start..end];
            let id = self.ids.get(piece).copied();
            match (id, &self.bytes, self.rules.unknown) {
                (Some(id), ..) => ids.push(id),
                (None, Some(bytes), _) => {
                    ids.extend(piece.bytes().map(|byte| bytes[usize::from(byte)]));
                }
                // A run of unknown characters is one unknown piece, as in SentencePiece.
                (None, None, Some(unknown)) if !after_unknown => ids.push(unknown),
                (None, None, _) => {}
            }
            after_unknown = id.is_none();
        }
    }

    /// Normalised text, and the byte ranges in it that no merge may cross (user-defined pieces).
    fn normalise(&self, text: &str) -> (String, Vec<(usize, usize)>) {
        let rules = &self.rules;
        let space = if rules.escape_whitespaces { SPACE } else { ' ' };
        let mut out = String::with_capacity(text.len() + text.len() / 4 + 3);
        let mut frozen = Vec::new();
        let mut rest = text;
        if rules.remove_extra_whitespaces {
            while !rest.is_empty() {
                let (used, piece, _) = self.normalise_prefix(rest);
                if piece != " " {
                    break;
                }
                rest = &rest[used..];
            }
        }
        if rest.is_empty() {
            return (out, frozen);
        }
        if rules.add_prefix {
            out.push(space);
        }
        let mut after_space = rules.remove_extra_whitespaces;
        while !rest.is_empty() {
            let (used, mut piece, user_defined) = self.normalise_prefix(rest);
            if after_space {
                piece = piece.trim_start_matches(' ');
            }
            let start = out.len();
            out.extend(piece.chars().map(|c| if c == ' ' { space } else { c }));
            if user_defined {
                frozen.push((start, out.len()));
            }
            if rules.remove_extra_whitespaces && !piece.is_empty() {
                after_space = piece.ends_with(' ');
            }
            rest = &rest[used..];
        }
        if rules.remove_extra_whitespaces {
            out.truncate(out.trim_end_matches(space).len());
        }
        (out, frozen)
    }

    /// How much of `text` one step takes, what it becomes, and whether it is a user-defined piece.
    fn normalise_prefix<'t>(&'t self, text: &'t str) -> (usize, &'t str, bool) {
        if let Some(id) = self.longest_match(&self.inline, text) {
            let piece = &self.pieces[id as usize].text;
            return (piece.len(), piece, true);
        }
        if let Some((used, piece)) = self.rules.charsmap.as_ref().and_then(|map| map.longest(text)) {
            return (used, piece, false);
        }
        let used = next_char(text);
        (used, &text[..used], false)
    }

    /// BPE: byte ranges of the final symbols.
    fn merge(&self, text: &str, frozen: &[(usize, usize)]) -> Vec<(usize, usize)> {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        let (mut at, mut next_frozen) = (0, frozen.iter().peekable());
        while at < text.len() {
            let fixed = next_frozen.next_if(|range| range.0 == at);
            let end = fixed.map_or_else(|| at + next_char(&text[at..]), |range| range.1);
            let index = symbols.len();
            symbols.push(Symbol {
                start: at,
                end,
                prev: index.checked_sub(1),
                next: (end < text.len()).then_some(index + 1),
                frozen: fixed.is_some(),
            });
            at = end;
        }
        let mut queue = BinaryHeap::new();
        // How an unused piece was put together, to take it apart again at the end.
        let mut made_of: HashMap<&str, usize> = HashMap::new();
        for index in 1..symbols.len() {
            self.propose(text, &symbols, index - 1, &mut queue, &mut made_of);
        }
        while let Some(Candidate { left, start, end, .. }) = queue.pop() {
            let first = symbols[left];
            let Some(right) = first.next else { continue };
            let second = symbols[right];
            // Outdated when either side has changed since it was proposed.
            if first.start != start || second.end != end || first.start == first.end {
                continue;
            }
            symbols[left].end = second.end;
            symbols[left].next = second.next;
            symbols[right].end = second.start; // Empty: gone.
            symbols[right].next = None;
            if let Some(after) = second.next {
                symbols[after].prev = Some(left);
                self.propose(text, &symbols, left, &mut queue, &mut made_of);
            }
            if let Some(before) = first.prev {
                self.propose(text, &symbols, before, &mut queue, &mut made_of);
            }
        }
        let mut spans = Vec::with_capacity(symbols.len());
        let mut index = (!symbols.is_empty()).then_some(0);
        while let Some(symbol) = index.map(|i| symbols[i]) {
            self.split_unused(text, symbol.start, symbol.end, &made_of, &mut spans);
            index = symbol.next;
        }
        spans
    }

    /// Queues the pair that starts at symbol `left`, if its text is a piece.
    fn propose<'t>(
        &self,
        text: &'t str,
        symbols: &[Symbol],
        left: usize,
        queue: &mut BinaryHeap<Candidate>,
        made_of: &mut HashMap<&'t str, usize>,
    ) {
        let first = symbols[left];
        let Some(second) = first.next.map(|right| symbols[right]) else {
            return;
        };
        let (start, end) = (first.start, second.end);
        if first.frozen || second.frozen || end - start > self.longest {
            return;
        }
        let Some(&id) = self.ids.get(&text[start..end]) else {
            return;
        };
        let piece = &self.pieces[id as usize];
        if piece.kind == Kind::Unused {
            made_of.insert(&text[start..end], first.end - first.start);
        }
        queue.push(Candidate { score: piece.score, left, start, end });
    }

    /// Unused pieces help merging but are never produced: they fall apart into what made them.
    fn split_unused(
        &self,
        text: &str,
        start: usize,
        end: usize,
        made_of: &HashMap<&str, usize>,
        spans: &mut Vec<(usize, usize)>,
    ) {
        let mut stack = vec![(start, end)];
        while let Some((start, end)) = stack.pop() {
            let piece = &text[start..end];
            let unused = self.ids.get(piece).is_some_and(|&id| self.pieces[id as usize].kind == Kind::Unused);
            match made_of.get(piece) {
                Some(&left) if unused => stack.extend([(start + left, end), (start, start + left)]),
                _ => spans.push((start, end)),
            }
        }
    }

    /// Unigram: byte ranges on the path of the highest summed score (Viterbi, f32 as in SentencePiece).
    fn best_path(&self, text: &str) -> Vec<(usize, usize)> {
        const UNKNOWN_PENALTY: f32 = 10.0; // kUnkPenalty of SentencePiece.
        // Best score up to each byte offset, and where its last piece starts.
        let mut best: Vec<Option<(f32, usize)>> = vec![None; text.len() + 1];
        best[0] = Some((0.0, 0));
        let mut at = 0;
        while at < text.len() {
            let so_far = best[at].map_or(0.0, |(score, _)| score);
            let one = next_char(&text[at..]);
            let mut covered = false;
            let limit = (at + self.longest).min(text.len());
            for end in (at + one..=limit).filter(|&end| text.is_char_boundary(end)) {
                let Some(&id) = self.ids.get(&text[at..end]) else {
                    continue;
                };
                let piece = &self.pieces[id as usize];
                let score = match piece.kind {
                    Kind::Unused => continue,
                    // The bonus makes a user-defined piece win over its parts.
                    Kind::UserDefined => (end - at) as f32 * self.max_score - 0.1,
                    _ => piece.score,
                };
                covered |= end == at + one;
                offer(&mut best[end], so_far + score, at);
            }
            if !covered {
                offer(&mut best[at + one], so_far + self.min_score - UNKNOWN_PENALTY, at);
            }
            at += one;
        }
        let mut spans = Vec::new();
        let mut end = text.len();
        while end > 0 {
            let start = best[end].map_or(0, |(_, start)| start);
            spans.push((start, end));
            end = start;
        }
        spans.reverse();
        spans
    }
}

fn offer(slot: &mut Option<(f32, usize)>, score: f32, start: usize) {
    if slot.is_none_or(|(best, _)| score > best) {
        *slot = Some((score, start));
    }
}

/// Length of the first character of a non-empty text.
fn next_char(text: &str) -> usize {
    text.chars().next().map_or(1, char::len_utf8)
}

/// The byte of a piece spelled `<0xXX>`.
pub(super) fn parse_byte_piece(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    prev: Option<usize>,
    next: Option<usize>,
    frozen: bool,
}

/// A possible merge: ordered by score, then leftmost.
#[derive(PartialEq)]
struct Candidate {
    score: f32,
    left: usize,
    start: usize,
    end: usize,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left)).then(other.end.cmp(&self.end))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// SentencePiece's `precompiled_charsmap`: a double-array trie of byte sequences and their replacements.
///
/// Layout: u32 size of the trie in bytes, the trie's u32 units, then the replacements as NUL-terminated
/// UTF-8, all little-endian. Unit bits as in Darts-clone.
#[derive(Clone, Debug)]
pub(super) struct Charsmap {
    blob: Vec<u8>,
    units: Vec<u32>,
    replacements: String,
}

impl Charsmap {
    /// # Errors
    /// A size beyond the blob or replacements that are not UTF-8. A wrong trie only fails to match.
    pub(super) fn new(blob: &[u8]) -> Result<Self, ModelError> {
        let refuse = |what: &str| ModelError::Tokenizer { what: format!("precompiled_charsmap {what}") };
        let (size, rest) = blob.split_first_chunk::<4>().ok_or_else(|| refuse("is shorter than 4 bytes"))?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, text) = rest
            .split_at_checked(size)
            .filter(|_| size.is_multiple_of(4))
            .ok_or_else(|| refuse(&format!("declares a trie of {size} bytes, but {} follow", rest.len())))?;
        let unit = |unit: &[u8]| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]]);
        let units = trie.chunks_exact(4).map(unit).collect();
        let replacements =
            String::from_utf8(text.to_vec()).map_err(|_| refuse("has replacements that are not UTF-8"))?;
        Ok(Self { blob: blob.to_vec(), units, replacements })
    }

    pub(super) fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// The longest rule that `text` starts with: how many bytes it takes, and its replacement.
    fn longest<'s>(&'s self, text: &str) -> Option<(usize, &'s str)> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & 0x200) >> 6)) as usize;
        let mut node = offset(*self.units.first()?);
        let mut found = None;
        for (at, byte) in text.bytes().enumerate() {
            node ^= usize::from(byte);
            let Some(&unit) = self.units.get(node) else {
                break;
            };
            if unit & 0x8000_00ff != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if unit & 0x100 != 0 {
                found = self.units.get(node).map(|leaf| (at + 1, (leaf & 0x7fff_ffff) as usize));
            }
        }
        let (used, start) = found.filter(|&(used, _)| text.is_char_boundary(used))?;
        let replacement = self.replacements.get(start..)?;
        Some((used, replacement.split('\0').next().unwrap_or_default()))
    }

    /// Whether another reader that indexes without checks may walk this trie: every step stays inside.
    pub(super) fn is_sound(&self) -> bool {
        let offset = |unit: u32| ((unit >> 10) << ((unit & 0x200) >> 6)) as usize;
        let len = self.units.len();
        // Blocks of 256 make `node ^ byte` stay inside whenever `node` does.
        len > 0
            && len.is_multiple_of(256)
            && self.units.iter().enumerate().filter(|(_, unit)| **unit >> 31 == 0).all(|(at, &unit)| {
                let node = at ^ offset(unit);
                let leaf_is_sound = |leaf: &u32| {
                    let start = (leaf & 0x7fff_ffff) as usize;
                    self.replacements.is_char_boundary(start)
                };
                node < len && (unit & 0x100 == 0 || self.units.get(node).is_some_and(leaf_is_sound))
            })
    }
}

//! Tensors of type 42: which of two layouts they have.
//!
//! Two programs gave the number 42 to Q2_0, blocks of two-bit codes after an f16 scale: one with 64 weights in
//! 18 bytes, one with 128 in 34. Nothing in a header says which, but sizes differ by 36 to 34, so any matrix of more
//! than a few blocks tells, and a file has one meaning. Where sizes leave it open, the caller decides.
//!
//! Contents are looked at as a cross-check only: scales are never negative and fourth codes unused in genuine
//! files, so a reading full of them beside another that has none is refused. That also finds the files of a third
//! program, which put the scale behind the codes of 128 weights.

use std::fmt;

use super::collisions::{Span, all};
use crate::format::{Encoding, Type42};

/// Blocks of each tensor whose contents are looked at.
const SAMPLE: usize = 64;

/// Weights in a group of the two layouts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    G64,
    G128,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.weights().fmt(f)
    }
}

impl Group {
    fn encoding(self) -> Encoding {
        if self == Self::G64 { Encoding::Q2_0G64 } else { Encoding::Q2_0G128 }
    }

    fn weights(self) -> usize {
        if self == Self::G64 { 64 } else { 128 }
    }

    fn other(self) -> Self {
        if self == Self::G64 { Self::G128 } else { Self::G64 }
    }

    /// Bytes of a block and the place of its scale.
    fn block(self) -> (usize, usize) {
        if self == Self::G64 { (18, 0) } else { (34, 0) }
    }
}

/// The bytes of 128 codes with their scale behind them.
const SCALE_LAST: (usize, usize) = (34, 32);

/// What a reading of `span` in this group size would take.
fn need(group: Group, span: &Span<'_>) -> String {
    match group.encoding().byte_len(span.shape) {
        Some(bytes) => format!("groups of {group} take {bytes}"),
        None => format!("groups of {group} do not divide its rows"),
    }
}

/// Of the blocks looked at, how many have a negative or infinite scale or a fourth code; and how many they are.
fn odd_blocks(spans: &[Span<'_>], (bytes, scale_at): (usize, usize), weights: usize) -> (usize, usize) {
    let (mut odd, mut seen) = (0, 0);
    for span in spans {
        let count = span.shape.iter().product::<usize>() / weights;
        for block in span.bytes.chunks_exact(bytes).take(count.min(SAMPLE)) {
            let scale = half::f16::from_le_bytes([block[scale_at], block[scale_at + 1]]).to_f32();
            let codes = block[..scale_at].iter().chain(&block[scale_at + 2..]);
            let fourth = codes.into_iter().any(|byte| byte & byte >> 1 & 0b01_01_01_01 != 0);
            odd += usize::from(!scale.is_finite() || scale < 0.0 || fourth);
            seen += 1;
        }
    }
    (odd, seen)
}

/// Decides the layout of all tensors of type 42 in a file: the encoding, [`Encoding::Undecided`] if the sizes
/// leave it open, and a sentence with the evidence.
///
/// # Errors
/// A sentence if the sizes fit neither layout, or contradict `asked` or the contents.
pub(super) fn decide(
    spans: &[Span<'_>],
    alignment: usize,
    asked: Type42,
) -> Result<(Encoding, String), String> {
    let misfit =
        |group: Group| spans.iter().find(|s| !s.takes(group.encoding().byte_len(s.shape), alignment));
    let total = spans.len();
    let (group, mut evidence) = match (asked, misfit(Group::G64), misfit(Group::G128)) {
        (Type42::Detect, None, None) => {
            if let Some((group, evidence)) = by_contents(spans) {
                return Ok((group.encoding(), evidence));
            }
            let why = "is of type 42, which is Q2_0 in groups of 64 or of 128 weights, and the sizes in this file fit \
                       both: the option `type42` must say group64 or group128";
            let evidence = format!(
                "type 42 is not decided: Q2_0 in groups of 64 and of 128 both fit the sizes of {}, so the option `type42` must \
                 say which",
                all(total)
            );
            return Ok((Encoding::Undecided { name: "Q2_0 (groups of 64 or 128)", why }, evidence));
        }
        (Type42::Detect, None, Some(telling)) => (Group::G64, by_size(Group::G64, telling, total)),
        (Type42::Detect, Some(telling), None) => (Group::G128, by_size(Group::G128, telling, total)),
        (Type42::Detect, Some(a), Some(b)) => {
            return Err(format!(
                "tensors of type 42 fit neither layout of Q2_0: `{}` takes {} bytes, but {}, and `{}` takes {} bytes, \
                 but {}: the file is cut short, or its type 42 is another type",
                a.name,
                a.bytes.len(),
                need(Group::G64, a),
                b.name,
                b.bytes.len(),
                need(Group::G128, b)
            ));
        }
        (Type42::Group64, misfit, other) => (Group::G64, by_caller(Group::G64, misfit, other)?),
        (Type42::Group128, other, misfit) => (Group::G128, by_caller(Group::G128, misfit, other)?),
    };
    let (odd, seen) = odd_blocks(spans, group.block(), group.weights());
    let other = group.other();
    let others = [
        (other.block(), other.weights(), format!("as groups of {other}")),
        (SCALE_LAST, 128, "as groups of 128 with their scales behind the codes".to_owned()),
    ];
    // The caller's word settles the group size, whatever the contents look like.
    for (block, weights, reading) in others.into_iter().skip(usize::from(asked != Type42::Detect)) {
        if odd * 4 > seen && odd_blocks(spans, block, weights).0 == 0 {
            return Err(format!(
                "tensors of type 42 have the sizes of Q2_0 in groups of {group}, but {odd} of {seen} blocks looked at \
                 would have a negative scale or a fourth code, and none {reading}: the file is damaged, or in a \
                 layout that is not read"
            ));
        }
    }
    evidence += &match odd {
        0 => format!("; none of {seen} blocks looked at has a negative scale or a fourth code"),
        _ => format!("; {odd} of {seen} blocks looked at have a negative scale or a fourth code"),
    };
    Ok((group.encoding(), evidence))
}

/// Where sizes leave it open: the reading without a negative scale or a fourth code, if the other has them everywhere.
fn by_contents(spans: &[Span<'_>]) -> Option<(Group, String)> {
    [Group::G64, Group::G128].into_iter().find_map(|group| {
        let other = group.other();
        let (odd, seen) = odd_blocks(spans, group.block(), group.weights());
        let (other_odd, other_seen) = odd_blocks(spans, other.block(), other.weights());
        let clear = odd == 0 && seen >= 16 && other_seen >= 16 && other_odd * 2 > other_seen;
        clear.then(|| {
            let evidence = format!(
                "type 42 is Q2_0 in groups of {group}: both groups fit the sizes, but {other_odd} of {other_seen} blocks looked \
                 at would have a negative scale or a fourth code in groups of {other}"
            );
            (group, evidence)
        })
    })
}

fn by_size(group: Group, telling: &Span<'_>, total: usize) -> String {
    format!(
        "type 42 is Q2_0 in groups of {group}: they fit the sizes of {}, while `{}` takes {} bytes \
         and {}",
        all(total),
        telling.name,
        telling.bytes.len(),
        need(group.other(), telling)
    )
}

/// Takes the caller's word, unless it cannot be or the file clearly says the opposite.
fn by_caller(group: Group, misfit: Option<&Span<'_>>, other: Option<&Span<'_>>) -> Result<String, String> {
    let asked = format!("type 42 is Q2_0 in groups of {group}, because the option `type42` says so");
    let Some(misfit) = misfit else { return Ok(asked) };
    let room = group.encoding().byte_len(misfit.shape).is_some_and(|need| need <= misfit.bytes.len());
    if !room || other.is_none() {
        return Err(format!(
            "the option `type42` says that Q2_0 is in groups of {group}, but `{}` takes {} bytes and {}: leave the \
             option out, or the file is damaged",
            misfit.name,
            misfit.bytes.len(),
            need(group, misfit)
        ));
    }
    Ok(format!(
        "{asked}, although `{}` takes {} bytes and {}",
        misfit.name,
        misfit.bytes.len(),
        need(group, misfit)
    ))
}

/// Whether both readings of a file whose tensors of type 42 have these shapes take the same space, padded to
/// `alignment`.
pub(super) fn ambiguous<'a>(shapes: impl Iterator<Item = &'a [usize]>, alignment: usize) -> bool {
    let padded = |group: Group, shape| {
        group.encoding().byte_len(shape).and_then(|bytes| bytes.checked_next_multiple_of(alignment))
    };
    let mut shapes = shapes.peekable();
    shapes.peek().is_some() && shapes.all(|shape| padded(Group::G64, shape) == padded(Group::G128, shape))
}

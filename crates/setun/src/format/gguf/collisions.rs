//! Type numbers that different programs gave to different types, and what a file says about which it means.
//!
//! Evidence is taken from all tensors of a number together: a file has one meaning for it. What cannot be settled is
//! left undecided or refused, never guessed; [`type42`] is the case with an answer in the sizes.

use super::i2s;
use super::{type42, types};
use crate::format::{Encoding, I2sLayout, OpenOptions, Tl};

/// A tensor of such a number.
pub(super) struct Span<'a> {
    pub(super) name: &'a str,
    /// Row-major.
    pub(super) shape: &'a [usize],
    /// From its offset to the next tensor's, or to the end of the file.
    pub(super) bytes: &'a [u8],
    /// Whether no tensor follows, so that bytes after it may be anything.
    pub(super) last: bool,
}

impl Span<'_> {
    /// Whether `need` bytes fill the room exactly, or up to `alignment`.
    pub(super) fn takes(&self, need: Option<usize>, alignment: usize) -> bool {
        let have = self.bytes.len();
        need.is_some_and(|need| have == need || Some(have) == need.checked_next_multiple_of(alignment))
    }
}

/// `1 tensor`, `12 tensors`.
fn tensors(n: usize) -> String {
    format!("{n} tensor{}", if n == 1 { "" } else { "s" })
}

/// `its one tensor`, `all 12 tensors`.
pub(super) fn all(n: usize) -> String {
    if n == 1 { "its one tensor".to_owned() } else { format!("all {}", tensors(n)) }
}

/// I2_S of bitnet.cpp; formerly IQ4_NL_4_4.
const I2_S: u32 = types::I2_S;
/// TL1 of bitnet.cpp; formerly IQ4_NL_8_8.
const TL1: u32 = 38;
/// MXFP4; TL2 of bitnet.cpp.
const MXFP4: u32 = 39;
/// Q2_0 in groups of 64 or 128.
const Q2_0: u32 = types::Q2_0;

/// The numbers with several meanings.
pub(super) const NUMBERS: [u32; 4] = [I2_S, TL1, MXFP4, Q2_0];

/// What all tensors of number `id` in a file are, and a sentence with the evidence.
///
/// # Errors
/// A sentence if they are of no layout that is known, or contradict the caller's choice.
pub(super) fn decide(
    id: u32,
    spans: &[Span<'_>],
    alignment: usize,
    options: &OpenOptions,
) -> Result<(Encoding, String), String> {
    let total = spans.len();
    // The 4.5-bit types that left the format.
    let older =
        |s: &Span| s.takes(s.shape.iter().product::<usize>().checked_div(32).map(|n| n * 18), alignment);
    Ok(match id {
        I2_S => return i2_s(spans, alignment, options.i2s, older),
        TL1 if spans.iter().all(older) => {
            let evidence =
                format!("type 38 is IQ4_NL_8_8, by the sizes of {}, which is not read", all(total));
            (Encoding::Other("IQ4_NL_8_8 (removed)".into()), evidence)
        }
        TL1 => {
            let why = "is of type 38, TL1 of bitnet.cpp, whose tile sizes for each shape are not in the file: the option \
                       `tl_tiles` must give them";
            let evidence =
                format!("type 38 ({}) is TL1 of bitnet.cpp, {}", tensors(total), tiled(spans, options));
            (Encoding::Undecided { name: "TL1 (tiles unknown)", why }, evidence)
        }
        MXFP4 if spans.iter().all(|s| s.takes(Encoding::MXFP4.byte_len(s.shape), alignment)) => {
            let evidence =
                format!("type 39 is MXFP4, by the sizes of {}; TL2 takes less than half", all(total));
            (Encoding::MXFP4, evidence)
        }
        MXFP4 => {
            let why = "is of type 39, TL2 of bitnet.cpp, whose tile sizes for each shape are not in the file: the option \
                       `tl_tiles` must give them";
            let evidence = format!(
                "type 39 ({}) does not have the sizes of MXFP4, so it is TL2 of bitnet.cpp, {}",
                tensors(total),
                tiled(spans, options)
            );
            (Encoding::Undecided { name: "TL2 (tiles unknown)", why }, evidence)
        }
        _ => return type42::decide(spans, alignment, options.type42),
    })
}

/// Which of the two types in tiles a number means whose encoding was left undecided.
pub(super) fn tl(id: u32, encoding: &Encoding) -> Option<Tl> {
    match (id, encoding) {
        (TL1, Encoding::Undecided { .. }) => Some(Tl::One),
        (MXFP4, Encoding::Undecided { .. }) => Some(Tl::Two),
        _ => None,
    }
}

/// What the caller says of the tiles of these tensors.
fn tiled(spans: &[Span<'_>], options: &OpenOptions) -> String {
    let known = |s: &&Span<'_>| options.tl_tiles.iter().any(|t| *s.shape == [t.rows, t.cols]);
    match spans.iter().filter(known).count() {
        0 => "whose tile sizes (BM, BK and bmm for each shape) are not in the file".to_owned(),
        n if n == spans.len() => "in tiles as the option `tl_tiles` says".to_owned(),
        n => format!("in tiles as the option `tl_tiles` says for {n} of them; the others are not read"),
    }
}

/// The layouts of I2_S have the same sizes, so weights tell them apart or nothing does; the older type of the number has another
/// size.
fn i2_s(
    spans: &[Span<'_>],
    alignment: usize,
    layout: I2sLayout,
    older: impl Fn(&Span<'_>) -> bool,
) -> Result<(Encoding, String), String> {
    let told = if layout == I2sLayout::Detect { i2s::by_weights(spans) } else { None };
    let encoding = told.as_ref().map_or(layout, |(found, _)| *found).encoding();
    for span in spans {
        let Some(bytes) = encoding.byte_len(span.shape) else { continue }; // Refused later, naming its rows.
        let padded = bytes.next_multiple_of(alignment);
        let room = span.bytes.len();
        if room > padded && (older(span) || !span.last && room >= padded + alignment) {
            return Err(format!(
                "tensor `{}` of type 36 takes {room} bytes, but I2_S takes {bytes}: it is another type of that \
                 number, which is not read",
                span.name
            ));
        }
    }
    let read = format!("type 36 ({}) is read as I2_S", tensors(spans.len()));
    let evidence = match told {
        Some((_, why)) => return Ok((encoding, format!("{read} {why}"))),
        None => layout,
    };
    let evidence = match evidence {
        I2sLayout::X86 => format!("{read} in blocks of 128, because the option `i2s` says so"),
        I2sLayout::Detect => format!(
            "{read} in blocks of 128, as published files are; blocks of 64 (ARM builds since late 2025) and \
             interleaved rows have the same sizes, and these weights do not tell, so the option `i2s` must name them"
        ),
        I2sLayout::Neon64 => format!("{read} in blocks of 64, because the option `i2s` says so"),
        I2sLayout::Rows4 => format!("{read} with four rows interleaved, because the option `i2s` says so"),
    };
    Ok((encoding, evidence))
}

//! Telling the layouts of I2_S apart by the weights.
//!
//! A feed-forward channel that training has little use for has few weights in its row of `ffn_up` and few in its column of
//! `ffn_down`. In the layout that a file was written in the two shares go together; in another one the columns (or rows) are
//! shuffled and they do not. Weights that were never trained tell nothing.

use super::collisions::Span;
use crate::format::I2sLayout;

/// Layers, and rows of a matrix of columns, that are looked at.
const LAYERS: usize = 4;
const ROWS: usize = 512;
/// Channels below which correlations may be chance.
const CHANNELS: usize = 256;
/// The least correlation that tells, and by how much it must exceed that of every other layout.
const TELLS: f64 = 0.4;
const MARGIN: f64 = 0.25;

/// The layout that the weights speak for, and how.
pub(super) fn by_weights(spans: &[Span<'_>]) -> Option<(I2sLayout, String)> {
    const LAYOUTS: [I2sLayout; 3] = [I2sLayout::X86, I2sLayout::Neon64, I2sLayout::Rows4];
    let pairs: Vec<(&Span, &Span)> = spans
        .iter()
        .filter_map(|up| {
            let layer = up.name.strip_suffix(".ffn_up.weight")?;
            let down = spans.iter().find(|s| s.name.strip_suffix(".ffn_down.weight") == Some(layer))?;
            let whole = |s: &Span| {
                let [rows, cols] = *s.shape else { return false };
                rows.is_multiple_of(128) && cols.is_multiple_of(128) && s.bytes.len() >= rows * cols / 4
            };
            let twins = up.shape.first() == down.shape.get(1) && up.shape.first()? >= &CHANNELS;
            (twins && whole(up) && whole(down)).then_some((up, down))
        })
        .collect();
    let step = pairs.len().div_ceil(LAYERS).max(1);
    let looked: Vec<_> = pairs.iter().step_by(step).collect();
    let mut found = LAYOUTS.map(|layout| {
        let each = looked
            .iter()
            .map(|(up, down)| correlation(&row_shares(up, layout), &column_shares(down, layout)));
        (layout, each.sum::<f64>() / looked.len().max(1) as f64)
    });
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    let [(best, most), (_, next), (_, least)] = found;
    (most >= TELLS && next <= most - MARGIN).then(|| {
        let name = match best {
            I2sLayout::Neon64 => "in blocks of 64",
            I2sLayout::Rows4 => "with four rows interleaved",
            _ => "in blocks of 128",
        };
        let why = format!(
            "{name}: rows of ffn_up and columns of ffn_down have zeros in common there (correlation {most:.2} over {} layers; in the \
             other layouts {next:.2} and {least:.2})",
            looked.len()
        );
        (best, why)
    })
}

/// Whether field `n` of a byte, counted from the high bits, is a weight other than 0.
fn weight(byte: u8, n: usize) -> f64 {
    f64::from(u8::from(byte >> (6 - 2 * n) & 3 != 1))
}

/// Weights other than 0 in every row.
fn row_shares(span: &Span, layout: I2sLayout) -> Vec<f64> {
    let (rows, cols) = (span.shape[0], span.shape[1]);
    let bytes = &span.bytes[..rows * cols / 4];
    // Zero weights are 01: their low bits, in the fields of `mask`.
    let weights = |part: &[u8], mask: u64| {
        let zeros = part.as_chunks::<8>().0.iter().map(|word| {
            let word = u64::from_le_bytes(*word);
            (!(word >> 1) & word & mask).count_ones()
        });
        f64::from(mask.count_ones()) * (part.len() / 8) as f64 - f64::from(zeros.sum::<u32>())
    };
    match layout {
        I2sLayout::Rows4 => {
            let field = |n: usize| 0x0101_0101_0101_0101 << (6 - 2 * n);
            bytes.chunks_exact(cols).flat_map(|four| [0, 1, 2, 3].map(|n| weights(four, field(n)))).collect()
        }
        _ => bytes.chunks_exact(cols / 4).map(|row| weights(row, 0x5555_5555_5555_5555)).collect(),
    }
}

/// Weights other than 0 in every column, of a sample of the rows.
fn column_shares(span: &Span, layout: I2sLayout) -> Vec<f64> {
    let (rows, cols) = (span.shape[0], span.shape[1]);
    let bytes = &span.bytes[..rows * cols / 4];
    let mut shares = vec![0.0; cols];
    let step = rows.div_ceil(ROWS);
    if layout == I2sLayout::Rows4 {
        for four in bytes.chunks_exact(cols).step_by(step) {
            for (share, &byte) in shares.iter_mut().zip(four) {
                *share += (0..4).map(|n| weight(byte, n)).sum::<f64>();
            }
        }
        return shares;
    }
    let run = if layout == I2sLayout::Neon64 { 16 } else { 32 };
    for row in bytes.chunks_exact(cols / 4).step_by(step) {
        for (block, codes) in shares.chunks_exact_mut(4 * run).zip(row.chunks_exact(run)) {
            for n in 0..4 {
                for (share, &byte) in block[n * run..].iter_mut().zip(codes) {
                    *share += weight(byte, n);
                }
            }
        }
    }
    shares
}

/// Pearson's; 0 where one side does not vary.
fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let (ma, mb) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b).map(|(x, y)| (x - ma, y - mb)) {
        (ab, aa, bb) = (ab + x * y, aa + x * x, bb + y * y);
    }
    if aa > 0.0 && bb > 0.0 { ab / (aa * bb).sqrt() } else { 0.0 }
}

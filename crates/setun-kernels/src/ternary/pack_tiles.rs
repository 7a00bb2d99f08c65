//! From canonical rows to panels of tiles and back.

use alloc::vec::Vec;

use super::{Columns, TILE_COLS};
use crate::matrix::TernaryMatrix;
use crate::pack::ZERO_BYTE;

/// Transposes the 4 × 4 matrix of two-bit elements in a word. Canonical codes count columns through
/// the fields of a byte first; tiles count them through the bytes first. Its own inverse.
fn transpose(x: u32) -> u32 {
    let t = (x ^ (x >> 6)) & 0x00cc_00cc;
    let x = x ^ t ^ (t << 6);
    let t = (x ^ (x >> 12)) & 0x0000_f0f0;
    x ^ t ^ (t << 12)
}

/// Sixteen codes from column `first` on; columns from `end` on count as zero weights.
fn gather(codes: &[u8], first: usize, end: usize) -> u32 {
    if first.is_multiple_of(4) && first + TILE_COLS <= end {
        let bytes = codes[first / 4..].first_chunk().expect("16 columns are four bytes");
        return u32::from_le_bytes(*bytes);
    }
    let mut word = u32::from_le_bytes([ZERO_BYTE; 4]);
    for c in first..end.min(first + TILE_COLS) {
        let (code, shift) = (u32::from(codes[c / 4] >> (2 * (c % 4))) & 3, 2 * (c - first));
        word = word & !(3 << shift) | code << shift;
    }
    word
}

/// Fills the tiles of the panel that starts at row `first`. Rows below the matrix are zero weights.
pub(super) fn pack_panel(
    matrix: &TernaryMatrix,
    columns: Columns,
    first: usize,
    rows: usize,
    tiles: &mut [u8],
) {
    let lanes = tiles.as_chunks_mut::<4>().0;
    lanes.fill([ZERO_BYTE; 4]);
    for lane in 0..rows.min(matrix.rows() - first) {
        let codes = matrix.row_codes(first + lane);
        for b in 0..columns.blocks() {
            let range = columns.range(b);
            for (tile, col) in columns.tiles(b).zip(range.clone().step_by(TILE_COLS)) {
                let word = transpose(gather(codes, col, range.end));
                lanes[tile * rows + lane] = word.to_le_bytes();
            }
        }
    }
}

/// The canonical codes of packed panels.
pub(super) fn unpack_panels(rows: usize, columns: Columns, lanes: usize, bytes: &[u8]) -> Vec<u8> {
    let row_bytes = columns.cols.div_ceil(4);
    let mut codes = alloc::vec![0u8; rows * row_bytes];
    let words = bytes.as_chunks::<4>().0;
    for r in 0..rows {
        let row = &mut codes[r * row_bytes..][..row_bytes];
        let first = r / lanes * columns.all_tiles() * lanes + r % lanes;
        for b in 0..columns.blocks() {
            for (i, c) in columns.range(b).enumerate() {
                let tile = columns.tiles(b).start + i / TILE_COLS;
                let word = transpose(u32::from_le_bytes(words[first + tile * lanes]));
                let code = (word >> (2 * (i % TILE_COLS))) & 3;
                row[c / 4] |= (code as u8) << (2 * (c % 4));
            }
        }
    }
    codes
}

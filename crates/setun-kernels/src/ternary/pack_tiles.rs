//! From canonical rows to panels of tiles and back.

use alloc::vec::Vec;

use super::columns::Columns;
use super::{TILE_COLS, TILE_COLS_5, TileKernels};
use crate::matrix::TernaryMatrix;
use crate::pack::ZERO_BYTE;

/// Bytes of five weights from here on stand for `i >= 64`; see [`five`].
pub(super) const ESCAPE: u8 = 0xc0;

/// Transposes the 4 × 4 matrix of two-bit elements in a word. Canonical codes count columns through
/// the fields of a byte first; tiles count them through the bytes first. Its own inverse.
fn transpose(x: u32) -> u32 {
    let t = (x ^ (x >> 6)) & 0x00cc_00cc;
    let x = x ^ t ^ (t << 6);
    let t = (x ^ (x >> 12)) & 0x0000_f0f0;
    x ^ t ^ (t << 12)
}

/// The byte of codes `t0` to `t3`, given as fields of two bits, and `t4`: with
/// `i = t0 + 3 t1 + 9 t2 + 27 t3`, it is `t4 << 6 | i` for `i < 64`, else `0xc0 + 3 (i - 64) + t4`.
const fn five(fields: u8, t4: u8) -> u8 {
    let i = (fields & 3) + 3 * (fields >> 2 & 3) + 9 * (fields >> 4 & 3) + 27 * (fields >> 6);
    if i < 64 { t4 << 6 | i } else { ESCAPE + 3 * (i - 64) + t4 }
}

/// The inverse of [`five`]: four codes as fields of two bits, and the fifth. Bytes that stand for nothing
/// give codes nevertheless.
pub(super) const fn fields_of_five(byte: u8) -> (u8, u8) {
    let (i, t4) = if byte < ESCAPE { (byte & 63, byte >> 6) } else { (64 + (byte - ESCAPE) / 3, byte % 3) };
    ((i % 3) | ((i / 3 % 3) << 2) | ((i / 9 % 3) << 4) | ((i / 27 % 3) << 6), t4)
}

/// [`five`] of every `t4 << 8 | fields`.
static FIVE: [u8; 3 << 8] = {
    let mut table = [0; 3 << 8];
    let mut i = 0;
    while i < table.len() {
        let fields = i as u8;
        if fields & fields >> 1 & 0x55 == 0 {
            table[i] = five(fields, (i >> 8) as u8);
        }
        i += 1;
    }
    table
};

/// The four bytes of a row in a tile of 16 or 20 codes, which start at the lowest bits.
#[inline]
fn word(codes: u64, tile: usize) -> [u8; 4] {
    let first16 = transpose(codes as u32).to_le_bytes();
    if tile == TILE_COLS {
        return first16;
    }
    let last = (codes >> 32) as usize;
    core::array::from_fn(|b| FIVE[(last >> (2 * b) & 3) << 8 | usize::from(first16[b])])
}

/// The inverse of [`word`].
fn codes_of_word(word: [u8; 4], tile: usize) -> u64 {
    if tile == TILE_COLS {
        return transpose(u32::from_le_bytes(word)).into();
    }
    let parts = word.map(fields_of_five);
    let last = (0..4).fold(0, |all, b| all | u64::from(parts[b].1) << (2 * b));
    u64::from(transpose(u32::from_le_bytes(parts.map(|p| p.0)))) | last << 32
}

/// The codes at the positions of tile `i`; positions without a column are zero weights.
fn gather(codes: &[u8], columns: Columns, i: usize) -> u64 {
    let first = i * columns.tile;
    let mut all = u64::from_le_bytes([ZERO_BYTE; 8]);
    for at in 0..columns.tile {
        if let Some(c) = columns.column(first + at) {
            let (code, shift) = (u64::from(codes[c / 4] >> (2 * (c % 4))) & 3, 2 * at);
            all = all & !(3 << shift) | code << shift;
        }
    }
    all
}

/// [`word`]s of the leading tiles of `TILE` columns, each from bytes of its own.
fn pack_row<const TILE: usize>(codes: &[u8], lanes: &mut [[u8; 4]], rows: usize) -> usize {
    let tiles = codes.chunks_exact(TILE / 4);
    let count = tiles.len();
    for (codes, lane) in tiles.zip(lanes.iter_mut().step_by(rows)) {
        let mut bytes = [0; 8];
        bytes[..TILE / 4].copy_from_slice(codes);
        *lane = word(u64::from_le_bytes(bytes), TILE);
    }
    count
}

/// Fills the tiles of the panel that starts at row `first`. Rows below the matrix are zero weights.
pub(super) fn pack_panel(
    matrix: &TernaryMatrix,
    columns: Columns,
    first: usize,
    kernels: &TileKernels,
    tiles: &mut [u8],
) {
    let rows = kernels.rows;
    let lanes = tiles.as_chunks_mut::<4>().0;
    let valid = rows.min(matrix.rows() - first);
    if valid < rows {
        lanes.fill(word(u64::from_le_bytes([ZERO_BYTE; 8]), columns.tile));
    }
    for lane in 0..valid {
        let codes = matrix.row_codes(first + lane);
        let lanes = &mut lanes[lane..];
        let done = if columns.contiguous() {
            let whole = &codes[..columns.cols / columns.tile * columns.tile / 4];
            // SAFETY: the matrix is packed for a kernel set that the CPU has.
            let fast = kernels.pack_row.map_or(0, |pack| unsafe { pack(whole, lanes) });
            let (codes, lanes) =
                (&whole[fast * columns.tile / 4..], lanes.get_mut(fast * rows..).unwrap_or_default());
            fast + match columns.tile {
                TILE_COLS => pack_row::<TILE_COLS>(codes, lanes, rows),
                _ => pack_row::<TILE_COLS_5>(codes, lanes, rows),
            }
        } else {
            0
        };
        for tile in done..columns.tiles() {
            lanes[tile * rows] = word(gather(codes, columns, tile), columns.tile);
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
        let first = r / lanes * columns.tiles() * lanes + r % lanes;
        for tile in 0..columns.tiles() {
            let all = codes_of_word(words[first + tile * lanes], columns.tile);
            for at in 0..columns.tile {
                if let Some(c) = columns.column(tile * columns.tile + at) {
                    row[c / 4] |= ((all >> (2 * at) & 3) as u8) << (2 * (c % 4));
                }
            }
        }
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_five_codes_have_a_byte_of_their_own() {
        let mut seen = [false; 256];
        for n in 0..243u32 {
            let code = |i: u32| (n / 3u32.pow(i) % 3) as u8;
            let fields = code(0) | code(1) << 2 | code(2) << 4 | code(3) << 6;
            let byte = five(fields, code(4));
            assert_eq!(fields_of_five(byte), (fields, code(4)));
            assert!(!core::mem::replace(&mut seen[usize::from(byte)], true));
        }
    }
}

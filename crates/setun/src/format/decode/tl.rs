//! TL1 and TL2 of bitnet.cpp: codes of pairs or triples of weights, in tiles whose sizes a program was built with.

use crate::format::options::TlTiles;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tl {
    /// Pairs of weights in four bits.
    One,
    /// Triples in four bits and a sign in a plane of its own, then pairs for the columns that are left.
    Two,
}

impl Tl {
    pub(crate) fn name(self) -> &'static str {
        if self == Self::One { "TL1" } else { "TL2" }
    }

    /// Bytes of a tensor in these tiles, as the converter pads it.
    ///
    /// # Errors
    /// A sentence without its subject if the layout is not defined for the tiles.
    pub(crate) fn stored_len(self, tiles: TlTiles) -> Result<usize, String> {
        let TlTiles { rows, cols, bm, bk, bmm } = tiles;
        let refuse = |what: &str| Err(format!("cannot be in tiles of BM {bm}, BK {bk}, bmm {bmm}: {what}"));
        let whole = |n: usize, of: usize| of != 0 && n.is_multiple_of(of);
        let groups: &[usize] = if self == Self::One { &[16, 32, 64] } else { &[32] };
        if !groups.contains(&bmm) {
            return refuse(if self == Self::One { "bmm must be 16, 32 or 64" } else { "bmm must be 32" });
        }
        if rows == 0 || !whole(bm, bmm) || !whole(rows, bm) {
            return refuse("bmm must divide BM, and BM the rows");
        }
        let Some(count) = rows.checked_mul(cols) else { return refuse("there are too many weights") };
        if self == Self::One {
            if cols == 0 || !whole(bk, 256 / bmm) || !whole(cols, bk) {
                return refuse("256 / bmm must divide BK, and BK the columns");
            }
            return Ok(count / 4);
        }
        if cols < 256 || bk == 0 || !whole(bk, 24) || ![0, 32].contains(&(cols % bk)) {
            return refuse("24 must divide BK, and BK the columns, of which 32 more may be left");
        }
        let triples = rows * (cols - 256) / 3;
        let padded = triples.checked_mul(5).map(|n| n / 8 + rows * 64);
        let used = rows * (cols - cols % bk) / 24 * 5 + rows * (cols % bk) / 4;
        match padded.filter(|&padded| padded >= used) {
            Some(padded) => Ok(padded),
            None => refuse("their codes take more room than the converter gives them"),
        }
    }

    /// Canonical codes of a tensor in these tiles.
    ///
    /// # Errors
    /// A sentence without its subject if the tiles or the length do not fit, or a code has no meaning.
    pub(crate) fn decode(self, tiles: TlTiles, stored: &[u8]) -> Result<Vec<u8>, String> {
        let expected = self.stored_len(tiles)?;
        if stored.len() != expected {
            return Err(format!(
                "has {} bytes, but {} in these tiles takes {expected}",
                stored.len(),
                self.name()
            ));
        }
        let mut out = Codes { bytes: vec![0; tiles.rows * (tiles.cols / 4)], row_bytes: tiles.cols / 4 };
        let damaged = |what: &str| format!("{what}, so it is damaged or its tiles are others");
        match self {
            Self::One => tl1(tiles, stored, &mut out),
            Self::Two => tl2(tiles, stored, &mut out),
        }
        .map_err(damaged)?;
        Ok(out.bytes)
    }
}

/// Canonical codes, written weight by weight.
struct Codes {
    bytes: Vec<u8>,
    row_bytes: usize,
}

impl Codes {
    /// Writes the four weights of two codes of pairs, the first in the high bits.
    fn pairs(&mut self, row: usize, col: usize, byte: u8) -> Result<(), &'static str> {
        let (a, b) = (byte >> 4, byte & 15);
        if a > 8 || b > 8 {
            return Err("has codes of pairs above 8");
        }
        self.bytes[row * self.row_bytes + col / 4] =
            (a / 3) | ((a % 3) << 2) | ((b / 3) << 4) | ((b % 3) << 6);
        Ok(())
    }
}

/// Multiples of `step` in a part of a dimension.
fn steps(start: usize, length: usize, step: usize) -> impl Iterator<Item = usize> {
    (start..start + length).step_by(step)
}

/// Calls `each` with the first row and column of every block of `bmm` rows and `width` columns, in order.
fn blocks(
    TlTiles { rows, bm, bk, bmm, .. }: TlTiles,
    cols: usize,
    width: usize,
    mut each: impl FnMut(usize, usize) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    for m in steps(0, rows, bm) {
        for k in steps(0, cols, bk) {
            for row in steps(m, bm, bmm) {
                steps(k, bk, width).try_for_each(|col| each(row, col))?;
            }
        }
    }
    Ok(())
}

fn tl1(tiles: TlTiles, stored: &[u8], out: &mut Codes) -> Result<(), &'static str> {
    let width = 256 / tiles.bmm;
    let mut columns = stored.as_chunks::<16>().0.iter();
    blocks(tiles, tiles.cols, width, |row, col| {
        for row in steps(row, tiles.bmm, 16) {
            for col in steps(col, width, 4) {
                let column = columns.next().expect("the length is checked");
                for (row, &byte) in (row..).zip(column) {
                    out.pairs(row, col, byte)?;
                }
            }
        }
        Ok(())
    })
}

/// The row in a group of 32 that is stored at place `at`: the second and the third eight are swapped.
fn swapped(at: usize) -> usize {
    match at / 8 {
        1 => at + 8,
        2 => at - 8,
        _ => at,
    }
}

fn tl2(tiles: TlTiles, stored: &[u8], out: &mut Codes) -> Result<(), &'static str> {
    let left = tiles.cols % tiles.bk;
    let cols = tiles.cols - left;
    let (per_row, count) = (cols / 3, tiles.rows * cols);
    let (indices, rest) = stored.split_at(count / 6);
    let (signs, rest) = rest.split_at(count / 24);
    let mut triples = vec![0i8; tiles.rows * per_row];
    let mut groups = indices.as_chunks::<32>().0.iter();
    blocks(tiles, cols, 6, |row, col| {
        let group = groups.next().expect("the length is checked");
        for (at, &byte) in group.iter().enumerate() {
            let (a, b) = (byte >> 4, byte & 15);
            if a > 13 || b > 13 {
                return Err("has codes of triples above 13");
            }
            let place = (row + swapped(at)) * per_row + col / 3;
            (triples[place], triples[place + 1]) = (a as i8, b as i8);
        }
        Ok(())
    })?;
    // Sixteen words for the rows of a half; their bits, the highest first, alternate between the halves.
    let mut words = signs.as_chunks::<2>().0.iter();
    blocks(tiles, cols, 24, |row, col| {
        for word_row in row..row + 16 {
            let word = u16::from_le_bytes(*words.next().expect("the length is checked"));
            for at in (0..16).filter(|at| word >> (15 - at) & 1 == 1) {
                let triple = &mut triples[(word_row + at % 2 * 16) * per_row + col / 3 + at / 2];
                if *triple == 0 {
                    return Err("has signs of triples that are 0");
                }
                *triple = -*triple;
            }
        }
        Ok(())
    })?;
    for (row, triples) in triples.chunks_exact(per_row.max(1)).enumerate() {
        // Four triples are twelve weights: three bytes.
        let bytes = out.bytes[row * out.row_bytes..].as_chunks_mut::<3>().0;
        for (bytes, four) in bytes.iter_mut().zip(triples.as_chunks::<4>().0) {
            let mut codes = 0u32;
            for (i, &v) in four.iter().enumerate() {
                let v = (v + 13) as u32;
                codes |= ((v / 9) | ((v / 3 % 3) << 2) | ((v % 3) << 4)) << (6 * i);
            }
            bytes.copy_from_slice(&codes.to_le_bytes()[..3]);
        }
    }
    let mut groups = rest.as_chunks::<32>().0.iter();
    for row in steps(0, tiles.rows, 32) {
        for col in steps(cols, left, 4) {
            let group = groups.next().expect("the length is checked");
            for (at, &byte) in group.iter().enumerate() {
                out.pairs(row + swapped(at), col, byte)?;
            }
        }
    }
    Ok(())
}

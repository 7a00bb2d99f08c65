//! Rows of GGUF's Q8_0 and Q4_0: blocks of 32 weights with an f16 scale of their own.

use half::f16;

use super::Row;
use crate::lanes::{Chunk, LANES, Lanes};

/// Weights of a block: two chunks.
pub(super) const BLOCK: usize = 2 * LANES;

/// A block as it is stored.
pub(super) trait Block: Copy + Sync + 'static {
    /// Its bytes, an f16 scale first.
    const BYTES: usize;
    /// Rows side by side, so many that the chains of additions of one token keep up with memory.
    const ROWS: usize;
    /// Its bytes as an array.
    type Stored: Copy + Sync + 'static;
    /// Blocks of a run of bytes; a rest that is no block is left out.
    fn all(data: &[u8]) -> &[Self::Stored];
    /// Its scale.
    fn scale(block: &Self::Stored) -> f16;
    /// Both of its chunks in f32, exactly.
    fn load<S: Lanes>(s: S, block: &Self::Stored) -> [S::V; 2];
    /// The same, by definition.
    fn values(block: &Self::Stored) -> [f32; BLOCK];

    /// Bytes of a row of `cols` columns.
    fn row_bytes(cols: usize) -> usize {
        cols / BLOCK * Self::BYTES
    }

    /// Decodes as many whole blocks as `out` has room for.
    fn decode(data: &[u8], out: &mut [f32]) {
        for (out, block) in out.as_chunks_mut().0.iter_mut().zip(Self::all(data)) {
            *out = Self::values(block);
        }
    }
}

/// Signed bytes `q`: a weight is `d · q`.
#[derive(Clone, Copy)]
pub(super) struct Q8_0;

/// Nibbles `q`: a weight is `d · (q − 8)`.
#[derive(Clone, Copy)]
pub(super) struct Q4_0;

impl Block for Q8_0 {
    const BYTES: usize = 34;
    const ROWS: usize = 2;
    type Stored = [u8; 34];
    #[inline(always)]
    fn all(data: &[u8]) -> &[[u8; 34]] {
        data.as_chunks().0
    }
    #[inline(always)]
    fn scale(block: &[u8; 34]) -> f16 {
        f16::from_le_bytes([block[0], block[1]])
    }
    #[inline(always)]
    fn load<S: Lanes>(s: S, block: &[u8; 34]) -> [S::V; 2] {
        let [_, _, q @ ..] = block;
        let (chunks, _) = q.as_chunks::<LANES>();
        let d = s.splat_f16(Self::scale(block));
        let signed = [chunks[0].map(u8::cast_signed), chunks[1].map(u8::cast_signed)];
        [s.mul(d, s.load_i8(&signed[0])), s.mul(d, s.load_i8(&signed[1]))]
    }
    fn values(block: &[u8; 34]) -> [f32; BLOCK] {
        let d = Self::scale(block).to_f32();
        std::array::from_fn(|i| d * f32::from(block[2 + i] as i8))
    }
}

impl Block for Q4_0 {
    const BYTES: usize = 18;
    const ROWS: usize = 4;
    type Stored = [u8; 18];
    #[inline(always)]
    fn all(data: &[u8]) -> &[[u8; 18]] {
        data.as_chunks().0
    }
    #[inline(always)]
    fn scale(block: &[u8; 18]) -> f16 {
        f16::from_le_bytes([block[0], block[1]])
    }
    #[inline(always)]
    fn load<S: Lanes>(s: S, block: &[u8; 18]) -> [S::V; 2] {
        let [_, _, q @ ..] = block;
        s.load_nibbles(q, s.splat_f16(Self::scale(block)))
    }
    fn values(block: &[u8; 18]) -> [f32; BLOCK] {
        let d = Self::scale(block).to_f32();
        std::array::from_fn(|i| {
            let byte = block[2 + i % LANES];
            d * f32::from((if i < LANES { byte & 15 } else { byte >> 4 }) as i8 - 8)
        })
    }
}

/// A row of blocks.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a, B: Block>(&'a [B::Stored]);

impl<'a, B: Block> Row<'a> for Blocks<'a, B> {
    type Data = [u8];
    const STEP: usize = B::BYTES;
    const ROWS: usize = B::ROWS;
    #[inline(always)]
    fn bytes(cols: usize) -> usize {
        B::row_bytes(cols)
    }
    #[inline(always)]
    fn row(data: &'a [u8], cols: usize, r: usize) -> Self {
        let per_row = cols / BLOCK;
        Self(&B::all(data)[r * per_row..(r + 1) * per_row])
    }
    #[inline(always)]
    fn whole(self) -> usize {
        self.0.len() * (BLOCK / LANES)
    }
    #[inline(always)]
    fn load<S: Lanes>(self, s: S, i: usize) -> S::V {
        B::load(s, &self.0[i / 2])[i % 2]
    }
    #[inline(always)]
    fn load_two<S: Lanes>(self, s: S, i: usize) -> [S::V; 2] {
        B::load(s, &self.0[i])
    }
    #[inline(always)]
    fn tail(self) -> Option<Chunk> {
        None
    }
    #[inline(always)]
    fn at(self, i: usize) -> *const u8 {
        self.0.as_ptr().wrapping_add(i / 2).cast()
    }
}

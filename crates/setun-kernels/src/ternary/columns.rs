//! How the columns of a row fall into scale blocks and tiles.

use alloc::vec::Vec;
use core::ops::Range;

use crate::matrix::Scales;

/// Columns with their scale blocks. Each block is padded to whole `unit`s of columns; padded columns are
/// counted as *positions*. Tiles hold positions in order, so a tile may hold the end of one block and the
/// start of the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Columns {
    pub(super) cols: usize,
    /// Columns of a scale block; all columns when a row has one scale.
    pub(super) block: usize,
    /// Positions of a tile.
    pub(super) tile: usize,
    pub(super) unit: usize,
}

/// Weights and activations of one scale block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// First tile, or unit of unpacked columns, and how many.
    pub(super) first: usize,
    pub(super) count: usize,
    /// Where its activations start in a row of them.
    pub(super) acts: usize,
}

impl Columns {
    pub(super) fn new(cols: usize, scales: &Scales, tile: usize, unit: usize) -> Self {
        let block = match scales {
            Scales::Block { cols: block, .. } => (*block).min(cols.max(1)),
            _ => cols.max(1),
        };
        Self { cols, block, tile, unit }
    }

    pub(super) fn blocks(self) -> usize {
        self.cols.div_ceil(self.block)
    }

    /// Columns of block `b`.
    pub(super) fn range(self, b: usize) -> Range<usize> {
        b * self.block..self.cols.min((b + 1) * self.block)
    }

    /// Position of the first column of block `b`.
    pub(super) fn start(self, b: usize) -> usize {
        b * self.block.next_multiple_of(self.unit)
    }

    /// Positions of a row.
    pub(super) fn positions(self) -> usize {
        let last = self.blocks().checked_sub(1);
        last.map_or(0, |b| self.start(b) + self.range(b).len().next_multiple_of(self.unit))
    }

    /// The column at a position, if there is one.
    pub(super) fn column(self, position: usize) -> Option<usize> {
        let padded = self.block.next_multiple_of(self.unit);
        let (b, i) = (position / padded, position % padded);
        (b < self.blocks() && i < self.range(b).len()).then(|| b * self.block + i)
    }

    /// Tiles of a panel.
    pub(super) fn tiles(self) -> usize {
        self.positions().div_ceil(self.tile)
    }

    /// Whether position `i` is column `i`.
    pub(super) fn contiguous(self) -> bool {
        self.blocks() <= 1 || self.block.is_multiple_of(self.unit)
    }

    /// Whether a tile holds columns of one block only.
    pub(super) fn blocks_own_tiles(self) -> bool {
        self.blocks() <= 1 || self.block.next_multiple_of(self.unit).is_multiple_of(self.tile)
    }

    /// Tiles that hold columns of block `b`.
    fn tiles_of(self, b: usize) -> Range<usize> {
        self.start(b) / self.tile..(self.start(b) + self.range(b).len()).div_ceil(self.tile)
    }

    /// Room for the activations of one block's tiles where neighbours share tiles.
    pub(super) fn own_row(self) -> usize {
        (self.block / self.tile + 2) * self.tile
    }

    /// Where activations of block `b` stand in a row in which every block has tiles of its own.
    pub(super) fn own_start(self, b: usize) -> usize {
        b * self.own_row() + self.start(b) % self.tile
    }

    /// The tiles of each block. The activations of a block are those at its positions or, where blocks
    /// share tiles, its own with zeros around them.
    pub(super) fn direct_spans(self) -> Vec<Span> {
        let own = !self.blocks_own_tiles();
        let span = |b: usize| {
            let tiles = self.tiles_of(b);
            let acts = if own { b * self.own_row() } else { tiles.start * self.tile };
            Span { first: tiles.start, count: tiles.len(), acts }
        };
        (0..self.blocks()).map(span).collect()
    }

    /// The unpacked units of each block.
    pub(super) fn unpacked_spans(self) -> Vec<Span> {
        let span = |b: usize| {
            let first = self.start(b);
            Span { first: first / self.unit, count: self.range(b).len().div_ceil(self.unit), acts: first }
        };
        (0..self.blocks()).map(span).collect()
    }
}

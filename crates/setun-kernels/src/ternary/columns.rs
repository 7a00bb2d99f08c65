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

/// Units of one scale block: the first, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: usize,
    pub(super) count: usize,
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

    /// The units of each block.
    pub(super) fn spans(self) -> Vec<Span> {
        let span = |b: usize| Span {
            first: self.start(b) / self.unit,
            count: self.range(b).len().div_ceil(self.unit),
        };
        (0..self.blocks()).map(span).collect()
    }
}

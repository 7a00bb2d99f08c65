//! Choices for what model files leave open.

use super::Encoding;

/// How to read what a file does not settle by itself. The default never guesses: what the file's own evidence
/// does not decide is refused when it is used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// GGUF tensors of type 42.
    pub type42: Type42,
    /// GGUF tensors of type 36.
    pub i2s: I2sLayout,
    /// Float matrices of a folder whose configuration says nothing of ternary weights.
    pub weights: FloatWeights,
    /// GGUF tensors of types 38 and 39, one entry for each of their shapes.
    pub tl_tiles: Vec<TlTiles>,
}

/// The tiles in which a program stored TL1 or TL2 matrices of one shape: BM, BK and bmm of bitnet.cpp's
/// `kernel_config.ini`. No file has them, and wrong ones often give valid weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlTiles {
    /// Rows of the matrix.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
    /// Rows of a tile.
    pub bm: usize,
    /// Columns of a tile.
    pub bk: usize,
    /// Rows of a group inside a tile.
    pub bmm: usize,
}

/// Which Q2_0 the number 42 means in a GGUF file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Type42 {
    /// What the sizes of all tensors of the type say; undecided where both fit.
    #[default]
    Detect,
    /// Groups of 64 weights: mainline programs.
    Group64,
    /// Groups of 128 weights: PrismML's older programs.
    Group128,
}

/// What the linear layers of a float checkpoint are that says nothing about it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FloatWeights {
    /// Ternary where every one of them holds 0 and ± its scales alone, floats where none does; a mixture is refused.
    #[default]
    Detect,
    /// Floats, whatever their values.
    Float,
    /// Ternary, or refused.
    Ternary,
}

/// In which layout a GGUF file's I2_S tensors are. All have the same sizes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum I2sLayout {
    /// Decided by the weights where these tell (see docs/format.md), else [`I2sLayout::X86`].
    #[default]
    Detect,
    /// Blocks of 128 weights: every published file.
    X86,
    /// Blocks of 64 weights: ARM builds of bitnet.cpp since November 2025.
    Neon64,
    /// Four rows interleaved: a build option of bitnet.cpp since November 2025.
    Rows4,
}

impl I2sLayout {
    /// The encoding of tensors in this layout.
    pub fn encoding(self) -> Encoding {
        match self {
            Self::Detect | Self::X86 => Encoding::I2S,
            Self::Neon64 => Encoding::I2SNeon,
            Self::Rows4 => Encoding::I2SRows4,
        }
    }
}

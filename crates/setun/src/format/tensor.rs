//! What a tensor is called, how it is shaped and encoded, and where its bytes lie.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use super::{Tl, TlTiles};

/// How a tensor's numbers are stored. Shapes are row-major, `[out, in]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `F32`.
    BF16,
    /// Bytes; in packed Hugging Face checkpoints each holds four ternary codes.
    U8,
    /// Signed bytes.
    I8,
    /// Blocks of 32: an f16 scale, four-bit numbers.
    Q4_0,
    /// Blocks of 32: an f16 scale and minimum, four-bit numbers.
    Q4_1,
    /// Blocks of 32: an f16 scale, five-bit numbers.
    Q5_0,
    /// Blocks of 32: an f16 scale and minimum, five-bit numbers.
    Q5_1,
    /// Blocks of 32: an f16 scale, then 32 signed bytes.
    Q8_0,
    /// Blocks of 256: two-bit numbers in 16 sub-blocks with four-bit scales and minima.
    Q2K,
    /// Blocks of 256: three-bit numbers in 16 sub-blocks with six-bit scales.
    Q3K,
    /// Blocks of 256: four-bit numbers in 8 sub-blocks with six-bit scales and minima.
    Q4K,
    /// Blocks of 256: five-bit numbers in 8 sub-blocks with six-bit scales and minima.
    Q5K,
    /// Blocks of 256: six-bit numbers in 16 sub-blocks with eight-bit scales.
    Q6K,
    /// Blocks of 32: an f16 scale, four-bit places in a table of 16 uneven steps.
    IQ4NL,
    /// Blocks of 32: a power of two in a byte, four-bit floats.
    MXFP4,
    /// Binary, blocks of 128: an f16 scale, then 128 signs.
    Q1_0,
    /// Ternary, blocks of 64: an f16 scale, then 16 bytes of four codes each. GGUF type 42 of mainline programs.
    Q2_0G64,
    /// Ternary, blocks of 128: an f16 scale, then 32 bytes of four codes each. GGUF type 42 of older PrismML programs.
    Q2_0G128,
    /// The bytes of [`Q2_0G128`](Self::Q2_0G128) under a number of their own.
    PQ2_0,
    /// Ternary, blocks of 128: 26 bytes of five trits each, then an f16 scale.
    PTQ1_0,
    /// Ternary, blocks of 256: 52 bytes of five trits each, then an f16 scale.
    TQ1_0,
    /// Ternary, blocks of 256: 64 bytes of four codes each, then an f16 scale.
    TQ2_0,
    /// Ternary, rows of an f16 scale and blocks of 64 weights in 13 bytes.
    IQ1BN,
    /// Ternary, rows of an f32 scale and blocks of 64 weights in 16 bytes.
    IQ2BN,
    /// Ternary, 2-bit codes in blocks of 128, then one f32 scale and 28 unused bytes.
    I2S,
    /// [`I2S`](Self::I2S) in blocks of 64, as later ARM builds of its program write it.
    I2SNeon,
    /// [`I2S`](Self::I2S) with four rows interleaved, a build option of its program.
    I2SRows4,
    /// Ternary, canonical row-major 2-bit codes, then one f32 scale. Never in a file: what the
    /// reader of llama2.c-style ternary checkpoints hands out.
    Trit2,
    /// A type whose layout the file leaves open; not read until the caller says which it is.
    Undecided {
        /// What the possible layouts have in common.
        name: &'static str,
        /// Which they are and what decides, for the refusal.
        why: &'static str,
    },
    /// A type that is recognised by name but not read.
    Other(String),
}

impl Encoding {
    /// The encodings that can be decoded, for messages.
    pub const READABLE: &'static str = "F32, F16, BF16, U8, I8, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, \
        MXFP4, Q1_0, Q2_0, PQ2_0, PTQ1_0, TQ1_0, TQ2_0, IQ1_BN, IQ2_BN and I2_S";

    /// The name as files and tools spell it.
    pub fn name(&self) -> &str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::IQ4NL => "IQ4_NL",
            Self::MXFP4 => "MXFP4",
            Self::Q1_0 => "Q1_0",
            Self::Q2_0G64 => "Q2_0_g64",
            Self::Q2_0G128 => "Q2_0_g128",
            Self::PQ2_0 => "PQ2_0",
            Self::PTQ1_0 => "PTQ1_0",
            Self::TQ1_0 => "TQ1_0",
            Self::TQ2_0 => "TQ2_0",
            Self::IQ1BN => "IQ1_BN",
            Self::IQ2BN => "IQ2_BN",
            Self::I2S => "I2_S",
            Self::I2SNeon => "I2_S_neon64",
            Self::I2SRows4 => "I2_S_rows4",
            Self::Trit2 => "Trit2",
            Self::Undecided { name, .. } => name,
            Self::Other(name) => name,
        }
    }

    /// Whether the values are −1, 0, +1 times a scale by construction; Q1_0's are never 0.
    pub fn is_ternary(&self) -> bool {
        matches!(
            self,
            Self::Q1_0
                | Self::Q2_0G64
                | Self::Q2_0G128
                | Self::PQ2_0
                | Self::PTQ1_0
                | Self::TQ1_0
                | Self::TQ2_0
                | Self::IQ1BN
                | Self::IQ2BN
                | Self::I2S
                | Self::I2SNeon
                | Self::I2SRows4
                | Self::Trit2
        )
    }

    /// Whether the values are floats of any precision, as against ternary weights and plain integers.
    pub fn is_float(&self) -> bool {
        let integers = matches!(self, Self::U8 | Self::I8);
        self.block().is_some() && !integers && !self.is_ternary()
    }

    /// Elements and bytes of a block, for types that are nothing but blocks.
    pub(crate) fn block(&self) -> Option<(usize, usize)> {
        Some(match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::U8 | Self::I8 => (1, 1),
            Self::Q4_0 | Self::IQ4NL => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
            Self::MXFP4 => (32, 17),
            Self::Q1_0 => (128, 18),
            Self::Q2_0G64 => (64, 18),
            Self::Q2_0G128 | Self::PQ2_0 => (128, 34),
            Self::PTQ1_0 => (128, 28),
            Self::TQ1_0 => (256, 54),
            Self::TQ2_0 => (256, 66),
            Self::IQ1BN | Self::IQ2BN | Self::I2S | Self::I2SNeon | Self::I2SRows4 => return None,
            Self::Trit2 | Self::Undecided { .. } | Self::Other(_) => return None,
        })
    }

    /// Elements per block; a row holds whole blocks. 1 where rows may have any length.
    pub fn block_len(&self) -> usize {
        match self {
            Self::IQ1BN | Self::IQ2BN | Self::I2SNeon => 64,
            Self::I2S => 128,
            _ => self.block().map_or(1, |(elements, _)| elements),
        }
    }

    /// Bytes of a tensor of this shape, or `None` if the type is unknown or undecided, the product overflows,
    /// a row is not whole blocks, or rows that are interleaved by fours are not fours.
    pub fn byte_len(&self, shape: &[usize]) -> Option<usize> {
        let count = element_count(shape)?;
        let cols = shape.last().copied().unwrap_or(1);
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        let rows = count.checked_div(cols).unwrap_or(0);
        match self {
            Self::IQ1BN => rows.checked_mul(cols / 64 * 13 + 2),
            Self::IQ2BN => rows.checked_mul(cols / 64 * 16 + 4),
            Self::I2SRows4 if !rows.is_multiple_of(4) => None,
            Self::I2S | Self::I2SNeon | Self::I2SRows4 => (count / 4).checked_add(32),
            Self::Trit2 => rows.checked_mul(cols.div_ceil(4))?.checked_add(4),
            _ => {
                let (elements, bytes) = self.block()?;
                (count / elements).checked_mul(bytes)
            }
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Product of the dimensions, or `None` if it overflows. No dimensions: one element.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// A tensor to be written: all that a header says about it except its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Row-major shape, `[out, in]`.
    pub shape: Vec<usize>,
    /// How its bytes are laid out.
    pub encoding: Encoding,
}

/// A tensor found in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Row-major shape, `[out, in]`.
    pub shape: Vec<usize>,
    /// How its bytes are laid out.
    pub encoding: Encoding,
    /// Which of the checkpoint's files holds it.
    pub(crate) file: usize,
    /// Where in that file; checked to lie inside it.
    pub(crate) range: Range<usize>,
    /// What must be done to the stored bytes before they are what `encoding` says.
    pub(crate) rewrite: Rewrite,
}

impl TensorInfo {
    /// Number of elements. Cannot overflow: readers check the product.
    pub fn element_count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes that the tensor takes in its file.
    pub fn stored_bytes(&self) -> usize {
        self.range.len()
    }
}

/// Layout changes made while a tensor is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rewrite {
    /// The bytes are used as stored.
    None,
    /// Rows of each of `heads` heads go from neighbouring rotary pairs to split halves.
    SplitRotaryPairs { heads: usize },
    /// Scale-first high-bits-first trits become [`Encoding::Trit2`], rows reordered as above
    /// where there are `heads`.
    HighFirstTrits { heads: Option<usize> },
    /// TL1 or TL2 in these tiles becomes [`Encoding::Trit2`] with the scale of these bits.
    Tiled { tl: Tl, tiles: TlTiles, scale: u32 },
}

/// A tensor with its bytes.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Name, shape and encoding.
    pub info: Cow<'a, TensorInfo>,
    /// The bytes, as `info.encoding` lays them out; borrowed from the mapped file where possible.
    pub data: Cow<'a, [u8]>,
}

impl<'a> Tensor<'a> {
    /// A tensor that is in no file, for conversion and tests. Its length is checked when it is decoded.
    pub fn new(spec: TensorSpec, data: impl Into<Cow<'a, [u8]>>) -> Self {
        let data = data.into();
        let TensorSpec { name, shape, encoding } = spec;
        let info =
            TensorInfo { name, shape, encoding, file: 0, range: 0..data.len(), rewrite: Rewrite::None };
        Self { info: Cow::Owned(info), data }
    }

    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// Row-major shape.
    pub fn shape(&self) -> &[usize] {
        &self.info.shape
    }
}

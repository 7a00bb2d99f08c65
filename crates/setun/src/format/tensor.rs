//! What a tensor is called, how it is shaped and encoded, and where its bytes lie.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

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
    /// Blocks of 32: an f16 scale, then 32 signed bytes.
    Q8_0,
    /// Ternary, blocks of 256: 52 bytes of five trits each, then an f16 scale.
    TQ1_0,
    /// Ternary, blocks of 256: 64 bytes of four codes each, then an f16 scale.
    TQ2_0,
    /// Ternary, 2-bit codes in blocks of 128, then one f32 scale and 28 unused bytes.
    I2S,
    /// Ternary, canonical row-major 2-bit codes, then one f32 scale. Never in a file: what the
    /// reader of llama2.c-style ternary checkpoints hands out.
    Trit2,
    /// A type that is recognised by name but not read.
    Other(String),
}

impl Encoding {
    /// The encodings that can be decoded, for messages.
    pub const READABLE: &'static str = "F32, F16, BF16, U8, I8, Q8_0, TQ1_0, TQ2_0 and I2_S";

    /// The name as files and tools spell it.
    pub fn name(&self) -> &str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::Q8_0 => "Q8_0",
            Self::TQ1_0 => "TQ1_0",
            Self::TQ2_0 => "TQ2_0",
            Self::I2S => "I2_S",
            Self::Trit2 => "Trit2",
            Self::Other(name) => name,
        }
    }

    /// Whether the values are −1, 0, +1 times a scale by construction.
    pub fn is_ternary(&self) -> bool {
        matches!(self, Self::TQ1_0 | Self::TQ2_0 | Self::I2S | Self::Trit2)
    }

    /// Elements per block; a row holds whole blocks. 1 where rows may have any length.
    pub fn block_len(&self) -> usize {
        match self {
            Self::Q8_0 => 32,
            Self::I2S => 128,
            Self::TQ1_0 | Self::TQ2_0 => 256,
            _ => 1,
        }
    }

    /// Bytes of a tensor of this shape, or `None` if the type is unknown, the product overflows, or a
    /// row is not whole blocks.
    pub fn byte_len(&self, shape: &[usize]) -> Option<usize> {
        let count = element_count(shape)?;
        if !shape.last().copied().unwrap_or(1).is_multiple_of(self.block_len()) {
            return None;
        }
        match self {
            Self::F32 => count.checked_mul(4),
            Self::F16 | Self::BF16 => count.checked_mul(2),
            Self::U8 | Self::I8 => Some(count),
            Self::Q8_0 => (count / 32).checked_mul(34),
            Self::TQ1_0 => (count / 256).checked_mul(54),
            Self::TQ2_0 => (count / 256).checked_mul(66),
            Self::I2S => (count / 4).checked_add(32),
            Self::Trit2 => {
                let cols = shape.last().copied().unwrap_or(1);
                let rows = count.checked_div(cols).unwrap_or(0);
                rows.checked_mul(cols.div_ceil(4))?.checked_add(4)
            }
            Self::Other(_) => None,
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

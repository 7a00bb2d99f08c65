//! How the inputs of ternary layers are rounded.

use setun_kernels::quant::Rounding;

/// What ternary layers multiply with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActivationType {
    /// int8, rounded per token, as BitNet b1.58 is trained.
    #[default]
    Int8,
    /// Four bits, rounded per token, as BitNet a4.8 and v2 have them ([`Rounding::Int4`]).
    Int4,
    /// Float, as models are defined of which only the weights were made ternary.
    Float,
}

impl std::fmt::Display for ActivationType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Float => "float",
        })
    }
}

impl ActivationType {
    /// How inputs of ternary layers are rounded; `None`: not at all.
    pub fn rounding(self) -> Option<Rounding> {
        match self {
            Self::Int8 => Some(Rounding::Int8),
            Self::Int4 => Some(Rounding::Int4),
            Self::Float => None,
        }
    }
}

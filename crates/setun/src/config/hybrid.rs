//! Models in which gated DeltaNet layers stand between attention layers: which layers, their shape, and the order of their heads.

use super::value_error;
use crate::error::ModelError;
use crate::ops::DeltaNet;

/// Tokens that a gated DeltaNet's convolution may see at most.
pub const MAX_CONV_KERNEL: usize = 16;
/// The state of a head is the square of this; published models have 128.
const MAX_HEAD: usize = 512;
/// Value heads times their width, 6144 in the largest published model: a small file must not ask for gigabytes of state.
const MAX_INNER: usize = 1 << 16;

/// Which of a gated DeltaNet's value heads read the same key head, of `k` key heads with `r` value heads each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadOrder {
    /// Neighbours: value head `j` reads key head `j / r`. How models are trained and Hugging Face stores them.
    Grouped,
    /// Every `k`-th: value head `j` reads key head `j mod k`. How GGUF stores them.
    Tiled,
}

impl HeadOrder {
    /// For every head in this order, its place in the order `from`.
    pub(crate) fn places(self, from: Self, key_heads: usize, value_heads: usize) -> Vec<usize> {
        let each = value_heads / key_heads.max(1);
        let place = |head: usize| match (self, from) {
            (Self::Grouped, Self::Tiled) => head % each * key_heads + head / each,
            (Self::Tiled, Self::Grouped) => head % key_heads * each + head / key_heads,
            _ => head,
        };
        (0..value_heads).map(place).collect()
    }
}

/// The gated DeltaNet layers of a model; all have one shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hybrid {
    /// Whether each layer is a gated DeltaNet; the others are attention.
    pub layers: Vec<bool>,
    /// Query and key heads.
    pub key_heads: usize,
    /// Value heads, a multiple of the key heads.
    pub value_heads: usize,
    /// Width of one head, of keys and values alike.
    pub head_dim: usize,
    /// Tokens that the convolution sees, the current one included.
    pub conv_kernel: usize,
    /// Order of the value heads in which the model is run.
    pub order: HeadOrder,
    /// Blocks behind the model's own that only draft tokens; they are not run.
    pub draft_layers: usize,
    /// Rotary pairs for time, height and width. In text all three positions are one, so files alone need this.
    pub rope_sections: Vec<u32>,
}

impl Hybrid {
    /// The shape of layer `layer`, `None` where it is attention.
    pub fn layer(&self, layer: usize) -> Option<DeltaNet> {
        self.layers.get(layer).copied().unwrap_or(false).then_some(DeltaNet {
            layer,
            key_heads: self.key_heads,
            value_heads: self.value_heads,
            head_dim: self.head_dim,
            conv_kernel: self.conv_kernel,
            order: self.order,
        })
    }

    /// Bytes of the state of all layers, which does not grow with the context.
    pub fn state_bytes(&self) -> usize {
        (0..self.layers.len())
            .filter_map(|n| self.layer(n))
            .map(|net| 4 * net.state_len().iter().sum::<usize>())
            .sum()
    }

    pub(super) fn check(&self, layers: usize) -> Result<(), ModelError> {
        let sizes = [
            ("linear_num_key_heads / ssm.group_count", self.key_heads, 1 << 12),
            ("linear_num_value_heads / ssm.time_step_rank", self.value_heads, 1 << 12),
            ("linear_key_head_dim / ssm.state_size", self.head_dim, MAX_HEAD),
            ("linear_conv_kernel_dim / ssm.conv_kernel", self.conv_kernel, MAX_CONV_KERNEL),
        ];
        for (field, value, most) in sizes {
            if value == 0 || value > most {
                return Err(value_error(field, value, format!("a number from 1 to {most}")));
            }
        }
        if !self.value_heads.is_multiple_of(self.key_heads) {
            let expected =
                format!("a multiple of linear_num_key_heads / ssm.group_count = {}", self.key_heads);
            return Err(value_error(
                "linear_num_value_heads / ssm.time_step_rank",
                self.value_heads,
                expected,
            ));
        }
        if self.value_heads * self.head_dim > MAX_INNER {
            let found = format!("{} of width {}", self.value_heads, self.head_dim);
            let expected = format!("at most {MAX_INNER} values in all");
            return Err(value_error("linear_num_value_heads / ssm.time_step_rank", found, expected));
        }
        match self.layers.len() == layers {
            true => Ok(()),
            false => Err(value_error("layer_types", self.layers.len(), format!("{layers} layers"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_order_of_heads_undoes_the_other() {
        let [grouped, tiled] =
            [(HeadOrder::Grouped, HeadOrder::Tiled), (HeadOrder::Tiled, HeadOrder::Grouped)]
                .map(|(to, from)| to.places(from, 2, 6));
        // Key head 0 has value heads 0, 2 and 4 of the tiled order.
        assert_eq!(grouped, [0, 2, 4, 1, 3, 5]);
        assert_eq!(tiled, [0, 3, 1, 4, 2, 5]);
        assert_eq!(grouped.iter().map(|&j| tiled[j]).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        assert_eq!(HeadOrder::Tiled.places(HeadOrder::Tiled, 2, 4), [0, 1, 2, 3]);
    }

    #[test]
    fn shapes_whose_state_would_dwarf_their_weights_are_refused() {
        let of = |value_heads, head_dim| Hybrid {
            layers: vec![true],
            key_heads: 1,
            value_heads,
            head_dim,
            conv_kernel: 4,
            order: HeadOrder::Grouped,
            draft_layers: 0,
            rope_sections: Vec::new(),
        };
        assert!(of(48, 128).check(1).is_ok() && of(128, 512).check(1).is_ok());
        for (wrong, named) in [(of(129, 512), "time_step_rank"), (of(1, 513), "state_size")] {
            let error = wrong.check(1).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        assert!(of(48, 128).check(2).unwrap_err().to_string().contains("layer_types"));
    }

    #[test]
    fn heads_are_permuted_as_the_publishers_program_permutes_them() {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/bonsai/transform/transform.safetensors");
        let file = crate::format::Checkpoint::open(path).unwrap();
        for case in ["perm0", "perm1"] {
            let floats = |part: &str| file.tensor(&format!("{case}.{part}")).unwrap().to_f32().unwrap();
            let dims = file.tensor(&format!("{case}.dims_hd_nk_rep")).unwrap();
            let dims: Vec<usize> =
                dims.data.as_chunks::<8>().0.iter().map(|&n| u64::from_le_bytes(n) as usize).collect();
            let [width, key_heads, each] = dims[..] else { panic!("{dims:?}") };
            let (tiled, grouped) = (floats("tiled"), floats("grouped"));
            let places = HeadOrder::Grouped.places(HeadOrder::Tiled, key_heads, key_heads * each);
            let found: Vec<f32> =
                places.iter().flat_map(|&head| tiled[head * width..(head + 1) * width].to_vec()).collect();
            assert_eq!(found, grouped, "{case}");
            assert_ne!(tiled, grouped);
        }
    }
}

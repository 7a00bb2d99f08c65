//! MLX's own section of a `config.json`.

use serde_json::{Map, Value};

use super::need;
use crate::config::{ActivationType, Numerics, Storage, Ternary, value_error};
use crate::error::ModelError;

/// What MLX's `quantization` section says: one group size for all packed layers, in two bits.
pub(super) fn numerics(section: &Map<String, Value>) -> Result<Numerics, ModelError> {
    let field = |key: &str| format!("quantization.{key}");
    let size = |key: &str| need(section.get(key).and_then(Value::as_u64), &field(key));
    let bits = size("bits")?;
    if bits != 2 {
        return Err(value_error(
            &field("bits"),
            bits,
            "2: ternary weights are what is read of MLX's formats",
        ));
    }
    if let Some(mode) = section.get("mode").filter(|mode| mode.as_str() != Some("affine")) {
        return Err(value_error(&field("mode"), mode, "`affine` or absent"));
    }
    let group = size("group_size")?;
    // Settings of single layers: left out (false), or as all others.
    for (layer, own) in section.iter().filter(|(_, own)| own.is_object()) {
        let same = |key: &str, all: u64| own.get(key).is_none_or(|v| v.as_u64() == Some(all));
        if !same("bits", bits) || !same("group_size", group) {
            return Err(value_error(
                &field(layer),
                own,
                format!("{bits} bits in groups of {group}, as all layers have"),
            ));
        }
    }
    let group = usize::try_from(group).unwrap_or(usize::MAX);
    let storage = Storage::Mlx { group };
    Ok(Numerics::Ternary(Ternary { activations: ActivationType::Float, storage, exceptions: None }))
}

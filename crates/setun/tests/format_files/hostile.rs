//! Damaged files: whatever the bytes, opening them ends, without a panic and without absurd memory.

use proptest::prelude::*;

use super::{gguf, llama2c, open, safetensors};

/// Opens bytes and reads every tensor; both may fail, neither may panic.
fn survive(bytes: &[u8]) -> bool {
    let Ok(file) = open(bytes) else { return false };
    for info in file.tensors() {
        if let Ok(tensor) = file.tensor(&info.name) {
            let (_, _, _) = (tensor.to_f32(), tensor.to_ternary(), tensor.to_dense());
        }
    }
    true
}

/// A valid file of each kind.
fn samples() -> [Vec<u8>; 6] {
    let (float, ternary) = (llama2c::legacy(false), llama2c::ternary());
    [gguf::valid(), gguf_ternary(), gguf_blocks(), safetensors::valid(), float, ternary]
}

/// Every type that is read, one after another; of type 42 more than a block, so that its groups are settled.
fn gguf_blocks() -> Vec<u8> {
    // Type, rows of 256 weights, bytes.
    let tensors: [(u32, u64, usize); 20] = [
        (2, 1, 144),
        (3, 1, 160),
        (6, 1, 176),
        (7, 1, 192),
        (10, 1, 84),
        (11, 1, 110),
        (12, 1, 144),
        (13, 1, 176),
        (14, 1, 210),
        (20, 1, 144),
        (24, 1, 256),
        (30, 1, 512),
        (39, 1, 136),
        (41, 1, 36),
        (42, 8, 576),
        (134, 2, 108),
        (135, 2, 136),
        (142, 1, 68),
        (143, 1, 56),
        (0, 1, 1024),
    ];
    let (mut builder, mut offset) = (gguf::Builder::new(3, tensors.len() as u64, 0), 0);
    for (id, rows, bytes) in tensors {
        builder = builder.tensor(&format!("t{id}"), &[256, rows], id, offset as u64);
        offset += bytes.next_multiple_of(32);
    }
    builder.data(32, offset)
}

fn gguf_ternary() -> Vec<u8> {
    let builder = gguf::Builder::new(3, 4, 1).text("general.alignment").u32(4).u32(64);
    let builder = builder.tensor("a", &[256], 34, 0).tensor("b", &[256], 35, 64);
    builder.tensor("c", &[128, 2], 36, 192).tensor("d", &[32, 1], 8, 320).data(64, 384)
}

#[test]
fn every_sample_is_valid_and_every_truncation_of_it_is_refused() {
    for bytes in samples() {
        assert!(survive(&bytes));
        // GGUF allows padding after the last tensor, so the last bytes may be spare.
        let spare = bytes.len() - 64;
        for length in 0..bytes.len() {
            let opened = survive(&bytes[..length]);
            assert!(!opened || length >= spare && bytes.starts_with(b"GGUF"), "{length} of {}", bytes.len());
        }
    }
}

#[test]
fn every_header_byte_may_take_any_of_its_neighbours_values() {
    for bytes in samples() {
        let header = bytes.len().min(512);
        let mut changed = bytes.clone();
        for at in 0..header {
            for flip in [1u8, 2, 4, 8, 16, 32, 64, 128, 255] {
                changed[at] = bytes[at] ^ flip;
                survive(&changed);
            }
            changed[at] = bytes[at];
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        survive(&bytes);
        survive(&[b"GGUF\x03\0\0\0", &bytes[..]].concat());
        let header = String::from_utf8_lossy(&bytes).into_owned();
        survive(&safetensors::file(&format!("{{{header}}}"), 16));
        survive(&[b"24ka\x01\0\0\0", &bytes[..]].concat());
    }

    #[test]
    fn mutated_files_are_survived(
        kind in 0usize..6,
        edits in proptest::collection::vec((0.0f64..1.0, any::<u8>()), 1..8),
        cut in 0.0f64..1.3,
    ) {
        let mut bytes = samples()[kind].clone();
        let length = bytes.len();
        for (place, value) in edits {
            bytes[(place * length as f64) as usize] = value;
        }
        bytes.truncate((cut * length as f64) as usize);
        survive(&bytes);
    }

    #[test]
    fn mutated_numbers_are_survived(
        at in 0usize..300,
        value in prop_oneof![Just(u64::MAX), Just(1 << 63), Just(1 << 40), Just(0), any::<u64>()],
    ) {
        for mut bytes in samples() {
            if at + 8 <= bytes.len() {
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
                survive(&bytes);
            }
        }
    }

    #[test]
    fn any_safetensors_entry_is_survived(
        shape in proptest::collection::vec(any::<u64>(), 0..4),
        offsets in any::<[u64; 2]>(),
        dtype in prop_oneof![Just("F32"), Just("U8"), Just("F4"), Just("NOPE")],
    ) {
        let entry = format!(
            r#"{{"w":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}}}"#
        );
        survive(&safetensors::file(&entry, 32));
    }
}

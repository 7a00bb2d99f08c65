//! The types of the Bonsai releases against golden/bonsai-blocks, and encoding them.

use proptest::prelude::*;
use setun::format::{
    Checkpoint, Encoding, Scaling, Tensor, TensorSpec, encode_floats, encode_ternary, mlx_to_ternary,
};
use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::golden;

fn fixture() -> Checkpoint {
    Checkpoint::open(golden("bonsai-blocks/blocks.safetensors")).unwrap()
}

fn tensor<'a>(shape: &[usize], encoding: Encoding, bytes: &'a [u8]) -> Tensor<'a> {
    Tensor::new(TensorSpec { name: "w".into(), shape: shape.to_vec(), encoding }, bytes)
}

/// Bits, with one spelling of zero: the fixture does not say which a product with 0 has.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if *v == 0.0 { 0 } else { v.to_bits() }).collect()
}

/// Name in the fixture, type, weights in a block.
const TYPES: [(&str, Encoding, usize); 7] = [
    ("q1_0", Encoding::Q1_0, 128),
    ("q2_0_g64", Encoding::Q2_0G64, 64),
    ("q2_0_g128", Encoding::Q2_0G128, 128),
    ("q2_0_g128", Encoding::PQ2_0, 128),
    ("ptq1_0", Encoding::PTQ1_0, 128),
    ("tq1_0", Encoding::TQ1_0, 256),
    ("tq2_0", Encoding::TQ2_0, 256),
];

#[test]
fn every_type_decodes_to_the_reference_values_whatever_its_scales_and_codes() {
    let file = fixture();
    for (name, encoding, cols) in TYPES {
        let raw = file.tensor(&format!("{name}.raw")).unwrap();
        let expected = file.tensor(&format!("{name}.f32")).unwrap().to_f32().unwrap();
        let read = tensor(&[24, cols], encoding, &raw.data);
        assert_eq!(bits(&read.to_f32().unwrap()), bits(&expected), "{name}");
    }
}

#[test]
fn ternary_matrices_hold_the_same_values_and_fourth_codes_are_refused_with_their_count() {
    let file = fixture();
    for (name, encoding, cols) in TYPES {
        let raw = file.tensor(&format!("{name}.raw")).unwrap();
        let values = file.tensor(&format!("{name}.f32")).unwrap().to_f32().unwrap();
        let twos = |range: std::ops::Range<usize>| match file.find(&format!("{name}.codes")).unwrap() {
            // Under a scale of 0 a fourth code is a zero like any other.
            Some(codes) => range.filter(|&i| codes.data[i] == 3 && values[i] != 0.0).count(),
            None => 0,
        };
        let width = raw.data.len() / 24;
        let read = |rows: std::ops::Range<usize>| {
            let bytes = &raw.data[rows.start * width..rows.end * width];
            tensor(&[rows.len(), cols], encoding.clone(), bytes).to_ternary()
        };
        if twos(0..24 * cols) > 0 {
            let error = read(0..24).unwrap_err().to_string();
            assert!(
                error.contains("`w`") && error.contains(&format!("{} weights", twos(0..24 * cols))),
                "{error}"
            );
        }
        let rows = if twos(0..24 * cols) > 0 { 12..24 } else { 0..24 };
        let matrix = read(rows.clone()).unwrap();
        let mut row = vec![0.0; cols];
        for (r, expected) in rows.clone().zip(values[rows.start * cols..].chunks(cols)) {
            matrix.dequantize_row(r - rows.start, &mut row);
            assert_eq!(bits(&row), bits(expected), "{name}, row {r}");
        }
        let Scales::Row(scales) = matrix.scales() else { panic!("{name}: a block fills a row") };
        assert!(scales.iter().all(|s| *s >= 0.0), "{name}: {scales:?}");
        assert_eq!(encoding == Encoding::Q1_0, matrix.zero_fraction() < 0.1, "{name}");
    }
}

#[test]
fn canonical_blocks_encode_to_the_bytes_they_came_from() {
    let file = fixture();
    for (name, encoding, cols) in TYPES {
        let raw = file.tensor(&format!("{name}.raw")).unwrap().data.into_owned();
        let width = raw.len() / 24;
        let (rows, trits): (_, Vec<i8>) = match file.find(&format!("{name}.trits_canonical")).unwrap() {
            Some(trits) => (0..12, trits.data.iter().map(|&t| t as i8).collect()),
            None => match file.find(&format!("{name}.codes")).unwrap() {
                Some(codes) => (12..24, codes.data[12 * cols..].iter().map(|&c| c as i8 - 1).collect()),
                None => continue, // Q1_0 is not written; TQ2_0 has no trits here, and is in gguf-blocks.
            },
        };
        let at = if matches!(encoding, Encoding::PTQ1_0 | Encoding::TQ1_0) { width - 2 } else { 0 };
        let scale = |block: &[u8]| half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let stored = &raw[rows.start * width..rows.end * width];
        let scales = Scales::Row(stored.chunks(width).map(scale).collect());
        let matrix = TernaryMatrix::from_trits(12, cols, &trits, scales).unwrap();
        let bytes = encode_ternary("w", &matrix, &encoding, Scaling::Exact).unwrap();
        assert!(bytes == stored, "{name} as {encoding}");
    }
}

#[test]
fn a_published_row_decodes_to_its_float_release_and_encodes_back() {
    let file = fixture();
    let raw = file.tensor("ffn_gate_row0_ptq1_0").unwrap();
    let expected = file.tensor("ffn_gate_row0_f32").unwrap().to_f32().unwrap();
    let read = tensor(&[1, 5120], Encoding::PTQ1_0, &raw.data);
    assert_eq!(bits(&read.to_f32().unwrap()), bits(&expected));
    let matrix = read.to_ternary().unwrap();
    assert!(matches!(matrix.scales(), Scales::Block { rows: 1, cols: 128, .. }));
    assert!(encode_ternary("w", &matrix, &Encoding::PTQ1_0, Scaling::Exact).unwrap() == raw.data[..]);
    // The groups' scales fit the types with as many or more, and no other.
    for encoding in [Encoding::PQ2_0, Encoding::Q2_0G64, Encoding::Q2_0G128] {
        let bytes = encode_ternary("w", &matrix, &encoding, Scaling::Exact).unwrap();
        let back = tensor(&[1, 5120], encoding.clone(), &bytes);
        assert_eq!(bits(&back.to_f32().unwrap()), bits(&expected), "{encoding}");
    }
    for encoding in [Encoding::TQ1_0, Encoding::TQ2_0, Encoding::I2S] {
        let error = encode_ternary("w", &matrix, &encoding, Scaling::Round).unwrap_err().to_string();
        assert!(error.contains("more than one scale"), "{error}");
    }
}

#[test]
fn scales_that_are_no_number_are_refused_naming_their_block_or_row() {
    let infinity = half::f16::INFINITY.to_le_bytes();
    for (encoding, cols, bytes, at, place) in [
        (Encoding::Q1_0, 256, 36, 18, "block 1"),
        (Encoding::Q2_0G64, 256, 72, 36, "block 2"),
        (Encoding::PQ2_0, 256, 68, 34, "block 1"),
        (Encoding::PTQ1_0, 256, 56, 54, "block 1"),
        (Encoding::IQ1BN, 128, 56, 28, "row 1"),
    ] {
        let mut raw = vec![0u8; bytes];
        raw[at..at + 2].copy_from_slice(&infinity);
        let rows = if cols == 128 { 2 } else { 1 };
        let error = tensor(&[rows, cols], encoding, &raw).to_ternary().unwrap_err().to_string();
        assert!(error.contains(&format!("`w`: {place} has scale inf")), "{error}");
    }
}

#[test]
fn a_group_without_weights_asks_for_no_scale() {
    let mut trits = [0i8; 256];
    trits[3] = -1;
    let scales = Scales::Block { rows: 1, cols: 128, values: vec![0.25, 7.0] };
    let matrix = TernaryMatrix::from_trits(1, 256, &trits, scales).unwrap();
    for encoding in [Encoding::TQ1_0, Encoding::TQ2_0] {
        let bytes = encode_ternary("w", &matrix, &encoding, Scaling::Exact).unwrap();
        let back = tensor(&[1, 256], encoding, &bytes).to_ternary().unwrap();
        assert_eq!((back.codes(), back.scales()), (matrix.codes(), &Scales::Tensor(0.25)));
    }
    let bytes = encode_ternary("w", &matrix, &Encoding::Q2_0G64, Scaling::Exact).unwrap();
    assert_eq!((&bytes[..2], &bytes[18..20]), (&[0, 0x34][..], &[0, 0][..]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_encoded_decodes_to_the_same_matrix(
        trits in proptest::collection::vec(-1i8..=1, 1024),
        scales in proptest::collection::vec(0x0001u16..0x7c00, 16), // Every positive f16.
        kind in 0usize..6,
    ) {
        let (_, encoding, weights) = &TYPES[kind + 1];
        let mut values: Vec<f32> =
            scales[..1024 / weights].iter().map(|&b| half::f16::from_bits(b).to_f32()).collect();
        for (value, block) in values.iter_mut().zip(trits.chunks(*weights)) {
            if block.iter().all(|t| *t == 0) {
                *value = 0.0;
            }
        }
        let scales = Scales::Block { rows: 1, cols: *weights, values };
        let matrix = TernaryMatrix::from_trits(2, 512, &trits, scales).unwrap();
        let bytes = encode_ternary("w", &matrix, encoding, Scaling::Exact).unwrap();
        prop_assert_eq!(Some(bytes.len()), encoding.byte_len(&[2, 512]));
        let read = tensor(&[2, 512], encoding.clone(), &bytes);
        let (back, mut row) = (read.to_ternary().unwrap(), vec![0.0; 512]);
        prop_assert_eq!(back.codes(), matrix.codes());
        let floats = read.to_f32().unwrap();
        for r in 0..2 {
            matrix.dequantize_row(r, &mut row);
            prop_assert_eq!(bits(&row), bits(&floats[r * 512..][..512]));
            back.dequantize_row(r, &mut row);
            prop_assert_eq!(bits(&row), bits(&floats[r * 512..][..512]));
        }
    }

    #[test]
    fn rounding_errors_stay_within_a_step_of_a_block(
        values in proptest::collection::vec(-4.0f32..4.0, 256),
    ) {
        let largest = |part: &[f32]| part.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        // Q8_0 rounds to half a step; the other two may lack the last of 8 or 32 steps on one side. All round scales.
        let types = [(Encoding::Q8_0, 32, 220.0), (Encoding::Q4_0, 32, 7.9), (Encoding::Q6K, 256, 24.0)];
        for (encoding, block, steps) in types {
            let bytes = encode_floats("w", &values, 256, &encoding).unwrap();
            let found = tensor(&[1, 256], encoding.clone(), &bytes).to_f32().unwrap();
            for (before, after) in values.chunks(block).zip(found.chunks(block)) {
                let limit = largest(before) / steps;
                prop_assert!(before.iter().zip(after).all(|(a, b)| (a - b).abs() <= limit), "{}", encoding);
            }
        }
    }
}

/// An MLX weight of 2 × 32 in groups of 16, with these words, scales and biases.
fn mlx(words: [u32; 4], scales: [f32; 4], biases: [f32; 4]) -> Result<TernaryMatrix, String> {
    let words: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let halves =
        |v: [f32; 4]| v.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect::<Vec<u8>>();
    let (scales, biases) = (halves(scales), halves(biases));
    let packed = tensor(&[2, 2], Encoding::Other("U32".into()), &words);
    let (scales, biases) = (tensor(&[2, 2], Encoding::F16, &scales), tensor(&[2, 2], Encoding::F16, &biases));
    mlx_to_ternary(&packed, &scales, &biases, 16).map_err(|e| e.to_string())
}

#[test]
fn mlx_words_are_codes_where_biases_are_negated_scales() {
    let words = [0x1842_9068, 0x5555_5555, 0, 0xaaaa_aaaa];
    let matrix = mlx(words, [0.5, 9.0, 0.25, -2.0], [-0.5, -9.0, -0.25, 2.0]).unwrap();
    let mut rows = vec![0.0; 64];
    rows.chunks_mut(32).enumerate().for_each(|(r, row)| matrix.dequantize_row(r, row));
    for (i, weight) in rows.iter().enumerate() {
        let q = (words[i / 16] >> (2 * (i % 16)) & 3) as f32;
        let (scale, bias) = ([0.5, 9.0, 0.25, -2.0][i / 16], [-0.5, -9.0, -0.25, 2.0][i / 16]);
        assert_eq!(*weight, scale * q + bias, "{i}");
    }
    let same = mlx(words, [0.5; 4], [-0.5; 4]).unwrap();
    assert_eq!(same.scales(), &Scales::Tensor(0.5));
}

#[test]
fn mlx_weights_that_are_not_ternary_are_refused() {
    let zeros = [0x5555_5555; 4];
    let error = mlx([3, 0, 0, 0], [1.0; 4], [-1.0; 4]).unwrap_err();
    assert!(error.contains("`w`: 1 weights"), "{error}");
    let error = mlx(zeros, [1.0; 4], [-1.0, -1.0, -1.0, -0.5]).unwrap_err();
    assert!(error.contains("-0.5 at row 1, group 1") && error.contains("negated scale"), "{error}");
    assert!(mlx(zeros, [f32::NAN; 4], [f32::NAN; 4]).is_err());
    assert!(mlx(zeros, [f32::INFINITY; 4], [f32::NEG_INFINITY; 4]).is_err());
    let bytes = [0u8; 16];
    let words = tensor(&[2, 2], Encoding::Other("U32".into()), &bytes);
    let wide = tensor(&[2, 4], Encoding::F16, &bytes);
    assert!(mlx_to_ternary(&words, &wide, &wide, 16).unwrap_err().to_string().contains("[2, 2] is expected"));
    let narrow = tensor(&[2, 2], Encoding::F16, &bytes[..8]);
    for group in [0, 24, 64] {
        let error = mlx_to_ternary(&words, &narrow, &narrow, group).unwrap_err().to_string();
        assert!(error.contains(&format!("groups of {group}")), "{error}");
    }
    let error = mlx_to_ternary(&narrow, &narrow, &narrow, 16).unwrap_err().to_string();
    assert!(error.contains("U32"), "{error}");
}

//! Block types against golden/gguf-blocks: bytes and values of reference programs.

use setun::format::{
    Checkpoint, Encoding, ScaleConvention, Scaling, Tensor, TensorSpec, encode_floats, encode_hf_packed,
    encode_ternary, hf_packed_to_ternary,
};
use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::golden;

const SHAPE: [usize; 2] = [4, 512];

fn fixture() -> Checkpoint {
    Checkpoint::open(golden("gguf-blocks/blocks.safetensors")).unwrap()
}

fn tensor<'a>(shape: &[usize], encoding: Encoding, bytes: &'a [u8]) -> Tensor<'a> {
    Tensor::new(TensorSpec { name: "w".into(), shape: shape.to_vec(), encoding }, bytes)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The trits and the scale of the fixture's ternary source.
fn ternary_source(file: &Checkpoint) -> (Vec<i8>, f32) {
    let source = file.tensor("ternary.source").unwrap().to_f32().unwrap();
    let scale = source.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(source.iter().all(|v| *v == 0.0 || v.abs() == scale));
    (source.iter().map(|v| if *v == 0.0 { 0 } else { v.signum() as i8 }).collect(), scale)
}

#[test]
fn every_block_type_decodes_to_the_reference_values_bit_for_bit() {
    let file = fixture();
    let cases = [
        ("F16", Encoding::F16),
        ("BF16", Encoding::BF16),
        ("Q4_0", Encoding::Q4_0),
        ("Q4_1", Encoding::Q4_1),
        ("Q5_0", Encoding::Q5_0),
        ("Q5_1", Encoding::Q5_1),
        ("Q8_0", Encoding::Q8_0),
        ("Q2_K", Encoding::Q2K),
        ("Q3_K", Encoding::Q3K),
        ("Q4_K", Encoding::Q4K),
        ("Q5_K", Encoding::Q5K),
        ("Q6_K", Encoding::Q6K),
        ("IQ4_NL", Encoding::IQ4NL),
        ("MXFP4", Encoding::MXFP4),
        ("TQ1_0", Encoding::TQ1_0),
        ("TQ2_0", Encoding::TQ2_0),
        ("TQ1_0.nonternary", Encoding::TQ1_0),
        ("TQ2_0.nonternary", Encoding::TQ2_0),
    ];
    for (name, encoding) in cases {
        let bytes = file.tensor(&format!("{name}.bytes")).unwrap().data.into_owned();
        let expected = file.tensor(&format!("{name}.f32")).unwrap().to_f32().unwrap();
        let read = tensor(&SHAPE, encoding.clone(), &bytes);
        assert_eq!(bits(&read.to_f32().unwrap()), bits(&expected), "{name}");
        if encoding.is_float() {
            let (dense, mut row) = (read.to_dense().unwrap(), vec![0.0; SHAPE[1]]);
            dense.row_f32(3, &mut row);
            assert_eq!(bits(&row), bits(&expected[3 * SHAPE[1]..]), "{name}");
        }
    }
}

#[test]
fn types_with_a_scale_per_row_decode_to_the_reference_weights() {
    let file = fixture();
    let (trits, scale) = ternary_source(&file);
    let expected = |scale| TernaryMatrix::from_trits(4, 512, &trits, Scales::Tensor(scale)).unwrap();
    for (name, encoding, scale) in
        [("IQ2_BN", Encoding::IQ2BN, scale), ("IQ1_BN", Encoding::IQ1BN, half::f16::from_f32(scale).to_f32())]
    {
        let bytes = file.tensor(&format!("{name}.bytes")).unwrap().data.into_owned();
        let read = tensor(&SHAPE, encoding.clone(), &bytes);
        assert_eq!(read.to_ternary().unwrap(), expected(scale), "{name}");
        let weights: Vec<f32> = trits.iter().map(|&t| f32::from(t) * scale).collect();
        assert_eq!(bits(&read.to_f32().unwrap()), bits(&weights), "{name}");
        // A row of another scale keeps its own, and a negative one turns its signs.
        let mut changed = bytes.clone();
        let width = bytes.len() / 4;
        let negative = if encoding == Encoding::IQ1BN { vec![0, 0xb8] } else { vec![0, 0, 0, 0xbf] }; // -0.5
        changed[2 * width..][..negative.len()].copy_from_slice(&negative);
        let matrix = tensor(&SHAPE, encoding, &changed).to_ternary().unwrap();
        assert_eq!(matrix.scales(), &Scales::Row(vec![scale, scale, 0.5, scale]), "{name}");
        let signs = |c: usize| (matrix.trit(1, c), -matrix.trit(2, c));
        assert!((0..512).all(|c| signs(c) == (trits[512 + c], trits[1024 + c])), "{name}");
    }
}

#[test]
fn every_layout_of_i2_s_decodes_to_the_same_matrix() {
    let file = fixture();
    let (trits, scale) = ternary_source(&file);
    let expected = TernaryMatrix::from_trits(4, 512, &trits, Scales::Tensor(scale)).unwrap();
    let cases = [("x86", Encoding::I2S), ("neon", Encoding::I2SNeon), ("rows4", Encoding::I2SRows4)];
    for (name, encoding) in cases {
        let mut bytes = file.tensor(&format!("I2_S.{name}.bytes")).unwrap().data.into_owned();
        assert_eq!(tensor(&SHAPE, encoding.clone(), &bytes).to_ternary().unwrap(), expected, "{name}");
        bytes[515] ^= 0x80; // The sign of the scale.
        let mut turned = vec![0.0; 2048];
        let negative = tensor(&SHAPE, encoding, &bytes).to_ternary().unwrap();
        turned.chunks_mut(512).enumerate().for_each(|(r, row)| negative.dequantize_row(r, row));
        assert_eq!(negative.scales(), &Scales::Tensor(scale));
        assert!(turned.iter().zip(&trits).all(|(v, &t)| *v == -f32::from(t) * scale), "{name}");
    }
    // Interleaved rows may have any length, but come in fours.
    let mut bytes = vec![0b10_01_00_10u8; 5 + 32];
    bytes[5..9].copy_from_slice(&2f32.to_le_bytes());
    let weights = tensor(&[4, 5], Encoding::I2SRows4, &bytes).to_f32().unwrap();
    assert_eq!(weights, [[2.0; 5], [0.0; 5], [-2.0; 5], [2.0; 5]].concat());
    assert!(tensor(&[5, 4], Encoding::I2SRows4, &bytes).to_ternary().is_err());
}

#[test]
fn floats_encode_to_the_reference_bytes() {
    let file = fixture();
    let source = file.tensor("source").unwrap().to_f32().unwrap();
    for encoding in [Encoding::F16, Encoding::BF16, Encoding::Q8_0, Encoding::Q4_0] {
        let bytes = encode_floats("w", &source, SHAPE[1], &encoding).unwrap();
        let expected = file.tensor(&format!("{encoding}.bytes")).unwrap();
        assert!(bytes == expected.data[..], "{encoding}");
    }
}

#[test]
fn rounding_to_few_bits_loses_no_more_than_the_reference_does() {
    let file = fixture();
    let source = file.tensor("source").unwrap().to_f32().unwrap();
    let rmse = |values: &[f32]| {
        let squares = values.iter().zip(&source).map(|(a, b)| f64::from(a - b).powi(2));
        (squares.sum::<f64>() / source.len() as f64).sqrt()
    };
    for encoding in [Encoding::Q4_0, Encoding::Q6K] {
        let bytes = encode_floats("w", &source, SHAPE[1], &encoding).unwrap();
        let ours = rmse(&tensor(&SHAPE, encoding.clone(), &bytes).to_f32().unwrap());
        let theirs = rmse(&file.tensor(&format!("{encoding}.f32")).unwrap().to_f32().unwrap());
        assert!(ours <= 1.05 * theirs, "{encoding}: {ours} against {theirs}");
    }
}

#[test]
fn zeros_and_blocks_of_one_value_survive_rounding() {
    for encoding in [Encoding::Q8_0, Encoding::Q4_0, Encoding::Q6K] {
        for value in [0.0f32, 0.5, -2.0, 1e-30] {
            let mut values = [0.0; 512];
            values[256..].fill(value);
            let bytes = encode_floats("w", &values, 256, &encoding).unwrap();
            let found = tensor(&[2, 256], encoding.clone(), &bytes).to_f32().unwrap();
            assert!(found[..256].iter().all(|v| *v == 0.0), "{encoding}");
            let near =
                |v: &f32| (v - value).abs() <= value.abs() * 1e-3 || value.abs() < 1e-20 && v.abs() < 1e-20;
            assert!(found[256..].iter().all(near), "{encoding}, {value}: {}", found[256]);
        }
        let huge = encode_floats("w", &[3e38; 256], 256, &encoding).unwrap_err().to_string();
        assert!(huge.contains("block 0") && huge.contains("beyond its range"), "{huge}");
        let mut values = [1.0f32; 256];
        values[0] = f32::NAN; // Followed by numbers: still found.
        let error = encode_floats("w", &values, 256, &encoding).unwrap_err().to_string();
        assert!(error.contains("block 0") && error.contains("NaN"), "{error}");
        assert!(encode_floats("w", &[0.0; 40], 40, &encoding).is_err());
    }
}

#[test]
fn ternary_matrices_encode_to_the_reference_bytes() {
    let file = fixture();
    let (trits, scale) = ternary_source(&file);
    let matrix = TernaryMatrix::from_trits(4, 512, &trits, Scales::Tensor(scale)).unwrap();
    for encoding in [Encoding::TQ1_0, Encoding::TQ2_0] {
        let bytes = encode_ternary("w", &matrix, &encoding, Scaling::Round).unwrap();
        let expected = file.tensor(&format!("{encoding}.bytes")).unwrap();
        assert!(bytes == expected.data[..], "{encoding}");
    }
    // The 28 bytes after the scale are unspecified.
    let bytes = encode_ternary("w", &matrix, &Encoding::I2S, Scaling::Exact).unwrap();
    let expected = file.tensor("I2_S.x86.bytes").unwrap();
    assert_eq!(bytes.len(), expected.data.len());
    assert!(bytes[..516] == expected.data[..516]);
    let decoded = tensor(&SHAPE, Encoding::I2S, &expected.data).to_ternary().unwrap();
    assert_eq!(decoded, matrix);
}

#[test]
fn equal_block_scales_collapse_to_one_and_different_ones_do_not() {
    let mut trits = vec![0i8; 3 * 512];
    (trits[0], trits[700], trits[1024]) = (1, -1, 1); // Three of six blocks hold a weight.
    let matrix = TernaryMatrix::from_trits(3, 512, &trits, Scales::Tensor(0.25)).unwrap();
    for encoding in [Encoding::TQ1_0, Encoding::TQ2_0] {
        let bytes = encode_ternary("w", &matrix, &encoding, Scaling::Exact).unwrap();
        let decoded = tensor(&[3, 512], encoding.clone(), &bytes).to_ternary().unwrap();
        assert_eq!(decoded, matrix, "{encoding}");
    }
    let values = vec![0.5, 1.0, 2.0, 0.25, 4.0, 1.0];
    let blocks = Scales::Block { rows: 1, cols: 256, values };
    let matrix = TernaryMatrix::from_trits(3, 512, &trits, blocks).unwrap();
    let bytes = encode_ternary("w", &matrix, &Encoding::TQ2_0, Scaling::Exact).unwrap();
    let decoded = tensor(&[3, 512], Encoding::TQ2_0, &bytes).to_ternary().unwrap();
    // Blocks without a weight store 0, as their type's quantiser does.
    let kept = Scales::Block { rows: 1, cols: 256, values: vec![0.5, 0.0, 2.0, 0.0, 4.0, 0.0] };
    assert_eq!((decoded.codes(), decoded.scales()), (matrix.codes(), &kept));
    let zeros = TernaryMatrix::from_trits(1, 256, &[0; 256], Scales::Tensor(3.0)).unwrap();
    let bytes = encode_ternary("w", &zeros, &Encoding::TQ1_0, Scaling::Exact).unwrap();
    let decoded = tensor(&[1, 256], Encoding::TQ1_0, &bytes).to_ternary().unwrap();
    assert_eq!((decoded.zero_fraction(), decoded.scales()), (1.0, &Scales::Tensor(1.0)));
}

#[test]
fn weights_of_a_block_with_scale_zero_are_zero_whatever_their_codes() {
    let mut bytes = vec![0b10_10_10_10u8; 132];
    bytes[64..66].copy_from_slice(&[0, 0]);
    bytes[130..132].copy_from_slice(&half::f16::from_f32(2.0).to_le_bytes());
    let matrix = tensor(&[1, 512], Encoding::TQ2_0, &bytes).to_ternary().unwrap();
    assert_eq!((matrix.trit(0, 0), matrix.trit(0, 256)), (0, 1));
    assert_eq!(matrix.scales(), &Scales::Tensor(2.0));
}

#[test]
fn codes_that_are_no_trit_and_scales_that_are_no_number_are_refused() {
    let mut bytes = vec![0b01_01_01_01u8; 66];
    bytes[64..66].copy_from_slice(&half::f16::ONE.to_le_bytes());
    bytes[3] = 0b11_01_11_01;
    let bad = tensor(&[1, 256], Encoding::TQ2_0, &bytes);
    let error = bad.to_ternary().unwrap_err().to_string();
    assert!(error.contains("`w`") && error.contains("2 weights"), "{error}");
    assert_eq!(bad.to_f32().unwrap()[32 + 3], 2.0); // The plain decoder gives what the type says.
    bytes[64..66].copy_from_slice(&half::f16::NAN.to_le_bytes());
    let error = tensor(&[1, 256], Encoding::TQ2_0, &bytes).to_ternary().unwrap_err().to_string();
    assert!(error.contains("block 0 has scale NaN"), "{error}");
    let mut bytes = vec![0u8; 64];
    bytes[7] = 0xff;
    let i2s = tensor(&[1, 128], Encoding::I2S, &bytes);
    assert!(i2s.to_ternary().unwrap_err().to_string().contains("4 weights"));
    assert!(i2s.to_f32().is_err());
    let short = tensor(&[2, 128], Encoding::I2S, &bytes);
    assert!(short.to_ternary().unwrap_err().to_string().contains("64 bytes are no I2_S"));
}

#[test]
fn packed_hugging_face_tensors_match_the_reference_both_ways() {
    let file = fixture();
    let cases = [
        ("edge.pack.ternary", "edge.pack.packed"),
        ("basic.w_ternary", "basic.w_packed_u8"),
        ("batch3d.w_ternary", "batch3d.w_packed_u8"),
    ];
    for (trits, packed) in cases {
        let (trits, packed) = (file.tensor(trits).unwrap(), file.tensor(packed).unwrap());
        let [out, cols] = trits.shape().try_into().unwrap();
        let scale = tensor(&[1], Encoding::F32, &0.5f32.to_le_bytes()).data.into_owned();
        let scale = tensor(&[1], Encoding::F32, &scale);
        let convention = ScaleConvention::Multiply;
        let matrix = hf_packed_to_ternary(&packed, &scale, convention, out, cols).unwrap();
        assert_eq!(matrix, trits.trits_to_ternary(0.5).unwrap());
        // Unpacked values of full shape load as the packed ones do.
        assert_eq!(hf_packed_to_ternary(&trits, &scale, convention, out, cols).unwrap(), matrix);
        let (bytes, stored) =
            encode_hf_packed("w", &matrix, convention, &Encoding::BF16, Scaling::Exact).unwrap();
        assert!(bytes == packed.data[..]);
        assert_eq!(stored, half::bf16::from_f32(0.5).to_le_bytes());
    }
}

#[test]
fn both_scale_conventions_give_the_same_weights() {
    let file = fixture();
    let packed = file.tensor("edge.conv.packed").unwrap();
    let scale = |name: &str| file.tensor(name).unwrap();
    let multiply = scale("edge.conv.autobitlinear_weight_scale");
    let divide = scale("edge.conv.bitlinear_weight_scale");
    let read = |scale, convention| {
        let matrix = hf_packed_to_ternary(&packed, scale, convention, 16, 24).unwrap();
        let &Scales::Tensor(value) = matrix.scales() else { panic!("one scale is stored") };
        (matrix.codes().to_vec(), value)
    };
    let (codes_a, a) = read(&multiply, ScaleConvention::Multiply);
    let (codes_b, b) = read(&divide, ScaleConvention::Divide);
    assert_eq!(codes_a, codes_b);
    assert!((a / b - 1.0).abs() < 1e-6, "{a} and {b}");
}

#[test]
fn a_divided_scale_is_given_back_as_it_was_stored() {
    let trits = TernaryMatrix::from_trits(4, 1, &[1, 0, -1, 1], Scales::Tensor(1.0)).unwrap();
    let (packed, _) =
        encode_hf_packed("w", &trits, ScaleConvention::Multiply, &Encoding::F32, Scaling::Exact).unwrap();
    let packed = tensor(&[1, 1], Encoding::U8, &packed);
    for value in (1..2000).map(|i| half::bf16::from_f32(i as f32 * 0.37)) {
        let bytes = value.to_le_bytes();
        let scale = tensor(&[1], Encoding::BF16, &bytes);
        let matrix = hf_packed_to_ternary(&packed, &scale, ScaleConvention::Divide, 4, 1).unwrap();
        let (_, again) =
            encode_hf_packed("w", &matrix, ScaleConvention::Divide, &Encoding::BF16, Scaling::Exact).unwrap();
        assert_eq!(again, bytes, "{value}");
    }
}

#[test]
fn packed_tensors_of_wrong_shape_scale_or_code_are_refused() {
    let one = 1f32.to_le_bytes();
    let scale = tensor(&[1], Encoding::F32, &one);
    let read = |shape: &[usize], bytes: &[u8], scale: &Tensor<'_>, out| {
        let packed = tensor(shape, Encoding::U8, bytes);
        let matrix = hf_packed_to_ternary(&packed, scale, ScaleConvention::Divide, out, 2);
        matrix.unwrap_err().to_string()
    };
    assert!(read(&[2, 2], &[0; 4], &scale, 4).contains("shape [2, 2], but [1, 2]"));
    assert!(read(&[1, 2], &[0; 2], &scale, 6).contains("multiple of 4"));
    assert!(read(&[1, 2], &[0, 0xff], &scale, 4).contains("4 weights"));
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let bytes = bad.to_le_bytes();
        let scale = tensor(&[1], Encoding::F32, &bytes);
        assert!(read(&[1, 2], &[0; 2], &scale, 4).contains("positive number"));
    }
    let two = [0u8; 8];
    let scales = tensor(&[2], Encoding::F32, &two);
    assert!(read(&[1, 2], &[0; 2], &scales, 4).contains("one number is expected"));
}

#[test]
fn what_a_type_cannot_hold_is_refused_with_the_reason() {
    let matrix = |rows: usize, cols: usize, scales| {
        TernaryMatrix::from_trits(rows, cols, &vec![1; rows * cols], scales).unwrap()
    };
    let refuse = |m: &TernaryMatrix, encoding: Encoding, scaling| {
        encode_ternary("w", m, &encoding, scaling).unwrap_err().to_string()
    };
    let narrow = matrix(1, 192, Scales::Tensor(1.0));
    assert!(refuse(&narrow, Encoding::TQ1_0, Scaling::Exact).contains("not a multiple of 256"));
    assert!(refuse(&narrow, Encoding::I2S, Scaling::Exact).contains("not a multiple of 128"));
    let rows = matrix(2, 256, Scales::Row(vec![1.0, 2.0]));
    assert!(refuse(&rows, Encoding::I2S, Scaling::Exact).contains("more than one scale"));
    assert!(encode_ternary("w", &rows, &Encoding::TQ1_0, Scaling::Exact).is_ok());
    let fine = matrix(1, 256, Scales::Block { rows: 1, cols: 128, values: vec![1.0, 2.0] });
    assert!(refuse(&fine, Encoding::TQ2_0, Scaling::Round).contains("more than one scale"));
    assert!(encode_ternary("w", &fine, &Encoding::PTQ1_0, Scaling::Exact).is_ok());
    assert!(refuse(&fine, Encoding::IQ2BN, Scaling::Exact).contains("not IQ2_BN"));
    let odd = matrix(1, 256, Scales::Tensor(0.1));
    assert!(refuse(&odd, Encoding::TQ2_0, Scaling::Exact).contains("permission to round"));
    assert!(encode_ternary("w", &odd, &Encoding::TQ2_0, Scaling::Round).is_ok());
    let tiny = matrix(1, 256, Scales::Tensor(1e-12));
    assert!(refuse(&tiny, Encoding::TQ2_0, Scaling::Round).contains("half precision"));
    let five = matrix(5, 4, Scales::Tensor(1.0));
    let hf = |m: &TernaryMatrix, encoding| {
        encode_hf_packed("w", m, ScaleConvention::Multiply, &encoding, Scaling::Exact)
            .unwrap_err()
            .to_string()
    };
    assert!(hf(&five, Encoding::F32).contains("multiple of 4"));
    assert!(hf(&matrix(4, 4, Scales::Tensor(0.1)), Encoding::BF16).contains("read back"));
    let error = encode_floats("w", &[1e5], 1, &Encoding::F16).unwrap_err().to_string();
    assert!(error.contains("index 0"), "{error}");
    let error = encode_floats("w", &[f32::NAN; 32], 32, &Encoding::Q8_0).unwrap_err().to_string();
    assert!(error.contains("block 0"), "{error}");
}

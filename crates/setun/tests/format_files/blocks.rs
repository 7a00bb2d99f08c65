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
        ("Q8_0", Encoding::Q8_0),
        ("TQ1_0", Encoding::TQ1_0),
        ("TQ2_0", Encoding::TQ2_0),
        ("TQ1_0.nonternary", Encoding::TQ1_0),
        ("TQ2_0.nonternary", Encoding::TQ2_0),
    ];
    for (name, encoding) in cases {
        let bytes = file.tensor(&format!("{name}.bytes")).unwrap().data.into_owned();
        let expected = file.tensor(&format!("{name}.f32")).unwrap().to_f32().unwrap();
        let found = tensor(&SHAPE, encoding, &bytes).to_f32().unwrap();
        assert_eq!(bits(&found), bits(&expected), "{name}");
    }
}

#[test]
fn floats_encode_to_the_reference_bytes() {
    let file = fixture();
    let source = file.tensor("source").unwrap().to_f32().unwrap();
    for encoding in [Encoding::F16, Encoding::BF16, Encoding::Q8_0] {
        let bytes = encode_floats("w", &source, SHAPE[1], &encoding).unwrap();
        let expected = file.tensor(&format!("{encoding}.bytes")).unwrap();
        assert!(bytes == expected.data[..], "{encoding}");
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

use super::*;

fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// One matrix of each format that can have this many columns.
fn matrices(rows: usize, cols: usize) -> Vec<DenseMatrix> {
    let weights = noise(rows * cols, 11);
    let mut all = vec![
        DenseData::F16(weights.iter().map(|&w| f16::from_f32(w)).collect()),
        DenseData::BF16(weights.iter().map(|&w| bf16::from_f32(w)).collect()),
        DenseData::F32(weights),
    ];
    if cols.is_multiple_of(BLOCK) {
        let blocks = |quants: usize| {
            let mut bytes = Vec::new();
            for block in 0..rows * cols / BLOCK {
                bytes.extend(f16::from_f32(0.01 + block as f32 / 1000.0).to_le_bytes());
                bytes.extend((0..quants).map(|i| (block * 37 + i * 91) as u8));
            }
            bytes
        };
        all.extend([DenseData::Q8_0(blocks(32)), DenseData::Q4_0(blocks(16))]);
    }
    all.into_iter().map(|data| DenseMatrix::new(rows, cols, data).unwrap()).collect()
}

#[test]
fn every_product_has_the_bits_of_dot_for_any_batch_kernel_and_thread_count() {
    let pools = [1, 2, 3, 4].map(Pool::new);
    let shapes =
        [(0, 7), (1, 0), (5, 0), (1, 1), (3, 16), (4, 31), (7, 32), (70, 33), (131, 96), (9, 640), (2, 1600)];
    for (rows, cols) in shapes {
        for matrix in matrices(rows, cols) {
            let mut row = vec![0.0; cols];
            for tokens in [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 20] {
                let x = noise(tokens * cols, 12);
                let mut expected = vec![0.0; tokens * rows];
                for r in 0..rows {
                    matrix.row_f32(r, &mut row);
                    for t in 0..tokens {
                        // Another instruction set than the fastest, so that sets are compared as well.
                        let k = Kernels::available().last().unwrap();
                        expected[t * rows + r] = k.dot(&row, &x[t * cols..(t + 1) * cols]);
                    }
                }
                for k in Kernels::available() {
                    for pool in &pools {
                        let mut out = vec![f32::NAN; tokens * rows];
                        matrix.matmul(k, &x, tokens, &mut out, pool);
                        let same = out.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(
                            same,
                            "{}, {rows} x {cols}, {tokens} tokens, {} threads, {:.60}",
                            k.name(),
                            pool.threads(),
                            format!("{:?}", matrix.data()),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn rows_are_the_stored_values() {
    let q8: Vec<u8> =
        [f16::from_f32(0.5).to_le_bytes().to_vec(), (0..32).map(|i| (i * 8) as u8).collect()].concat();
    let matrix = DenseMatrix::new(1, 32, DenseData::Q8_0(q8)).unwrap();
    let mut row = [0.0; 32];
    matrix.row_f32(0, &mut row);
    let expected: [f32; 32] = std::array::from_fn(|i| 0.5 * f32::from((i * 8) as u8 as i8));
    assert_eq!(row, expected);
    assert_eq!(matrix.bytes(), 34);
    // Sixteen bytes: all nibbles, the high ones in falling order.
    let q4: Vec<u8> =
        [f16::from_f32(0.5).to_le_bytes().to_vec(), (0..16).map(|i| i | (15 - i) << 4).collect()].concat();
    let matrix = DenseMatrix::new(1, 32, DenseData::Q4_0(q4)).unwrap();
    matrix.row_f32(0, &mut row);
    let nibble = |i: usize| if i < 16 { i as f32 } else { 31.0 - i as f32 };
    let expected: [f32; 32] = std::array::from_fn(|i| 0.5 * (nibble(i) - 8.0));
    assert_eq!(row, expected);
    assert_eq!(matrix.bytes(), 18);
    let matrix =
        DenseMatrix::new(2, 1, DenseData::BF16(vec![bf16::from_f32(3.0), bf16::from_f32(-0.25)])).unwrap();
    matrix.row_f32(1, &mut row[..1]);
    assert_eq!(row[0], -0.25);
    assert_eq!(matrix.bytes(), 4);
}

#[test]
fn infinite_and_denormal_weights_are_exact_in_every_instruction_set() {
    let mut weights: Vec<f16> = (0..48).map(|i| f16::from_bits(i * 21)).collect();
    weights[40] = f16::MAX;
    let finite = DenseMatrix::new(1, 48, DenseData::F16(weights.clone())).unwrap();
    weights[3] = f16::INFINITY;
    let infinite = DenseMatrix::new(1, 48, DenseData::F16(weights)).unwrap();
    let (pool, x) = (Pool::new(1), [1e-3; 48]);
    let scalar = Kernels::by_name("scalar").unwrap();
    for k in Kernels::available() {
        let (mut a, mut b) = ([0.0], [0.0]);
        finite.matmul(k, &x, 1, &mut a, &pool);
        finite.matmul(scalar, &x, 1, &mut b, &pool);
        assert_eq!(a, b, "{}", k.name());
        infinite.matmul(k, &x, 1, &mut a, &pool);
        assert_eq!(a, [f32::INFINITY], "{}", k.name());
    }
}

#[test]
fn weights_that_do_not_fit_the_shape_are_refused_with_both_lengths() {
    let error = DenseMatrix::new(3, 5, DenseData::F32(vec![0.0; 14])).unwrap_err().to_string();
    assert!(error.contains("15") && error.contains("14"), "{error}");
    let error = DenseMatrix::new(2, 33, DenseData::Q8_0(vec![0; 68])).unwrap_err();
    assert_eq!(error, DenseError::Blocks { cols: 33 });
    let error = DenseMatrix::new(2, 64, DenseData::Q8_0(vec![0; 135])).unwrap_err();
    assert_eq!(error, DenseError::Length { rows: 2, cols: 64, expected: Some(136), found: 135 });
    let error = DenseMatrix::new(1, 16, DenseData::Q4_0(vec![0; 9])).unwrap_err();
    assert_eq!(error, DenseError::Blocks { cols: 16 });
    let error = DenseMatrix::new(usize::MAX, 2, DenseData::F16(Vec::new())).unwrap_err();
    assert!(error.to_string().contains("larger than memory"), "{error}");
}

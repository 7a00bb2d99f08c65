use super::*;
use crate::dense::DenseData;
use half::{bf16, f16};

/// Gaussian enough: the sum of twelve uniform numbers.
fn numbers(count: usize, mut seed: u64) -> Vec<f32> {
    std::iter::repeat_with(|| (0..12).map(|_| uniform(&mut seed)).sum()).take(count).collect()
}

fn matrix(rows: usize, cols: usize, seed: u64) -> DenseMatrix {
    DenseMatrix::new(rows, cols, DenseData::F32(numbers(rows * cols, seed))).unwrap()
}

/// The four-bit codes and the estimate written out by their definition.
fn estimate(list: &Shortlist, x: &[f32], r: usize) -> f64 {
    let panel = &list.data[r / ROWS * panel_bytes(list.cols)..];
    let (mut at, mut sum) = (0, 0.0);
    for columns in groups(list.cols) {
        let step = bf16_to_f32(u16::from_le_bytes(panel[at + 2 * (r % ROWS)..][..2].try_into().unwrap()));
        at += STEP_BYTES;
        for c in columns.clone() {
            let i = c - columns.start;
            let byte = panel[at + i / TILE_COLS * TILE_BYTES + 4 * (r % ROWS) + i % 4];
            let code = if i % TILE_COLS < 4 { byte & 15 } else { byte >> 4 };
            sum += f64::from(step) * (f64::from(code) - f64::from(list.offsets[c])) * f64::from(x[c]);
        }
        at += columns.len().div_ceil(TILE_COLS) * TILE_BYTES;
    }
    sum
}

#[test]
fn bounds_hold_and_have_the_same_bits_on_every_kernel_and_thread_count() {
    for (rows, cols) in [(1, 1), (63, 7), (65, 256), (200, 300), (130, 1031), (700, 512)] {
        let matrix = matrix(rows, cols, 3);
        let x = numbers(5 * cols, 4);
        let mut expected: Option<(Vec<u32>, Vec<u32>)> = None;
        for kernels in Kernels::available() {
            for threads in [1, 3] {
                let pool = Pool::new(threads);
                let list = Shortlist::new(&matrix, kernels, &pool).unwrap();
                assert_eq!(list.bytes(), shortlist_bytes(rows, cols));
                for tokens in [1, 2, 3, 5] {
                    let mut bounds = Bounds::default();
                    list.bounds(kernels, &x[..tokens * cols], tokens, &mut bounds, &pool);
                    let mut logits = vec![0.0; tokens * rows];
                    matrix.matmul(kernels, &x[..tokens * cols], tokens, &mut logits, &pool);
                    for t in 0..tokens {
                        assert!(bounds.usable(t));
                        let x = &x[t * cols..(t + 1) * cols];
                        for r in 0..rows {
                            let (found, upper) = (bounds.estimates(t)[r], bounds.uppers(t)[r]);
                            assert!(logits[t * rows + r] <= upper, "row {r} of {rows}x{cols}");
                            let close = (upper - found) * 0.1;
                            assert!((f64::from(found) - estimate(&list, x, r)).abs() <= f64::from(close));
                        }
                    }
                    if tokens == 5 {
                        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                        let found = (bits(&bounds.estimates), bits(&bounds.uppers));
                        let expected = expected.get_or_insert_with(|| found.clone());
                        assert!(*expected == found, "{}, {threads} threads, {rows}x{cols}", kernels.name());
                    }
                }
            }
        }
    }
}

#[test]
fn sums_are_exact_at_the_extremes() {
    for byte in [0x00, 0xff, 0xf0, 0x5a] {
        // Steps of 1 before a group's codes.
        let mut panel = 0x3f80u16.to_le_bytes().repeat(ROWS);
        panel.resize(panel_bytes(GROUP), byte);
        for (h, l) in [(127, 127), (-127, -128), (127, -128), (0, 1)] {
            let each = GROUP as i32 / 2 * (i32::from(byte & 15) + i32::from(byte >> 4));
            let whole = each * (256 * i32::from(h) + i32::from(l)) - 5;
            let group = InputGroup { scale: 1.0, whole, rest: 0.0, spread: 0.0, slack: 0.0 };
            let input =
                || Input { usable: true, high: vec![h; GROUP], low: vec![l; GROUP], groups: vec![group] };
            let inputs = [input(), input()];
            for kernels in Kernels::available() {
                for tokens in 1..=MAX_TOKENS {
                    let mut totals = [ZERO; MAX_TOKENS];
                    // SAFETY: a panel and inputs of so many columns, on a set that is there.
                    unsafe { add_panel_of(kernels)(&panel, GROUP, &inputs[..tokens], &mut totals) };
                    for totals in &totals[..tokens] {
                        assert_eq!(totals.estimate, [5.0; ROWS], "{}, byte {byte:#x}", kernels.name());
                    }
                }
            }
        }
    }
}

/// The proof's premise: errors are uniform whatever the weights, so over many rows and inputs the excess over an estimate has the
/// variance that `T` assumes, no more.
#[test]
fn errors_have_the_variance_of_the_proof_for_any_weights() {
    let (rows, cols) = (2048, 512);
    let pool = Pool::new(2);
    let heavy: Vec<f32> = numbers(rows * cols, 8).iter().map(|v| v * v * v).collect();
    let few: Vec<f32> = numbers(rows * cols, 9).iter().map(|v| v.round()).collect();
    let same = vec![0.3; rows * cols];
    for (name, weights) in
        [("gaussian", numbers(rows * cols, 7)), ("heavy", heavy), ("few", few), ("same", same)]
    {
        let matrix = DenseMatrix::new(rows, cols, DenseData::F32(weights)).unwrap();
        let kernels = Kernels::best();
        let list = Shortlist::new(&matrix, kernels, &pool).unwrap();
        let (mut total, mut most, tokens) = (0.0, 0f64, 24);
        for token in 0..tokens {
            let x = numbers(cols, 100 + token);
            let (mut bounds, mut logits) = (Bounds::default(), vec![0.0; rows]);
            list.bounds(kernels, &x, 1, &mut bounds, &pool);
            matrix.matmul(kernels, &x, 1, &mut logits, &pool);
            for r in 0..rows {
                let width = f64::from(bounds.uppers(0)[r] - bounds.estimates(0)[r]);
                let sigmas =
                    f64::from(logits[r] - bounds.estimates(0)[r]) / width * f64::from(WIDTH) * 12f64.sqrt();
                total += sigmas * sigmas;
                most = most.max(sigmas.abs());
            }
        }
        let variance = total / (rows as f64 * tokens as f64);
        // Rows that are equal have one error, hence the wide interval.
        assert!(variance < 2.0 && (name == "same" || variance > 0.7), "{name}: {variance}");
        assert!(most < 6.5, "{name}: {most} standard deviations");
    }
}

#[test]
fn the_largest_weights_and_every_format_are_coded_without_clipping() {
    let pool = Pool::new(1);
    let values = [MAX_WEIGHT, -MAX_WEIGHT, 0.0, 1.0, -1e-30, 1e-7, 65504.0, -65504.0];
    let weights: Vec<f32> = values.iter().cycle().take(70 * 24).copied().collect();
    let f16s: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w.clamp(-65504.0, 65504.0))).collect();
    let forms = [
        DenseData::BF16(weights.iter().map(|&w| bf16::from_f32(w)).collect()),
        DenseData::F16(f16s),
        DenseData::F32(weights),
    ];
    for data in forms {
        let matrix = DenseMatrix::new(70, 24, data).unwrap();
        for kernels in Kernels::available() {
            let list = Shortlist::new(&matrix, kernels, &pool).unwrap();
            let mut row = vec![0.0; 24];
            for (r, c) in [(0, 0), (0, 1), (3, 6), (64, 7), (69, 23)] {
                let mut x = vec![0.0; 24];
                x[c] = 1.0;
                matrix.row_f32(r, &mut row);
                let panel = &list.data[r / ROWS * panel_bytes(24)..];
                let step = panel[2 * (r % ROWS)..][..2].try_into().unwrap();
                let step = f64::from(bf16_to_f32(u16::from_le_bytes(step)));
                let error = estimate(&list, &x, r) - f64::from(row[c]);
                assert!(error.abs() <= step * 0.50001, "{}: {error} of {step}", kernels.name());
            }
        }
    }
}

#[test]
fn what_has_no_bounds_is_refused() {
    let (kernels, pool) = (Kernels::best(), Pool::new(1));
    for bad in [f32::NAN, f32::INFINITY, MAX_WEIGHT * 1.01] {
        let mut weights = vec![0.5; 65 * 40];
        weights[64 * 40 + 39] = bad;
        let matrix = DenseMatrix::new(65, 40, DenseData::F32(weights)).unwrap();
        assert!(Shortlist::new(&matrix, kernels, &pool).is_none(), "{bad}");
    }
    let list = Shortlist::new(&matrix(65, 40, 1), kernels, &pool).unwrap();
    let mut x = vec![0.0; 4 * 40];
    (x[3], x[40 + 1], x[80 + 2]) = (f32::NAN, f32::NEG_INFINITY, 1e10);
    let mut bounds = Bounds::default();
    list.bounds(kernels, &x, 4, &mut bounds, &pool);
    assert!((0..4).all(|t| !bounds.usable(t)));
}

#[test]
fn rows_are_found_by_estimate_and_by_bound() {
    let (kernels, pool) = (Kernels::best(), Pool::new(2));
    for rows in [1, 64, 300, 5000] {
        let matrix = matrix(rows, 96, 5);
        let list = Shortlist::new(&matrix, kernels, &pool).unwrap();
        let (x, mut bounds) = (numbers(2 * 96, 6), Bounds::default());
        list.bounds(kernels, &x, 2, &mut bounds, &pool);
        let mut found = Vec::new();
        for (t, count) in [(0, 1), (1, 40), (1, 100), (0, 6000)] {
            bounds.likeliest(t, count, &mut found);
            assert!(found.len() >= count.min(rows) && found.is_sorted(), "{count} of {rows}");
        }
        for limit in [-1e9, 0.0, 3.0, 1e9] {
            let all: Vec<u32> = (0..rows as u32).filter(|&r| bounds.uppers(1)[r as usize] >= limit).collect();
            assert!(bounds.reaching(1, limit, rows, &mut found));
            assert_eq!(found, all);
            assert_eq!(bounds.reaching(1, limit, all.len().saturating_sub(1), &mut found), all.is_empty());
        }
    }
}

#[test]
fn picked_rows_have_the_bits_of_the_whole_product() {
    for cols in [0, 1, 15, 16, 33, 96, 320] {
        let rows = 90;
        let values = numbers(rows * cols, 2);
        let mut forms = vec![
            DenseData::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            DenseData::BF16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
        ];
        if cols % 32 == 0 {
            let blocks =
                (0..rows * cols / 32 * 34).map(|i| if i % 34 == 1 { 0x2c } else { (i * 7 % 251) as u8 });
            forms.push(DenseData::Q8_0(blocks.collect()));
        }
        forms.push(DenseData::F32(values));
        let x = numbers(cols, 3);
        for data in forms {
            let matrix = DenseMatrix::new(rows, cols, data).unwrap();
            for kernels in Kernels::available() {
                for threads in [1, 3] {
                    let pool = Pool::new(threads);
                    let mut all = vec![0.0; rows];
                    matrix.matmul(kernels, &x, 1, &mut all, &pool);
                    for count in [0usize, 1, 2, 5, 64, 77] {
                        let picked: Vec<u32> = (0..count).map(|i| (i * 37 % rows) as u32).collect();
                        let mut out = vec![0.0; count];
                        matrix.dots(kernels, &x, &picked, &mut out, &pool);
                        for (found, r) in out.iter().zip(&picked) {
                            assert_eq!(
                                found.to_bits(),
                                all[*r as usize].to_bits(),
                                "{}, {cols}",
                                kernels.name()
                            );
                        }
                    }
                }
            }
        }
    }
}

use super::*;
use alloc::vec;

/// A small deterministic generator.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

#[test]
fn weights_round_ties_to_even_and_clamp() {
    // Mean of |w| is exactly 1, so ties stay ties.
    let w = [0.5, -0.5, 1.5, -1.5, 0.75, -0.75, 2.5, 0.0];
    let (q, scale) = quantize_absmean(&w);
    assert_eq!(scale, 1.0);
    assert_eq!(q, [0, 0, 1, -1, 1, -1, 1, 0]);
    assert_eq!(quantize_absmean(&[]), (vec![], 1e-5));
    assert_eq!(quantize_absmean(&[0.0, 0.0, 4e-6]), (vec![0, 0, 0], 1e-5));
}

#[test]
fn every_kernel_and_thread_count_quantises_weights_like_the_definition() {
    for (rows, cols) in [(1, 1), (3, 37), (5, 64), (70, 523), (0, 4), (4, 0)] {
        let w = noise(rows * cols, 5);
        let (q, scale) = quantize_absmean(&w);
        let expected = TernaryMatrix::from_trits(rows, cols, &q, Scales::Tensor(scale)).unwrap();
        for k in Kernels::available() {
            for threads in 1..4 {
                let pool = Pool::new(threads);
                let m = TernaryMatrix::quantize(k, &w, rows, cols, &pool).unwrap();
                assert_eq!(m, expected, "{} {rows}x{cols}", k.name());
            }
        }
    }
    assert!(TernaryMatrix::quantize(Kernels::best(), &[1.0], 1, 2, &Pool::new(1)).is_err());
}

#[test]
fn the_parallel_scale_has_the_same_bits() {
    for n in [0, 1, SUM_CHUNK, SUM_CHUNK * 20 + 11] {
        let w = noise(n, 9);
        let expected = absmean_scale(&w).to_bits();
        assert_eq!(absmean_scale_parallel(&w, &Pool::new(3)).to_bits(), expected);
    }
}

#[test]
fn activations_follow_the_definition_on_every_kernel() {
    for k in Kernels::available() {
        for cols in (0..70).chain([127, 128, 129, 515]) {
            // The largest is 127, so a = 1 and halves are ties.
            let mut x: Vec<f32> = noise(cols * 3, cols as u32);
            x.iter_mut().for_each(|v| *v = (*v * 254.0) as i32 as f32 / 2.0);
            if cols > 1 {
                x[cols - 1] = -127.0;
                x[cols] = 1e-30;
            }
            let mut a = Activations::new();
            a.quantize(k, &x, 3, cols, None);
            for t in 0..3 {
                let row = &x[t * cols..][..cols];
                let m = row.iter().fold(1e-5f32, |m, v| m.max(v.abs()));
                let scale = 127.0 / m;
                let q: Vec<i8> =
                    row.iter().map(|v| (v * scale).round_ties_even().clamp(-128.0, 127.0) as i8).collect();
                assert_eq!(a.row(t), q, "{} cols {cols}", k.name());
                assert_eq!(a.inverse(t), 1.0 / scale);
                assert_eq!(a.sum(t), q.iter().map(|&q| i32::from(q)).sum::<i32>());
                assert!(a.padded_row(t)[cols..].iter().all(|&q| q == 0));
            }
        }
    }
}

#[test]
fn ties_go_to_even() {
    let x = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5];
    for k in Kernels::available() {
        let mut a = Activations::new();
        a.quantize(k, &x, 1, 7, None);
        assert_eq!(a.row(0), [127, 0, 2, 2, 0, -2, -2]);
    }
}

#[test]
fn non_finite_and_zero_tokens_are_defined() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let x = [nan, 1.0, -inf, 1.0, 0.0, -0.0, f32::MAX, -f32::MAX];
    for k in Kernels::available() {
        let mut a = Activations::new();
        a.quantize(k, &x, 4, 2, None);
        assert!(a.inverse(0).is_nan() && a.inverse(1).is_nan());
        assert_eq!((a.row(0), a.row(1), a.row(2)), (&[0, 0][..], &[0, 0][..], &[0, 0][..]));
        assert_eq!(a.inverse(2), 1.0 / (127.0 / 1e-5));
        assert_eq!(a.row(3), [127, -127]);
    }
}

#[test]
fn a_reused_buffer_equals_a_fresh_one_on_any_thread_count() {
    let mut reused = Activations::new();
    for (tokens, cols, threads) in [(9, 8000, 3), (1, 40, 1), (2, 30, 1), (7, 70, 2), (0, 5, 1)] {
        let x = noise(tokens * cols + 1, 3);
        let x = &x[1..]; // Misaligned for vectors.
        let mut fresh = Activations::new();
        fresh.quantize(Kernels::best(), x, tokens, cols, None);
        reused.quantize(Kernels::best(), x, tokens, cols, Some(&Pool::new(threads)));
        for t in 0..tokens {
            assert_eq!(reused.padded_row(t), fresh.padded_row(t));
            assert_eq!(reused.sum(t), fresh.sum(t));
            let from = Activations::from_i8(fresh.row(t), &[fresh.inverse(t)], cols);
            assert_eq!(from.padded_row(0), fresh.padded_row(t));
        }
    }
}

#[test]
fn groups_are_rounded_by_their_own_mean_kept_as_a_half_on_every_kernel_and_thread_count() {
    let (rows, cols, group) = (37, 50, 16);
    let weights: Vec<f32> =
        (0..rows * cols).map(|i| ((i * 7919 % 1000) as f32 - 499.5) * 1e-3 / (1 + i % 5) as f32).collect();
    for kernels in Kernels::available() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let mut found =
                TernaryMatrix::quantize_groups(kernels, &weights, rows, cols, group, &pool).unwrap();
            let check = |found: &TernaryMatrix, weights: &[f32]| {
                let Scales::Block { rows: 1, cols: 16, values } = found.scales() else {
                    panic!("{:?}", found.scales())
                };
                for (r, row) in weights.chunks(cols).enumerate() {
                    for (g, part) in row.chunks(group).enumerate() {
                        let mean = part.iter().map(|w| f64::from(w.abs())).sum::<f64>() / part.len() as f64;
                        let scale = f16::from_f64(mean.max(1e-5)).to_f32();
                        assert!(
                            (values[r * 4 + g] / scale - 1.0).abs() < 1e-3,
                            "{} {scale}",
                            values[r * 4 + g]
                        );
                        assert_eq!(f16::from_f32(values[r * 4 + g]).to_f32(), values[r * 4 + g]);
                        for (i, &w) in part.iter().enumerate() {
                            let expected = (w * (1.0 / values[r * 4 + g])).round_ties_even().clamp(-1.0, 1.0);
                            assert_eq!(f32::from(found.trit(r, g * group + i)), expected);
                        }
                    }
                }
            };
            check(&found, &weights);
            let other: Vec<f32> = weights.iter().rev().map(|w| w * 3.0).collect();
            found.requantize(kernels, &other, &pool);
            check(&found, &other);
        }
    }
    let zeros = TernaryMatrix::quantize_groups(Kernels::best(), &[0.0; 8], 2, 4, 4, &Pool::new(1)).unwrap();
    assert_eq!(zeros.zero_fraction(), 1.0);
    let huge = TernaryMatrix::quantize_groups(Kernels::best(), &[1e30; 4], 1, 4, 4, &Pool::new(1)).unwrap();
    assert!(matches!(huge.scales(), Scales::Block { values, .. } if values == &[f16::MAX.to_f32()]));
}

#[test]
fn four_bits_are_rounded_by_the_mean_and_clamped_on_every_kernel() {
    let cols = 77;
    let mut x: Vec<f32> = (0..4 * cols).map(|i| ((i * 7919 % 1000) as f32 - 499.5) * 1e-2).collect();
    x[..cols].fill(0.0);
    x[cols] = 1e30; // Its token's other codes are 0, its own 7.
    x[3 * cols + 5] = f32::NAN;
    let mut all: Vec<Activations> = Vec::new();
    for kernels in Kernels::available() {
        let mut found = Activations::rounded(Rounding::Int4);
        found.quantize(kernels, &x, 4, cols, Some(&Pool::new(2)));
        for (t, row) in x.chunks(cols).enumerate().take(3) {
            let mean = (row.iter().map(|v| f64::from(v.abs())).sum::<f64>() / cols as f64).max(1e-5);
            assert!((f64::from(found.inverse(t)) / (mean / 7f64.sqrt()) - 1.0).abs() < 1e-6);
            for (&q, &v) in found.row(t).iter().zip(row) {
                let expected = (v * (7f32.sqrt() / mean as f32)).round_ties_even().clamp(-8.0, 7.0);
                assert_eq!(f32::from(q), expected, "{v}");
            }
            assert_eq!(found.sum(t), found.row(t).iter().map(|&q| i32::from(q)).sum::<i32>());
        }
        assert!(found.inverse(3).is_nan() && found.row(3).iter().all(|&q| q == 0));
        all.push(found);
    }
    for other in &all[1..] {
        assert!((0..4).all(|t| other.row(t) == all[0].row(t)));
        assert!((0..3).all(|t| other.inverse(t).to_bits() == all[0].inverse(t).to_bits()));
    }
}

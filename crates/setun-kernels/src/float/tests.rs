use super::*;
use half::f16;

job!(StoreF16 { x: &'a [f32], dst: &'a mut [f16] } -> (), |s| {
    let ((chunks, tail), (dst_chunks, dst_tail)) = (x.as_chunks(), dst.as_chunks_mut());
    for (chunk, dst) in chunks.iter().zip(dst_chunks) {
        s.store_f16(s.load(chunk), dst);
    }
    if !tail.is_empty() {
        let mut padded = [f16::ZERO; LANES];
        s.store_f16(s.load(&chunk_at(tail, 0)), &mut padded);
        dst_tail.copy_from_slice(&padded[..tail.len()]);
    }
});

/// Deterministic values in -1..1, scaled.
fn noise(len: usize, seed: u32, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / 8_388_608.0 * scale - scale
        })
        .collect()
}

/// Lengths around every chunk boundary, and some larger ones.
fn lengths() -> impl Iterator<Item = usize> {
    (0..=50).chain([63, 64, 65, 255, 256, 257, 1000, 2560])
}

/// Values where rounding, overflow and masks happen.
fn extremes(len: usize) -> Vec<f32> {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::MIN_POSITIVE,
        -1e-42,
        1e-45,
        f32::MAX,
        f32::MIN,
        88.7,
        88.8,
        -87.4,
        -103.9,
        -104.1,
        65504.0,
        65520.0,
        1e-8,
        5.960_464_5e-8,
        2.98e-8,
        3.0e-8,
        f32::NEG_INFINITY,
        6.1e-5,
    ];
    (0..len).map(|i| special[(i * 7 + i / 22) % special.len()]).collect()
}

/// Bits, with one representative for all NaN.
fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

/// Distance in units of the last place of the exact result, which has at least denormal spacing.
fn ulp(got: f32, exact: f64) -> f64 {
    let spacing = if exact == 0.0 { -149 } else { (exact.abs().log2().floor() as i32 - 23).max(-149) };
    (f64::from(got) - exact).abs() / 2f64.powi(spacing)
}

#[test]
fn dot_is_sixteen_fused_chains_folded_in_a_fixed_tree() {
    for len in lengths() {
        let (a, b) = (noise(len, 1, 3.0), noise(len, 2, 1e4));
        let mut lanes = [0.0f32; 16];
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            lanes[i % 16] = a.mul_add(*b, lanes[i % 16]);
        }
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
        }
        for k in Kernels::available() {
            assert_eq!(k.dot(&a, &b).to_bits(), lanes[0].to_bits(), "{}, length {len}", k.name());
        }
    }
}

#[test]
fn every_instruction_set_gives_the_bits_of_scalar() {
    let scalar = Kernels::by_name("scalar").unwrap();
    type Operation = fn(&Kernels, &[f32], &[f32]) -> Vec<f32>;
    let operations: [(&str, Operation); 14] = [
        ("dot", |k, a, b| vec![k.dot(a, b)]),
        ("sum_of_squares", |k, a, _| vec![k.sum_of_squares(a)]),
        ("rms_norm", |k, a, b| {
            let mut out = vec![7.0; a.len()];
            k.rms_norm(a, Some(b), 1e-5, &mut out);
            out
        }),
        ("rms_norm without weight", |k, a, _| {
            let mut out = vec![7.0; a.len()];
            k.rms_norm(a, None, 1e-6, &mut out);
            out
        }),
        ("add_assign", |k, a, b| {
            let mut a = a.to_vec();
            k.add_assign(&mut a, b);
            a
        }),
        ("scale_assign", |k, a, _| {
            let mut a = a.to_vec();
            k.scale_assign(&mut a, 0.3);
            a
        }),
        ("silu_gate", |k, a, b| {
            let mut out = vec![7.0; a.len()];
            k.silu_gate(a, b, &mut out);
            out
        }),
        ("sigmoid_gate", |k, a, b| {
            let mut out = vec![7.0; a.len()];
            k.sigmoid_gate(a, b, &mut out);
            out
        }),
        ("relu2_gate", |k, a, b| {
            let mut out = vec![7.0; a.len()];
            k.relu2_gate(a, b, &mut out);
            out
        }),
        ("exp_in_place", |k, a, _| {
            let mut a = a.to_vec();
            k.exp_in_place(&mut a);
            a
        }),
        ("softmax_in_place", |k, a, _| {
            let mut a = a.to_vec();
            k.softmax_in_place(&mut a);
            a
        }),
        ("log_sum_exp", |k, a, _| vec![k.log_sum_exp(a)]),
        ("rope", |k, a, b| {
            let (mut a, pairs) = (a.to_vec(), a.len() / 2);
            k.rope(&mut a, 1, b.len(), &b[..pairs], &b[b.len() - pairs..]);
            a
        }),
        ("store_f16", |k, a, _| {
            let mut half = vec![f16::ZERO; a.len()];
            k.lanes(StoreF16 { x: a, dst: &mut half });
            half.iter().map(|h| h.to_f32()).collect()
        }),
    ];
    for len in lengths() {
        let mut rare = noise(len, 5, 20.0);
        rare.iter_mut().step_by(7).for_each(|x| *x = f32::NAN);
        rare.iter_mut().skip(3).step_by(11).for_each(|x| *x = f32::INFINITY);
        let inputs = [
            (noise(len, 3, 20.0), noise(len, 4, 2.0)),
            (extremes(len), noise(len, 4, 2.0)),
            (noise(len, 3, 1e-41), extremes(len)),
            (rare, extremes(len)),
        ];
        for (name, operation) in operations {
            for (which, (a, b)) in inputs.iter().enumerate() {
                let expected = bits(&operation(scalar, a, b));
                for k in Kernels::available() {
                    let found = bits(&operation(k, a, b));
                    assert_eq!(found, expected, "{name} on {}, length {len}, input {which}", k.name());
                }
            }
        }
    }
}

#[test]
fn exp_is_within_one_ulp_and_the_free_function_has_the_vector_bits() {
    // 1 in 4001 of all finite floats of either sign up to ±110.
    let x: Vec<f32> = (0..110f32.to_bits()).step_by(4001).map(f32::from_bits).flat_map(|x| [x, -x]).collect();
    for k in Kernels::available() {
        let mut y = x.clone();
        k.exp_in_place(&mut y);
        let mut worst = (0.0, 0.0);
        for (&x, &y) in x.iter().zip(&y) {
            assert_eq!(y.to_bits(), exp(x).to_bits(), "{}, e^{x}", k.name());
            let exact = f64::from(x).exp();
            if exact > f64::from(f32::MAX) * (1.0 + 2f64.powi(-25)) {
                assert_eq!(y, f32::INFINITY, "e^{x}");
            } else if ulp(y, exact) > worst.0 {
                worst = (ulp(y, exact), x);
            }
        }
        assert!(worst.0 <= 1.0, "{}: e^{} is {} ulp off", k.name(), worst.1, worst.0);
    }
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-0.0), 1.0);
    assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
    assert!(exp(f32::NAN).is_nan());
}

#[test]
fn logarithm_is_within_one_ulp_from_one_upwards() {
    for i in 0..2_000_000u32 {
        let x = f32::from_bits(1f32.to_bits() + i * 401);
        let exact = f64::from(x).ln();
        assert!(ulp(ln(x), exact) <= 1.0, "ln {x}: {} instead of {exact}", ln(x));
    }
    assert_eq!(ln(1.0), 0.0);
    assert_eq!(ln(0.0), f32::NEG_INFINITY);
    assert_eq!(ln(f32::INFINITY), f32::INFINITY);
    assert!(ln(f32::NAN).is_nan() && ln(-1.0).is_nan());
}

#[test]
fn norms_gates_and_softmax_are_close_to_f64() {
    let k = Kernels::best();
    let (x, w) = (noise(1000, 8, 30.0), noise(1000, 9, 2.0));
    let close = |got: f32, exact: f64, what: &str| {
        assert!(
            (f64::from(got) - exact).abs() <= 1e-6 * exact.abs() + 1e-12,
            "{what}: {got} instead of {exact}"
        );
    };
    let mut out = vec![0.0; 1000];
    k.rms_norm(&x, Some(&w), 1e-5, &mut out);
    let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 1000.0;
    for i in 0..1000 {
        close(out[i], f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]), "rms_norm");
    }
    k.sigmoid_gate(&x, &w, &mut out);
    for (i, &g) in x.iter().enumerate() {
        close(out[i], f64::from(w[i]) / (1.0 + f64::from(-g).exp()), "sigmoid_gate");
    }
    k.silu_gate(&x, &w, &mut out);
    for i in 0..1000 {
        let g = f64::from(x[i]);
        close(out[i], g / (1.0 + (-g).exp()) * f64::from(w[i]), "silu_gate");
    }
    k.relu2_gate(&x, &w, &mut out);
    for i in 0..1000 {
        close(out[i], f64::from(x[i].max(0.0)).powi(2) * f64::from(w[i]), "relu2_gate");
    }
    out.copy_from_slice(&x);
    k.softmax_in_place(&mut out);
    let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
    for i in 0..1000 {
        // The exponent's own rounding (x - max, up to 60) is 2e-6 of the result.
        let exact = f64::from(x[i]).exp() / sum;
        assert!((f64::from(out[i]) - exact).abs() <= 3e-6 * exact, "softmax: {} instead of {exact}", out[i]);
    }
    close(k.log_sum_exp(&x), sum.ln(), "log_sum_exp");
}

#[test]
fn masked_logits_have_probability_zero() {
    for k in Kernels::available() {
        let mut x = [f32::NEG_INFINITY; 19];
        assert_eq!(k.log_sum_exp(&x), f32::NEG_INFINITY);
        k.softmax_in_place(&mut x);
        assert_eq!(bits(&x), [0; 19], "all masked");
        x = [f32::NEG_INFINITY; 19];
        x[17] = -3e38;
        k.softmax_in_place(&mut x);
        assert_eq!(x.iter().sum::<f32>(), 1.0);
        assert_eq!(x[17], 1.0);
        assert_eq!(k.log_sum_exp(&[f32::INFINITY, 0.0]), f32::INFINITY);
        assert!(k.log_sum_exp(&[f32::INFINITY, f32::NAN]).is_nan());
        assert_eq!(k.log_sum_exp(&[]), f32::NEG_INFINITY);
        k.softmax_in_place(&mut []);
    }
}

#[test]
fn argmax_takes_the_first_of_equals_and_never_nan() {
    for k in Kernels::available() {
        assert_eq!(k.argmax(&[]), 0);
        assert_eq!(k.argmax(&[f32::NAN; 20]), 0);
        assert_eq!(k.argmax(&[f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY]), 1);
        for len in [1, 15, 16, 17, 300, 1001] {
            for at in 0..len {
                let mut x = vec![-5.0; len];
                x[at] = 2.0;
                x[len - 1] = 2.0;
                x[at / 2] = if at / 2 == at { 2.0 } else { f32::NAN };
                assert_eq!(k.argmax(&x), at, "{}, length {len}", k.name());
            }
        }
        assert_eq!(k.argmax(&[-1.0, -0.0, 0.0]), 1, "zeros are equal");
    }
}

#[test]
fn rope_turns_half_split_pairs_of_every_head_and_leaves_the_rest() {
    let (heads, head_dim, pairs) = (3, 50, 17);
    let x = noise(heads * head_dim, 6, 4.0);
    let angles: Vec<f32> = (0..pairs).map(|j| 0.1 + j as f32).collect();
    let (cos, sin): (Vec<_>, Vec<_>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    for k in Kernels::available() {
        let mut y = x.clone();
        k.rope(&mut y, heads, head_dim, &cos, &sin);
        for h in 0..heads {
            let (x, y) = (&x[h * head_dim..][..head_dim], &y[h * head_dim..][..head_dim]);
            for j in 0..pairs {
                let (a, b) = (f64::from(x[j]), f64::from(x[j + pairs]));
                let (c, s) = (f64::from(cos[j]), f64::from(sin[j]));
                assert!((f64::from(y[j]) - (a * c - b * s)).abs() < 1e-6, "{}", k.name());
                assert!((f64::from(y[j + pairs]) - (b * c + a * s)).abs() < 1e-6, "{}", k.name());
            }
            assert_eq!(y[2 * pairs..], x[2 * pairs..]);
        }
    }
}

#[test]
fn cache_values_round_to_nearest_even_and_overflow_to_infinity() {
    // Every half float, the values half way to the next one, and their neighbours; NaN included.
    let mut x = Vec::new();
    for h in 0..=u16::MAX {
        let (here, next) =
            (f16::from_bits(h).to_f32_const(), f16::from_bits(h.wrapping_add(1)).to_f32_const());
        let middle = (here + next) / 2.0;
        x.extend([here, middle, middle.next_up(), middle.next_down()]);
    }
    x.extend([65519.0, 65520.0, 1e9, -1e9, 1e-45, f32::MAX]);
    let expected: Vec<u16> = x.iter().map(|&x| f16::from_f32_const(x).to_bits()).collect();
    for k in Kernels::available() {
        let mut half = vec![f16::ZERO; x.len()];
        k.lanes(StoreF16 { x: &x, dst: &mut half });
        for i in 0..x.len() {
            assert_eq!(half[i].to_bits(), expected[i], "{}: {}", k.name(), x[i]);
        }
    }
    assert_eq!(f16::from_f32_const(65519.9), f16::MAX);
    assert_eq!(f16::from_f32_const(65520.0), f16::INFINITY);
}

#[test]
fn hadamard_is_its_definition_and_its_own_inverse_with_the_same_bits_everywhere() {
    for block in [1usize, 2, 8, 16, 32, 128, 1024] {
        let x = noise(3 * block, 8, 2.0);
        let mut first: Option<Vec<u32>> = None;
        for k in Kernels::available() {
            let mut y = x.clone();
            k.hadamard(&mut y, block);
            assert_eq!(first.get_or_insert_with(|| bits(&y)), &bits(&y), "{}, block {block}", k.name());
            for (i, y) in y.iter().enumerate().step_by(1 + block / 16) {
                let (start, row) = (i / block * block, i % block);
                let sign = |j: usize| if (row & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let sum: f64 = (0..block).map(|j| sign(j) * f64::from(x[start + j])).sum();
                let exact = sum / (block as f64).sqrt();
                assert!((f64::from(*y) - exact).abs() < 1e-5, "{}, block {block}: {y}, {exact}", k.name());
            }
            k.hadamard(&mut y, block);
            assert!(y.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-5), "{}, block {block}", k.name());
        }
    }
}

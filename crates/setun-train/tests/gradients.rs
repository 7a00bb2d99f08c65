//! Every operation's backward pass against central differences, and a whole model's.

mod common;

use common::{Bench, noise};
use setun::config::Activation;
use setun::model::Role;
use setun::ops::{Attention, Direction, Linear, Ops, Rotate};
use setun_train::params::{Kind, ParamId};
use setun_train::tape::{Tape, Var};

/// Checks `f`, a function of inputs of the given widths, on `sequences` of `seq_len` tokens: with random `r`, the gradient
/// of `Σ r · f` with respect to every input and parameter.
fn check(
    name: &str,
    bench: &mut Bench,
    [sequences, seq_len]: [usize; 2],
    widths: &[usize],
    f: impl Fn(&mut Tape, &[Var]) -> Vec<Var>,
) {
    let tokens = sequences * seq_len;
    let mut inputs: Vec<Vec<f32>> =
        widths.iter().enumerate().map(|(i, w)| noise(tokens * w, 100 + i as u32)).collect();
    let weight = |i: usize, len: usize| noise(len, 900 + i as u32);

    let objective = |bench: &Bench, inputs: &[Vec<f32>]| -> f64 {
        let mut tape = Tape::forward_only(bench.setting(sequences, seq_len));
        let vars: Vec<Var> = inputs.iter().zip(widths).map(|(x, w)| tape.input(x, *w)).collect();
        let sums = f(&mut tape, &vars).into_iter().enumerate().map(|(i, y)| {
            let r = weight(i, y.values().len());
            y.values().iter().zip(r).map(|(y, r)| f64::from(*y) * f64::from(r)).sum::<f64>()
        });
        sums.sum()
    };

    let mut gradients = bench.gradients();
    let mut tape = Tape::new(bench.setting(sequences, seq_len), &mut gradients);
    let vars: Vec<Var> = inputs.iter().zip(widths).map(|(x, w)| tape.input(x, *w)).collect();
    for (i, y) in f(&mut tape, &vars).into_iter().enumerate() {
        tape.seed(&y, &weight(i, y.values().len()));
    }
    let all: Vec<&Var> = vars.iter().collect();
    let found = tape.backward_to::<4>(std::array::from_fn(|i| all[i.min(all.len() - 1)]));

    const H: f32 = 1e-2;
    for (i, found) in found.iter().enumerate().take(widths.len()) {
        let found = found.as_ref().unwrap_or_else(|| panic!("{name}: input {i} has no gradient"));
        let numeric: Vec<f64> = (0..found.len())
            .map(|at| {
                let mut side = |h: f32| {
                    let old = inputs[i][at];
                    inputs[i][at] = old + h;
                    let value = objective(bench, &inputs);
                    inputs[i][at] = old;
                    value
                };
                (side(H) - side(-H)) / f64::from(2.0 * H)
            })
            .collect();
        common::assert_close(&format!("{name}, input {i}"), found, &numeric, 3e-3);
    }
    for id in bench.ids() {
        let numeric: Vec<f64> = (0..gradients.get(id).len())
            .map(|at| {
                let mut side = |h: f32| {
                    let old = bench.params[id].values[at];
                    bench.set(id, at, old + h);
                    let value = objective(bench, &inputs);
                    bench.set(id, at, old);
                    value
                };
                (side(H) - side(-H)) / f64::from(2.0 * H)
            })
            .collect();
        common::assert_close(
            &format!("{name}, {}", bench.params[id].name),
            gradients.get(id),
            &numeric,
            3e-3,
        );
    }
}

fn linear(matrix: ParamId, bias: Option<ParamId>) -> Linear<ParamId, ParamId> {
    Linear { bias, ..Linear::plain(matrix) }
}

#[test]
fn embedding_adds_up_the_gradients_of_repeated_ids() {
    let mut bench = Bench::new(2);
    let table = bench.matrix("table", 7, 5, Role::Embedding);
    check("embed", &mut bench, [2, 4], &[5], |tape, x| {
        let rows = tape.embed(&table, &[3, 0, 3, 6, 6, 1, 3, 2]);
        vec![tape.add(rows, x[0].clone())]
    });
}

#[test]
fn rms_norm_has_the_gradient_of_its_formula() {
    for width in [3, 16, 37] {
        let mut bench = Bench::new(2);
        let weight = bench.vector("weight", width, Kind::Norm);
        check("rms_norm", &mut bench, [1, 3], &[width], |tape, x| vec![tape.rms_norm(&x[0], &weight, 1e-3)]);
    }
}

#[test]
fn rms_norm_of_heads_adds_up_the_gradients_of_their_shared_weight() {
    let mut bench = Bench::new(2);
    let weight = bench.vector("weight", 8, Kind::Norm);
    check("rms_norm of heads", &mut bench, [1, 3], &[24], |tape, x| {
        let y = tape.rms_norm(&x[0], &weight, 1e-3);
        assert_eq!(y.width(), 24);
        vec![y]
    });
}

#[test]
fn a_rotation_goes_back_by_its_transpose() {
    let signs = [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0];
    for signs in [Some(signs.into()), None] {
        let by = Rotate { block: 4, signs };
        for direction in [Direction::Forward, Direction::Back] {
            check(&format!("rotate {direction:?}"), &mut Bench::new(2), [2, 3], &[12], |tape, x| {
                // Used twice, so that the gradients of a shared input add up.
                let y = tape.rotate(&x[0], &by, direction);
                vec![tape.add(x[0].clone(), y)]
            });
        }
    }
}

#[test]
fn a_group_of_float_linears_adds_up_the_gradients_of_its_input() {
    let mut bench = Bench::new(2);
    let (a, b) = (bench.matrix("a", 5, 6, Role::Float), bench.matrix("b", 3, 6, Role::Float));
    let bias = bench.vector("bias", 3, Kind::Bias);
    check("linear", &mut bench, [2, 3], &[6], |tape, x| {
        tape.linear(&x[0], [&linear(a, None), &linear(b, Some(bias))]).to_vec()
    });
}

#[test]
fn rope_goes_back_by_the_opposite_rotation() {
    let mut bench = Bench::new(2);
    check("rope", &mut bench, [2, 5], &[24], |tape, x| vec![tape.rope(x[0].clone(), 3, 8)]);
}

#[test]
fn attention_has_the_gradient_of_its_formula_with_groups_and_windows() {
    for (heads, kv_heads, window, seq_len) in [
        (2, 2, None, 5),
        (4, 2, None, 7),
        (2, 1, Some(3), 9),
        (1, 1, Some(1), 4),
        (1, 1, None, 70),
        (1, 1, Some(4), 70),
    ] {
        let shape = Attention { layer: 0, heads, kv_heads, head_dim: 4, scale: 0.7, window };
        let widths = [heads * 4, kv_heads * 4, kv_heads * 4];
        check(&format!("attention {shape:?}"), &mut Bench::new(2), [2, seq_len], &widths, |tape, x| {
            vec![tape.attention(x[0].clone(), x[1].clone(), x[2].clone(), shape)]
        });
    }
}

/// Where the documents of two sequences start: one of many tokens, some of one, one that is cut.
fn starts(seq_len: usize) -> Vec<u32> {
    let first = (0..seq_len as u32).map(|i| if i < 2 { i } else { 2 });
    let second = (0..seq_len as u32).map(|i| if i < 4 { 0 } else { 4 });
    first.chain(second).collect()
}

#[test]
fn attention_within_documents_has_the_gradient_of_its_formula() {
    for (heads, kv_heads, window, seq_len) in [(2, 1, None, 7), (2, 2, Some(3), 9), (1, 1, None, 70)] {
        let shape = Attention { layer: 0, heads, kv_heads, head_dim: 4, scale: 0.7, window };
        let widths = [heads * 4, kv_heads * 4, kv_heads * 4];
        check(&format!("attention {shape:?}"), &mut Bench::new(2), [2, seq_len], &widths, |tape, x| {
            tape.documents(&starts(seq_len));
            vec![tape.attention(x[0].clone(), x[1].clone(), x[2].clone(), shape)]
        });
    }
}

#[test]
fn rope_from_the_start_of_each_document_goes_back_by_the_opposite_rotation() {
    check("rope", &mut Bench::new(2), [2, 6], &[24], |tape, x| {
        tape.documents(&starts(6));
        vec![tape.rope(x[0].clone(), 3, 8)]
    });
}

#[test]
fn a_packed_document_has_the_bits_that_it_has_by_itself_forward_and_back() {
    let shape = |window| Attention { layer: 0, heads: 4, kv_heads: 2, head_dim: 8, scale: 0.4, window };
    let widths = [32, 16, 16];
    // Lengths around the size of a block of queries.
    let lengths = [70, 1, 64, 129, 3];
    let seq_len: usize = lengths.iter().sum();
    let ends = lengths.iter().scan(0, |end, n| {
        *end += n;
        Some(*end)
    });
    let documents: Vec<_> = ends.zip(lengths).map(|(end, n)| end - n..end).collect();
    let starts: Vec<u32> = documents.iter().flat_map(|d| d.clone().map(|_| d.start as u32)).collect();
    let inputs: Vec<_> = widths.iter().map(|w| noise(seq_len * w, *w as u32)).collect();
    let slopes = noise(seq_len * 32, 77);
    let bench = Bench::new(2);
    // Output and gradients of the tokens `rows`, as one sequence.
    let run = |rows: std::ops::Range<usize>, starts: &[u32], window| -> Vec<Vec<u32>> {
        let mut gradients = bench.gradients();
        let mut tape = Tape::new(bench.setting(1, rows.len()), &mut gradients);
        tape.documents(starts);
        let cut = |all: &[f32], width: usize| all[rows.start * width..rows.end * width].to_vec();
        let [q, k, v] = std::array::from_fn(|i| tape.input(&cut(&inputs[i], widths[i]), widths[i]));
        let rotated = [tape.rope(q.clone(), 4, 8), tape.rope(k.clone(), 2, 8)];
        let [rq, rk] = rotated;
        let out = tape.attention(rq, rk, v.clone(), shape(window));
        tape.seed(&out, &cut(&slopes, 32));
        let out = out.values().to_vec();
        let found = tape.backward_to([&q, &k, &v]).map(Option::unwrap);
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect();
        std::iter::once(&out).chain(&found).map(|x| bits(x)).collect()
    };
    for window in [None, Some(20)] {
        let packed = run(0..seq_len, &starts, window);
        for document in &documents {
            let alone = run(document.clone(), &[], window);
            for ((packed, alone), width) in packed.iter().zip(&alone).zip([32, 32, 16, 16]) {
                assert!(packed[document.start * width..document.end * width] == alone[..], "{document:?}");
            }
        }
    }
}

#[test]
fn gates_have_the_gradients_of_their_formulas() {
    for activation in [Activation::Silu, Activation::Relu2] {
        check(&format!("{activation:?}"), &mut Bench::new(2), [1, 3], &[19, 19], |tape, x| {
            vec![tape.gate(x[0].clone(), x[1].clone(), activation)]
        });
    }
}

#[test]
fn inputs_of_a_residual_share_their_gradient_safely() {
    // `x` feeds the sum and, later than the gate that made `y`, another operation: the shared buffer must not carry one
    // gradient into the other.
    let mut bench = Bench::new(2);
    let weight = bench.vector("weight", 6, Kind::Norm);
    check("residual", &mut bench, [1, 4], &[6, 6], |tape, x| {
        let y = tape.gate(x[1].clone(), x[0].clone(), Activation::Silu);
        let z = tape.rms_norm(&x[0], &weight, 1e-3);
        let sum = tape.add(x[0].clone(), y);
        vec![tape.add(sum, z)]
    });
}

#[test]
fn cross_entropy_has_the_gradient_of_its_mean_and_skips_ignored_tokens() {
    for tokens in [5, 700] {
        let mut bench = Bench::new(2);
        let head = bench.matrix("head", 11, 6, Role::Embedding);
        let mut targets: Vec<u32> = (0..tokens as u32).map(|t| t * 7 % 11).collect();
        targets[1] = setun_train::loss::IGNORE;
        let x = noise(tokens * 6, 5);
        let weight = 1.0 / (tokens - 1) as f32;
        let objective = |bench: &Bench, x: &[f32]| {
            let mut tape = Tape::forward_only(bench.setting(1, tokens));
            let x = tape.input(x, 6);
            tape.cross_entropy(&x, head, &targets, weight).mean()
        };
        let mut gradients = bench.gradients();
        let mut tape = Tape::new(bench.setting(1, tokens), &mut gradients);
        let input = tape.input(&x, 6);
        let loss = tape.cross_entropy(&input, head, &targets, weight);
        assert_eq!(loss.tokens, tokens - 1);
        assert!((loss.mean() - objective(&bench, &x)).abs() < 1e-12);
        let [found] = tape.backward_to([&input]);
        let found = found.unwrap();
        assert!(found[6..12].iter().all(|&g| g == 0.0), "the ignored token has a gradient");
        let h = 1e-2;
        let numeric: Vec<f64> = (0..found.len().min(60))
            .map(|at| {
                let side = |h: f32| {
                    let mut x = x.clone();
                    x[at] += h;
                    objective(&bench, &x)
                };
                (side(h) - side(-h)) / f64::from(2.0 * h)
            })
            .collect();
        common::assert_close("cross_entropy, input", &found[..numeric.len()], &numeric, 3e-3);
        let numeric: Vec<f64> = (0..66)
            .map(|at| {
                let mut side = |h: f32| {
                    let old = bench.params[head].values[at];
                    bench.set(head, at, old + h);
                    let value = objective(&bench, &x);
                    bench.set(head, at, old);
                    value
                };
                (side(h) - side(-h)) / f64::from(2.0 * h)
            })
            .collect();
        common::assert_close("cross_entropy, head", gradients.get(head), &numeric, 3e-3);
    }
}

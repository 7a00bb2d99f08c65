//! Every kernel set equals a naive product, bit for bit, whatever the shape, scales and threads.

use setun_kernels::{Activations, Kernels, PackedMatrix, Pool, Scales, TernaryMatrix};

/// Enough tokens that kernels which ever unpack their weights do.
const MANY: usize = 67;

/// A small deterministic generator: a failure repeats.
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }

    fn trits(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| (self.next() % 3) as i8 - 1).collect()
    }

    fn codes(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| self.next() as u8 as i8).collect()
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32 / (1 << 24) as f32 + 0.01).collect()
    }
}

/// A product written down directly from the definition, on trits and codes.
struct Naive<'a> {
    rows: usize,
    cols: usize,
    trits: &'a [i8],
    scales: &'a Scales,
    acts: &'a [i8],
    inverses: &'a [f32],
}

impl Naive<'_> {
    fn sum(&self, t: usize, r: usize, from: usize, to: usize) -> i32 {
        let weights = &self.trits[r * self.cols..][from..to];
        let acts = &self.acts[t * self.cols..][from..to];
        let sum: i64 = weights.iter().zip(acts).map(|(&w, &a)| i64::from(w) * i64::from(a)).sum();
        sum.try_into().unwrap()
    }

    fn integers(&self) -> Vec<i32> {
        let all = (0..self.inverses.len()).flat_map(|t| (0..self.rows).map(move |r| (t, r)));
        all.map(|(t, r)| self.sum(t, r, 0, self.cols)).collect()
    }

    fn float(&self, t: usize, r: usize) -> f32 {
        let inverse = self.inverses[t];
        match self.scales {
            Scales::Tensor(s) => self.sum(t, r, 0, self.cols) as f32 * (s * inverse),
            Scales::Row(s) => self.sum(t, r, 0, self.cols) as f32 * (s[r] * inverse),
            Scales::Block { rows, cols, values } => {
                let blocks = self.cols.div_ceil(*cols);
                let mut y = 0.0;
                for b in 0..blocks {
                    let sum = self.sum(t, r, b * cols, self.cols.min((b + 1) * cols));
                    y = (sum as f32).mul_add(values[r / rows * blocks + b], y);
                }
                y * inverse
            }
        }
    }

    /// Checks every kernel set that this machine has.
    fn check(&self, threads: &[usize]) {
        let (rows, cols, tokens) = (self.rows, self.cols, self.inverses.len());
        let matrix = TernaryMatrix::from_trits(rows, cols, self.trits, self.scales.clone()).unwrap();
        let acts = Activations::from_i8(self.acts, self.inverses, cols);
        let integers = self.integers();
        let floats: Vec<u32> =
            (0..tokens).flat_map(|t| (0..rows).map(move |r| self.float(t, r).to_bits())).collect();
        for &threads in threads {
            let pool = Pool::new(threads);
            for k in Kernels::available() {
                let what = format!("{} {rows}x{cols}, {tokens} tokens, {threads} threads", k.name());
                let packed = PackedMatrix::pack(&matrix, k, &pool);
                assert!(packed.unpack() == matrix, "unpack of pack: {what}");
                // One element off, so that nothing is aligned.
                let mut out = vec![-1; tokens * rows + 1];
                packed.matmul_i32(&acts, &mut out[1..], &pool);
                assert!(out[1..] == integers, "integers: {what}");
                let mut out = vec![-1.0; tokens * rows + 1];
                packed.matmul(&acts, &mut out[1..], &pool);
                let bits: Vec<u32> = out[1..].iter().map(|y| y.to_bits()).collect();
                assert!(bits == floats, "floats: {what}, {:?}", self.scales);
                assert_eq!((out[0], packed.rows(), packed.cols()), (-1.0, rows, cols));
            }
        }
    }
}

fn check_random(rows: usize, cols: usize, tokens: usize, scales: &Scales, threads: &[usize]) {
    let mut noise = Noise((rows * 31 + cols * 7 + tokens) as u32);
    let trits = noise.trits(rows * cols);
    let acts = noise.codes(tokens * cols);
    let inverses = noise.floats(tokens);
    Naive { rows, cols, trits: &trits, scales, acts: &acts, inverses: &inverses }.check(threads);
}

fn all_scales(rows: usize, cols: usize) -> Vec<Scales> {
    let mut noise = Noise(11);
    let mut scales = vec![Scales::Tensor(0.37), Scales::Row(noise.floats(rows))];
    let blocks = [(1, 64), (1, 128), (1, 256), (32, 64), (3, 48), (2, 7), (1, 1), (5, 33), (1, 4000)];
    for (r, c) in blocks {
        let values = noise.floats(rows.div_ceil(r) * cols.div_ceil(c));
        scales.push(Scales::Block { rows: r, cols: c, values });
    }
    scales
}

#[test]
fn every_kernel_is_exact_at_every_column_count() {
    for cols in 0..=130 {
        for tokens in [1, 3, MANY] {
            check_random(67, cols, tokens, &Scales::Tensor(0.3), &[1]);
        }
    }
}

#[test]
fn every_kernel_is_exact_at_every_row_count() {
    for rows in (0..=70).chain([127, 128, 129, 200]) {
        for tokens in [1, MANY] {
            check_random(rows, 45, tokens, &Scales::Tensor(1.7), &[1, 2]);
        }
    }
}

#[test]
fn every_kernel_is_exact_for_any_token_and_thread_count() {
    for tokens in (0..=20).chain([33, 64, 65, 211]) {
        check_random(150, 100, tokens, &Scales::Tensor(0.01), &[1, 2, 3, 4]);
    }
}

#[test]
fn every_kind_of_scale_gives_the_defined_bits() {
    for cols in [600, 640, 64, 1] {
        for scales in all_scales(70, cols) {
            for tokens in [1, 2, 5, 7, 17, MANY] {
                check_random(70, cols, tokens, &scales, &[2]);
            }
        }
    }
}

#[test]
fn scales_kept_as_halves_give_the_defined_bits() {
    // All of these are halves, down to the smallest; one more value that is not makes all of them floats.
    let halves = [1.0, -0.25, 0.0, -0.0, 65504.0, 6.1e-5f32, 2f32.powi(-24), -3.0 * 2f32.powi(-24)];
    for last in [0.5, 0.1, 2f32.powi(-25), f32::MAX, f32::INFINITY] {
        for (cols, block) in [(600usize, 128), (640, 64), (1200, 160)] {
            let mut values: Vec<f32> =
                halves.iter().copied().cycle().take(70 * cols.div_ceil(block)).collect();
            *values.last_mut().unwrap() = last;
            values[5] = 7.0 * 2f32.powi(-17);
            let scales = Scales::Block { rows: 1, cols: block, values };
            for tokens in [1, 4, MANY] {
                check_random(70, cols, tokens, &scales, &[2]);
            }
        }
    }
}

#[test]
fn halves_take_half_the_bytes_of_floats() {
    let pool = Pool::new(1);
    for k in Kernels::available().filter(|k| k.name() != "scalar") {
        let bytes = |value: f32| {
            let scales = Scales::Block { rows: 1, cols: 128, values: vec![value; 64 * 5] };
            let matrix = TernaryMatrix::from_trits(64, 640, &vec![1; 64 * 640], scales).unwrap();
            PackedMatrix::pack(&matrix, k, &pool).bytes()
        };
        assert_eq!(bytes(0.1) - bytes(0.5), 64 * 5 * 2, "{}", k.name());
    }
}

#[test]
fn extreme_values_never_overflow() {
    let cols = 6912;
    let alternate = |even: i8, odd: i8| (0..cols).map(move |c| if c % 2 == 0 { even } else { odd });
    for act in [(127, 127), (-128, -128), (127, -128), (-128, 127)] {
        for weight in [(1, 1), (-1, -1), (0, 0), (1, -1), (-1, 1)] {
            let row: Vec<i8> = alternate(act.0, act.1).collect();
            let trits: Vec<i8> = alternate(weight.0, weight.1).collect();
            let (acts, trits) = (row.repeat(MANY), trits.repeat(3));
            let scales = &Scales::Tensor(1.0);
            for tokens in [1, MANY] {
                let acts = &acts[..tokens * cols];
                let inverses = &vec![1.0; tokens];
                Naive { rows: 3, cols, trits: &trits, scales, acts, inverses }.check(&[1]);
            }
        }
    }
}

#[test]
fn rows_longer_than_a_fields_range_are_exact() {
    // Above 2^18 columns a masked field would overflow, were sums not taken in pieces.
    let cols = (1 << 18) * 2 + 100;
    for (act, weight) in [(-128, -1), (-128, 1), (127, 1)] {
        let (acts, trits) = (vec![act; cols], vec![weight; cols]);
        for block in [None, Some((1 << 18) + 64)] {
            let scales = match block {
                None => Scales::Tensor(1.0),
                Some(cols) => Scales::Block { rows: 1, cols, values: vec![0.5, 0.25] },
            };
            let naive =
                Naive { rows: 1, cols, trits: &trits, scales: &scales, acts: &acts, inverses: &[1.0] };
            naive.check(&[1]);
        }
    }
}

#[test]
fn a_group_equals_its_products_one_by_one() {
    let mut noise = Noise(3);
    let (cols, pool) = (200, Pool::new(3));
    for tokens in [1, MANY] {
        let acts = Activations::from_i8(&noise.codes(tokens * cols), &vec![0.5; tokens], cols);
        for k in Kernels::available() {
            let matrices = [100, 0, 33].map(|rows| {
                let trits = noise.trits(rows * cols);
                let scales = Scales::Row(noise.floats(rows));
                let m = TernaryMatrix::from_trits(rows, cols, &trits, scales).unwrap();
                PackedMatrix::pack(&m, k, &pool)
            });
            let mut group = matrices.each_ref().map(|m| vec![0f32; tokens * m.rows()]);
            let [a, b, c] = &mut group;
            PackedMatrix::matmul_group(&matrices.each_ref(), &acts, &mut [a, b, c], &pool);
            for (m, out) in matrices.iter().zip(&group) {
                let mut single = vec![0f32; tokens * m.rows()];
                m.matmul(&acts, &mut single, &pool);
                assert_eq!(&single, out, "{}", k.name());
            }
        }
    }
}

#[test]
fn repacking_in_place_equals_packing_anew() {
    let (mut noise, pool) = (Noise(5), Pool::new(2));
    for k in Kernels::available() {
        for (rows, cols) in [(65usize, 50usize), (0, 3), (3, 0)] {
            let mut matrix = || {
                let block = noise.floats(rows * cols.div_ceil(20));
                let scales = Scales::Block { rows: 1, cols: 20, values: block };
                TernaryMatrix::from_trits(rows, cols, &noise.trits(rows * cols), scales).unwrap()
            };
            let (a, b) = (matrix(), matrix());
            let mut packed = PackedMatrix::pack(&a, k, &pool);
            packed.repack(&b, &pool);
            let acts = Activations::from_i8(&vec![3; cols], &[2.0], cols);
            let (mut got, mut expected) = (vec![0.0; rows], vec![0.0; rows]);
            packed.matmul(&acts, &mut got, &pool);
            PackedMatrix::pack(&b, k, &pool).matmul(&acts, &mut expected, &pool);
            assert_eq!(got, expected);
            assert_eq!(packed.unpack(), b);
        }
    }
}

#[test]
fn a_token_with_a_nan_gives_nan_and_leaves_the_others_alone() {
    let pool = Pool::new(1);
    let matrix = TernaryMatrix::from_trits(2, 3, &[1, 0, -1, 1, 1, 1], Scales::Tensor(2.0)).unwrap();
    for k in Kernels::available() {
        let mut acts = Activations::new();
        acts.quantize(k, &[f32::NAN, 1.0, 2.0, 127.0, 0.0, 0.0], 2, 3, Some(&pool));
        let mut out = [0.0; 4];
        PackedMatrix::pack(&matrix, k, &pool).matmul(&acts, &mut out, &pool);
        assert!(out[0].is_nan() && out[1].is_nan());
        assert_eq!(out[2..], [254.0, 254.0]);
    }
}

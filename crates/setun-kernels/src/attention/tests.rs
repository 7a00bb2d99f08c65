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

fn half(x: &[f32]) -> Vec<f16> {
    x.iter().map(|&x| f16::from_f32(x)).collect()
}

/// A layer's queries and its cache, filled beyond what any test may look at.
struct Layer {
    shape: AttentionShape,
    capacity: usize,
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Layer {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>, tokens: usize) -> Self {
        let shape =
            AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window };
        let capacity = tokens + 9;
        let mut keys = noise(kv_heads * capacity * head_dim, 22);
        let mut values = noise(kv_heads * capacity * head_dim, 23);
        for head in 0..kv_heads {
            // What lies beyond the last token must not be looked at.
            let beyond = (head * capacity + tokens) * head_dim..(head + 1) * capacity * head_dim;
            keys[beyond.clone()].fill(f32::NAN);
            values[beyond].fill(f32::INFINITY);
        }
        // Large queries, so that the maximum moves from block to block.
        let q = noise(tokens * heads * head_dim, 21).iter().map(|x| x * 6.0).collect();
        Self { shape, capacity, q, keys, values }
    }

    fn width(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    /// Tokens `from..to` in one call, on f32 or f16 keys and values.
    fn run(&self, k: &Kernels, from: usize, to: usize, f32_cache: bool, pool: &Pool) -> Vec<f32> {
        let q = &self.q[from * self.width()..to * self.width()];
        let mut out = vec![f32::NAN; q.len()];
        let (keys, values) = (half(&self.keys), half(&self.values));
        let (keys, values) = if f32_cache {
            (KvData::F32(&self.keys), KvData::F32(&self.values))
        } else {
            (KvData::F16(&keys), KvData::F16(&values))
        };
        k.attention(&self.shape, q, from, keys, values, self.capacity, &mut out, pool);
        out
    }

    /// The textbook formula in f64 on the f32 cache.
    fn naive(&self, token: usize) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, head_dim, scale, window } = self.shape;
        let mut out = vec![0.0; self.width()];
        for h in 0..heads {
            let q = &self.q[token * self.width() + h * head_dim..][..head_dim];
            let row = |data: &'_ [f32], j: usize| -> Vec<f64> {
                let start = (h / (heads / kv_heads) * self.capacity + j) * head_dim;
                data[start..start + head_dim].iter().map(|&x| f64::from(x)).collect()
            };
            let seen = (0..=token).filter(|j| window.is_none_or(|w| j + w > token));
            let weights: Vec<(usize, f64)> = seen
                .map(|j| {
                    let dot: f64 = q.iter().zip(row(&self.keys, j)).map(|(&q, k)| f64::from(q) * k).sum();
                    (j, (dot * f64::from(scale)).exp())
                })
                .collect();
            let sum: f64 = weights.iter().map(|(_, p)| p).sum();
            for (j, p) in weights {
                for (out, v) in out[h * head_dim..].iter_mut().zip(row(&self.values, j)) {
                    *out += p / sum * v;
                }
            }
        }
        out
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Heads, key–value heads, head size, window, tokens.
const CASES: [(usize, usize, usize, Option<usize>, usize); 10] = [
    (1, 1, 16, None, 1),
    (2, 1, 12, None, 70),
    (4, 4, 64, None, 65),
    (6, 2, 100, None, 131),
    (5, 1, 128, Some(1), 67),
    (4, 2, 32, Some(5), 200),
    (3, 3, 48, Some(64), 200),
    (3, 3, 8, Some(65), 150),
    (4, 1, 80, Some(1000), 100),
    (70, 1, 4, None, 66),
];

#[test]
fn attention_is_the_softmax_of_scaled_scores_times_values() {
    let pool = Pool::new(2);
    for (heads, kv_heads, head_dim, window, tokens) in CASES {
        let layer = Layer::new(heads, kv_heads, head_dim, window, tokens);
        let out = layer.run(Kernels::best(), 0, tokens, true, &pool);
        for token in 0..tokens {
            let expected = layer.naive(token);
            for (i, expected) in expected.iter().enumerate() {
                let found = f64::from(out[token * layer.width() + i]);
                assert!(
                    (found - expected).abs() < 4e-6,
                    "{:?}, token {token}, element {i}: {found} instead of {expected}",
                    layer.shape
                );
            }
        }
    }
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_bits_of_scalar() {
    let pools = [1, 2, 3, 4].map(Pool::new);
    let scalar = Kernels::by_name("scalar").unwrap();
    for (heads, kv_heads, head_dim, window, tokens) in CASES {
        let layer = Layer::new(heads, kv_heads, head_dim, window, tokens);
        for f32_cache in [false, true] {
            let expected = bits(&layer.run(scalar, 0, tokens, f32_cache, &pools[0]));
            for k in Kernels::available() {
                for pool in &pools {
                    let found = bits(&layer.run(k, 0, tokens, f32_cache, pool));
                    assert_eq!(
                        found,
                        expected,
                        "{}, {} threads, {:?}",
                        k.name(),
                        pool.threads(),
                        layer.shape
                    );
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_how_the_prompt_is_cut() {
    let pool = Pool::new(2);
    for (heads, kv_heads, head_dim, window, tokens) in CASES {
        let layer = Layer::new(heads, kv_heads, head_dim, window, tokens);
        let k = Kernels::best();
        let whole = bits(&layer.run(k, 0, tokens, false, &pool));
        for chunk in [1, 2, 3, 5, 7, 31, 63, 64, 65, 127] {
            let mut pieces = Vec::new();
            for from in (0..tokens).step_by(chunk) {
                pieces.extend(bits(&layer.run(k, from, tokens.min(from + chunk), false, &pool)));
            }
            assert_eq!(pieces, whole, "pieces of {chunk}, {:?}", layer.shape);
        }
    }
}

#[test]
fn keys_outside_of_the_mask_do_not_touch_the_result() {
    // An infinite or NaN key or value would show in any weight but none.
    let pool = Pool::new(2);
    for k in Kernels::available() {
        let mut layer = Layer::new(4, 2, 24, Some(10), 90);
        let clean = bits(&layer.run(k, 70, 90, true, &pool));
        for head in 0..2 {
            for position in 0..=60 {
                let cells =
                    (head * layer.capacity + position) * 24..(head * layer.capacity + position + 1) * 24;
                layer.keys[cells.clone()].fill(f32::INFINITY);
                layer.values[cells].fill(f32::NAN);
            }
        }
        assert_eq!(bits(&layer.run(k, 70, 90, true, &pool)), clean, "{}", k.name());
    }
}

#[test]
fn no_tokens_are_no_work() {
    let layer = Layer::new(2, 1, 8, None, 3);
    assert!(layer.run(Kernels::best(), 2, 2, true, &Pool::new(2)).is_empty());
}

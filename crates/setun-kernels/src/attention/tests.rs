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

/// A layer's queries, keys and values; what lies beyond the tokens is what no test may look at.
struct Layer {
    shape: AttentionShape,
    tokens: usize,
    capacity: usize,
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Layer {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>, tokens: usize) -> Self {
        let shape =
            AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window };
        let (capacity, width) = (tokens + 9, kv_heads * head_dim);
        let mut keys = noise(capacity * width, 22);
        let mut values = noise(capacity * width, 23);
        keys[tokens * width..].fill(f32::NAN);
        values[tokens * width..].fill(f32::INFINITY);
        // Large queries, so that the maximum moves from segment to segment.
        let q = noise(tokens * heads * head_dim, 21).iter().map(|x| x * 6.0).collect();
        Self { shape, tokens, capacity, q, keys, values }
    }

    fn width(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    /// Layer 1 of 2, filled by `kernels`.
    fn store(&self, kind: KvType, kernels: &Kernels, pool: &Pool) -> KvStore {
        let mut store = KvStore::new(kind, 2, self.shape.kv_heads, self.shape.head_dim, self.capacity);
        store.reserve(self.capacity);
        store.put(kernels, 1, 0, &self.keys, &self.values, pool);
        store
    }

    /// Tokens `from..to` in one call.
    fn run(&self, k: &Kernels, from: usize, to: usize, store: &KvStore, pool: &Pool) -> Vec<f32> {
        let q = &self.q[from * self.width()..to * self.width()];
        let mut out = vec![f32::NAN; q.len()];
        k.attention(
            &self.shape,
            1,
            &mut [Queries { q, out: &mut out, first: from, against: Against::Stored(store) }],
            pool,
        );
        out
    }

    /// The textbook formula in f64 on the f32 cache.
    fn naive(&self, token: usize) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, head_dim, scale, window } = self.shape;
        let mut out = vec![0.0; self.width()];
        for h in 0..heads {
            let q = &self.q[token * self.width() + h * head_dim..][..head_dim];
            let row = |data: &'_ [f32], j: usize| -> Vec<f64> {
                let start = (j * kv_heads + h / (heads / kv_heads)) * head_dim;
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
const CASES: [(usize, usize, usize, Option<usize>, usize); 13] = [
    (1, 1, 16, None, 1),
    (2, 1, 12, None, 70),
    (4, 4, 64, None, 65),
    (6, 2, 100, None, 131),
    (5, 1, 128, Some(1), 67),
    (4, 2, 32, Some(5), 300),
    (3, 3, 48, Some(64), 200),
    (3, 3, 8, Some(65), 150),
    (4, 1, 80, Some(1000), 100),
    (70, 1, 4, None, 66),
    (8, 1, 33, None, 530),
    (2, 2, 256, Some(257), 515),
    (1, 1, 288, None, 40),
];

#[test]
fn attention_is_the_softmax_of_scaled_scores_times_values() {
    let pool = Pool::new(2);
    for (heads, kv_heads, head_dim, window, tokens) in CASES {
        let layer = Layer::new(heads, kv_heads, head_dim, window, tokens);
        // How far codes may be off was measured on this noise, the worst case for them: no two values alike.
        for (kind, tolerance) in
            [(KvType::F32, 4e-6), (KvType::F16, 4e-3), (KvType::Int8, 4e-2), (KvType::Int4, 0.6)]
        {
            let store = layer.store(kind, Kernels::best(), &pool);
            let out = layer.run(Kernels::best(), 0, tokens, &store, &pool);
            for token in 0..tokens {
                for (i, expected) in layer.naive(token).iter().enumerate() {
                    let found = f64::from(out[token * layer.width() + i]);
                    assert!(
                        (found - expected).abs() < tolerance,
                        "{kind}, {:?}, token {token}, element {i}: {found} instead of {expected}",
                        layer.shape
                    );
                }
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
        for kind in KvType::ALL {
            let store = layer.store(kind, scalar, &pools[0]);
            let expected = bits(&layer.run(scalar, 0, tokens, &store, &pools[0]));
            for k in Kernels::available() {
                for pool in &pools {
                    let store = layer.store(kind, k, pool);
                    let found = bits(&layer.run(k, 0, tokens, &store, pool));
                    let what = format!("{kind}, {}, {} threads, {:?}", k.name(), pool.threads(), layer.shape);
                    assert_eq!(found, expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_how_the_prompt_is_cut() {
    let pools = [1, 2, 5].map(Pool::new);
    for (heads, kv_heads, head_dim, window, tokens) in CASES {
        let layer = Layer::new(heads, kv_heads, head_dim, window, tokens);
        let k = Kernels::best();
        for kind in KvType::ALL {
            let whole_store = layer.store(kind, k, &pools[0]);
            let whole = bits(&layer.run(k, 0, tokens, &whole_store, &pools[0]));
            for (n, chunk) in [1, 2, 3, 5, 7, 31, 63, 64, 65, 127, 257].into_iter().enumerate() {
                // Stored piece by piece as well.
                let pool = &pools[n % 3];
                let (kv_width, mut pieces) = (kv_heads * head_dim, Vec::new());
                let mut store = KvStore::new(kind, 2, kv_heads, head_dim, layer.capacity);
                for from in (0..tokens).step_by(chunk) {
                    let to = tokens.min(from + chunk);
                    let rows = from * kv_width..to * kv_width;
                    store.reserve(to);
                    store.put(k, 1, from, &layer.keys[rows.clone()], &layer.values[rows], pool);
                    pieces.extend(bits(&layer.run(k, from, to, &store, pool)));
                }
                assert_eq!(pieces, whole, "{kind}, pieces of {chunk}, {:?}", layer.shape);
            }
        }
    }
}

#[test]
fn storing_on_the_way_gives_the_bits_and_the_cache_of_storing_before() {
    let pools = [1, 2, 5].map(Pool::new);
    for (heads, kv_heads, head_dim, window, tokens) in CASES {
        let layer = Layer::new(heads, kv_heads, head_dim, window, tokens);
        let kv_width = kv_heads * head_dim;
        for (k, kind) in Kernels::available().flat_map(|k| KvType::ALL.map(|kind| (k, kind))) {
            let expected = bits(&layer.run(k, 0, tokens, &layer.store(kind, k, &pools[0]), &pools[0]));
            for (pool, chunk) in pools.iter().zip([3, 40, 300]) {
                let mut store = KvStore::new(kind, 2, kv_heads, head_dim, layer.capacity);
                let mut found = Vec::new();
                for from in (0..tokens).step_by(chunk) {
                    let to = tokens.min(from + chunk);
                    store.reserve(to);
                    let (rows, width) = (from * kv_width..to * kv_width, layer.width());
                    let mut out = vec![f32::NAN; (to - from) * width];
                    let against = Against::Storing {
                        store: &mut store,
                        keys: &layer.keys[rows.clone()],
                        values: &layer.values[rows],
                    };
                    let q = &layer.q[from * width..to * width];
                    k.attention(
                        &layer.shape,
                        1,
                        &mut [Queries { q, out: &mut out, first: from, against }],
                        pool,
                    );
                    found.extend(bits(&out));
                }
                let what = format!("{kind}, {}, pieces of {chunk}, {:?}", k.name(), layer.shape);
                assert_eq!(found, expected, "{what}");
                assert_eq!(bits(&layer.run(k, 0, tokens, &store, pool)), expected, "stored: {what}");
            }
        }
    }
}

#[test]
fn sequences_together_give_the_bits_of_each_alone() {
    let pool = Pool::new(3);
    let lengths = [3usize, 300, 1, 640, 70];
    let layers: Vec<Layer> = lengths.iter().map(|&n| Layer::new(4, 2, 40, None, n)).collect();
    for k in Kernels::available() {
        for kind in [KvType::F16, KvType::Int8] {
            let stores: Vec<KvStore> = layers.iter().map(|l| l.store(kind, k, &pool)).collect();
            for new in [1, 3, 100] {
                let from = |l: &Layer| l.tokens.saturating_sub(new);
                let alone: Vec<Vec<u32>> = layers
                    .iter()
                    .zip(&stores)
                    .map(|(l, store)| bits(&l.run(k, from(l), l.tokens, store, &pool)))
                    .collect();
                let mut outs: Vec<Vec<f32>> =
                    layers.iter().map(|l| vec![f32::NAN; (l.tokens - from(l)) * l.width()]).collect();
                let mut queries: Vec<Queries> = layers
                    .iter()
                    .zip(&stores)
                    .zip(&mut outs)
                    .map(|((l, store), out)| Queries {
                        q: &l.q[from(l) * l.width()..],
                        out,
                        first: from(l),
                        against: Against::Stored(store),
                    })
                    .collect();
                k.attention(&layers[0].shape, 1, &mut queries, &pool);
                let together: Vec<Vec<u32>> = outs.iter().map(|out| bits(out)).collect();
                assert_eq!(together, alone, "{}, {kind}, {new} tokens each", k.name());
            }
        }
    }
}

#[test]
fn positions_outside_of_the_mask_do_not_touch_the_result() {
    // An infinite or NaN key or value would show in any weight but none.
    let pool = Pool::new(2);
    for k in Kernels::available() {
        for kind in KvType::ALL {
            let mut layer = Layer::new(4, 2, 24, Some(10), 90);
            let clean = bits(&layer.run(k, 70, 90, &layer.store(kind, k, &pool), &pool));
            layer.keys[..61 * 48].fill(f32::INFINITY);
            layer.values[..61 * 48].fill(f32::NAN);
            let found = bits(&layer.run(k, 70, 90, &layer.store(kind, k, &pool), &pool));
            assert_eq!(found, clean, "{}, {kind}", k.name());
        }
    }
}

#[test]
fn what_is_not_finite_shows_in_all_that_see_it_and_in_nothing_else() {
    let pool = Pool::new(2);
    for k in Kernels::available() {
        for kind in [KvType::Int8, KvType::Int4] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut layer = Layer::new(2, 1, 20, None, 80);
                layer.values[50 * 20 + 3] = bad;
                let out = layer.run(k, 0, 80, &layer.store(kind, k, &pool), &pool);
                for (token, row) in out.chunks(layer.width()).enumerate() {
                    assert!(row.iter().all(|x| x.is_nan() == (token >= 50)), "{}, token {token}", k.name());
                }
            }
        }
    }
}

#[test]
fn extreme_codes_stay_exact() {
    // The largest sums there are: equal signs, largest magnitudes, 256 dimensions, and weights all alike.
    let pool = Pool::new(2);
    let (head_dim, tokens) = (256, 256);
    let mut layer = Layer::new(1, 1, head_dim, None, tokens);
    layer.shape.scale = 1e-9;
    layer.q.fill(-3.0);
    layer.keys.fill(-1.0);
    layer.values.fill(-5.0);
    for kind in [KvType::Int8, KvType::Int4] {
        for k in Kernels::available() {
            let out = layer.run(k, 0, tokens, &layer.store(kind, k, &pool), &pool);
            assert!(out.iter().all(|x| (x + 5.0).abs() < 0.05), "{kind}, {}: {}", k.name(), out[0]);
        }
    }
}

#[test]
fn positions_may_be_stored_again() {
    let pool = Pool::new(1);
    let (first, second) = (Layer::new(2, 2, 20, None, 90), Layer::new(2, 2, 20, None, 90));
    for kind in KvType::ALL {
        let clean = second.store(kind, Kernels::best(), &pool);
        let mut store = first.store(kind, Kernels::best(), &pool);
        let other: Vec<f32> = first.keys.iter().map(|x| 1.0 - x).collect();
        store.put(Kernels::best(), 1, 0, &other, &other, &pool);
        store.put(Kernels::best(), 1, 0, &second.keys, &second.values, &pool);
        let [found, expected] =
            [&store, &clean].map(|store| bits(&second.run(Kernels::best(), 0, 90, store, &pool)));
        assert_eq!(found, expected, "{kind}");
    }
}

#[test]
fn weights_of_a_softmax_are_close_to_the_exponential_and_zero_far_below() {
    use super::softmax::exp_weight;
    use crate::lanes::One;
    for i in 0..=87_000 {
        let x = -(i as f32) / 1000.0;
        let (found, expected) = (f64::from(exp_weight(One, x)), f64::from(x).exp());
        assert!((found / expected - 1.0).abs() < 5e-7, "{x}: {found} instead of {expected}");
    }
    assert_eq!(exp_weight(One, 0.0), 1.0);
    for x in [-87.7, -88.0, -1e9, f32::NEG_INFINITY] {
        assert_eq!(exp_weight(One, x), 0.0, "{x}");
    }
    assert!(exp_weight(One, f32::NAN).is_nan());
}

#[test]
fn cache_types_are_named_as_they_are_read() {
    for kind in KvType::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    let error = "q8".parse::<KvType>().unwrap_err();
    assert!(error.contains("`q8`") && KvType::ALL.iter().all(|kind| error.contains(kind.name())), "{error}");
}

#[test]
fn no_tokens_are_no_work() {
    let (layer, pool) = (Layer::new(2, 1, 8, None, 3), Pool::new(2));
    let store = layer.store(KvType::F32, Kernels::best(), &pool);
    assert!(layer.run(Kernels::best(), 2, 2, &store, &pool).is_empty());
}

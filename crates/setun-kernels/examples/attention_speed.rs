//! Speed of attention against what this machine can do: `cargo run --release -p setun-kernels --example
//! attention_speed [threads] [kernel]`. Shares are of the read bandwidth (decode) and of the float peak (prefill), measured in the
//! same run; codes are multiplied as integers, so theirs may exceed what floats could reach.

use std::time::Instant;

use setun_kernels::attention::{Against, AttentionShape, KvStore, KvType, Queries};
use setun_kernels::{Kernels, Pool, peak, threads};

fn noise(len: usize, mut seed: u32) -> Vec<f32> {
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The shortest of several runs.
fn seconds(passes: usize, mut f: impl FnMut()) -> f64 {
    f();
    let time = |_| {
        let started = Instant::now();
        f();
        started.elapsed().as_secs_f64()
    };
    (0..passes).map(time).fold(f64::INFINITY, f64::min)
}

/// A cache in which every layer holds the same noise.
fn filled(kind: KvType, shape: &AttentionShape, layers: usize, positions: usize, pool: &Pool) -> KvStore {
    let mut store = KvStore::new(kind, layers, shape.kv_heads, shape.head_dim, positions);
    store.reserve(positions);
    let rows = noise(positions * shape.kv_heads * shape.head_dim, 5);
    for layer in 0..layers {
        store.put(Kernels::best(), layer, 0, &rows, &rows, pool);
    }
    store
}

/// Seconds of a layer for one token at position `context - 1`, after other memory went through the caches, as weights do:
/// storing its keys and values first, and on the way.
fn cold(k: &Kernels, kind: KvType, shape: &AttentionShape, context: usize, pool: &Pool) -> [f64; 2] {
    const LAYERS: usize = 30;
    let mut store = filled(kind, shape, LAYERS, context, pool);
    let (q, first) = (noise(shape.heads * shape.head_dim, 9), context - 1);
    let rows = noise(shape.kv_heads * shape.head_dim, 3);
    let mut out = vec![0.0; q.len()];
    let mut other = vec![1.0f32; 24 << 20];
    let mut pass = |apart: bool| {
        let layer = |layer| {
            pool.run_chunks_mut(&mut other, 1 << 18, |_, part| part.iter_mut().for_each(|x| *x = -*x));
            let started = Instant::now();
            let against = if apart {
                store.put(k, layer, first, &rows, &rows, pool);
                Against::Stored(&store)
            } else {
                Against::Storing { store: &mut store, keys: &rows, values: &rows }
            };
            k.attention(shape, layer, &mut [Queries { q: &q, out: &mut out, first, against }], pool);
            started.elapsed().as_secs_f64()
        };
        (0..LAYERS).map(layer).sum::<f64>() / LAYERS as f64
    };
    [true, false].map(|apart| (0..5).map(|_| pass(apart)).fold(f64::INFINITY, f64::min))
}

fn main() {
    let mut args = std::env::args().skip(1);
    let count = args.next().and_then(|a| a.parse().ok()).unwrap_or_else(threads::physical_cores_allowed);
    let (pool, only) = (Pool::new(count), args.next());
    let read = peak::read_bandwidth(&pool);
    println!("{} threads, read {:.1} GB/s", pool.threads(), read / 1e9);
    let kernels =
        Kernels::available().filter(|k| only.as_ref().map_or(k.name() != "scalar", |n| n == k.name()));
    for k in kernels {
        let float = peak::float_peak(k, &pool);
        println!("{}: float {:.0} GFLOP/s", k.name(), float / 1e9);
        // 2B-4T: groups of 4 heads.
        let shape = AttentionShape { heads: 20, kv_heads: 5, head_dim: 128, scale: 0.088, window: None };
        for kind in KvType::ALL {
            for tokens in [512, 2048] {
                let store = filled(kind, &shape, 1, tokens, &pool);
                let q = noise(tokens * shape.heads * shape.head_dim, 7);
                let mut out = vec![0.0; q.len()];
                let s = seconds(3, || {
                    let mut queries =
                        [Queries { q: &q, out: &mut out, first: 0, against: Against::Stored(&store) }];
                    k.attention(&shape, 0, &mut queries, &pool);
                });
                let flops = (2 * shape.head_dim * shape.heads * tokens * (tokens + 1)) as f64;
                println!(
                    "  {kind:4} prefill {tokens:4}: {:6.2} ms, {:5.1} % of float peak",
                    s * 1e3,
                    flops / s / float * 100.0
                );
            }
        }
        let layers = 30;
        for (heads, kv_heads) in [(20, 5), (8, 8), (32, 4)] {
            let shape = AttentionShape { heads, kv_heads, ..shape };
            let q = noise(heads * shape.head_dim, 9);
            let mut out = vec![0.0; q.len()];
            for kind in KvType::ALL {
                print!("  {kind:4} decode, groups of {}:", heads / kv_heads);
                for context in [16, 64, 512, 4096] {
                    let store = filled(kind, &shape, layers, context, &pool);
                    let s = seconds(9, || {
                        for layer in 0..layers {
                            let mut queries = [Queries {
                                q: &q,
                                out: &mut out,
                                first: context - 1,
                                against: Against::Stored(&store),
                            }];
                            k.attention(&shape, layer, &mut queries, &pool);
                        }
                    });
                    print!("  {context}: {:.1} us a layer", s * 1e6 / layers as f64);
                    if context == 4096 {
                        let share = store.bytes() as f64 / s / read * 100.0;
                        print!(
                            ", {:.2} ms for {layers}, {:.0} MB, {share:.1} % of read",
                            s * 1e3,
                            store.bytes() as f64 / 1e6
                        );
                    }
                }
                println!();
            }
        }
        for kind in [KvType::F16, KvType::Int8] {
            for context in [16, 100, 200] {
                let [apart, together] = cold(k, kind, &shape, context, &pool).map(|s| s * 1e6);
                println!(
                    "  {kind:4} decode from memory, {context}: {together:.1} us a layer, {apart:.1} us storing first"
                );
            }
        }
        let width = shape.kv_heads * shape.head_dim;
        let rows = noise(512 * width, 3);
        for kind in KvType::ALL {
            let mut store = filled(kind, &shape, 1, 512, &pool);
            let many = seconds(9, || store.put(k, 0, 0, &rows, &rows, &pool));
            let one = seconds(200, || store.put(k, 0, 500, &rows[..width], &rows[..width], &pool));
            println!("  {kind:4} store: {:.1} us for 512 tokens, {:.2} us for one", many * 1e6, one * 1e6);
        }
    }
}

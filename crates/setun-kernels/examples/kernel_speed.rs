//! Speed of the ternary products against what this machine can do, measured in the same run:
//!
//! `cargo run --release -p setun-kernels --example kernel_speed -- [threads] [--kernel NAME] [--tokens N,N]
//! [--scales NAME] [--set]`
//!
//! `--set` takes all matrices of a 2B model with 30 layers, else 6912 x 2560 as often as caches need to be
//! left behind. Shares are of the bandwidth of plain reads and of the peak of int8 products.

use std::time::Instant;

use setun_kernels::{Activations, Kernels, PackedMatrix, Pool, Scales, TernaryMatrix, peak, threads};

/// Query, key and value; output; gate and up; down.
const LAYER: [(usize, usize); 4] = [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912)];
const ONE: [(usize, usize); 1] = [(6912, 2560)];
const TOKENS: [usize; 10] = [1, 2, 4, 6, 8, 16, 32, 64, 512, 2048];
/// Up to this many tokens every pass reads all weights from memory; more are bound by arithmetic.
const FROM_MEMORY: usize = 8;

fn codes(rows: usize, cols: usize, mut seed: u32) -> Vec<u8> {
    let mut byte = || {
        let mut b = 0;
        for _ in 0..4 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            b = b << 2 | ((seed >> 8) % 3) as u8;
        }
        b
    };
    (0..rows * cols.div_ceil(4)).map(|_| byte()).collect()
}

fn seconds(passes: usize, mut f: impl FnMut()) -> f64 {
    f();
    let time = |_| {
        let started = Instant::now();
        f();
        started.elapsed().as_secs_f64()
    };
    (0..passes).map(time).fold(f64::INFINITY, f64::min)
}

fn scales(name: &str, rows: usize, cols: usize) -> Scales {
    match name.strip_prefix("group ").and_then(|group| group.parse::<usize>().ok()) {
        Some(group) => {
            let values = vec![1.0 / 128.0; rows * cols.div_ceil(group)];
            Scales::Block { rows: 1, cols: group, values }
        }
        None => Scales::Tensor(0.01),
    }
}

/// One product of every distinct shape, with an output.
struct Shape {
    matrix: TernaryMatrix,
    acts: Activations,
    out: Vec<f32>,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| args.iter().position(|a| a == flag).and_then(|i| args.get(i + 1));
    let threads = args.first().and_then(|a| a.parse().ok());
    let pool = Pool::new(threads.unwrap_or_else(threads::physical_cores_allowed));
    let (shapes, copies) = if args.iter().any(|a| a == "--set") { (&LAYER[..], 30) } else { (&ONE[..], 96) };
    let tokens: Vec<usize> = match value("--tokens") {
        Some(list) => list.split(',').filter_map(|n| n.parse().ok()).collect(),
        None => TOKENS.to_vec(),
    };
    let read = peak::read_bandwidth(&pool);
    println!("{} threads, read {:.1} GB/s", pool.threads(), read / 1e9);
    for k in
        Kernels::available().filter(|k| value("--kernel").map_or(k.name() != "scalar", |n| n == k.name()))
    {
        let int8 = peak::int8_peak(k, &pool);
        let float = peak::float_peak(k, &pool);
        println!("{}: int8 {:.0} GMAC/s, float {:.0} GFLOP/s", k.name(), int8 / 1e9, float / 1e9);
        for name in ["tensor", "group 128", "group 64"] {
            if value("--scales").is_some_and(|n| n != name) {
                continue;
            }
            let mut shapes: Vec<Shape> = shapes
                .iter()
                .map(|&(rows, cols)| {
                    let codes = codes(rows, cols, 1);
                    let matrix = TernaryMatrix::new(rows, cols, codes, scales(name, rows, cols)).unwrap();
                    Shape { matrix, acts: Activations::new(), out: Vec::new() }
                })
                .collect();
            let started = Instant::now();
            let set: Vec<Vec<PackedMatrix>> = (0..copies)
                .map(|_| shapes.iter().map(|s| PackedMatrix::pack(&s.matrix, k, &pool)).collect())
                .collect();
            let packing = started.elapsed().as_secs_f64();
            let bytes: usize = set.iter().flatten().map(PackedMatrix::bytes).sum();
            let weights: usize = set.iter().flatten().map(|m| m.rows() * m.cols()).sum();
            println!(
                "  {name}: {:.3} bits per weight; packed {:.2} G weights in {packing:.3} s, {:.1} GB/s of codes",
                bytes as f64 * 8.0 / weights as f64,
                weights as f64 / 1e9,
                weights as f64 / 4.0 / packing / 1e9,
            );
            for &tokens in &tokens {
                for s in &mut shapes {
                    let (rows, cols) = (s.matrix.rows(), s.matrix.cols());
                    s.acts = Activations::from_i8(&vec![77; tokens * cols], &vec![0.5; tokens], cols);
                    s.out = vec![0.0; tokens * rows];
                }
                let set = if tokens > FROM_MEMORY { &set[..2] } else { &set[..] };
                let s = seconds(if tokens > FROM_MEMORY { 4 } else { 8 }, || {
                    for layer in set {
                        for (m, s) in layer.iter().zip(&mut shapes) {
                            m.matmul(&s.acts, &mut s.out, &pool);
                        }
                    }
                });
                let macs =
                    set.iter().flatten().map(|m| m.rows() * m.cols() * tokens).sum::<usize>() as f64 / s;
                print!(
                    "    {tokens:4} tokens: {:6.1} GMAC/s, {:4.1} % of int8",
                    macs / 1e9,
                    macs / int8 * 100.0
                );
                if tokens <= FROM_MEMORY {
                    let rate = bytes as f64 / s;
                    let share = rate / read * 100.0;
                    print!(", {:5.1} GB/s, {share:4.1} % of read, {:6.2} ms a pass", rate / 1e9, s * 1e3);
                }
                println!();
            }
        }
        let (rows, cols) = ONE[0];
        let w = vec![0.3f32; rows * cols];
        let mut m = TernaryMatrix::new(rows, cols, codes(rows, cols, 1), Scales::Tensor(1.0)).unwrap();
        let s = seconds(5, || m.requantize(k, &w, &pool));
        println!("  requantize {:.2} ms for {} M weights", s * 1e3, w.len() / 1_000_000);
        let mut packed = PackedMatrix::pack(&m, k, &pool);
        let s = seconds(5, || packed.repack(&m, &pool));
        println!("  repack {:.2} ms", s * 1e3);
        let mut acts = Activations::new();
        let x = vec![0.3f32; 512 * cols];
        let s = seconds(5, || acts.quantize(k, &x, 512, cols, Some(&pool)));
        println!("  quantize 512 x {cols} activations {:.3} ms", s * 1e3);
        let s = seconds(500, || acts.quantize(k, &x[..cols], 1, cols, Some(&pool)));
        println!("  quantize 1 x {cols} activations {:.2} us", s * 1e6);
    }
    let s = seconds(5, || (0..1000).for_each(|_| pool.run(pool.threads(), &|_| {})));
    println!("fork and join {:.2} us", s * 1e3);
}

//! Speed of the ternary products against what this machine can do: `cargo run --release -p
//! setun-kernels --example kernel_speed [threads]`.

use std::time::Instant;

use setun_kernels::{Activations, Kernels, PackedMatrix, Pool, Scales, TernaryMatrix, peak, threads};

const SHAPE: (usize, usize) = (6912, 2560);

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

fn main() {
    let threads = std::env::args().nth(1).and_then(|a| a.parse().ok());
    let pool = Pool::new(threads.unwrap_or_else(threads::physical_cores_allowed));
    let (rows, cols) = SHAPE;
    let read = peak::read_bandwidth(&pool);
    println!("{} threads, read {:.1} GB/s", pool.threads(), read / 1e9);
    let block = |cols: usize| {
        let values = vec![0.01; rows * (SHAPE.1 / cols)];
        Scales::Block { rows: 1, cols, values }
    };
    for k in Kernels::available().filter(|k| k.name() != "scalar") {
        let int8 = peak::int8_peak(k, &pool);
        let float = peak::float_peak(k, &pool);
        println!("{}: int8 {:.0} GMAC/s, float {:.0} GFLOP/s", k.name(), int8 / 1e9, float / 1e9);
        for (name, scales) in [("tensor", Scales::Tensor(0.01)), ("group 128", block(128))] {
            let matrix = TernaryMatrix::new(rows, cols, codes(rows, cols, 1), scales).unwrap();
            let set: Vec<_> = (0..96).map(|_| PackedMatrix::pack(&matrix, k, &pool)).collect();
            let bytes: usize = set.iter().map(PackedMatrix::bytes).sum();
            for tokens in [1, 2, 4, 6, 8, 64, 512] {
                let set = if tokens > 8 { &set[..2] } else { &set[..] };
                let acts = Activations::from_i8(&vec![77; tokens * cols], &vec![0.5; tokens], cols);
                let mut out = vec![0.0; tokens * rows];
                let s = seconds(if tokens > 8 { 5 } else { 8 }, || {
                    for m in set {
                        m.matmul(&acts, &mut out, &pool);
                    }
                });
                let macs = (set.len() * rows * cols * tokens) as f64 / s;
                print!(
                    "  {name:9} {tokens:3} tokens: {:6.1} GMAC/s, {:4.1} % of int8 peak",
                    macs / 1e9,
                    macs / int8 * 100.0
                );
                if tokens <= 8 {
                    let rate = bytes as f64 / s;
                    print!(", {:5.1} GB/s, {:4.1} % of read", rate / 1e9, rate / read * 100.0);
                }
                println!();
            }
        }
        let (w, mut m) = (
            vec![0.3f32; rows * cols],
            TernaryMatrix::new(rows, cols, codes(rows, cols, 1), Scales::Tensor(1.0)).unwrap(),
        );
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

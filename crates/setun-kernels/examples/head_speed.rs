//! The output head by a shortlist, against the exact one and what this machine can do: `cargo run --release -p
//! setun-kernels --example head_speed [threads] [rows] [columns]`.

use std::time::Instant;

use half::f16;
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::shortlist::{Bounds, Shortlist};
use setun_kernels::{Kernels, Pool, peak, threads};

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 29)
}

fn uniform(state: &mut u64) -> f64 {
    (next(state) >> 11) as f64 / (1u64 << 53) as f64
}

fn gaussian(state: &mut u64) -> f64 {
    (-2.0 * (1.0 - uniform(state)).ln()).sqrt() * (uniform(state) * std::f64::consts::TAU).cos()
}

/// A million numbers of a distribution, from which weights are drawn.
fn numbers(name: &str) -> Vec<f16> {
    let state = &mut 7;
    let number = |_| match name {
        "uniform" => 2.0 * uniform(state) - 1.0,
        "gaussian" => gaussian(state),
        // Student's t with four degrees of freedom.
        _ => {
            let four: f64 = (0..4).map(|_| gaussian(state).powi(2)).sum();
            gaussian(state) / (four / 4.0).sqrt()
        }
    };
    (0..1 << 20).map(number).map(|v| f16::from_f64(v * 0.02)).collect()
}

fn seconds(passes: usize, mut f: impl FnMut(usize)) -> f64 {
    let time = |i| {
        let started = Instant::now();
        f(i);
        started.elapsed().as_secs_f64()
    };
    (0..passes).map(time).fold(f64::INFINITY, f64::min)
}

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let pool = Pool::new(args.first().copied().unwrap_or_else(threads::physical_cores_allowed));
    let (rows, cols) = (args.get(1).copied().unwrap_or(128_256), args.get(2).copied().unwrap_or(2560));
    println!("{} threads, head {rows} x {cols} in f16", pool.threads());
    for name in ["uniform", "gaussian", "heavy"] {
        let table = numbers(name);
        let mut weights = vec![f16::ZERO; rows * cols];
        pool.run_chunks_mut(&mut weights, 1 << 20, |i, part| {
            let mut state = i as u64 + 1;
            part.iter_mut().for_each(|w| *w = table[(next(&mut state) >> 44) as usize]);
        });
        let matrix = DenseMatrix::new(rows, cols, DenseData::F16(weights)).unwrap();
        let x: Vec<f32> = (0..32 * cols).map(|i| gaussian(&mut (i as u64 * 99)) as f32).collect();
        for k in Kernels::available().filter(|k| k.name() != "scalar") {
            // Each time anew: on a shared machine memory is faster in one minute than in the next.
            let read = peak::read_bandwidth(&pool);
            let mut list = None;
            let built = seconds(1, |_| list = Shortlist::new(&matrix, k, &pool));
            let list = list.expect("finite weights");
            let (mut bounds, mut logits) = (Bounds::default(), vec![0.0; rows]);
            let exact = seconds(4, |_| matrix.matmul(k, &x[..cols], 1, &mut logits, &pool));
            let plane = seconds(12, |_| list.bounds(k, &x[..cols], 1, &mut bounds, &pool));
            println!(
                "{name:9} {:7} read {:.1} GB/s; built in {built:.2} s; exact {:.2} ms, {:.0} % of read; bounds {:.2} ms, {:.0} % of read",
                k.name(),
                read / 1e9,
                exact * 1e3,
                matrix.bytes() as f64 / exact / read * 100.0,
                plane * 1e3,
                list.bytes() as f64 / plane / read * 100.0
            );
            for tokens in [2, 4, 8] {
                let s = seconds(6, |_| list.bounds(k, &x[..tokens * cols], tokens, &mut bounds, &pool));
                print!("    {tokens} tokens {:.2} ms", s * 1e3);
            }
            println!();
            for top in [1, 40] {
                let (mut ids, mut more, mut out, mut count) = (Vec::new(), Vec::new(), Vec::new(), 0);
                let mut whole = |i: usize| {
                    let x = &x[i % 32 * cols..][..cols];
                    list.bounds(k, x, 1, &mut bounds, &pool);
                    bounds.likeliest(0, top, &mut ids);
                    out.resize(ids.len(), 0.0);
                    matrix.dots(k, x, &ids, &mut out, &pool);
                    out.sort_unstable_by(|a, b| b.total_cmp(a));
                    assert!(bounds.reaching(0, out[top - 1], rows, &mut more));
                    out.resize(more.len(), 0.0);
                    matrix.dots(k, x, &more, &mut out, &pool);
                    count += ids.len() + more.len();
                };
                let started = Instant::now();
                let best = seconds(32, &mut whole);
                let mean = started.elapsed().as_secs_f64() / 32.0;
                let picked = count as f64 / 32.0;
                let bytes = list.bytes() as f64 + picked * (matrix.bytes() / rows) as f64;
                println!(
                    "    top {top:2}: {picked:7.0} rows exactly, {:.1} MB of {:.1}; mean {:.2} ms, best {:.2} ms = {:.0} % of read",
                    bytes / 1e6,
                    matrix.bytes() as f64 / 1e6,
                    mean * 1e3,
                    best * 1e3,
                    bytes / best / read * 100.0
                );
            }
        }
    }
}

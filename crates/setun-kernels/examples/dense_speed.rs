//! Speed of dense products of one token against read bandwidth: `cargo run --release -p setun-kernels --example
//! dense_speed [threads]`.

use std::time::Instant;

use half::{bf16, f16};
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::{Kernels, Pool, advise_huge_pages, peak, threads};

/// A gate or up projection of BitNet-b1.58-2B-4T's shape, and a down projection.
const SHAPES: [(usize, usize); 2] = [(6912, 2560), (2560, 6912)];
/// More than caches hold.
const BYTES: usize = 400 << 20;
const PASSES: usize = 7;

/// In huge pages, where the system has them.
fn filled<T: Copy>(len: usize, value: T) -> Vec<T> {
    let mut memory = Vec::with_capacity(len);
    advise_huge_pages(memory.spare_capacity_mut());
    memory.resize(len, value);
    memory
}

fn data(kind: &str, count: usize) -> DenseData {
    let block = |bytes: usize| filled(count / 32 * bytes, 0x11u8);
    match kind {
        "F32" => DenseData::F32(filled(count, 0.5)),
        "F16" => DenseData::F16(filled(count, f16::ONE)),
        "BF16" => DenseData::BF16(filled(count, bf16::ONE)),
        "Q8_0" => DenseData::Q8_0(block(34)),
        _ => DenseData::Q4_0(block(18)),
    }
}

fn main() {
    let threads = std::env::args().nth(1).and_then(|a| a.parse().ok());
    let pool = Pool::new(threads.unwrap_or_else(threads::physical_cores_allowed));
    for kind in ["F32", "F16", "BF16", "Q8_0", "Q4_0"] {
        for (rows, cols) in SHAPES {
            let one = DenseMatrix::new(rows, cols, data(kind, rows * cols)).expect("a whole matrix");
            let bytes = one.bytes();
            let set: Vec<_> =
                std::iter::once(one)
                    .chain((1..BYTES.div_ceil(bytes)).map(|_| {
                        DenseMatrix::new(rows, cols, data(kind, rows * cols)).expect("a whole matrix")
                    }))
                    .collect();
            let x = vec![0.5; cols];
            let mut out = vec![0.0; rows];
            for k in Kernels::available().filter(|k| k.name() != "scalar") {
                let (mut best, mut read) = (f64::INFINITY, 0f64);
                for _ in 0..PASSES {
                    read = read.max(peak::read_bandwidth(&pool));
                    let started = Instant::now();
                    for matrix in &set {
                        matrix.matmul(k, &x, 1, &mut out, &pool);
                    }
                    best = best.min(started.elapsed().as_secs_f64());
                }
                let rate = (bytes * set.len()) as f64 / best;
                println!(
                    "{kind:5} {rows:6} x {cols} {:7} {:5.1} GB/s, {:5.1} % of {:.1} GB/s read",
                    k.name(),
                    rate / 1e9,
                    rate / read * 100.0,
                    read / 1e9
                );
            }
        }
    }
}

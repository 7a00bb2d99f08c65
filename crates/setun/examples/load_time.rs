//! Loads a model several times and prints what each took: `cargo run --release -p setun --example load_time -- FILE [REPEATS]`.
//!
//! Processor time (user + system, all threads, in ticks of 10 ms) tells what loading costs where other work shares the cores.

use std::time::Instant;

use setun::engine::{Engine, EngineOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: load_time FILE [REPEATS]")?;
    let repeats: usize = args.next().map_or(Ok(5), |n| n.parse())?;
    for _ in 0..repeats {
        let (before, started) = (cpu_ticks(), Instant::now());
        let engine = Engine::open(&path, &EngineOptions::default())?;
        let seconds = started.elapsed().as_secs_f64();
        let after = cpu_ticks();
        let cpu = |i: usize| (after[i] - before[i]) as f64 / 100.0;
        println!(
            "{seconds:.3} s, processor {:.2} s user + {:.2} s system, {} MB of weights, {} kB resident without the file",
            cpu(0),
            cpu(1),
            engine.bytes_per_token() / 1_000_000,
            anonymous(),
        );
    }
    Ok(())
}

/// User and system time of this process; zeros where the system does not tell.
fn cpu_ticks() -> [u64; 2] {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name in brackets may hold anything; the times are the 12th and 13th fields after it.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    [11, 12].map(|i| fields.get(i).and_then(|f| f.parse().ok()).unwrap_or(0))
}

fn anonymous() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.map_or("unknown".into(), |line| line.trim().trim_end_matches(" kB").to_owned())
}

//! Trains the model that a TOML file describes, from Rust: `cargo run --release -p setun-train --example train runs/smoke.toml`.

use setun_train::config::TrainConfig;
use setun_train::trainer::{Progress, StepReport, Trainer};

struct Print;

impl Progress for Print {
    fn step(&mut self, r: &StepReport) {
        if r.step.is_multiple_of(10) {
            println!(
                "step {} loss {:.4} grad {:.2} {:.0} tokens/s",
                r.step, r.loss, r.grad_norm, r.tokens_per_s
            );
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: train CONFIG.toml")?;
    Trainer::open(TrainConfig::load(path.as_ref())?)?.run(&mut Print)?;
    Ok(())
}

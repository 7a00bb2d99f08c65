//! The `setun` command: one file per subcommand, each only wiring the library to flags and output.

mod bench;
mod convert;
mod default_model;
mod eval;
mod finetune;
mod info;
mod interrupt;
mod logits;
mod memory;
mod model;
mod output;
mod plot;
mod prepare;
mod progress;
mod pull;
mod run;
mod tokenize;
mod train;

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};

/// Train, convert, run and measure ternary language models (weights -1, 0 and +1).
///
/// Without a command, tells a story with the model that is part of the program: no download, no argument.
/// Text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
#[derive(Parser)]
#[command(name = "setun", version, after_help = "Every command explains itself: setun run --help")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    Pull(pull::PullArgs),
    Info(info::InfoArgs),
    Logits(logits::LogitsArgs),
    Convert(convert::ConvertArgs),
    Tokenize(tokenize::TokenizeArgs),
    Eval(eval::EvalArgs),
    Bench(bench::BenchArgs),
    Train(train::TrainArgs),
    Finetune(finetune::FinetuneArgs),
    Plot(plot::PlotArgs),
}

/// Arguments that clap accepts but that contradict each other: exit code 2.
#[derive(Debug)]
struct WrongUsage(String);

impl std::fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongUsage {}

fn main() -> ExitCode {
    let started = Instant::now();
    let done = match Cli::parse().command {
        None => run::default_story(started),
        Some(Command::Run(args)) => run::run(args, started),
        Some(Command::Pull(args)) => pull::pull(&args),
        Some(Command::Info(args)) => info::info(args),
        Some(Command::Logits(args)) => logits::logits(args),
        Some(Command::Convert(args)) => convert::convert(args),
        Some(Command::Tokenize(args)) => tokenize::tokenize(args),
        Some(Command::Eval(args)) => eval::eval(args),
        Some(Command::Bench(args)) => bench::bench(args),
        Some(Command::Train(args)) => train::train(args),
        Some(Command::Finetune(args)) => finetune::finetune(args),
        Some(Command::Plot(args)) => plot::plot(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has seen enough (`| head`): nothing failed.
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", output::one_line(&error));
            let wrong_usage = error.is::<WrongUsage>()
                || matches!(error.downcast_ref(), Some(setun::error::ModelError::Sampling { .. }));
            ExitCode::from(if wrong_usage { 2 } else { 1 })
        }
    }
}

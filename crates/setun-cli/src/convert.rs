//! `setun convert`: the same model in another container or packing.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use clap::ValueEnum;
use setun::convert::{ConvertOptions, ConvertReport, Target, convert as convert_model};
use setun::format::{Encoding, ScaleConvention};

use crate::interrupt::Interrupt;
use crate::{WrongUsage, model, output, progress};

/// Rewrite a model in another format, losing nothing: ternary weights and their scales keep every bit, or it is refused.
///
/// Reads GGUF, Hugging Face folders (packed ternary, float masters, plain float; split ones too) and llama2.c files. Float
/// masters of a ternary model become ternary by their own definition. Floats are narrowed only to a type named by --type or
/// --embedding-type, and the largest error is printed. Any other loss needs --allow-loss, and each is named in the output.
/// The output appears under its name when it is complete; what a killed conversion left is cleared away by the next.
#[derive(clap::Args)]
#[command(after_help = "Ternary layers are written
  in GGUF (--type):
    i2_s       one scale per tensor, blocks of 128 (bitnet.cpp); the default for BitNet models
    tq1_0      1.6875 bits, an f16 scale per 256 weights (llama.cpp)
    tq2_0      2.0625 bits, an f16 scale per 256 weights (llama.cpp)
    q2_0       2.25 bits, an f16 scale per 64 weights (llama.cpp); q2_0_g64 is the same
    q2_0_g128  2.125 bits, an f16 scale per 128 weights (older PrismML programs; the same type number)
    pq2_0      2.125 bits, an f16 scale per 128 weights (PrismML)
    ptq1_0     1.75 bits, an f16 scale per 128 weights (PrismML)
  in a Hugging Face folder (--scales), four weights to a byte and one scale per tensor:
    multiply   linear_class autobitlinear: outputs are multiplied by the scale (BitNet 2B-4T)
    divide     linear_class bitlinear: outputs are divided by it (Falcon-E, HF1BitLLM)
    Models whose activations are floats (Bonsai, TriLM) become float copies there, f16 where that holds them.

Examples:
  setun convert model-folder model.gguf --to gguf --embedding-type f16 --verify
  setun convert model.gguf model-folder --to hf --shard-size 2GB
  setun convert stories.bin stories.gguf --to gguf --tokenizer tok512.model")]
pub struct ConvertArgs {
    /// Model file (GGUF, safetensors, llama2.c), folder or hub name (OWNER/NAME[:FILE])
    input: PathBuf,
    /// File (gguf) or folder (hf) to write
    output: PathBuf,
    /// Format to write
    #[arg(long, value_name = "FORMAT")]
    to: Format,
    /// Type of the linear layers: one of the ternary types below (ternary layers only), f32, f16, bf16, q8_0, q6_k or q4_0
    /// [default: i2_s for ternary layers in GGUF, their own type for float layers and in weight-only models]
    #[arg(long = "type", value_name = "TYPE", value_parser = any_type)]
    linear_type: Option<Encoding>,
    /// Type of the embedding and the output head: f32, f16, bf16, q8_0, q6_k or q4_0; asking for a narrower one is asking
    /// for its rounding [default: their own]
    #[arg(long, value_name = "TYPE", value_parser = float_type)]
    embedding_type: Option<Encoding>,
    /// What the scales beside packed layers mean in a Hugging Face folder: the factor of the layer's output (as BitNet
    /// 2B-4T) or its divisor (as Falcon-E) [default: as in the input, else multiply]
    #[arg(long, value_name = "MEANING")]
    scales: Option<Meaning>,
    /// Tokenizer to write instead of the model's own: tokenizer.json, tokenizer.model, a GGUF file or a folder
    #[arg(long, value_name = "FILE", conflicts_with = "no_tokenizer")]
    tokenizer: Option<PathBuf>,
    /// Write no tokenizer
    #[arg(long)]
    no_tokenizer: bool,
    /// Write what the output cannot hold exactly: scales are rounded or merged, float activations become int8 or the other
    /// way round, a rotation is turned back. Each loss is printed and named in the output (`setun.convert.losses`)
    #[arg(long)]
    allow_loss: bool,
    /// Largest file of a Hugging Face folder: 5GB, 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    shard_size: Option<u64>,
    /// Read the output back and compare every ternary weight, scale and float, the configuration, sampling and tokenizer
    /// before it gets its name; a difference leaves no output
    #[arg(long)]
    verify: bool,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    /// Print what was done as JSON on stdout
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    open: model::OpenArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// One GGUF file
    Gguf,
    /// A Hugging Face folder: safetensors, config.json, tokenizer.json
    Hf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Meaning {
    Multiply,
    Divide,
}

pub fn convert(args: ConvertArgs) -> Result<()> {
    if let (Format::Gguf, Some(_)) = (args.to, args.scales) {
        return Err(WrongUsage(
            "--scales is about Hugging Face folders: leave it out, or use --to hf".into(),
        )
        .into());
    }
    let file = args.open.open(Some(&args.input))?;
    let tokenizer = args.tokenizer.as_deref().map(model::tokenizer_at).transpose()?;
    let interrupt = Interrupt::install()?;
    let options = ConvertOptions {
        target: match args.to {
            Format::Gguf => Target::Gguf,
            Format::Hf => Target::HuggingFace,
        },
        linear_type: args.linear_type,
        embedding_type: args.embedding_type,
        scales: args.scales.map(|meaning| match meaning {
            Meaning::Multiply => ScaleConvention::Multiply,
            Meaning::Divide => ScaleConvention::Divide,
        }),
        tokenizer: tokenizer.as_ref(),
        without_tokenizer: args.no_tokenizer,
        allow_loss: args.allow_loss,
        shard_size: args.shard_size,
        force: args.force,
        verify: args.verify,
        stop: Some(interrupt.flag()),
    };
    let started = Instant::now();
    let bar = progress::bytes();
    interrupt.begin();
    let report = convert_model(&file, &args.output, &options, &mut |p| {
        bar.set_length(p.total);
        bar.set_position(p.done);
        bar.set_message(p.tensor.to_owned());
    });
    interrupt.end();
    bar.finish_and_clear();
    let report = report?;
    let seconds = started.elapsed().as_secs_f64();
    summary(&args.output, &report, seconds);
    if args.json {
        let mut json = serde_json::to_value(&report)?;
        json["output"] = args.output.display().to_string().into();
        json["seconds"] = seconds.into();
        output::print_json(&json)?;
    }
    Ok(())
}

fn summary(path: &Path, report: &ConvertReport, seconds: f64) {
    let types: Vec<String> = report.types.iter().map(|(name, count)| format!("{count} {name}")).collect();
    eprintln!(
        "{}: {} from {}, {} tensors ({}) in {seconds:.1} s",
        path.display(),
        output::bytes(report.output_bytes as usize),
        output::bytes(report.input_bytes as usize),
        report.tensors,
        types.join(", ")
    );
    if let Some(max) = &report.max_error {
        eprintln!("narrowed floats: largest error {:.3e}, in {}", max.error, max.tensor);
    }
    if report.max_scale_error > 0.0 {
        eprintln!("rounded scales: largest relative change {:.3e}", report.max_scale_error);
    }
    for loss in &report.losses {
        eprintln!("loss: {loss}");
    }
    for note in &report.notes {
        eprintln!("note: {note}");
    }
    if let Some(seen) = &report.verified {
        let within = if report.losses.is_empty() { "" } else { " or within the losses above" };
        eprintln!(
            "verified: {} tensors read back, {} ternary weights equal in sign and scale, {} floats equal{within}, {} facts: {}",
            seen.tensors,
            output::count(seen.trits as usize),
            output::count(seen.floats as usize),
            seen.keys.len(),
            seen.keys.join(", ")
        );
    }
}

fn any_type(text: &str) -> Result<Encoding, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "i2_s" => Encoding::I2S,
        "tq1_0" => Encoding::TQ1_0,
        "tq2_0" => Encoding::TQ2_0,
        "q2_0" | "q2_0_g64" => Encoding::Q2_0G64,
        "q2_0_g128" => Encoding::Q2_0G128,
        "pq2_0" => Encoding::PQ2_0,
        "ptq1_0" => Encoding::PTQ1_0,
        other => float_type(other).map_err(
            |_| "i2_s, tq1_0, tq2_0, q2_0, q2_0_g128, pq2_0, ptq1_0, f32, f16, bf16, q8_0, q6_k or q4_0 is expected",
        )?,
    })
}

fn float_type(text: &str) -> Result<Encoding, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "f32" => Encoding::F32,
        "f16" => Encoding::F16,
        "bf16" => Encoding::BF16,
        "q8_0" => Encoding::Q8_0,
        "q6_k" => Encoding::Q6K,
        "q4_0" => Encoding::Q4_0,
        _ => return Err("f32, f16, bf16, q8_0, q6_k or q4_0 is expected".into()),
    })
}

/// A number of bytes with a unit of thousands (KB, MB, GB, TB) or of 1024 (KiB …), or none.
fn size(text: &str) -> Result<u64, String> {
    let expected = || "a size such as 5GB or 500MB is expected".to_owned();
    let (number, unit) = text.split_at(text.find(|c: char| c.is_alphabetic()).unwrap_or(text.len()));
    let unit = unit.to_ascii_lowercase();
    let (prefix, base) = match unit.strip_suffix("ib") {
        Some(prefix) => (prefix, 1024f64),
        None => (unit.strip_suffix('b').unwrap_or(&unit), 1000.0),
    };
    let power = ["", "k", "m", "g", "t"].iter().position(|p| *p == prefix).ok_or_else(expected)?;
    let bytes = number.trim().parse::<f64>().map_err(|_| expected())? * base.powi(power as i32);
    if (1.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(expected()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_thousands_or_1024() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("1.5 kib"), Ok(1536));
        assert_eq!((size("7"), size("2M")), (Ok(7), Ok(2_000_000)));
        for wrong in ["", "GB", "0", "-1GB", "5XB", "1e99GB", "nanb"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn types_are_named_in_any_case_and_ternary_ones_only_for_linears() {
        assert_eq!(any_type("I2_S"), Ok(Encoding::I2S));
        assert_eq!(any_type("q8_0"), float_type("Q8_0"));
        assert!(float_type("tq2_0").is_err() && any_type("q3_0").unwrap_err().contains("tq1_0"));
    }
}

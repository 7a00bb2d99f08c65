//! `setun tokenize`: text to ids and back.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{WrongUsage, model, output};

/// Turn text into token ids, or ids into text.
///
/// Prints one line for each token: its id, and the token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`).
/// MODEL may also be a tokenizer alone: tokenizer.json or a SentencePiece model.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  setun tokenize MODEL 'Once upon a time' --ids\n  setun tokenize MODEL - < book.txt --json\n  setun tokenize MODEL --decode '403 407 261'"
)]
pub struct TokenizeArgs {
    /// Model file, folder or hub name (OWNER/NAME[:FILE]), or a tokenizer file
    model: PathBuf,
    /// Text to encode; `-` or nothing reads stdin
    #[arg(conflicts_with = "decode")]
    text: Option<String>,
    /// Print the ids alone, on one line
    #[arg(long, conflicts_with = "decode")]
    ids: bool,
    /// Turn these ids (separated by spaces or commas, brackets allowed) into text; `-` reads them from stdin
    #[arg(long, value_name = "IDS", allow_hyphen_values = true)]
    decode: Option<String>,
    /// Encoding: add no BOS or other special token around the text. Decoding: leave special tokens out
    #[arg(long)]
    no_special: bool,
    /// Print one JSON object: `ids` and `tokens`, or `text`
    #[arg(long)]
    json: bool,
}

pub fn tokenize(args: TokenizeArgs) -> Result<()> {
    let tokenizer = model::tokenizer_at(&args.model)?;
    if let Some(ids) = &args.decode {
        let ids = if ids == "-" { stdin()? } else { ids.clone() };
        let ids = parse_ids(&ids)?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= tokenizer.vocab_size()) {
            eprintln!(
                "note: id {id} is outside the vocabulary of {} and has no text",
                tokenizer.vocab_size()
            );
        }
        let text = tokenizer.decode(&ids, args.no_special)?;
        return match args.json {
            true => output::print_json(&serde_json::json!({ "ids": ids, "text": text })),
            false => Ok(output::print(&(text + "\n"))?),
        };
    }
    let text = match args.text.as_deref() {
        None | Some("-") => stdin()?,
        Some(text) => text.to_owned(),
    };
    let ids = tokenizer.encode(&text, !args.no_special)?;
    let spelled = |id: &u32| tokenizer.id_to_token(*id).unwrap_or_default();
    if args.json {
        let tokens: Vec<String> = ids.iter().map(spelled).collect();
        return output::print_json(&serde_json::json!({ "ids": ids, "tokens": tokens }));
    }
    let text = if args.ids {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        ids.join(" ") + "\n"
    } else {
        // Control characters in a token would tear the table.
        ids.iter()
            .map(|id| format!("{id:7}  {}\n", spelled(id).replace('\n', "\\n").replace('\t', "\\t")))
            .collect()
    };
    Ok(output::print(&text)?)
}

/// All of stdin as text.
pub fn stdin() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read stdin")?;
    String::from_utf8(bytes).context("stdin is not UTF-8 text")
}

fn parse_ids(text: &str) -> Result<Vec<u32>> {
    let separator = |c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']');
    let words = text.split(separator).filter(|word| !word.is_empty());
    let id = |word: &str| word.parse().map_err(|_| WrongUsage(format!("`{word}` is not a token id")).into());
    words.map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_may_be_written_as_json_or_plainly() {
        assert_eq!(parse_ids("[1, 2,3]").unwrap(), [1, 2, 3]);
        assert_eq!(parse_ids(" 1 2\n3 ").unwrap(), [1, 2, 3]);
        assert!(parse_ids("1 -2").unwrap_err().is::<WrongUsage>());
    }
}

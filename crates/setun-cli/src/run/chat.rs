//! The conversation at the terminal.

use std::io::{BufRead, Write};

use anyhow::{Context, Result};
use setun::chat::{Chat, Message, Prompt};
use setun::engine::Session;
use setun::generate::Stop;
use setun::sampler::{Sampler, Sampling};

use super::{Speaker, Thoughts};
use crate::interrupt::Interrupt;
use crate::output;

const HELP: &str = "/reset  forget the conversation
/exit   end (or Ctrl-D)
Ctrl-C  stop an answer
A line ending in \\ continues on the next.";

/// Talks until the user ends it. The cache keeps what a turn has in common with the last.
pub fn converse(speaker: &Speaker, chat: &Chat, mut session: Session, sampling: Sampling) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let mut sampler = Sampler::new(sampling.clone())?;
    let system: Vec<Message> = speaker.args.system.iter().map(|text| Message::new("system", text)).collect();
    let (mut messages, mut seen) = (system.clone(), Vec::<u32>::new());
    eprintln!("Type a message, or /help. Seed {}.", sampling.seed);
    while let Some(line) = read_message()? {
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/help" => {
                eprintln!("{HELP}");
                continue;
            }
            "/reset" => {
                messages = system.clone();
                sampler = Sampler::new(sampling.clone())?;
                eprintln!("(forgotten)");
                continue;
            }
            command if command.starts_with('/') && !command.contains(' ') => {
                eprintln!("`{command}` is not a command; /help lists them");
                continue;
            }
            text => messages.push(Message::new("user", text)),
        }
        let prompt = match fit(speaker, chat, &session, &mut messages, system.len()) {
            Ok(prompt) => prompt,
            Err(error) => {
                eprintln!("error: {}", output::one_line(&error));
                messages.pop();
                continue;
            }
        };
        // At least one token is fed, so that there are logits to sample from.
        let ids = &prompt.ids;
        let common =
            ids.iter().zip(&seen).take_while(|(a, b)| a == b).count().min(ids.len().saturating_sub(1));
        // Recurrent layers go back to the end of a prompt at best.
        let known = session.truncate(common);
        interrupt.begin();
        let again = if known < common { session.feed(&ids[known..common]).map(drop) } else { Ok(()) };
        let max_tokens = speaker.args.tokens.unwrap_or(usize::MAX);
        let mut thoughts = Thoughts::new(speaker.args);
        let told = again.map_err(anyhow::Error::from).and_then(|()| {
            speaker.generate(&mut session, &prompt, common, &mut sampler, max_tokens, &mut |part, text| {
                thoughts.print(part, text)?;
                Ok(!interrupt.asked())
            })
        });
        thoughts.end();
        interrupt.end();
        let told = match told {
            Ok(told) => told,
            // A closed stdout ends the program; what is wrong with a message is said, and the next one is awaited.
            Err(error) if error.is::<std::io::Error>() => return Err(error),
            Err(error) => {
                eprintln!("error: {}", output::one_line(&error));
                messages.pop();
                session.clear();
                seen.clear();
                continue;
            }
        };
        output::print("\n")?;
        let (new, rate) = (told.report.new_ids.len(), output::rate(told.report.decode_rate()));
        eprintln!("({new} tokens at {rate} tok/s)");
        if told.report.stop == Stop::ContextFull {
            eprintln!("(the context is full: the answer is cut short, and the next turn forgets the oldest)");
        }
        seen = prompt.ids;
        seen.extend(&told.report.new_ids);
        seen.truncate(session.len());
        // Templates were trained on histories without the thoughts.
        messages.push(Message::new("assistant", told.text.trim()));
    }
    Ok(())
}

/// Ids of the conversation, without its oldest exchanges where it would not leave a quarter of the context free.
fn fit(
    speaker: &Speaker,
    chat: &Chat,
    session: &Session,
    messages: &mut Vec<Message>,
    system: usize,
) -> Result<Prompt> {
    let limit = session.len() + session.room();
    loop {
        let prompt = chat.prompt(messages, speaker.args.enable_thinking())?;
        if prompt.ids.len() <= limit - limit / 4 || messages.len() <= system + 1 {
            return Ok(prompt);
        }
        messages.drain(system..system + 2); // A user's message and its answer.
        eprintln!(
            "(the conversation outgrows the context of {limit} tokens: its oldest exchange is forgotten)"
        );
    }
}

/// A line from the user, or several joined by backslashes; `None` at the end of input.
fn read_message() -> Result<Option<String>> {
    let mut message = String::new();
    loop {
        eprint!("{}", if message.is_empty() { "> " } else { ". " });
        std::io::stderr().flush()?;
        let mut line = Vec::new();
        if std::io::stdin().lock().read_until(b'\n', &mut line).context("cannot read the message")? == 0 {
            eprintln!();
            return Ok((!message.is_empty()).then_some(message));
        }
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches(['\n', '\r']);
        match line.strip_suffix('\\') {
            Some(start) => message = message + start + "\n",
            None => return Ok(Some(message + line)),
        }
    }
}

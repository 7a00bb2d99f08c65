//! Conversations as tokens of which only the assistant's count.
//!
//! The model's template renders the conversation twice: as it is, and with unmistakable words in the place of what the assistant
//! says. What stands between these words is the template's own, and where both renderings agree but for them, the
//! assistant's turns are known to the byte. A template that changes earlier turns (leaving their thoughts out, say) is asked turn by turn
//! instead: what it writes after its own opening of an answer.
//!
//! Each turn counts with the marker that ends it, which the model has to write as well. Text is tokenised piece by piece where a
//! turn begins and ends, since at inference a prompt ends where the answer begins.

use std::ops::Range;

use setun::chat::{Chat, Message, TurnEnd};
use setun::config::ModelConfig;
use setun::tokenizer::Tokenizer;

use super::examples::Example;
use super::read::end_of_text;

/// The role whose turns count.
pub(crate) const ASSISTANT: &str = "assistant";

/// A conversation as the template writes it, and which bytes of it count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The whole text.
    pub text: String,
    /// The assistant's turns, in order, each with the marker that ends it.
    pub turns: Vec<Range<usize>>,
}

/// A conversation's examples: one, unless the template shows earlier turns in another way than it showed them before.
///
/// # Errors
/// The template's own complaint, or that what it makes of the assistant's turns cannot be found.
pub(crate) fn examples(
    chat: &Chat,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    messages: &[Message],
) -> Result<Vec<Example>, String> {
    let end = match chat.turn_end() {
        // Nothing else would tell the model to stop.
        TurnEnd::Unknown => end_of_text(tokenizer, config),
        _ => None,
    };
    let mut made = Vec::new();
    for rendered in render(chat, tokenizer, messages)? {
        let (mut tokens, mut counts) = tokens(tokenizer, &rendered)?;
        if let Some(end) = end.filter(|_| rendered.turns.last().is_some_and(|t| t.end == rendered.text.len()))
        {
            tokens.push(end);
            counts.push(true);
        }
        let bytes = rendered.turns.iter().map(|turn| turn.len() as u64).sum();
        made.extend(Example::new(&tokens, |i| counts[i], bytes, true));
    }
    Ok(made)
}

/// The conversation by the template, with the assistant's turns marked.
///
/// # Errors
/// As [`examples`].
pub fn render(chat: &Chat, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<Rendered>, String> {
    let text = chat.render(messages, None, false).map_err(|e| e.to_string())?;
    if let Some(turns) = find_turns(chat, tokenizer, messages, &text) {
        return Ok(vec![Rendered { text, turns }]);
    }
    let answers = (0..messages.len()).filter(|&n| messages[n].role == ASSISTANT);
    answers.map(|n| answer(chat, tokenizer, messages, n)).collect()
}

/// The assistant's turns in `text`, if it is what probes in their place give.
fn find_turns(
    chat: &Chat,
    tokenizer: &Tokenizer,
    messages: &[Message],
    text: &str,
) -> Option<Vec<Range<usize>>> {
    let mut probed = messages.to_vec();
    let (mut probes, mut contents) = (Vec::new(), Vec::new());
    for message in probed.iter_mut().filter(|m| m.role == ASSISTANT) {
        let probe = format!("qxProbe{}Xq", probes.len());
        contents.push(std::mem::replace(&mut message.content, probe.clone()));
        probes.push(probe);
    }
    let with_probes = chat.render(&probed, None, false).ok()?;
    // What the template writes before, between and after them.
    let (mut own, mut rest) = (Vec::new(), with_probes.as_str());
    for probe in &probes {
        let (before, after) = rest.split_once(probe.as_str())?;
        own.push(before);
        rest = after;
    }
    own.push(rest);
    let changes: [fn(&str) -> &str; 4] = [|s| s, str::trim, str::trim_end, str::trim_start];
    changes.into_iter().find_map(|change| {
        let (mut made, mut turns) = (String::from(own[0]), Vec::new());
        for (content, after) in contents.iter().zip(&own[1..]) {
            let start = made.len();
            made += change(content);
            turns.push(start..made.len() + end_marker(chat, tokenizer, after));
            made += after;
        }
        (made == text).then_some(turns)
    })
}

/// Answer `n` alone, after the conversation before it as the model is shown that.
fn answer(chat: &Chat, tokenizer: &Tokenizer, messages: &[Message], n: usize) -> Result<Rendered, String> {
    let show = |messages: &[Message], open| chat.render(messages, None, open).map_err(|e| e.to_string());
    let (before, text) = (show(&messages[..n], true)?, show(&messages[..=n], false)?);
    let Some(said) = text.strip_prefix(before.as_str()) else {
        return Err(format!(
            "the chat template changes what the assistant says in message {}, so that it cannot be found in the text",
            n + 1
        ));
    };
    // The marker is the last of its kind.
    let marker = marker(chat, tokenizer);
    let end = marker.and_then(|m| said.rfind(&m).map(|at| at + m.len())).unwrap_or(said.trim_end().len());
    let end = before.len() + end;
    Ok(Rendered { text: text[..end].to_owned(), turns: std::iter::once(before.len()..end).collect() })
}

/// What ends an assistant's turn, as text.
fn marker(chat: &Chat, tokenizer: &Tokenizer) -> Option<String> {
    match chat.turn_end() {
        TurnEnd::Token(id) => tokenizer.id_to_token(*id),
        TurnEnd::Text(text) => Some(text.clone()),
        TurnEnd::Unknown => None,
    }
}

/// How many bytes of `after`, which follows what the assistant said, belong to its turn.
fn end_marker(chat: &Chat, tokenizer: &Tokenizer, after: &str) -> usize {
    let Some(marker) = marker(chat, tokenizer) else { return 0 };
    let blank = after.len() - after.trim_start().len();
    if after[blank..].starts_with(&marker) { blank + marker.len() } else { 0 }
}

/// The tokens of the text, and which of them count.
fn tokens(tokenizer: &Tokenizer, rendered: &Rendered) -> Result<(Vec<u32>, Vec<bool>), String> {
    let Rendered { text, turns } = rendered;
    let encode = |text: &str| tokenizer.encode_prompt(text).map_err(|e| e.to_string());
    if starts_words_with_a_blank(tokenizer) {
        // A piece of its own would get a blank that the text has not: the whole is tokenised, and a turn is what its
        // beginning and its end do not share with the text before.
        let all = encode(text)?;
        let mut counts = vec![false; all.len()];
        for turn in turns {
            let shared = |end: usize| -> Result<usize, String> {
                let part = encode(&text[..end])?;
                Ok(part.iter().zip(&all).take_while(|(a, b)| a == b).count())
            };
            let (start, end) = (shared(turn.start)?, shared(turn.end)?);
            counts[start..end.max(start)].fill(true);
        }
        return Ok((all, counts));
    }
    let first = turns.first().map_or(text.len(), |turn| turn.start);
    let mut all = encode(&text[..first])?;
    let mut counts = vec![false; all.len()];
    for (n, turn) in turns.iter().enumerate() {
        let next = turns.get(n + 1).map_or(text.len(), |next| next.start);
        for (piece, counted) in [(turn.clone(), true), (turn.end..next, false)] {
            let ids = tokenizer.encode(&text[piece], false).map_err(|e| e.to_string())?;
            counts.extend(std::iter::repeat_n(counted, ids.len()));
            all.extend(ids);
        }
    }
    Ok((all, counts))
}

/// Whether the tokenizer puts a blank before a text (SentencePiece's `add_dummy_prefix`).
fn starts_words_with_a_blank(tokenizer: &Tokenizer) -> bool {
    let ids = tokenizer.encode("a", false).unwrap_or_default();
    ids.first().and_then(|&id| tokenizer.id_to_token(id)).is_some_and(|token| token.starts_with('\u{2581}'))
}

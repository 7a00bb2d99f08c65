//! Ids to bytes, for the vocabularies whose tokens are bytes whatever their neighbours.

use super::spm::{SPACE, parse_byte_piece};

/// What decoding must remember between tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DecodeState {
    /// Some text has been produced, so a leading space is no longer the tokenizer's own.
    pub(super) started: bool,
}

/// How one token's string becomes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's alphabet: one printable character for each byte.
    ByteLevel,
    /// `▁` is a space, `<0xXX>` a byte; `strip` drops one space at the start of the text.
    SentencePiece { strip: bool },
}

impl Spelling {
    /// Appends the bytes of the token spelled `token`.
    pub(super) fn push(self, token: &str, state: &mut DecodeState, out: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = out.len();
                for c in token.chars() {
                    let Some(byte) = char_to_byte(c) else {
                        // An added token such as `<｜end｜>` is plain text.
                        out.truncate(start);
                        out.extend_from_slice(token.as_bytes());
                        break;
                    };
                    out.push(byte);
                }
            }
            Self::SentencePiece { strip } => {
                if let Some(byte) = parse_byte_piece(token) {
                    out.push(byte);
                } else {
                    let text = token.replace(SPACE, " ");
                    let own = strip && !state.started;
                    let kept = if own { text.strip_prefix(' ').unwrap_or(&text) } else { &text };
                    out.extend_from_slice(kept.as_bytes());
                }
            }
        }
        state.started = true;
    }
}

/// GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up.
fn char_to_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Takes from `bytes` everything that is certain: whole characters, and U+FFFD for each sequence that no
/// further byte can make valid. Leaves at most three bytes of an incomplete character.
pub(super) fn lossy_prefix(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, invalid) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = invalid;
                let Some(length) = error.error_len() else {
                    break;
                };
                text.push('\u{fffd}');
                rest = &rest[length..];
            }
        }
    }
    *bytes = rest.to_vec();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte_to_char(byte: u8) -> char {
        let code = match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
            0x00..=0x20 => 0x100 + u32::from(byte),
            0x7f..=0xa0 => 0x121 + u32::from(byte - 0x7f),
            0xad => 0x143,
        };
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    }

    #[test]
    fn byte_alphabet_is_a_bijection_without_spaces() {
        let mut seen = std::collections::HashSet::new();
        for byte in 0..=255 {
            let c = byte_to_char(byte);
            assert!(seen.insert(c) && !c.is_whitespace() && !c.is_control(), "{byte}: {c:?}");
            assert_eq!(char_to_byte(c), Some(byte));
        }
        assert_eq!((byte_to_char(b' '), byte_to_char(b'\n'), byte_to_char(0xad)), ('Ġ', 'Ċ', 'Ń'));
    }

    #[test]
    fn lossy_prefixes_put_together_equal_from_utf8_lossy_for_any_cut() {
        let bytes = b"a\xe2\x82\xac\xf0\x9f\x98\xff\xe2\x28\xa1\xc3\xc3\xa9\xf4\x90\x80\x80z\xe6\x97";
        let mut pending = Vec::new();
        let mut text = String::new();
        for &byte in bytes {
            pending.push(byte);
            text += &lossy_prefix(&mut pending);
        }
        if !pending.is_empty() {
            text.push('\u{fffd}');
        }
        assert_eq!(text, String::from_utf8_lossy(bytes));
    }
}

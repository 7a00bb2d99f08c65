//! Stop strings: text that ends a generation and is not part of it.

/// Watches streamed text for any of a set of strings, holding back what may be the beginning of one.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
}

/// What became certain with the last piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// Text that can be shown.
    pub text: String,
    /// Whether a stop string came after it; nothing more is to be shown then.
    pub stopped: bool,
}

impl StopStrings {
    /// Watches for `strings`; empty ones are ignored.
    pub fn new(strings: Vec<String>) -> Self {
        Self { strings: strings.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Takes the next piece. The earliest stop string wins, the longest of those at one place does not matter.
    pub fn push(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        if let Some(at) = self.strings.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return Passed { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.strings.iter().map(|s| possible_start(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Passed { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Ends the text: what was held back belongs to it after all.
    pub fn finish(self) -> String {
        self.held
    }
}

/// Bytes of the longest end of `text` that `stop` begins with.
fn possible_start(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = StopStrings::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out = String::new();
        for piece in pieces {
            let Passed { text, stopped } = watch.push(piece);
            out += &text;
            if stopped {
                return (out, true);
            }
        }
        (out + &watch.finish(), false)
    }

    #[test]
    fn a_stop_string_split_over_pieces_is_cut_off_whole() {
        assert_eq!(run(&["\nUser:"], &["Hi", "\nUs", "er", ": more"]), ("Hi".into(), true));
        assert_eq!(run(&["ab", "xyz"], &["1x", "y", "z2ab"]), ("1".into(), true));
    }

    #[test]
    fn a_beginning_that_leads_nowhere_is_given_out() {
        assert_eq!(run(&["\nUser:"], &["Hi\nUs", "ually"]), ("Hi\nUsually".into(), false));
        assert_eq!(run(&["aab"], &["a", "a", "a", "c"]), ("aaac".into(), false));
        assert_eq!(run(&["end"], &["the en"]), ("the en".into(), false));
        assert_eq!(run(&["é!"], &["caf", "é", "e"]), ("cafée".into(), false));
    }

    #[test]
    fn without_stop_strings_text_passes_at_once() {
        let mut watch = StopStrings::new(vec![String::new()]);
        assert_eq!(watch.push("abc"), Passed { text: "abc".into(), stopped: false });
    }
}

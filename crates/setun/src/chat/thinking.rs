//! Thinking apart from the answer: what a model writes between tags before it answers.

/// Opening and closing tags in circulation, the most common first.
const TAGS: [(&str, &str); 7] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
];

/// The tags that a model puts around its thinking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tags {
    /// Before it.
    pub open: &'static str,
    /// After it.
    pub close: &'static str,
}

impl Tags {
    /// Those of a model of which `known` says whether its template or vocabulary has a tag.
    pub(super) fn find(known: impl Fn(&str) -> bool) -> Option<Self> {
        TAGS.iter().find(|(_, close)| known(close)).map(|&(open, close)| Self { open, close })
    }

    /// Whether a prompt that ends so leaves a thought open, which the answer then begins in.
    pub(super) fn left_open(self, prompt_end: &str) -> bool {
        prompt_end.rfind(self.open) > prompt_end.rfind(self.close)
    }
}

/// Which part of an answer a text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Between the tags.
    Thought,
    /// After them: what the model says.
    Answer,
}

/// Splits streamed text at the tags, which it leaves out, holding back what may be the beginning of one.
///
/// A thought is recognised at the start of the text only: an answer may well be about tags. White space around the tags belongs
/// to neither part.
#[derive(Debug, Clone)]
pub struct Splitter {
    tags: Option<Tags>,
    state: State,
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space yet: an opening tag may come.
    Start,
    /// The part's leading white space is dropped.
    Enter(Part),
    Inside(Part),
}

impl Splitter {
    /// For an answer to a prompt that ends inside a thought (`open`), or not. Without `tags` everything is answer.
    pub fn new(tags: Option<Tags>, open: bool) -> Self {
        let state = match (tags, open) {
            (None, _) => State::Inside(Part::Answer),
            (Some(_), true) => State::Enter(Part::Thought),
            (Some(_), false) => State::Start,
        };
        Self { tags, state, held: String::new() }
    }

    /// Takes the next piece and passes on what became certain.
    pub fn push(&mut self, piece: &str, show: &mut dyn FnMut(Part, &str)) {
        self.held.push_str(piece);
        self.advance(false, show);
    }

    /// Ends the text: what was held back belongs to it after all.
    pub fn finish(mut self, show: &mut dyn FnMut(Part, &str)) {
        self.advance(true, show);
    }

    fn advance(&mut self, end: bool, show: &mut dyn FnMut(Part, &str)) {
        loop {
            match (self.state, self.tags) {
                (State::Start, Some(tags)) => {
                    let text = self.held.trim_start();
                    if let Some(rest) = text.strip_prefix(tags.open) {
                        self.held = rest.to_owned();
                        self.state = State::Enter(Part::Thought);
                    } else if !end && tags.open.starts_with(text) {
                        return;
                    } else {
                        self.state = State::Inside(Part::Answer); // Its own white space and all.
                    }
                }
                (State::Enter(part), _) => {
                    self.held = self.held.trim_start().to_owned();
                    if self.held.is_empty() {
                        return;
                    }
                    self.state = State::Inside(part);
                }
                (State::Inside(Part::Thought), Some(tags)) => match self.held.find(tags.close) {
                    Some(at) => {
                        let thought = self.held[..at].trim_end();
                        if !thought.is_empty() {
                            show(Part::Thought, thought);
                        }
                        self.held = self.held[at + tags.close.len()..].to_owned();
                        self.state = State::Enter(Part::Answer);
                    }
                    None => {
                        let keep = if end { 0 } else { may_close(&self.held, tags.close) };
                        return self.pass(Part::Thought, self.held.len() - keep, show);
                    }
                },
                _ => return self.pass(Part::Answer, self.held.len(), show),
            }
        }
    }

    fn pass(&mut self, part: Part, bytes: usize, show: &mut dyn FnMut(Part, &str)) {
        let rest = self.held.split_off(bytes);
        let text = std::mem::replace(&mut self.held, rest);
        if !text.is_empty() {
            show(part, &text);
        }
    }
}

/// Bytes at the end of a thought that may turn out to belong to its close: the beginning of the tag, and white space before.
fn may_close(text: &str, close: &str) -> usize {
    let longest = text.len().min(close.len() - 1);
    let tag = (1..=longest).rev().find(|&n| close.is_char_boundary(n) && text.ends_with(&close[..n]));
    let before = &text[..text.len() - tag.unwrap_or(0)];
    text.len() - before.trim_end().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const THINK: Tags = Tags { open: "<think>", close: "</think>" };

    /// Thought and answer of a text that comes in pieces of `n` characters.
    fn split(text: &str, n: usize, open: bool) -> (String, String) {
        let (mut thought, mut answer) = (String::new(), String::new());
        let mut show = |part, text: &str| match part {
            Part::Thought => thought += text,
            Part::Answer => answer += text,
        };
        let mut splitter = Splitter::new(Some(THINK), open);
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(n) {
            splitter.push(&piece.iter().collect::<String>(), &mut show);
        }
        splitter.finish(&mut show);
        (thought, answer)
    }

    #[test]
    fn thoughts_are_kept_apart_however_the_text_is_cut() {
        for (text, open, thought, answer) in [
            ("<think>\nWell, 1 < 2.\n</think>\n\nYes.", false, "Well, 1 < 2.", "Yes."),
            ("\n <think></think>\n\nYes.\n", false, "", "Yes.\n"),
            ("So </thin is\n\n it.\n</think>\nNo.", true, "So </thin is\n\n it.", "No."),
            ("Never closed é", true, "Never closed é", ""),
            ("<think>cut short </thi", false, "cut short </thi", ""),
            (" It says <think> here</think>.", false, "", " It says <think> here</think>."),
            ("<thinner", false, "", "<thinner"),
            ("", false, "", ""),
        ] {
            for n in 1..=text.chars().count().max(1) {
                assert_eq!(split(text, n, open), (thought.to_owned(), answer.to_owned()), "{text:?} by {n}");
            }
        }
    }

    #[test]
    fn a_prompt_leaves_a_thought_open_unless_it_closes_it() {
        assert!(THINK.left_open("<|im_start|>assistant\n<think>\n"));
        assert!(!THINK.left_open("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
        assert!(!THINK.left_open("<|im_start|>assistant\n"));
        assert_eq!(Tags::find(|tag| tag == "</think>"), Some(THINK));
        assert_eq!(Tags::find(|_| false), None);
    }
}

//! A model's side of a conversation: its template, where its turns end, how it shows that it thinks.

use super::thinking::Tags;
use super::{ChatTemplate, Context, Message};
use crate::config::{Family, ModelConfig};
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;

/// What BitNet-b1.58-2B-4T was tuned on, by its model card; GGUF files of it come without a template. BOS is the tokenizer's.
const BITNET_2B_4T: &str = "{% for message in messages %}{{ message['role'] | capitalize }}: \
     {{ message['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}";

/// A content that no template has a reason to change.
const PROBE: &str = "qxProbeXq";

/// How to talk with a model.
#[derive(Debug)]
pub struct Chat<'t> {
    tokenizer: &'t Tokenizer,
    template: ChatTemplate,
    origin: String,
    tags: Option<Tags>,
    turn_end: TurnEnd,
}

/// What a template writes behind an assistant's message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TurnEnd {
    /// A token of the vocabulary: generation ends with it.
    Token(u32),
    /// A marker that is no single token: generation ends before this text.
    Text(String),
    /// Nothing of the kind, or the template refused the question.
    Unknown,
}

/// A conversation as ids, to be continued with the model's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What the model reads.
    pub ids: Vec<u32>,
    /// Whether it ends inside a thought, so that the answer begins there.
    pub thinking: bool,
}

impl<'t> Chat<'t> {
    /// The template named `name` of the model's files, else (without a name) its default one, else what the family is known to
    /// use; `None` if there is none of these.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] for a name that is not there, and for a template that cannot be parsed.
    pub fn of(
        tokenizer: &'t Tokenizer,
        config: Option<&ModelConfig>,
        name: Option<&str>,
    ) -> Result<Option<Self>, ModelError> {
        let wanted = name.unwrap_or("default");
        let all = tokenizer.chat_templates();
        if let Some(template) = all.iter().find(|template| template.name == wanted) {
            return Self::with_template(tokenizer, &template.source, &template.origin).map(Some);
        }
        if name.is_some() || !all.is_empty() {
            let names: Vec<String> = all.iter().map(|template| format!("`{}`", template.name)).collect();
            let there = if names.is_empty() { "the model has none".into() } else { names.join(", ") };
            let what = format!("there is none named `{wanted}`: {there}");
            return Err(ModelError::ChatTemplate { what });
        }
        let bitnet = config.is_some_and(|config| config.family == Family::BitNet);
        if bitnet && tokenizer.token_to_id("<|eot_id|>").is_some() {
            let origin = "the family: the files have none, so that of BitNet-b1.58-2B-4T's model card";
            return Self::with_template(tokenizer, BITNET_2B_4T, origin).map(Some);
        }
        Ok(None)
    }

    /// A conversation by a template from elsewhere, found in `origin`.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] if it cannot be parsed.
    pub fn with_template(tokenizer: &'t Tokenizer, source: &str, origin: &str) -> Result<Self, ModelError> {
        let template = ChatTemplate::new(source)?;
        let tags = Tags::find(|tag| source.contains(tag))
            .or_else(|| Tags::find(|tag| tokenizer.token_to_id(tag).is_some()));
        let mut chat =
            Self { tokenizer, template, origin: origin.to_owned(), tags, turn_end: TurnEnd::Unknown };
        chat.turn_end = chat.find_turn_end();
        Ok(chat)
    }

    /// Where the template was found.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// What the template writes behind an assistant's message.
    pub fn turn_end(&self) -> &TurnEnd {
        &self.turn_end
    }

    /// The tags around the model's thinking, if it has any.
    pub fn tags(&self) -> Option<Tags> {
        self.tags
    }

    /// Tags that the tokenizer would leave out of the text as control tokens.
    pub fn hidden_tags(&self) -> Vec<u32> {
        let tags = self.tags.iter().flat_map(|tags| [tags.open, tags.close]);
        let ids = tags.filter_map(|tag| self.tokenizer.token_to_id(tag));
        ids.filter(|&id| self.tokenizer.is_special(id)).collect()
    }

    /// The conversation, ready for an answer. BOS comes once, whether the template writes it or the tokenizer adds it.
    /// `thinking` is handed to the template as `enable_thinking`; `None` leaves it to the model.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] with the template's own complaint; [`ModelError::Tokenizer`].
    pub fn prompt(&self, messages: &[Message], thinking: Option<bool>) -> Result<Prompt, ModelError> {
        let text = self.render(messages, thinking, true)?;
        let open = self.tags.is_some_and(|tags| {
            // Only what the template itself writes for the answer: a user may write tags too.
            let before = self.render(messages, thinking, false).unwrap_or_default();
            text.strip_prefix(before.as_str()).is_some_and(|end| tags.left_open(end))
        });
        Ok(Prompt { ids: self.tokenizer.encode_prompt(&text)?, thinking: open })
    }

    /// The conversation as the template writes it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render(
        &self,
        messages: &[Message],
        thinking: Option<bool>,
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        let text = |id: Option<u32>| id.and_then(|id| self.tokenizer.id_to_token(id)).unwrap_or_default();
        let mut extra = serde_json::Map::new();
        extra.extend(thinking.map(|on| ("enable_thinking".to_owned(), on.into())));
        let context = Context {
            add_generation_prompt,
            bos_token: text(self.tokenizer.bos()),
            eos_token: text(self.tokenizer.eos_ids().first().copied()),
            extra,
        };
        self.template.render(messages, &context)
    }

    /// Whether a system message arrives in the text.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] if the template refuses it, with its own words, or leaves it out.
    pub fn check_system(&self) -> Result<(), ModelError> {
        let messages = [Message::new("system", PROBE), Message::new("user", "Hello.")];
        let what = match self.render(&messages, None, true) {
            Ok(text) if text.contains(PROBE) => return Ok(()),
            Ok(_) => "it leaves system messages out: say it in the first message instead".to_owned(),
            Err(error) => {
                let error = error.to_string();
                let said = error.strip_prefix("chat template: ").unwrap_or(&error);
                format!("it takes no system message ({said}): say it in the first message instead")
            }
        };
        Err(ModelError::ChatTemplate { what })
    }

    /// Renders a turn and looks at what comes behind it.
    fn find_turn_end(&self) -> TurnEnd {
        let messages = [Message::new("user", "Hello."), Message::new("assistant", PROBE)];
        let Ok(text) = self.render(&messages, None, false) else { return TurnEnd::Unknown };
        let Some((_, end)) = text.rsplit_once(PROBE) else { return TurnEnd::Unknown };
        let end = end.trim_start();
        let ids = self.tokenizer.encode(end, false).unwrap_or_default();
        for id in ids {
            let token = self.tokenizer.id_to_token(id).unwrap_or_default();
            if token.replace(['\u{2581}', '\u{120}', '\u{10a}'], " ").trim().is_empty() {
                continue;
            }
            // Vocabularies declare some markers as ordinary added tokens.
            if end.starts_with(&token) && (self.tokenizer.is_special(id) || is_marker(&token)) {
                return TurnEnd::Token(id);
            }
            break;
        }
        match end.find('>').map(|at| &end[..=at]).filter(|marker| is_marker(marker)) {
            Some(marker) => TurnEnd::Text(marker.to_owned()),
            None => TurnEnd::Unknown,
        }
    }
}

/// `<…>` without blanks: `</s>`, `<|im_end|>`, `<end_of_turn>`.
fn is_marker(text: &str) -> bool {
    let inner = text.strip_prefix('<').and_then(|rest| rest.strip_suffix('>'));
    inner.is_some_and(|inner| {
        (1..=60).contains(&inner.len()) && !inner.contains(|c: char| c.is_whitespace() || "<>{}".contains(c))
    })
}

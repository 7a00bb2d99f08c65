//! Chat templates: messages to the text the model was trained on.
//!
//! A template is Jinja source from the model's files. It runs as `transformers` runs it (block trimming,
//! loop controls, Python's string methods, `raise_exception`, `strftime_now`, unescaped `tojson`), with a
//! budget of instructions and of what it makes and looks at (`guard`), since it comes from outside.

mod conversation;
mod guard;
mod python;
mod thinking;

pub use conversation::{Chat, Prompt, TurnEnd};
pub use thinking::{Part, Splitter, Tags};

use crate::error::ModelError;
use crate::tokenizer::Tokenizer;
use guard::Budget;
use minijinja::machinery::{CodeGenerator, Instructions, eval, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Instructions one rendering may execute. Real templates need some hundreds for each message.
const FUEL: u64 = 4_000_000;
/// Bytes of a template. The longest in circulation have about 30 thousand.
const MAX_SOURCE: usize = 64 << 10;
/// Stack for parsing and rendering, which recurse as deep as a template nests: enough for [`MAX_SOURCE`] bytes of nesting.
/// Only what is used takes memory.
const STACK: usize = 512 << 20;
const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: usually `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A chat template that was found to be valid.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
}

/// What a template sees beside the messages.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// End with the opening of an assistant's message.
    pub add_generation_prompt: bool,
    /// Text of the BOS token, empty if there is none.
    pub bos_token: String,
    /// Text of the EOS token, empty if there is none.
    pub eos_token: String,
    /// Further variables, such as `enable_thinking` or `tools`.
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl ChatTemplate {
    /// Parses Jinja source.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] with the line at fault.
    pub fn new(source: &str) -> Result<Self, ModelError> {
        if source.len() > MAX_SOURCE {
            let what = format!("it has {} bytes, but at most {MAX_SOURCE} are accepted", source.len());
            return Err(ModelError::ChatTemplate { what });
        }
        let source = without_generation_tags(source);
        on_large_stack(|| compile(&source).map(drop).map_err(|error| failed(&error)))?;
        Ok(Self { source })
    }

    /// Renders a conversation: of [`Message`]s, or of JSON objects with whatever else a template reads (`tool_calls`).
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] with the template's own complaint (`raise_exception`: roles that do not
    /// alternate, say), or when it runs too long or writes too much.
    pub fn render<M: Serialize + Sync>(
        &self,
        messages: &[M],
        context: &Context,
    ) -> Result<String, ModelError> {
        on_large_stack(|| self.render_here(messages, context))
    }

    fn render_here<M: Serialize>(&self, messages: &[M], context: &Context) -> Result<String, ModelError> {
        let mut variables = context.extra.clone();
        let messages = serde_json::to_value(messages).unwrap_or_default();
        variables.insert("messages".to_owned(), messages);
        variables.insert("add_generation_prompt".to_owned(), context.add_generation_prompt.into());
        variables.insert("bos_token".to_owned(), context.bos_token.as_str().into());
        variables.insert("eos_token".to_owned(), context.eos_token.as_str().into());
        let conversation = serde_json::to_string(&variables).map_or(0, |json| json.len());
        let environment = environment(&Arc::new(Budget::new(conversation)));
        let mut text = String::new();
        let (instructions, blocks) = compile(&self.source).map_err(|error| failed(&error))?;
        let (variables, mut output) = (Value::from(Serde(&variables)), make_string_output(&mut text));
        eval(&environment, &instructions, variables, &blocks, &mut output, AutoEscape::None)
            .map_err(|error| failed(&error))?;
        Ok(text)
    }
}

type Compiled<'a> = (Instructions<'a>, BTreeMap<&'a str, Instructions<'a>>);

fn compile(source: &str) -> Result<Compiled<'_>, Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let template = guard::rebuild(&parse(source, NAME, syntax)?)?;
    let mut code = CodeGenerator::new(NAME, source);
    code.compile_stmt(&template);
    Ok(code.finish())
}

/// What a template can use, all of it paid for from `budget`.
fn environment(budget: &Arc<Budget>) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(64);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| strftime(&format, unix_seconds()));
    budget.install(&mut environment);
    environment
}

/// Ids of a conversation by the model's own template, ready for its answer: [`Chat`] in one step.
///
/// # Errors
/// [`ModelError::ChatTemplate`] if the model has no template or it fails; [`ModelError::Tokenizer`].
pub fn encode_chat(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>, ModelError> {
    let chat = Chat::of(tokenizer, None, None)?.ok_or_else(|| ModelError::ChatTemplate {
        what: "the model has none; give a plain prompt instead of a conversation".to_owned(),
    })?;
    Ok(chat.prompt(messages, None)?.ids)
}

/// `{% generation %}` marks for trainers what the model wrote; here it is a block like any other.
fn without_generation_tags(source: &str) -> String {
    let tag = regex::Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})").expect("a valid pattern");
    tag.replace_all(source, |found: &regex::Captures| {
        let block = if found.get(2).is_some() { "endwith" } else { "with" };
        format!("{}{block}{}", &found[1], &found[3])
    })
    .into_owned()
}

fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T, ModelError> + Send) -> Result<T, ModelError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| ModelError::ChatTemplate {
            what: format!("no thread with a stack of {STACK} bytes can be had for it: {error}"),
        })?;
        // The engine is given foreign programs; where it panics, that one is refused.
        let gave_up =
            |_| Err(ModelError::ChatTemplate { what: "the template engine gave up on it".to_owned() });
        thread.join().unwrap_or_else(gave_up)
    })
}

fn failed(error: &Error) -> ModelError {
    let mut what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    if let Some(line) = error.line() {
        what += &format!(" (line {line} of the template)");
    }
    ModelError::ChatTemplate { what }
}

fn unix_seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// The codes of `strftime` that templates use, in UTC.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"]; // 1970-01-01 first.
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut codes = format.chars();
    while let Some(c) = codes.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out += &match codes.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{:02}", second / 3600),
            Some('I') => format!("{:02}", (second / 3600 + 11) % 12 + 1),
            Some('p') => if second < 43_200 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60),
            Some('e') => format!("{day:>2}"),
            Some('j') => format!("{:03}", days - days_before(year) + 1),
            // Without leading zeros, as the C library underneath Python has it.
            Some('-') => match codes.next() {
                Some('d') => day.to_string(),
                Some('m') => month.to_string(),
                Some('H') => (second / 3600).to_string(),
                Some('I') => ((second / 3600 + 11) % 12 + 1).to_string(),
                other => {
                    return Err(unknown_code(&format!("-{}", other.map(String::from).unwrap_or_default())));
                }
            },
            Some('%') => "%".to_owned(),
            other => return Err(unknown_code(&other.map(String::from).unwrap_or_default())),
        };
    }
    Ok(out)
}

fn unknown_code(code: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know `%{code}`"))
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before(year: u64) -> u64 {
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leap_days(year - 1) - leap_days(1969)
}

/// Year, month (1–12) and day of a day count since 1970-01-01, in the Gregorian calendar.
fn civil_date(mut days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    // 400 years are 146,097 days; after that at most 400 steps.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, ModelError> {
        let messages = [Message::new("user", "Hi <b> & 'you'"), Message::new("assistant", " Yes. ")];
        let extra = serde_json::json!({"tools": [{"name": "f", "args": {"z": 1, "a": "é"}}]});
        let extra = extra.as_object().cloned().unwrap_or_default();
        let context =
            Context { add_generation_prompt: true, bos_token: "<s>".into(), eos_token: "</s>".into(), extra };
        ChatTemplate::new(source)?.render(&messages, &context)
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_trims_them() {
        let source = "{{ bos_token }}\n  {% for m in messages %}\n{{ m['role'] }}:{{ m.content.strip() }}\n    {% endfor %}\nend\n";
        assert_eq!(render(source).unwrap(), "<s>\nuser:Hi <b> & 'you'\nassistant:Yes.\nend");
    }

    #[test]
    fn tojson_is_pythons_not_htmls() {
        assert_eq!(render("{{ tools | tojson }}").unwrap(), r#"[{"name": "f", "args": {"z": 1, "a": "é"}}]"#);
        assert_eq!(render("{{ messages[0].content | tojson }}").unwrap(), r#""Hi <b> & 'you'""#);
        assert_eq!(render("{{ {'a': [1]} | tojson(indent=2) }}").unwrap(), "{\n  \"a\": [\n    1\n  ]\n}");
    }

    #[test]
    fn loop_controls_and_namespaces_work() {
        let source = "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}";
        assert_eq!(render(source).unwrap(), "8");
    }

    #[test]
    fn the_templates_own_complaint_is_the_error() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err().to_string();
        assert_eq!(error, "chat template: roles must alternate (line 1 of the template)");
        assert!(render("{% for %}").unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn endless_templates_are_stopped() {
        let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        let error = render(nested).unwrap_err().to_string();
        assert!(error.contains("fuel") || error.contains("looks at") || error.contains("makes"), "{error}");
        let long = "{% set s = 'x' * 100000 %}{% for a in range(5000) %}{{ s }}{% endfor %}";
        assert!(render(long).is_err());
        assert!(render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
    }

    #[test]
    fn templates_that_multiply_are_stopped_before_they_take_memory_or_time() {
        let twice = |what: &str| {
            format!("{{% set x = ['ab'] %}}{{% set s = 'ab' %}}{}{{{{ s }}}}{{{{ x }}}}", what.repeat(60))
        };
        let loops = |body: &str| {
            format!("{{% set s = 'ab' * 100000 %}}{{% for i in range(99999) %}}{body}{{% endfor %}}")
        };
        let raw = "x".repeat(50_000);
        for source in [
            "{{ 'a' * 1000000000 }}".to_owned(),
            "{{ 99999999 * 'a' }}".to_owned(),
            "{{ [0] * 99999999 }}".to_owned(),
            "{{ range(1000000000) }}".to_owned(),
            "{{ 'a' | indent(1000000000, true) }}".to_owned(),
            "{{ '%999999999d' | format(1) }}".to_owned(),
            "{{ '%999999999d'.format(1) }}{{ '{:999999999}'.format(1) }}".to_owned(),
            "{{ [1] | batch(1000000000, 2) }}".to_owned(),
            "{{ 'x' | slice(1000000000, 2) }}".to_owned(),
            twice("{% set s = s ~ s %}"),
            twice("{% set s = s + s %}"),
            twice("{% set s %}{{ s }}{{ s }}{% endset %}"),
            twice("{% set s = s | replace('a', s) %}"),
            twice("{% set s = s.replace('b', s) %}"),
            twice("{% set s = (s, s) | join(s) %}"),
            twice("{% set s = s.join([s, s]) %}"),
            twice("{% set s = '%s%s' | format(s, s) %}"),
            twice("{% set s = '{}{}'.format(s, s) %}"),
            twice("{% set x = x + x %}"),
            twice("{% set x = [x, x] %}"),
            twice("{% set x = (x, x) %}"),
            twice("{% set x = {'a': x, 'b': x} %}"),
            twice("{% set x = x | map('replace', 'a', s) | list + x %}{% set s = s ~ s %}"),
            format!(
                "{{% set s = 'a' * 100000 %}}{{% set x = [{}] %}}{{{{ x | map('upper') | list }}}}",
                "s, ".repeat(500)
            ),
            format!(
                "{{% macro f(x) %}}{{{{ x }}}}{{{{ x }}}}{{% endmacro %}}{{{{ {}'ab'{} }}}}",
                "f(".repeat(60),
                ")".repeat(60)
            ),
            format!("{{% set s %}}{{% for i in range(99999) %}}{raw}{{% endfor %}}{{% endset %}}"),
            loops("{{ s }}"),
            loops("{% set t = s.split('a') %}"),
            loops("{% set t = s | upper %}"),
            loops("{% if s == s ~ '' %}{% endif %}"),
            loops("{% if 'c' in s %}{% endif %}"),
            loops("{% set t = s.find('c') %}"),
            loops("{% set t = s[100] %}"),
            loops("{% set t = s is eq s %}"),
            loops("{% set t = s | list | sort %}"),
        ] {
            let started = std::time::Instant::now();
            let result = render(&source);
            let start: String = source.chars().take(80).collect();
            assert!(result.is_err(), "{start}: {:?}", result.map(|text| text.len()));
            assert!(started.elapsed().as_secs() < 10, "{start}: {:?}", started.elapsed());
        }
    }

    #[test]
    fn steps_through_text_and_lists_are_pythons() {
        for (source, expected) in [
            ("{{ ('a' ~ '').strip('a')[::-1] }}.{{ ''[::-1] }}.{{ 'é'[::-1] }}", "..é"),
            (
                "{{ 'abcdef'[::2] }} {{ 'abcdef'[4:1:-1] }} {{ 'abcdef'[-2::-2] }} {{ 'abc'[9::-1] }}",
                "ace edc eca cba",
            ),
            (
                "{{ [1, 2, 3, 4][::-2] }} {{ (1, 2, 3)[1::1] }} {{ [1][5:0:-1] }} {{ missing[::-1] }}",
                "[4, 2] (2, 3) [] []",
            ),
            ("{{ 'abc'[-9:9:1] }} {{ 'abc'[2:-9:-1] }}", "abc cba"),
        ] {
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
        assert!(render("{{ 'abc'[::0] }}").is_err() && render("{{ {'a': 1}[::-1] }}").is_err());
    }

    #[test]
    fn paying_for_operations_changes_no_result() {
        for (source, expected) in [
            (
                "{{ 1 + 2 }} {{ 1 + 2.5 }} {{ 2 * 3 }} {{ 1.5 * 2 }} {{ true + 1 }} {{ 2 ** 10 }} {{ 7 // 2 }}",
                "3 3.5 6 3.0 2 1024 3",
            ),
            ("{{ 'a' + 'b' ~ 1 ~ none ~ [1, 'x'] }}", "ab1None[1, 'x']"),
            ("{{ ([1] + [2, 3]) | join('-') }} {{ (1,) + (2,) }} {{ 'ab' * 2 }}", "1-2-3 (1, 2) abab"),
            (
                "{{ [1, 2, 3] | map('string') | join }} {{ 'x\ny' | indent(2) }} {{ '%03d' | format(7) }}",
                "123 x\n  y 007",
            ),
            (
                "{% set e = '' %}{% set l = [] %}{{ e[::-1] }}{{ l[::-1] }}{% set s = 'abc' %}{{ s[::-1] }}{{ s[::2] }}",
                "[]cbaac",
            ),
            ("{{ missing ~ 'a' }}{{ missing | default('d') }}{{ messages[0].content[::-1][:5] }}", "ad'uoy'"),
            ("{% filter upper %}a{{ 'b' }}{% endfilter %}{% set t | trim %} c {% endset %}{{ t }}", "ABc"),
            ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ 'a,b'.split(',')[1] }}", "a1b"),
            (
                "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ caller() }}{% endmacro %}{% call f(1) %}z{% endcall %}",
                "12z",
            ),
            (
                "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
                "123",
            ),
        ] {
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn deep_nesting_is_an_answer_or_an_error_and_no_crash() {
        let deep = [
            format!("{{{{ {}1 }}}}", "-".repeat(60_000)),
            format!("{{{{ {}1 }}}}", "1+".repeat(30_000)),
            format!("{{{{ {}'a' }}}}", "'a'~".repeat(15_000)),
            format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(5_000)),
        ];
        for source in deep {
            let _ = render(&source);
        }
        let error = render(&" ".repeat(MAX_SOURCE + 1)).unwrap_err().to_string();
        assert!(error.contains("at most"), "{error}");
    }

    #[test]
    fn dates_are_gregorian() {
        assert_eq!(strftime("%d %b %Y %A %H:%M:%S", 0).unwrap(), "01 Jan 1970 Thursday 00:00:00");
        assert_eq!(strftime("%Y-%m-%d %a", 951_827_696).unwrap(), "2000-02-29 Tue");
        assert_eq!(strftime("%F %%", 4_107_542_399).unwrap(), "2100-02-28 %");
        assert_eq!(strftime("%-d %e %I %p %j %T", 951_827_696).unwrap(), "29 29 12 PM 060 12:34:56");
        assert_eq!(strftime("%-I%p %j", 1_735_603_200).unwrap(), "12AM 366");
        assert!(strftime("%Q", 0).is_err() && strftime("%-", 0).is_err());
    }
}

//! Templates that cannot take more memory or time than their input warrants.
//!
//! The engine counts instructions, but one instruction can double a string or compare two huge ones. So the parsed template
//! is rebuilt before it is compiled: every operation that makes a value pays for its size, every one that reads values
//! pays for theirs, raw text is written like any other value, and the few operations whose result can be far larger than
//! their operands ask first. What they pay from is a [`Budget`], one for each rendering; `rebuild` makes them pay.

mod rebuild;

pub(super) use rebuild::rebuild;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use minijinja::value::{Kwargs, StringInput, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::python;

/// Bytes of strings and lists that a rendering may make, and how many more for each byte of the conversation.
const MADE: (usize, usize) = (8 << 20, 64);
/// Bytes that a rendering may look at, by comparing, searching or counting.
const LOOKED_AT: (usize, usize) = (64 << 20, 1024);
/// What an element of a list counts.
const ELEMENT: usize = 32;
/// Most values in a list, those of lists inside included (and as many more as the conversation has bytes), and how deep
/// these may be.
const MAX_NODES: usize = 1 << 16;
const MAX_DEPTH: usize = 64;

/// What a rendering may still make and look at, in bytes.
#[derive(Debug)]
pub(super) struct Budget {
    made: AtomicUsize,
    looked_at: AtomicUsize,
    limit: Size,
}

/// The size of a value with all that is in it, what is in it twice counted twice.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    bytes: usize,
    nodes: usize,
}

impl Size {
    fn total(self) -> usize {
        self.bytes.saturating_add(self.nodes * ELEMENT)
    }
}

fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

fn pay(from: &AtomicUsize, bytes: usize, what: &str) -> Result<(), Error> {
    let left = from.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(bytes));
    left.map(drop).map_err(|left| {
        refused(format!("the template {what} more than a conversation of this length warrants ({bytes} bytes where {left} are left)"))
    })
}

impl Budget {
    /// For a conversation of so many bytes.
    pub(super) fn new(conversation: usize) -> Self {
        let of = |(base, each): (usize, usize)| conversation.saturating_mul(each).saturating_add(base);
        let limit = Size { bytes: of(MADE), nodes: of((MAX_NODES, 1)) };
        Self { made: of(MADE).into(), looked_at: of(LOOKED_AT).into(), limit }
    }

    /// Pays for bytes that are about to be made.
    pub(super) fn make(&self, bytes: usize) -> Result<(), Error> {
        pay(&self.made, bytes, "makes")
    }

    fn look_at(&self, bytes: usize) -> Result<(), Error> {
        pay(&self.looked_at, bytes, "looks at")
    }

    /// Refuses values that are too large or too deep to be written out, compared or searched.
    fn size(&self, value: &Value) -> Result<Size, Error> {
        let mut size = Size::default();
        self.add_size(value, 0, &mut size)?;
        Ok(size)
    }

    fn add_size(&self, value: &Value, depth: usize, size: &mut Size) -> Result<(), Error> {
        if let Some(text) = value.as_str() {
            size.bytes += text.len();
        } else if let Some(bytes) = value.as_bytes() {
            size.bytes += bytes.len();
        } else if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
            if depth == MAX_DEPTH {
                return Err(refused(format!("the template nests lists deeper than {MAX_DEPTH}")));
            }
            let map = value.kind() == ValueKind::Map;
            for item in value.try_iter()? {
                size.nodes += 1;
                self.add_size(&item, depth + 1, size)?;
                if map {
                    self.add_size(&value.get_item(&item)?, depth + 1, size)?;
                }
                if size.nodes > self.limit.nodes || size.bytes > self.limit.bytes {
                    break;
                }
            }
        }
        if size.nodes > self.limit.nodes || size.bytes > self.limit.bytes {
            return Err(refused("the template makes a list that is too large"));
        }
        Ok(())
    }

    /// A value that an operation made.
    fn keep(&self, value: Value) -> Result<Value, Error> {
        if let Some(text) = value.as_str() {
            self.make(text.len())?;
        } else if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
            self.look_at(self.size(&value)?.nodes * ELEMENT)?;
            self.make(value.len().unwrap_or(0).saturating_mul(ELEMENT))?;
        }
        Ok(value)
    }

    /// A value that an operation reads.
    fn look(&self, value: Value) -> Result<Value, Error> {
        self.look_at(self.size(&value)?.total())?;
        Ok(value)
    }

    /// A value of which an operation reads a part; a string has to be walked to find it.
    fn peek(&self, value: Value) -> Result<Value, Error> {
        self.look_at(value.as_str().map_or(0, str::len))?;
        Ok(value)
    }

    /// A value that a filter may take apart: characters of a string become elements.
    fn spread(&self, value: Value) -> Result<Value, Error> {
        self.make(value.as_str().map_or(0, str::len).saturating_mul(ELEMENT))?;
        self.look(value)
    }

    /// A list whose elements a filter may take apart.
    fn burst(&self, value: Value) -> Result<Value, Error> {
        self.make(self.size(&value)?.bytes.saturating_mul(ELEMENT))?;
        self.look(value)
    }

    fn text(&self, value: &Value, room: &str) -> Result<String, Error> {
        // Written out, a string in a list may take six bytes for one.
        let size = self.size(value)?;
        let length = if value.as_str().is_some() { size.bytes } else { size.total().saturating_mul(6) };
        self.make(length.saturating_add(room.len()))?;
        python::text(value)
    }

    fn concat(&self, left: Value, right: Value) -> Result<Value, Error> {
        let mut text = self.text(&left, "")?;
        text.push_str(&self.text(&right, &text)?);
        Ok(Value::from(text))
    }

    fn add(&self, left: Value, right: Value) -> Result<Value, Error> {
        let list = |v: &Value| matches!(v.kind(), ValueKind::Seq | ValueKind::Iterable);
        if left.as_str().is_some() && right.as_str().is_some() {
            return self.concat(left, right);
        }
        if list(&left) && list(&right) && left.is_tuple() == right.is_tuple() {
            let elements = [&left, &right].map(|v| v.len().unwrap_or(0)).into_iter().sum::<usize>();
            self.make(elements.saturating_mul(ELEMENT))?;
            let both: Vec<Value> = left.try_iter()?.chain(right.try_iter()?).collect();
            let both = if left.is_tuple() {
                Value::from(minijinja::value::Tuple::from(both))
            } else {
                Value::from(both)
            };
            return self.size(&both).map(|_| both);
        }
        arithmetic("+", &left, &right, i128::checked_add, |a, b| a + b)
    }

    fn mul(&self, left: Value, right: Value) -> Result<Value, Error> {
        if let (Some(text), Some(times)) = (left.as_str(), right.as_usize()) {
            self.make(text.len().saturating_mul(times))?;
            return Ok(Value::from(text.repeat(times)));
        }
        if right.as_str().is_some() && left.as_usize().is_some() {
            return self.mul(right, left);
        }
        arithmetic("*", &left, &right, i128::checked_mul, |a, b| a * b)
    }

    fn replace(&self, text: &str, from: &str, to: &str, most: Option<usize>) -> Result<Value, Error> {
        let times = text.matches(from).count().min(most.unwrap_or(usize::MAX));
        self.make(times.saturating_mul(to.len()).saturating_add(text.len()))?;
        self.look_at(text.len())?;
        Ok(Value::from(text.replacen(from, to, times)))
    }

    /// Room for `list` joined with `separator` between its elements.
    fn join(&self, list: &Value, separator: &str) -> Result<(), Error> {
        let size = self.size(list)?;
        let gaps = list.len().unwrap_or(size.nodes).saturating_mul(separator.len());
        self.make(size.total().saturating_mul(6).saturating_add(gaps))
    }

    /// Room for a format string's widths and precisions.
    fn format(&self, text: &str) -> Result<(), Error> {
        let digits = text.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
        if digits > 3 || text.contains('*') {
            return Err(refused("the template formats with a width or precision of more than 3 digits"));
        }
        self.make(text.len().saturating_mul(1000).min(1 << 20).max(text.len()))
    }

    /// `value[start:stop:step]` as Python has it, of text, lists and tuples.
    fn slice(&self, value: Value, start: Value, stop: Value, step: Value) -> Result<Value, Error> {
        let whole = |bound: Value| match bound.is_none() {
            true => Ok(None),
            false => i64::try_from(bound).map(Some),
        };
        let step = whole(step)?.unwrap_or(1);
        if step == 0 {
            return Err(refused("cannot slice by step size of 0"));
        }
        let text = value.as_str().map(str::to_owned);
        let items: Vec<Value> = match (&text, value.kind()) {
            (Some(text), _) => {
                self.make(text.len().saturating_mul(ELEMENT))?;
                text.chars().map(Value::from).collect()
            }
            (_, ValueKind::Undefined | ValueKind::None) => Vec::new(),
            (_, ValueKind::Seq | ValueKind::Iterable) => value.try_iter()?.collect(),
            (_, kind) => return Err(refused(format!("value of type {kind} cannot be sliced"))),
        };
        let n = i64::try_from(items.len()).unwrap_or(i64::MAX);
        let (lowest, highest) = if step > 0 { (0, n) } else { (-1, n - 1) };
        let within = |bound: i64| match bound < 0 {
            true => bound.saturating_add(n).max(lowest),
            false => bound.min(highest),
        };
        let (first, last) = if step > 0 { (lowest, highest) } else { (highest, lowest) };
        let mut at = whole(start)?.map_or(first, within);
        let stop = whole(stop)?.map_or(last, within);
        let mut picked = Vec::new();
        while if step > 0 { at < stop } else { at > stop } {
            picked.extend(usize::try_from(at).ok().and_then(|at| items.get(at)).cloned());
            at = at.saturating_add(step);
        }
        Ok(match text {
            Some(_) => Value::from(picked.iter().filter_map(Value::as_str).collect::<String>()),
            None if value.is_tuple() => Value::from(minijinja::value::Tuple::from(picked)),
            None => Value::from(picked),
        })
    }

    /// Puts the operations of the rebuilt template, and checked versions of the filters and methods whose result can be
    /// much larger than what they are given, into an environment.
    pub(super) fn install(self: &Arc<Self>, environment: &mut Environment) {
        macro_rules! put {
            ($($name:literal $method:ident ($($arg:ident),+)),+ $(,)?) => {$({
                let budget = Arc::clone(self);
                environment.add_function($name, move |$($arg: Value),+| budget.$method($($arg),+));
            })+};
        }
        put!("#keep" keep(v), "#look" look(v), "#peek" peek(v), "#spread" spread(v), "#burst" burst(v));
        put!("#concat" concat(l, r), "#add" add(l, r), "#mul" mul(l, r), "#slice" slice(v, from, to, step));

        let budget = Arc::clone(self);
        environment.set_formatter(move |out, _, value| {
            match value.as_str() {
                Some(text) => budget.make(text.len())?,
                None => {
                    let size = budget.size(value)?;
                    budget.make(size.total().saturating_mul(6).max(8))?;
                }
            }
            Ok(out.write_str(&python::text(value)?)?)
        });
        let budget = Arc::clone(self);
        environment.add_filter("string", move |value: &Value| budget.text(value, ""));
        let budget = Arc::clone(self);
        environment.add_filter("tojson", move |value: &Value, options: Kwargs| {
            python::to_json(value, options, |text| budget.make(text.len()))
        });
        let budget = Arc::clone(self);
        environment.add_filter("replace", move |text: &str, from: &str, to: &str| {
            budget.replace(text, from, to, None)
        });
        let budget = Arc::clone(self);
        environment.add_filter(
            "join",
            move |state: &mut State,
                  list: &Value,
                  joiner: Option<StringInput>,
                  attribute: Option<&str>,
                  more: Kwargs| {
                let named: Option<&str> = if more.has("d") { more.peek("d")? } else { None };
                budget.join(list, joiner.as_ref().map(StringInput::as_str).or(named).unwrap_or_default())?;
                minijinja::filters::join(state, list, joiner, attribute, more)
            },
        );
        let budget = Arc::clone(self);
        environment.add_filter(
            "indent",
            move |text: StringInput,
                  width: Option<usize>,
                  first: Option<bool>,
                  blank: Option<bool>,
                  more: Kwargs| {
                let width = width.or(more.get("width")?).unwrap_or(4);
                let first = first.or(more.get("first")?).unwrap_or(false);
                let blank = blank.or(more.get("blank")?).unwrap_or(false);
                more.assert_all_used()?;
                let lines = text.as_str().matches('\n').count() + 1;
                budget.make(lines.saturating_mul(width).saturating_add(text.as_str().len()))?;
                let kwargs: Kwargs = std::iter::empty::<(&str, Value)>().collect();
                minijinja::filters::indent(text, Some(width), Some(first), Some(blank), kwargs)
            },
        );
        let budget = Arc::clone(self);
        environment.add_filter(
            "format",
            move |state: &mut State, text: &Value, arguments: minijinja::value::Rest<Value>| {
                budget.format(text.as_str().unwrap_or_default())?;
                state.apply_filter("#format", &[std::slice::from_ref(text), &arguments[..]].concat())
            },
        );
        environment.add_filter("#format", minijinja::filters::format);
        // Neither is in Jinja; both can make lists far larger than what they are given.
        for name in ["zip", "chain", "pprint"] {
            environment.remove_filter(name);
        }
        for (name, filter) in [
            (
                "batch",
                minijinja::filters::batch as fn(&State, Value, usize, Option<Value>) -> Result<Value, Error>,
            ),
            ("slice", minijinja::filters::slice),
        ] {
            environment.add_filter(
                name,
                move |state: &State, list: Value, count: usize, fill: Option<Value>| {
                    if count > 10_000 {
                        return Err(refused(format!(
                            "`{name}` is asked for {count}, but at most 10000 are accepted"
                        )));
                    }
                    filter(state, list, count, fill)
                },
            );
        }
        environment.remove_global("debug");

        let budget = Arc::clone(self);
        environment.set_unknown_method_callback(move |state, value, method, args| {
            if let Some(text) = value.as_str() {
                let argument = |i: usize| args.get(i).and_then(Value::as_str);
                match method {
                    "replace" => {
                        if let (Some(from), Some(to)) = (argument(0), argument(1)) {
                            let most = args.get(2).and_then(Value::as_usize);
                            return budget.replace(text, from, to, most);
                        }
                    }
                    "join" => args.first().map_or(Ok(()), |list| budget.join(list, text))?,
                    "format" => budget.format(text)?,
                    "split" | "rsplit" => {
                        let pieces = argument(0).map_or_else(
                            || text.split_whitespace().count(),
                            |separator| text.matches(separator).count() + 1,
                        );
                        budget.make(pieces.saturating_mul(ELEMENT).saturating_add(text.len()))?;
                    }
                    "splitlines" => budget.make((text.matches('\n').count() + 1).saturating_mul(ELEMENT))?,
                    _ => {}
                }
            }
            match python::method(value, method, args) {
                Some(made) => Ok(made),
                None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
            }
        });
    }
}

fn arithmetic(
    sign: &str,
    left: &Value,
    right: &Value,
    whole: fn(i128, i128) -> Option<i128>,
    real: fn(f64, f64) -> f64,
) -> Result<Value, Error> {
    let impossible = || {
        refused(format!(
            "tried to use {sign} operator on unsupported types {} and {}",
            left.kind(),
            right.kind()
        ))
    };
    let number = |v: &Value| matches!(v.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(left) || !number(right) {
        return Err(impossible());
    }
    if let (Ok(a), Ok(b)) = (i128::try_from(left.clone()), i128::try_from(right.clone()))
        && !is_float(left)
        && !is_float(right)
    {
        let sum = whole(a, b).ok_or_else(|| refused(format!("unable to calculate {left} {sign} {right}")))?;
        return Ok(i64::try_from(sum).map_or_else(|_| Value::from(sum), Value::from));
    }
    let float = |v: &Value| f64::try_from(v.clone()).map_err(|_| impossible());
    Ok(Value::from(real(float(left)?, float(right)?)))
}

fn is_float(value: &Value) -> bool {
    value.is_number() && !value.is_integer()
}

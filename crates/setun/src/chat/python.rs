//! Where Jinja shows that it is Python: how values are printed, `json.dumps`, string methods, `strftime`.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use std::io::Write;

/// `str(value)`: `None`, `True`, `['a', 1]`, `{'k': 'v'}`; undefined is empty, as Jinja prints it.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.to_string(),
        _ => repr(value, 0)?,
    })
}

/// `repr(value)`.
fn repr(value: &Value, depth: usize) -> Result<String, Error> {
    if depth > 64 {
        return Err(Error::new(ErrorKind::InvalidOperation, "a value is nested too deeply to be printed"));
    }
    let join = |items: Vec<String>| items.join(", ");
    Ok(match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| repr(&item, depth + 1));
            let items = items.collect::<Result<Vec<_>, _>>()?;
            match (value.is_tuple(), &items[..]) {
                (true, [only]) => format!("({only},)"),
                (true, _) => format!("({})", join(items)),
                (false, _) => format!("[{}]", join(items)),
            }
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                Ok(format!("{}: {}", repr(&key, depth + 1)?, repr(&value.get_item(&key)?, depth + 1)?))
            };
            format!("{{{}}}", join(value.try_iter()?.map(pair).collect::<Result<_, Error>>()?))
        }
        _ => value.to_string(),
    })
}

/// A string literal with the quotes that Python chooses.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out += "\\\\",
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            c if c == quote => out.extend(['\\', c]),
            c if c.is_ascii_control() => out += &format!("\\x{:02x}", c as u32),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Python's `json.dumps` with `transformers`' defaults: nothing is escaped for HTML, and non-ASCII stays as it is.
/// `pay` is told of every piece before it is written.
pub(super) fn to_json(
    value: &Value,
    options: Kwargs,
    pay: impl Fn(&[u8]) -> Result<(), Error>,
) -> Result<Value, Error> {
    let invalid = |error: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"));
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let mut json = serde_json::to_value(value).map_err(|error| invalid(error.to_string()))?;
    if sorted == Some(true) {
        json.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(invalid("separators are two texts".into())),
    };
    let style = Style { item, key, indent: indent.map(|n| n.min(16)), depth: 0, filled: false };
    let mut out = Paid(Vec::new(), &pay);
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, style);
    serde::Serialize::serialize(&json, &mut serializer).map_err(|error| invalid(error.to_string()))?;
    let mut text = String::from_utf8(out.0).map_err(|error| invalid(error.to_string()))?;
    if ascii == Some(true) && !text.is_ascii() {
        // Two bytes become six.
        (0..3).try_for_each(|_| pay(text.as_bytes()))?;
        let mut units = [0; 2];
        text = text.chars().fold(String::new(), |mut out, c| {
            match c.is_ascii() {
                true => out.push(c),
                false => out.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}"))),
            }
            out
        });
    }
    Ok(Value::from(text))
}

/// Bytes that are paid for as they come.
struct Paid<F>(Vec<u8>, F);

impl<F: Fn(&[u8]) -> Result<(), Error>> Write for Paid<&F> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        (self.1)(bytes).map_err(std::io::Error::other)?;
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `{"a": 1, "b": [1, 2]}`, or over lines.
struct Style<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    depth: usize,
    /// Whether the innermost array or object has an item, so that its end is on a line of its own.
    filled: bool,
}

impl Style<'_> {
    fn begin(&mut self, out: &mut (impl Write + ?Sized), bracket: &[u8]) -> std::io::Result<()> {
        self.depth += 1;
        self.filled = false;
        out.write_all(bracket)
    }

    fn end(&mut self, out: &mut (impl Write + ?Sized), bracket: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(out)?;
        }
        self.filled = true;
        out.write_all(bracket)
    }

    fn line(&self, out: &mut (impl Write + ?Sized)) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(out, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }

    fn next(&mut self, out: &mut (impl Write + ?Sized), first: bool) -> std::io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.filled = true;
        self.line(out)
    }
}

impl serde_json::ser::Formatter for Style<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.begin(out, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.end(out, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        self.next(out, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.begin(out, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.end(out, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        self.next(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
}

/// Methods of Python's strings that the engine's own compatibility layer lacks.
pub(super) fn method(value: &Value, name: &str, args: &[Value]) -> Option<Value> {
    let text = value.as_str()?;
    let arg = args.first().and_then(Value::as_str).filter(|arg| !arg.is_empty());
    let parts = |parts: [&str; 3]| Value::from(parts.map(str::to_owned).to_vec());
    Some(match (name, arg) {
        ("removeprefix", arg) => arg.and_then(|arg| text.strip_prefix(arg)).unwrap_or(text).into(),
        ("removesuffix", arg) => arg.and_then(|arg| text.strip_suffix(arg)).unwrap_or(text).into(),
        ("partition", Some(arg)) => match text.split_once(arg) {
            Some((before, after)) => parts([before, arg, after]),
            None => parts([text, "", ""]),
        },
        ("rpartition", Some(arg)) => match text.rsplit_once(arg) {
            Some((before, after)) => parts([before, arg, after]),
            None => parts(["", "", text]),
        },
        ("rsplit", Some(arg)) => {
            let most = args.get(1).and_then(Value::as_usize).map_or(usize::MAX, |n| n.saturating_add(1));
            let mut pieces: Vec<&str> = text.rsplitn(most, arg).collect();
            pieces.reverse();
            Value::from(pieces.into_iter().map(str::to_owned).collect::<Vec<_>>())
        }
        _ => return None,
    })
}

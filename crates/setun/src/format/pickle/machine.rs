//! The part of Python's pickle machine that a `state_dict` needs: values are pushed on a stack, collected into tuples,
//! lists and dictionaries, and remembered by number. Nothing is imported and nothing is called.
//!
//! Names of Python objects are looked up in a list ([`global`]); calls are understood for three of them. All values lie in
//! tables and refer to each other by index, so nesting costs no stack, and what a pickle can make the tables hold is bounded.

/// Longest pickle read, in bytes; one tensor takes some 200.
const MAX_BYTES: usize = 32 << 20;
/// Most values on the stack, in the memo, or in all collections together: room for some 38 000 tensors in a file.
const MAX_VALUES: usize = 1 << 20;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;

/// Why a pickle is not read.
pub(super) enum Found {
    /// It breaks its format.
    Broken(String),
    /// It asks for something beyond tensors in dictionaries.
    Refused(String),
}

/// A value; texts and names are places in the pickle, collections are places in the machine's tables.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    /// None, booleans, floats: what nothing here depends on.
    Plain,
    Int(i64),
    Text {
        start: u32,
        len: u32,
    },
    Global(Global),
    Tuple(u32),
    List(u32),
    Dict(u32),
    Storage(u32),
    Tensor(u32),
}

/// A Python object that a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(Dtype),
}

/// A number type, by the name safetensors has for it, and its size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Dtype {
    pub(super) name: &'static str,
    pub(super) bytes: usize,
}

/// Raw numbers in an entry of the archive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    pub(super) dtype: Dtype,
    pub(super) key: &'a str,
    pub(super) elements: u64,
}

/// A view of a storage.
#[derive(Debug)]
pub(super) struct TensorView {
    pub(super) storage: u32,
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    /// Whether its elements are consecutive, in row-major order.
    pub(super) contiguous: bool,
}

/// What `module.name` stands for.
fn global(module: &str, name: &str) -> Option<Global> {
    let storage = |name, bytes| Some(Global::Storage(Dtype { name, bytes }));
    match (module, name) {
        ("collections", "OrderedDict") => Some(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
        ("torch", "Size") => Some(Global::Size),
        ("torch", "FloatStorage") => storage("F32", 4),
        ("torch", "HalfStorage") => storage("F16", 2),
        ("torch", "BFloat16Storage") => storage("BF16", 2),
        ("torch", "DoubleStorage") => storage("F64", 8),
        ("torch", "ByteStorage") => storage("U8", 1),
        ("torch", "CharStorage") => storage("I8", 1),
        ("torch", "ShortStorage") => storage("I16", 2),
        ("torch", "IntStorage") => storage("I32", 4),
        ("torch", "LongStorage") => storage("I64", 8),
        ("torch", "BoolStorage") => storage("BOOL", 1),
        _ => None,
    }
}

/// The machine after any number of operations.
pub(super) struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: std::collections::HashMap<u32, Value>,
    tuples: Vec<Vec<Value>>,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<TensorView>,
    /// Values in all collections, and collections.
    kept: usize,
}

type Step<T = ()> = Result<T, Found>;

fn broken<T>(what: impl Into<String>) -> Step<T> {
    Err(Found::Broken(what.into()))
}

impl<'a> Machine<'a> {
    pub(super) fn new(pickle: &'a [u8]) -> Self {
        Self {
            pickle,
            at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: std::collections::HashMap::new(),
            tuples: Vec::new(),
            lists: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
            kept: 0,
        }
    }

    /// The entries of a dictionary, in the order in which they were put.
    pub(super) fn dict(&self, value: Value) -> Option<&[(Value, Value)]> {
        match value {
            Value::Dict(index) => Some(&self.dicts[index as usize]),
            _ => None,
        }
    }

    /// A text's characters.
    pub(super) fn text(&self, value: Value) -> Option<&'a str> {
        let Value::Text { start, len } = value else { return None };
        std::str::from_utf8(&self.pickle[start as usize..(start + len) as usize]).ok()
    }

    pub(super) fn tensor(&self, index: u32) -> &TensorView {
        &self.tensors[index as usize]
    }

    pub(super) fn storage(&self, index: u32) -> Storage<'a> {
        self.storages[index as usize]
    }

    /// Runs the pickle to its end and returns what it leaves.
    pub(super) fn run(&mut self) -> Step<Value> {
        if self.pickle.len() > MAX_BYTES {
            return broken(format!("its pickle has {} bytes, more than {MAX_BYTES}", self.pickle.len()));
        }
        loop {
            let place = self.at;
            match self.byte()? {
                b'.' => return self.pop(),
                // PROTO and FRAME say nothing that is needed.
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                b'(' => self.mark()?,
                b'N' | 0x88 | 0x89 => self.push(Value::Plain)?,
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Plain)?;
                }
                b'K' => {
                    let n = self.byte()?;
                    self.push(Value::Int(i64::from(n)))?;
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(i64::from(n)))?;
                }
                b'J' => {
                    let n = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(i64::from(n)))?;
                }
                0x8a => self.long()?,
                b'X' | b'T' => {
                    let len = u32::from_le_bytes(self.array()?);
                    self.put_text(len as usize)?;
                }
                0x8c | b'U' => {
                    let len = self.byte()?;
                    self.put_text(usize::from(len))?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.put_global(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Some(module), Some(name)) = (self.text(module), self.text(name)) else {
                        return broken(format!("the name at byte {place} of its pickle is no text"));
                    };
                    self.put_global(module, name)?;
                }
                b')' => self.put_tuple(Vec::new())?,
                b't' => {
                    let items = self.since_mark()?;
                    self.put_tuple(items)?;
                }
                n @ 0x85..=0x87 => {
                    let from = self.depth(usize::from(n - 0x84))?;
                    let items = self.stack.split_off(from);
                    self.put_tuple(items)?;
                }
                b']' => {
                    self.keep(1)?;
                    self.lists.push(Vec::new());
                    self.push(Value::List(self.lists.len() as u32 - 1))?;
                }
                b'}' => self.put_dict()?,
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.since_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let from = self.depth(2)?;
                    let pair = self.stack.split_off(from);
                    self.set_items(&pair)?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.set_items(&items)?;
                }
                b'q' => {
                    let n = self.byte()?;
                    self.remember(u32::from(n))?;
                }
                b'r' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.remember(n)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let n = self.byte()?;
                    self.recall(u32::from(n))?;
                }
                b'j' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.recall(n)?;
                }
                b'Q' => self.persistent()?,
                b'R' => self.call()?,
                b'b' => {
                    // Attributes of an OrderedDict (`_metadata`: versions of its modules); nothing depends on them.
                    self.pop()?;
                    if !matches!(self.stack.last(), Some(Value::Dict(_) | Value::Tensor(_))) {
                        return Err(Found::Refused(format!(
                            "byte {place} of its pickle sets the state of an object"
                        )));
                    }
                }
                other => {
                    let what = format!("its pickle uses operation 0x{other:02x} at byte {place}");
                    return Err(Found::Refused(what));
                }
            }
        }
    }

    fn take(&mut self, n: usize) -> Step<&'a [u8]> {
        match self.pickle.get(self.at..).and_then(|rest| rest.get(..n)) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None => broken(format!("its pickle ends inside an operation, after {} bytes", self.pickle.len())),
        }
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        Ok(*self.take(N)?.first_chunk().expect("as many were taken"))
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.pickle[self.at..];
        let Some(len) = rest.iter().position(|&b| b == b'\n') else {
            return broken("a name in its pickle has no end");
        };
        let line = self.take(len + 1)?;
        match std::str::from_utf8(&line[..len]) {
            Ok(text) => Ok(text),
            Err(_) => broken("a name in its pickle is not UTF-8"),
        }
    }

    fn keep(&mut self, values: usize) -> Step {
        self.kept += values;
        match self.kept > MAX_VALUES {
            true => broken(format!("its pickle makes more than {MAX_VALUES} values")),
            false => Ok(()),
        }
    }

    fn push(&mut self, value: Value) -> Step {
        if self.stack.len() >= MAX_VALUES {
            return broken(format!("its pickle puts more than {MAX_VALUES} values on the stack"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Step<Value> {
        let from = self.depth(1)?;
        Ok(self.stack.split_off(from)[0])
    }

    /// Where the last `n` values start, which must lie above the last mark.
    fn depth(&self, n: usize) -> Step<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(n).filter(|&from| from >= floor) {
            Some(from) => Ok(from),
            None => broken(format!("its pickle takes a value that is not there, before byte {}", self.at)),
        }
    }

    fn mark(&mut self) -> Step {
        if self.marks.len() >= MAX_VALUES {
            return broken(format!("its pickle is nested deeper than {MAX_VALUES}"));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn since_mark(&mut self) -> Step<Vec<Value>> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => broken(format!("its pickle ends a collection that was not begun, at byte {}", self.at)),
        }
    }

    fn long(&mut self) -> Step {
        let len = usize::from(self.byte()?);
        let bytes = self.take(len)?;
        let Some(sign) = bytes.last().map(|b| if b & 0x80 != 0 { 0xff } else { 0 }) else {
            return self.push(Value::Int(0));
        };
        if len > 8 {
            return broken(format!("a number of {len} bytes in its pickle is too large"));
        }
        let mut wide = [sign; 8];
        wide[..len].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn put_text(&mut self, len: usize) -> Step {
        let start = self.at as u32;
        if std::str::from_utf8(self.take(len)?).is_err() {
            return broken(format!("the text at byte {start} of its pickle is not UTF-8"));
        }
        self.push(Value::Text { start, len: len as u32 })
    }

    fn put_global(&mut self, module: &str, name: &str) -> Step {
        match global(module, name) {
            Some(known) => self.push(Value::Global(known)),
            None => {
                let shown = super::shortened(&format!("{module}.{name}"));
                Err(Found::Refused(format!("its pickle asks for `{shown}`")))
            }
        }
    }

    fn put_tuple(&mut self, items: Vec<Value>) -> Step {
        self.keep(1 + items.len())?;
        self.tuples.push(items);
        self.push(Value::Tuple(self.tuples.len() as u32 - 1))
    }

    fn put_dict(&mut self) -> Step {
        self.keep(1)?;
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() as u32 - 1))
    }

    fn append(&mut self, items: Vec<Value>) -> Step {
        self.keep(items.len())?;
        self.depth(1)?;
        match self.stack.last() {
            Some(&Value::List(list)) => self.lists[list as usize].extend(items),
            _ => return broken(format!("its pickle appends to what is no list, at byte {}", self.at)),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Value]) -> Step {
        self.keep(items.len())?;
        self.depth(1)?;
        let (Some(&Value::Dict(dict)), (pairs, [])) = (self.stack.last(), items.as_chunks::<2>()) else {
            return broken(format!("its pickle sets items of what is no dictionary, at byte {}", self.at));
        };
        self.dicts[dict as usize].extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn remember(&mut self, n: u32) -> Step {
        self.depth(1)?;
        let value = *self.stack.last().expect("one is there");
        if self.memo.len() >= MAX_VALUES && !self.memo.contains_key(&n) {
            return broken(format!("its pickle remembers more than {MAX_VALUES} values"));
        }
        self.memo.insert(n, value);
        Ok(())
    }

    fn recall(&mut self, n: u32) -> Step {
        match self.memo.get(&n) {
            Some(&value) => self.push(value),
            None => broken(format!("its pickle recalls value {n}, which it did not make")),
        }
    }

    fn items(&self, value: Value) -> Option<&[Value]> {
        match value {
            Value::Tuple(index) => Some(&self.tuples[index as usize]),
            _ => None,
        }
    }

    /// `('storage', type, key, device, elements)`: an entry of the archive.
    fn persistent(&mut self) -> Step {
        let id = self.pop()?;
        let parts = match self.items(id) {
            Some(&[kind, Value::Global(Global::Storage(dtype)), key, _, Value::Int(elements)]) => {
                Some((self.text(kind), dtype, self.text(key), u64::try_from(elements)))
            }
            _ => None,
        };
        let Some((Some("storage"), dtype, Some(key), Ok(elements))) = parts else {
            return broken(format!("its pickle refers to what is no storage, at byte {}", self.at));
        };
        self.keep(1)?;
        self.storages.push(Storage { dtype, key, elements });
        self.push(Value::Storage(self.storages.len() as u32 - 1))
    }

    fn call(&mut self) -> Step {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let Some(items) = self.items(arguments) else {
            return broken(format!("its pickle calls something without arguments, at byte {}", self.at));
        };
        match (callee, items) {
            (Value::Global(Global::OrderedDict), []) => self.put_dict(),
            (Value::Global(Global::Size), &[size @ Value::Tuple(_)]) => self.push(size),
            (Value::Global(Global::RebuildParameter), &[tensor @ Value::Tensor(_), _, _]) => {
                self.push(tensor)
            }
            (
                Value::Global(Global::RebuildTensor),
                &[Value::Storage(storage), Value::Int(offset), size, strides, _, _]
                | &[Value::Storage(storage), Value::Int(offset), size, strides, _, _, _],
            ) => {
                let view = (self.sizes(size), self.sizes(strides), u64::try_from(offset));
                let (Some(shape), Some(strides), Ok(offset)) = view else {
                    return broken(format!(
                        "a tensor before byte {} of its pickle has no valid shape",
                        self.at
                    ));
                };
                if shape.len() != strides.len() {
                    return broken(format!("a tensor of shape {shape:?} has strides {strides:?}"));
                }
                self.keep(1 + shape.len())?;
                let contiguous = is_contiguous(&shape, &strides);
                self.tensors.push(TensorView { storage, offset, shape, contiguous });
                self.push(Value::Tensor(self.tensors.len() as u32 - 1))
            }
            _ => Err(Found::Refused(format!("its pickle calls something at byte {}", self.at - 1))),
        }
    }

    /// A tuple of a few sizes.
    fn sizes(&self, value: Value) -> Option<Vec<usize>> {
        let items = self.items(value).filter(|items| items.len() <= MAX_DIMS)?;
        let size = |v: &Value| if let Value::Int(n) = v { usize::try_from(*n).ok() } else { None };
        items.iter().map(size).collect()
    }
}

/// Whether elements are consecutive in row-major order; strides of dimensions of one element are arbitrary.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected = expected.saturating_mul(size);
            fits
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pickle: &[u8]) -> Result<Value, String> {
        Machine::new(pickle).run().map_err(|found| match found {
            Found::Broken(what) | Found::Refused(what) => what,
        })
    }

    #[test]
    fn names_beyond_the_list_are_refused_before_anything_uses_them() {
        for (pickle, named) in [
            (&b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."[..], "os.system"),
            (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
            (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
            (b"\x80\x02i", "operation 0x69"),
        ] {
            let error = run(pickle).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        assert!(run(b"ccollections\nOrderedDict\nK\x01\x85R.").unwrap_err().contains("calls something"));
    }

    #[test]
    fn what_a_pickle_can_make_the_machine_hold_is_bounded() {
        let deep = vec![b'('; 2 << 20];
        assert!(run(&deep).unwrap_err().contains("nested deeper"));
        let mut tuples = b")".to_vec();
        tuples.extend(std::iter::repeat_n(0x85, 2 << 20));
        assert!(run(&tuples).unwrap_err().contains("more than 1048576 values"));
        assert!(run(&vec![b'N'; 2 << 20]).unwrap_err().contains("on the stack"));
        assert!(run(&vec![0; MAX_BYTES + 1]).unwrap_err().contains("more than 33554432"));
    }

    #[test]
    fn marks_protect_the_values_below_them() {
        for pickle in [
            &b"K\x01(0."[..],
            b"K\x01(.",
            b"K\x01(\x85.",
            b"t.",
            b"u.",
            b"}(K\x01u.",
            b"h\x00.",
            b"X\xff\xff\xff\xff.",
        ] {
            assert!(run(pickle).is_err(), "{pickle:?}");
        }
        assert_eq!(run(b"\x8a\x02\x00\xff."), Ok(Value::Int(-256)));
        assert_eq!(run(b"\x8a\x00."), Ok(Value::Int(0)));
    }

    #[test]
    fn only_row_major_views_without_gaps_are_contiguous() {
        assert!(
            is_contiguous(&[2, 3], &[3, 1]) && is_contiguous(&[1, 3], &[99, 1]) && is_contiguous(&[], &[])
        );
        assert!(is_contiguous(&[0, 3], &[7, 7]));
        assert!(!is_contiguous(&[3, 2], &[1, 3]) && !is_contiguous(&[2, 3], &[6, 1]));
    }
}

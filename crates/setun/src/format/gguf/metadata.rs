//! GGUF metadata: ordered keys with typed values.
//!
//! Writers disagree about integer widths, so the accessors take any integer type that holds the value.

use std::collections::HashMap;

use crate::error::ModelError;

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The thirteen types of the format; the names say it.
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array value. Elements have one type and are stored as that type, so that an array takes
/// about as much memory as it takes in the file.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Value {
    /// Any integer type, if it is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U64(v) => Some(v),
            _ => self.as_i64().and_then(|v| u64::try_from(v).ok()),
        }
    }

    /// Any integer type, if the value fits.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::U64(v) => i64::try_from(v).ok(),
            Self::I64(v) => Some(v),
            _ => None,
        }
    }

    /// Either float type; integers are not floats.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(v) => Some(v),
            Self::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(v) = self { Some(v) } else { None }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(v) = self { Some(*v) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        if let Self::Array(v) = self { Some(v) } else { None }
    }

    /// The type in words, for messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::String(v) => v.len(),
            Self::Array(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F64(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements of a string array.
    pub fn as_strings(&self) -> Option<&[String]> {
        if let Self::String(v) = self { Some(v) } else { None }
    }

    /// The elements of an integer array of any width, if every value fits.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        match self {
            Self::U8(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Self::I8(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Self::U16(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Self::I16(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Self::U32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Self::I32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Self::U64(v) => v.iter().map(|&x| i64::try_from(x).ok()).collect(),
            Self::I64(v) => Some(v.clone()),
            _ => None,
        }
    }

    /// The elements of an integer array of any width, if none is negative.
    pub fn to_u64s(&self) -> Option<Vec<u64>> {
        match self {
            Self::U64(v) => Some(v.clone()),
            _ => self.to_i64s()?.into_iter().map(|x| u64::try_from(x).ok()).collect(),
        }
    }

    /// The elements of a float array of either width.
    pub fn to_f32s(&self) -> Option<Vec<f32>> {
        match self {
            Self::F32(v) => Some(v.clone()),
            Self::F64(v) => Some(v.iter().map(|&x| x as f32).collect()),
            _ => None,
        }
    }
}

/// The metadata of a file, in file order. Keys are unique.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    places: HashMap<String, usize>,
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// No entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key, in its old place if it was there, else at the end. Returns the old value.
    pub fn insert(&mut self, key: impl Into<String>, value: Value) -> Option<Value> {
        let key = key.into();
        if let Some(&place) = self.places.get(&key) {
            return Some(std::mem::replace(&mut self.entries[place].1, value));
        }
        self.places.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        None
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.places.get(key).map(|&place| &self.entries[place].1)
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// An integer of any width, `None` if the key is absent.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] if the value is negative or no integer.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, ModelError> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    /// A float of either width, `None` if the key is absent.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] if the value is no float.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.typed(key, "a float", Value::as_f32)
    }

    /// A boolean, `None` if the key is absent.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] if the value is no boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    /// A string, `None` if the key is absent.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] if the value is no string.
    pub fn str(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An array, `None` if the key is absent.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] if the value is no array.
    pub fn array(&self, key: &str) -> Result<Option<&Array>, ModelError> {
        self.typed(key, "an array", Value::as_array)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        convert(value).map(Some).ok_or_else(|| {
            let found = match value.as_i64() {
                Some(number) => number.to_string(),
                None => format!("of type {}", value.type_name()),
            };
            let what = format!("is {found}, but {expected} is expected");
            ModelError::Metadata { key: key.to_owned(), what }
        })
    }
}

/// Turns an absent value into the error that names its key.
///
/// # Errors
/// [`ModelError::Metadata`] if `value` is `None`.
pub fn required<T>(key: &str, value: Option<T>) -> Result<T, ModelError> {
    value.ok_or_else(|| ModelError::Metadata { key: key.to_owned(), what: "is missing".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_in_any_width_that_holds_them() {
        let cases = [Value::U8(7), Value::I16(7), Value::I32(7), Value::U64(7), Value::I64(7)];
        for value in cases {
            assert_eq!((value.as_u64(), value.as_i64()), (Some(7), Some(7)), "{value:?}");
        }
        assert_eq!(Value::I8(-1).as_u64(), None);
        assert_eq!(Value::U64(u64::MAX).as_i64(), None);
        assert_eq!(Value::F32(1.0).as_u64(), None);
        assert_eq!(Array::U64(vec![1, u64::MAX]).to_i64s(), None);
        assert_eq!(Array::I8(vec![1, -1]).to_u64s(), None);
    }

    #[test]
    fn a_value_of_the_wrong_type_names_its_key_and_what_was_found() {
        let mut metadata = Metadata::new();
        metadata.insert("llama.block_count", Value::String("six".into()));
        metadata.insert("llama.context_length", Value::I32(-4));
        let error = metadata.u64("llama.block_count").unwrap_err().to_string();
        assert_eq!(
            error,
            "metadata key `llama.block_count` is of type string, but a non-negative integer is expected"
        );
        let error = metadata.u64("llama.context_length").unwrap_err().to_string();
        assert!(error.contains("is -4"), "{error}");
        assert_eq!(metadata.u64("absent").unwrap(), None);
    }

    #[test]
    fn inserting_again_keeps_the_place_and_returns_the_old_value() {
        let mut metadata = Metadata::new();
        metadata.insert("a", Value::U8(1));
        metadata.insert("b", Value::U8(2));
        assert_eq!(metadata.insert("a", Value::U8(3)), Some(Value::U8(1)));
        let keys: Vec<_> = metadata.iter().map(|(k, _)| k).collect();
        assert_eq!((keys, metadata.get("a")), (vec!["a", "b"], Some(&Value::U8(3))));
    }
}

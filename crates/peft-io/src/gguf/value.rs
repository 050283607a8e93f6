//! Metadata values of a GGUF file. Arrays are kept typed, so that a file's array of a million bytes
//! takes a million bytes here too.

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaValue {
    /// Unsigned integer of 8 bits.
    U8(u8),
    /// Signed integer of 8 bits.
    I8(i8),
    /// Unsigned integer of 16 bits.
    U16(u16),
    /// Signed integer of 16 bits.
    I16(i16),
    /// Unsigned integer of 32 bits.
    U32(u32),
    /// Signed integer of 32 bits.
    I32(i32),
    /// Float of 32 bits.
    F32(f32),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values of one type.
    Array(MetaArray),
    /// Unsigned integer of 64 bits.
    U64(u64),
    /// Signed integer of 64 bits.
    I64(i64),
    /// Float of 64 bits.
    F64(f64),
}

/// An array of one element type.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaArray {
    /// Unsigned integers of 8 bits.
    U8(Vec<u8>),
    /// Signed integers of 8 bits.
    I8(Vec<i8>),
    /// Unsigned integers of 16 bits.
    U16(Vec<u16>),
    /// Signed integers of 16 bits.
    I16(Vec<i16>),
    /// Unsigned integers of 32 bits.
    U32(Vec<u32>),
    /// Signed integers of 32 bits.
    I32(Vec<i32>),
    /// Floats of 32 bits.
    F32(Vec<f32>),
    /// Booleans.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<String>),
    /// Arrays of arrays.
    Array(Vec<MetaArray>),
    /// Unsigned integers of 64 bits.
    U64(Vec<u64>),
    /// Signed integers of 64 bits.
    I64(Vec<i64>),
    /// Floats of 64 bits.
    F64(Vec<f64>),
}

impl MetaValue {
    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(s) => Some(s),
            _ => None,
        }
    }

    /// The boolean, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The integer as `u64`, if it is a non-negative integer of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            _ => self.as_i64().and_then(|v| v.try_into().ok()),
        }
    }

    /// The integer as `i64`, if it is an integer that fits.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::U64(v) => v.try_into().ok(),
            Self::I64(v) => Some(v),
            _ => None,
        }
    }

    /// The number as `f64`; integers are converted.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            Self::U64(v) => Some(v as f64),
            _ => self.as_i64().map(|v| v as f64),
        }
    }

    /// The array, if it is one.
    pub fn as_array(&self) -> Option<&MetaArray> {
        match self {
            Self::Array(a) => Some(a),
            _ => None,
        }
    }

    /// Name of the type for messages, such as `u32` or `array of string`.
    pub fn type_name(&self) -> String {
        match self {
            Self::U8(_) => "u8".into(),
            Self::I8(_) => "i8".into(),
            Self::U16(_) => "u16".into(),
            Self::I16(_) => "i16".into(),
            Self::U32(_) => "u32".into(),
            Self::I32(_) => "i32".into(),
            Self::F32(_) => "f32".into(),
            Self::Bool(_) => "bool".into(),
            Self::String(_) => "string".into(),
            Self::Array(a) => format!("array of {}", a.type_name()),
            Self::U64(_) => "u64".into(),
            Self::I64(_) => "i64".into(),
            Self::F64(_) => "f64".into(),
        }
    }
}

impl MetaArray {
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

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i` as a value, or `None` past the end.
    pub fn get(&self, i: usize) -> Option<MetaValue> {
        match self {
            Self::U8(v) => v.get(i).copied().map(MetaValue::U8),
            Self::I8(v) => v.get(i).copied().map(MetaValue::I8),
            Self::U16(v) => v.get(i).copied().map(MetaValue::U16),
            Self::I16(v) => v.get(i).copied().map(MetaValue::I16),
            Self::U32(v) => v.get(i).copied().map(MetaValue::U32),
            Self::I32(v) => v.get(i).copied().map(MetaValue::I32),
            Self::F32(v) => v.get(i).copied().map(MetaValue::F32),
            Self::Bool(v) => v.get(i).copied().map(MetaValue::Bool),
            Self::String(v) => v.get(i).cloned().map(MetaValue::String),
            Self::Array(v) => v.get(i).cloned().map(MetaValue::Array),
            Self::U64(v) => v.get(i).copied().map(MetaValue::U64),
            Self::I64(v) => v.get(i).copied().map(MetaValue::I64),
            Self::F64(v) => v.get(i).copied().map(MetaValue::F64),
        }
    }

    /// Name of the element type for messages.
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

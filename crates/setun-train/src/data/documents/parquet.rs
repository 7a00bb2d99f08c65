//! Documents of a Parquet file: one string column, a few rows at a time.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parquet::basic::{ConvertedType, LogicalType, Type};
use parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::{LONGEST, TextFile, trimmed};
use crate::error::TrainError;

/// Rows decoded at a time. Their values share the memory of their page.
const ROWS: usize = 64;

pub(super) struct Rows {
    file: TextFile,
    reader: SerializedFileReader<File>,
    /// Index of the text column.
    column: usize,
    /// The row group after the one that `values` reads.
    group: usize,
    values: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Rows left in it.
    left: usize,
    ready: std::vec::IntoIter<ByteArray>,
    /// Rows whose text is done with, absent ones included up to the end of their batch.
    row: usize,
    read: Arc<AtomicU64>,
}

impl Rows {
    pub(super) fn open(file: TextFile, read: &Arc<AtomicU64>) -> Result<Self, TrainError> {
        let path = &file.path;
        let opened = File::open(path).map_err(|e| TrainError::read(path, e))?;
        let reader = guarded(|| SerializedFileReader::new(opened))
            .map_err(|what| TrainError::file(path, format!("not a usable Parquet file: {what}")))?;
        let column =
            text_column(path, reader.metadata().file_metadata().schema_descr().columns(), &file.field)?;
        let (read, ready) = (read.clone(), Vec::new().into_iter());
        Ok(Self { file, reader, column, group: 0, values: None, left: 0, ready, row: 0, read })
    }

    pub(super) fn document(&mut self) -> Result<Option<String>, TrainError> {
        loop {
            let Some(value) = self.ready.next() else {
                if self.more()? {
                    continue;
                }
                return Ok(None);
            };
            self.row += 1;
            let bad = |what: &str| {
                let what = format!("column `{}`: value {} {what}", self.file.field, self.row);
                TrainError::file(&self.file.path, what)
            };
            if value.len() > LONGEST {
                return Err(bad(&format!("is longer than {} MiB", LONGEST >> 20)));
            }
            let text = std::str::from_utf8(value.data()).map_err(|_| bad("is not UTF-8"))?;
            if let Some(document) = trimmed(text) {
                return Ok(Some(document));
            }
        }
    }

    /// Decodes the next rows; false at the end of the file.
    fn more(&mut self) -> Result<bool, TrainError> {
        while self.left == 0 {
            self.values = None;
            if self.group == self.reader.num_row_groups() {
                return Ok(false);
            }
            let group = self.reader.metadata().row_group(self.group);
            self.left = usize::try_from(group.num_rows()).unwrap_or(0);
            // Progress by row groups; their other columns are passed over.
            let bytes = group.columns().iter().map(|c| c.compressed_size().max(0) as u64).sum();
            self.read.fetch_add(bytes, Ordering::Relaxed);
            self.group += 1;
        }
        let (reader, group, column, wanted) =
            (&self.reader, self.group - 1, self.column, self.left.min(ROWS));
        let values = &mut self.values;
        let decoded = guarded(|| {
            if values.is_none() {
                let found = reader.get_row_group(group)?.get_column_reader(column)?;
                *values = Some(get_typed_column_reader(found));
            }
            let values = values.as_mut().expect("set above");
            let (mut texts, mut levels) = (Vec::with_capacity(wanted), Vec::new());
            let (rows, ..) = values.read_records(wanted, Some(&mut levels), None, &mut texts)?;
            Ok((rows, texts))
        });
        let damaged = |what: String| {
            let (field, path) = (&self.file.field, &self.file.path);
            TrainError::file(
                path,
                format!("column `{field}`, row group {group}: the data is damaged ({what})"),
            )
        };
        let (rows, texts) = decoded.map_err(damaged)?;
        if rows == 0 {
            return Err(damaged(format!("{} of its rows are missing", self.left)));
        }
        self.left -= rows;
        self.ready = texts.into_iter();
        Ok(true)
    }
}

/// The column called `field`, if it holds one string per row.
fn text_column(path: &Path, columns: &[Arc<ColumnDescriptor>], field: &str) -> Result<usize, TrainError> {
    let name = |c: &ColumnDescriptor| c.path().string();
    let Some(index) = columns.iter().position(|c| name(c) == field) else {
        let there: Vec<String> = columns.iter().map(|c| format!("`{}` ({})", name(c), kind(c))).collect();
        let what =
            format!("no column `{field}`; its columns are {}; choose one by text_field", there.join(", "));
        return Err(TrainError::file(path, what));
    };
    let column = &columns[index];
    if kind(column) != "text" {
        let strings = columns.iter().filter(|c| kind(c) == "text").map(|c| format!("`{}`", name(c)));
        let strings: Vec<String> = strings.collect();
        let there = if strings.is_empty() { "none".to_owned() } else { strings.join(", ") };
        let what = format!("column `{field}` is {}, not text; its text columns: {there}", kind(column));
        return Err(TrainError::file(path, what));
    }
    Ok(index)
}

/// What a column holds, in words; `text` for what documents can be read from.
fn kind(column: &ColumnDescriptor) -> String {
    let plain = column.logical_type_ref().is_none_or(|t| matches!(t, LogicalType::String))
        && matches!(column.converted_type(), ConvertedType::NONE | ConvertedType::UTF8);
    match column.physical_type() {
        _ if column.max_rep_level() > 0 => "a list".into(),
        // Old writers leave strings unmarked.
        Type::BYTE_ARRAY if plain => "text".into(),
        other => match column.logical_type_ref() {
            Some(logical) => format!("{other} as {logical:?}").to_lowercase(),
            None => other.to_string().to_lowercase(),
        },
    }
}

/// Runs the library on bytes that may be damaged; where it panics, that is an error too.
fn guarded<T>(work: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|e| e.to_string().trim_end_matches('.').replace('\n', ", ")),
        Err(_) => Err("the Parquet library gave up on it".to_owned()),
    }
}

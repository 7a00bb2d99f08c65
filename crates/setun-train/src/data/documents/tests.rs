use std::io::Write;

use ::parquet::basic::Compression as Codec;
use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;

use super::*;

fn read(paths: &[PathBuf]) -> Result<Vec<String>, TrainError> {
    Documents::new(files(paths, None)?).collect()
}

#[test]
fn separator_lines_end_documents_and_empty_ones_are_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    std::fs::write(
        &path,
        "\u{feff}one\r\n\r\ntwo\n<|endoftext|>\n\n<|endoftext|>\r\n three <|endoftext|> here\n",
    )
    .unwrap();
    let found = read(&[path]).unwrap();
    assert_eq!(found, ["one\n\ntwo", "three <|endoftext|> here"]);
}

#[test]
fn json_lines_and_folders_give_documents_in_name_order() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("b.txt"), "second").unwrap();
    std::fs::write(at("a.jsonl"), "{\"text\": \"fi\\nrst\", \"id\": 1}\n\n").unwrap();
    std::fs::write(at("ignored.md"), "no").unwrap();
    assert_eq!(read(&[folder.path().to_owned()]).unwrap(), ["fi\nrst", "second"]);
}

#[test]
fn unusable_text_is_an_error_with_its_line_and_ends_the_iteration() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("a.txt"), b"fine\nbad \xff\n").unwrap();
    std::fs::write(at("b.jsonl"), "{\"words\": 1}\n").unwrap();
    let error = read(&[at("a.txt")]).unwrap_err().to_string();
    assert!(error.contains("a.txt: line 2 is not UTF-8 from its byte 5"), "{error}");
    let error = read(&[at("b.jsonl")]).unwrap_err().to_string();
    assert!(error.contains("line 1") && error.contains("`text`"), "{error}");
    let mut documents = Documents::new(files(&[at("b.jsonl"), at("a.txt")], None).unwrap());
    assert!(documents.next().unwrap().is_err());
    assert!(documents.next().is_none());
    std::fs::create_dir(at("empty")).unwrap();
    assert!(read(&[at("empty")]).unwrap_err().to_string().contains("no .txt, .jsonl"));
    assert!(read(&[at("absent.txt")]).unwrap_err().to_string().contains("absent.txt"));
}

#[test]
fn fingerprint_sees_contents_and_file_boundaries() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let of = |paths: &[PathBuf]| fingerprint(&files(paths, None).unwrap()).unwrap();
    let (ab, c) = (at("1.txt", "ab"), at("2.txt", "c"));
    let (a, bc) = (at("3.txt", "a"), at("4.txt", "bc"));
    assert_ne!(of(&[ab.clone(), c.clone()]), of(&[a, bc]));
    assert_eq!(of(&[ab.clone(), c.clone()]), of(&[ab, c]));
}

/// `one` and `two`, compressed by `xz -9 -C crc64`.
const XZ: &[u8] = &[
    0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x04, 0xe6, 0xd6, 0xb4, 0x46, 0x02, 0x00, 0x21, 0x01, 0x1c,
    0x00, 0x00, 0x00, 0x10, 0xcf, 0x58, 0xcc, 0x01, 0x00, 0x15, 0x6f, 0x6e, 0x65, 0x0a, 0x3c, 0x7c, 0x65,
    0x6e, 0x64, 0x6f, 0x66, 0x74, 0x65, 0x78, 0x74, 0x7c, 0x3e, 0x0a, 0x74, 0x77, 0x6f, 0x0a, 0x00, 0x00,
    0x00, 0x8a, 0xe3, 0x1a, 0x98, 0xdc, 0x0b, 0xb0, 0x61, 0x00, 0x01, 0x2e, 0x16, 0x56, 0x09, 0x55, 0xdf,
    0x1f, 0xb6, 0xf3, 0x7d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x04, 0x59, 0x5a,
];

/// Every compression of the text `one`, `two`.
fn compressed() -> [(&'static str, Vec<u8>); 4] {
    let text = b"one\n<|endoftext|>\ntwo\n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(text).unwrap();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    bzip2.write_all(text).unwrap();
    let mut zstd = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
    zstd.include_checksum(true).unwrap();
    zstd.write_all(text).unwrap();
    [
        ("gz", gzip.finish().unwrap()),
        ("zst", zstd.finish().unwrap()),
        ("xz", XZ.to_vec()),
        ("bz2", bzip2.finish().unwrap()),
    ]
}

#[test]
fn compressed_files_hold_the_documents_that_were_compressed_also_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    for (end, bytes) in compressed() {
        let path = folder.path().join(format!("a.txt.{end}"));
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(std::slice::from_ref(&path)).unwrap(), ["one", "two"], "{end}");
        let plain = path.with_extension("");
        std::fs::write(&plain, &bytes).unwrap();
        let hash = |path: &Path| fingerprint(&files(&[path.to_owned()], None).unwrap()).unwrap();
        assert_ne!(hash(&path), hash(&plain));
        std::fs::remove_file(plain).unwrap();
        // Two members: `two` and `one` are joined by a line end only.
        std::fs::write(&path, bytes.repeat(2)).unwrap();
        assert_eq!(read(&[path]).unwrap(), ["one", "two\none", "two"], "{end}");
    }
    assert_eq!(read(&[folder.path().to_owned()]).unwrap().len(), 12);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(b"{\"body\": \"b\", \"text\": \"t\"}\n").unwrap();
    let path = folder.path().join("a.JSONL.GZ");
    std::fs::write(&path, gzip.finish().unwrap()).unwrap();
    let of = |field| {
        Documents::new(files(std::slice::from_ref(&path), field).unwrap()).collect::<Result<Vec<_>, _>>()
    };
    assert_eq!((of(None).unwrap(), of(Some("body")).unwrap()), (vec!["t".into()], vec!["b".into()]));
    let hash = |field| fingerprint(&files(std::slice::from_ref(&path), field).unwrap()).unwrap();
    assert!(hash(None) == hash(Some("text")) && hash(None) != hash(Some("body")));
}

#[test]
fn damaged_compressed_data_is_an_error_that_names_the_file_wherever_it_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    for (end, bytes) in compressed() {
        let path = folder.path().join(format!("a.txt.{end}"));
        let name = Compression::of(&path).0.name().unwrap();
        for length in 1..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let error = read(std::slice::from_ref(&path)).expect_err(end).to_string();
            assert!(error.contains(&format!("a.txt.{end}: the {name} data is ")), "{length}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x5a;
            std::fs::write(&path, changed).unwrap();
            // Bytes that mean nothing (a time, a level) may change; what is read is never another text.
            if let Ok(found) = read(std::slice::from_ref(&path)) {
                assert_eq!(found, ["one", "two"], "{end}, byte {at}");
            }
        }
    }
}

#[test]
fn a_missing_json_field_is_told_with_those_that_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    let error = |line: &str| {
        std::fs::write(&path, format!("{{\"text\": \"fine\"}}\n{line}\n")).unwrap();
        read(std::slice::from_ref(&path)).unwrap_err().to_string()
    };
    for (line, expected) in [
        ("{\"body\": {\"text\": \"x\"}, \"id\": 3}", "its fields are `body`, `id`; choose one by text_field"),
        ("{}", "it has no fields"),
        ("{\"text\": 3}", "line 2 is not a JSON object with a string `text`"),
        ("{\"text\": \"a\", \"text\": \"b\"}", "twice"),
        ("[\"text\"]", "an object with a string `text`"),
        ("{\"text\": \"a\"} x", "trailing"),
        ("{\"text\": \"a", "line 2"),
    ] {
        let found = error(line);
        assert!(found.contains(expected) && found.contains("a.jsonl"), "{line}: {found}");
    }
}

#[test]
fn text_without_separators_is_cut_at_a_line_and_longer_lines_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    let line = format!("{}\n", "x".repeat((1 << 20) - 1));
    std::fs::write(&path, line.repeat(40)).unwrap();
    let found = read(std::slice::from_ref(&path)).unwrap();
    let lengths: Vec<usize> = found.iter().map(String::len).collect();
    assert_eq!(lengths, [LONGEST - 1, LONGEST - 1, LONGEST / 2 - 1]);
    std::fs::write(&path, "x".repeat(LONGEST + 1)).unwrap();
    let error = read(&[path]).unwrap_err().to_string();
    assert!(error.contains("line 1 is longer than 16 MiB"), "{error}");
}

/// A Parquet file of columns `id`, `text` (some values absent) and `tags` (a list), in groups of `rows` rows.
fn write_parquet(path: &Path, codec: Codec, groups: usize, rows: usize) {
    let schema = "message m { required int64 id; optional binary text (UTF8); repeated binary tags (UTF8); \
                  required group inner { required binary body (UTF8); } required binary raw (JSON); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(codec).set_data_page_row_count_limit(50);
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties.build())).unwrap();
    for group in 0..groups {
        let numbers = group * rows..(group + 1) * rows;
        let mut group = writer.next_row_group().unwrap();
        let ids: Vec<i64> = numbers.clone().map(|n| n as i64).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let there = |n: &usize| n % 5 != 3;
        let texts = |word: &str, keep: &dyn Fn(&usize) -> bool| -> Vec<ByteArray> {
            let kept = numbers.clone().filter(|n| keep(n));
            kept.map(|n| ByteArray::from(format!(" {word} {n}\n").into_bytes())).collect()
        };
        let levels: Vec<i16> = numbers.clone().map(|n| i16::from(there(&n))).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts("text", &there), Some(&levels), None).unwrap();
        column.close().unwrap();
        let (none, zero) = (vec![0; rows], vec![0; rows]);
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[], Some(&none), Some(&zero)).unwrap();
        column.close().unwrap();
        for word in ["body", "raw"] {
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&texts(word, &|_| true), None, None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn parquet_documents(path: &Path, field: Option<&str>) -> Result<Vec<String>, TrainError> {
    Documents::new(files(&[path.to_owned()], field)?).collect()
}

#[test]
fn a_parquet_column_gives_its_texts_in_order_whatever_it_is_compressed_with() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let expected: Vec<String> = (0..390).filter(|n| n % 5 != 3).map(|n| format!("text {n}")).collect();
    let zstd = Codec::ZSTD(Default::default());
    let gzip = Codec::GZIP(Default::default());
    for codec in [Codec::UNCOMPRESSED, Codec::SNAPPY, gzip, zstd, Codec::LZ4_RAW] {
        write_parquet(&path, codec, 3, 130);
        assert_eq!(parquet_documents(&path, None).unwrap(), expected, "{codec}");
        assert_eq!(parquet_documents(&path, Some("inner.body")).unwrap()[389], "body 389");
    }
    assert_eq!(read(&[folder.path().to_owned()]).unwrap(), expected);
    write_parquet(&path, Codec::SNAPPY, 0, 0);
    assert_eq!(parquet_documents(&path, None).unwrap(), [""; 0]);
}

#[test]
fn a_parquet_column_that_is_none_or_no_text_is_told_with_those_that_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    write_parquet(&path, Codec::SNAPPY, 1, 3);
    for (field, expected) in [
        (
            "txt",
            "no column `txt`; its columns are `id` (int64), `text` (text), `tags` (a list), `inner.body` (text)",
        ),
        ("id", "column `id` is int64, not text; its text columns: `text`, `inner.body`"),
        ("tags", "column `tags` is a list, not text"),
        ("raw", "column `raw` is byte_array as json, not text"),
        ("inner", "no column `inner`"),
    ] {
        let error = parquet_documents(&path, Some(field)).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("a.parquet"), "{error}");
    }
    let packed = folder.path().join("a.parquet.gz");
    std::fs::write(&packed, "x").unwrap();
    assert!(parquet_documents(&packed, None).unwrap_err().to_string().contains("unpack it"));
}

#[test]
fn damaged_parquet_files_are_errors_and_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    write_parquet(&path, Codec::SNAPPY, 2, 20);
    let bytes = std::fs::read(&path).unwrap();
    for length in (0..bytes.len()).step_by(7) {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let error = parquet_documents(&path, None).unwrap_err().to_string();
        assert!(error.contains("a.parquet: not a usable Parquet file") && !error.contains('\n'), "{error}");
    }
    let whole = {
        std::fs::write(&path, &bytes).unwrap();
        parquet_documents(&path, None).unwrap().len()
    };
    let mut refused = 0;
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] = changed[at].wrapping_add(0x91);
        std::fs::write(&path, changed).unwrap();
        match parquet_documents(&path, None) {
            Ok(found) => assert!(found.len() <= whole, "byte {at}"),
            Err(error) => {
                assert!(error.to_string().contains("a.parquet"), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > bytes.len() / 10, "{refused} of {} changes were seen", bytes.len());
}

#[test]
fn a_file_of_pyarrow_gives_the_texts_that_were_put_into_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/parquet/stories.parquet");
    let texts = ["Once upon a time.", "Zwölf Äpfel — 🍎", "Once upon a time.", "two\nlines", "last"];
    assert_eq!(parquet_documents(&path, None).unwrap(), texts);
    let stories: Vec<String> = (0..7).map(|n| format!("story {n}")).collect();
    assert_eq!(parquet_documents(&path, Some("story")).unwrap(), stories);
    assert_eq!(parquet_documents(&path, Some("kind")).unwrap(), ["x", "y", "x", "y", "x", "y", "x"]);
    let error = parquet_documents(&path, Some("tags")).unwrap_err().to_string();
    let expected =
        "`id` (int64), `text` (text), `score` (double), `story` (text), `tags.list.element` (a list)";
    assert!(error.contains(expected), "{error}");
}

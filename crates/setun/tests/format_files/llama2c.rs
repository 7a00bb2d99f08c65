//! llama2.c checkpoints, float and ternary, made here byte by byte.

use setun::format::{CheckpointKind, Llama2cKind};

use super::{assert_refused, open};

const DIM: usize = 8;
const HIDDEN: usize = 4;
const LAYERS: usize = 2;
const VOCAB: usize = 3;
const SEQ: usize = 5;

/// A legacy file whose floats count up from 0: heads of 4, two query heads, one key head.
pub fn legacy(tied: bool) -> Vec<u8> {
    let vocab = if tied { VOCAB as i32 } else { -(VOCAB as i32) };
    let header = [DIM as i32, HIDDEN as i32, LAYERS as i32, 2, 1, vocab, SEQ as i32];
    let layer = DIM + DIM * DIM + 2 * 4 * DIM + DIM * DIM + DIM + 3 * HIDDEN * DIM;
    let head = if tied { 0 } else { VOCAB * DIM };
    let floats = VOCAB * DIM + LAYERS * layer + DIM + SEQ * 4 + head;
    let mut bytes: Vec<u8> = header.iter().flat_map(|i| i.to_le_bytes()).collect();
    bytes.extend((0..floats).flat_map(|i| (i as f32).to_le_bytes()));
    bytes
}

/// The ternary twin: every linear has scale 0.5 and codes that repeat +1, 0, −1, −1.
pub fn ternary() -> Vec<u8> {
    let mut bytes = 0x616b_3432u32.to_le_bytes().to_vec();
    let header = [1, DIM as i32, HIDDEN as i32, LAYERS as i32, 2, 1, VOCAB as i32, SEQ as i32];
    bytes.extend(header.iter().flat_map(|i: &i32| i.to_le_bytes()));
    bytes.push(1);
    bytes.resize(256, 0);
    bytes.extend((0..DIM + VOCAB * DIM).flat_map(|i| (i as f32).to_le_bytes()));
    for elements in [DIM * DIM, 4 * DIM, 4 * DIM, DIM * DIM, HIDDEN * DIM, DIM * HIDDEN, HIDDEN * DIM] {
        for _ in 0..LAYERS {
            bytes.extend(0.5f32.to_le_bytes());
            bytes.resize(bytes.len() + elements / 4, 0b01_00_11_11);
        }
    }
    bytes
}

#[test]
fn legacy_floats_get_their_names_and_half_split_rows() {
    for tied in [true, false] {
        let file = open(&legacy(tied)).unwrap();
        assert_eq!(file.kind(), CheckpointKind::Llama2c);
        let facts = file.llama2c().unwrap();
        assert_eq!((facts.kind, facts.tied, facts.vocab), (Llama2cKind::Float, tied, VOCAB));
        assert_eq!((facts.heads, facts.kv_heads, facts.hidden_dim), (2, 1, HIDDEN));
        assert_eq!(file.info("lm_head.weight").is_some(), !tied);
        assert_eq!(file.tensors().len(), 2 + 9 * LAYERS + usize::from(!tied));
        // Embeddings, then both layers' norms, then the queries: floats count up from there.
        let q = file.tensor("model.layers.1.self_attn.q_proj.weight").unwrap();
        let first = VOCAB * DIM + LAYERS * DIM + DIM * DIM;
        let q = q.to_f32().unwrap();
        let starts: Vec<usize> = q.chunks(DIM).map(|row| (row[0] as usize - first) / DIM).collect();
        assert_eq!(starts, [0, 2, 1, 3, 4, 6, 5, 7]);
        let v = file.tensor("model.layers.0.self_attn.v_proj.weight").unwrap().to_f32().unwrap();
        assert!(v.windows(2).all(|w| w[1] == w[0] + 1.0));
    }
}

#[test]
fn ternary_weights_become_canonical_with_their_scale() {
    let file = open(&ternary()).unwrap();
    assert_eq!(file.llama2c().unwrap().kind, Llama2cKind::Ternary);
    let down = file.tensor("model.layers.1.mlp.down_proj.weight").unwrap();
    assert_eq!(down.shape(), [DIM, HIDDEN]);
    let matrix = down.to_ternary().unwrap();
    let mut row = [0i8; HIDDEN];
    matrix.row_trits(3, &mut row);
    assert_eq!(row, [1, 0, -1, -1]);
    assert_eq!(down.to_f32().unwrap()[..4], [0.5, 0.0, -0.5, -0.5]);
}

#[test]
fn ternary_query_rows_become_half_split() {
    let mut bytes = ternary();
    let q = 256 + 4 * (DIM + VOCAB * DIM) + 4; // First layer's query codes, two bytes a row.
    for row in 0..DIM {
        bytes[q + 2 * row..][..2].fill([0b00_00_00_00, 0b01_01_01_01, 0b11_11_11_11, 0b00_01_00_01][row % 4]);
    }
    let file = open(&bytes).unwrap();
    let q = file.tensor("model.layers.0.self_attn.q_proj.weight").unwrap().to_ternary().unwrap();
    let firsts: Vec<i8> = (0..DIM).map(|r| q.trit(r, 1)).collect();
    assert_eq!(firsts, [0, -1, 1, 1, 0, -1, 1, 1]);
}

#[test]
fn a_code_that_is_no_trit_is_counted_when_the_tensor_is_read() {
    let mut bytes = ternary();
    let last = bytes.len() - 1;
    bytes[last] = 0b10_10_00_00;
    let error = open(&bytes).unwrap().tensor("model.layers.1.mlp.up_proj.weight").unwrap_err();
    let error = error.to_string();
    assert!(error.contains("up_proj") && error.contains("2 of 32 codes are 10"), "{error}");
}

#[test]
fn a_file_of_another_length_version_or_shape_is_refused() {
    for bytes in [legacy(true), ternary()] {
        let size = bytes.len();
        assert_refused(&bytes[..size - 1], &["asks for", &size.to_string(), &(size - 1).to_string()]);
        let longer = [&bytes[..], &[0]].concat();
        assert_refused(&longer, &["asks for", &size.to_string()]);
    }
    let mut other = ternary();
    other[4] = 2;
    assert_refused(&other, &["version 2"]);
    let mut odd = ternary();
    odd[20] = 3; // Three heads do not divide eight columns.
    assert_refused(&odd, &["do not fit together"]);
    let mut untied = ternary();
    untied[36] = 0;
    assert_refused(&untied, &["own output head"]);
    let mut absurd = legacy(true);
    absurd[8..12].copy_from_slice(&i32::MAX.to_le_bytes());
    assert_refused(&absurd, &["not a model file"]);
}

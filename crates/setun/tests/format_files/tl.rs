//! TL1 and TL2: golden/gguf-blocks, whole files made here, and tiles that cannot be.

use setun::error::ModelError;
use setun::format::{Checkpoint, Encoding, OpenOptions, TlTiles};
use setun_kernels::matrix::Scales;

use super::gguf::Builder;
use super::golden;

fn tiles([rows, cols, bm, bk, bmm]: [usize; 5]) -> TlTiles {
    TlTiles { rows, cols, bm, bk, bmm }
}

/// A file of one matrix `w` and its scale, 0.5, behind it.
fn file(id: u32, [rows, cols]: [usize; 2], codes: &[u8], scale_name: &str) -> Vec<u8> {
    let at = codes.len().next_multiple_of(32);
    let builder = Builder::new(3, 2, 0).tensor("w", &[cols as u64, rows as u64], id, 0);
    let mut bytes = builder.tensor(scale_name, &[1], 0, at as u64).data(32, 0);
    let start = bytes.len();
    bytes.extend(codes);
    bytes.resize(start + at, 0);
    bytes.extend(0.5f32.to_le_bytes());
    bytes
}

fn open(bytes: Vec<u8>, tl_tiles: &[TlTiles]) -> Result<Checkpoint, ModelError> {
    let options = OpenOptions { tl_tiles: tl_tiles.to_vec(), ..OpenOptions::default() };
    Checkpoint::from_bytes_with("test", Vec::leak(bytes), options)
}

/// The trits of `w`, whose scale must be 0.5.
fn trits(file: &Checkpoint) -> Result<Vec<i8>, ModelError> {
    let matrix = file.tensor("w")?.to_ternary()?;
    assert_eq!(matrix.scales(), &Scales::Tensor(0.5));
    let mut row = vec![0.0; matrix.cols()];
    let rows = (0..matrix.rows()).flat_map(|r| {
        matrix.dequantize_row(r, &mut row);
        row.iter().map(|v| (v * 2.0) as i8).collect::<Vec<_>>()
    });
    Ok(rows.collect())
}

#[test]
fn the_reference_codes_are_read_bit_for_bit() {
    let fixture = Checkpoint::open(golden("gguf-blocks/blocks.safetensors")).unwrap();
    for (id, name, t) in [
        (38, "TL1.128x256", [128, 256, 128, 64, 32]),
        (38, "TL1.320x256", [320, 256, 320, 128, 64]),
        (39, "TL2.128x384", [128, 384, 128, 96, 32]),
        (39, "TL2.160x416", [160, 416, 160, 96, 32]),
    ] {
        let codes = fixture.tensor(&format!("{name}.bytes")).unwrap().data.into_owned();
        let expected = fixture.tensor(&format!("{name}.ternary")).unwrap().data.into_owned();
        let read = open(file(id, [t[0], t[1]], &codes, "w_scale"), &[tiles(t)]).unwrap();
        let evidence = &read.evidence()[0];
        assert!(evidence.contains("in tiles as the option `tl_tiles` says"), "{evidence}");
        assert_eq!(read.info("w").unwrap().encoding, Encoding::Trit2);
        let trits: Vec<u8> = trits(&read).unwrap().into_iter().map(|t| t as u8).collect();
        assert!(trits == expected, "{name}");
    }
}

/// Weights with all patterns in no order.
fn weights(count: usize) -> Vec<i8> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as i8 % 3
    };
    (0..count).map(next).map(|w: i8| w.signum() * i8::from(w != 0)).collect()
}

/// The place of `(row, col)` in nested tiles, from its digits: each of `axes` is `(of a row, size, step)`, the
/// outermost first.
fn place(row: usize, col: usize, axes: &[(bool, usize, usize)]) -> usize {
    axes.iter()
        .fold(0, |at, &(of_row, size, step)| at * size + (if of_row { row } else { col }) / step % size)
}

fn pair(w: &[i8]) -> u8 {
    (3 * w[0] + w[1] + 4) as u8
}

fn encode_tl1(w: &[i8], t: TlTiles) -> Vec<u8> {
    let by = 256 / t.bmm;
    let axes = [
        (true, t.rows / t.bm, t.bm),
        (false, t.cols / t.bk, t.bk),
        (true, t.bm / t.bmm, t.bmm),
        (false, t.bk / by, by),
        (true, t.bmm / 16, 16),
        (false, by / 4, 4),
        (true, 16, 1),
    ];
    let mut out = vec![0; w.len() / 4];
    for (i, four) in w.chunks(4).enumerate() {
        out[place(i * 4 / t.cols, i * 4 % t.cols, &axes)] = pair(four) << 4 | pair(&four[2..]);
    }
    out
}

fn encode_tl2(w: &[i8], t: TlTiles) -> Vec<u8> {
    let cols = t.cols / t.bk * t.bk;
    let (indices, signs) = (t.rows * cols / 6, t.rows * cols / 24);
    let mut out = vec![0; (t.cols - 256) * t.rows / 3 * 5 / 8 + 64 * t.rows];
    let tile = |step| {
        [
            (true, t.rows / t.bm, t.bm),
            (false, cols / t.bk, t.bk),
            (true, t.bm / 32, 32),
            (false, t.bk / step, step),
        ]
    };
    // Halves of sixteen rows and halves of those, the two digits exchanged.
    let swapped = [(true, 2, 8), (true, 2, 16), (true, 8, 1)];
    for row in 0..t.rows {
        for col in (0..cols).step_by(3) {
            let of = &w[row * t.cols + col..];
            let v = 9 * of[0] + 3 * of[1] + of[2];
            let at = place(row, col, &[&tile(6)[..], &swapped].concat());
            out[at] |= v.unsigned_abs() << if col % 6 == 0 { 4 } else { 0 };
            let bits = [(true, 16, 1), (false, 8, 3), (true, 2, 16)];
            let bit = place(row, col, &[&tile(24)[..], &bits].concat());
            // Little-endian words, from their highest bit.
            out[indices + ((bit / 8) ^ 1)] |= u8::from(v < 0) << (7 - bit % 8);
        }
        for col in (cols..t.cols).step_by(4) {
            let of = &w[row * t.cols + col..];
            let axes = [&[(true, t.rows / 32, 32), (false, 8, 4)][..], &swapped].concat();
            out[indices + signs + place(row, col - cols, &axes)] = pair(of) << 4 | pair(&of[2..]);
        }
    }
    out
}

#[test]
fn whole_files_in_other_tiles_are_read() {
    for (id, t) in [
        (38, [128, 128, 64, 32, 32]),
        (38, [96, 64, 48, 32, 16]),
        (38, [256, 48, 128, 8, 64]),
        (39, [128, 384, 64, 48, 32]),
        (39, [192, 320, 96, 96, 32]),
        (39, [64, 272, 32, 24, 32]),
    ] {
        let t = tiles(t);
        let w = weights(t.rows * t.cols);
        let codes = if id == 38 { encode_tl1(&w, t) } else { encode_tl2(&w, t) };
        let read = open(file(id, [t.rows, t.cols], &codes, "w_scale"), &[tiles([1, 2, 3, 4, 5]), t]);
        if t.cols == 272 {
            // 272 is 11 · 24 + 8: what is left is not 32.
            assert!(read.unwrap_err().to_string().contains("24 must divide BK"));
            continue;
        }
        assert!(trits(&read.unwrap()).unwrap() == w, "{t:?}");
    }
}

#[test]
fn what_is_not_certain_is_refused_by_name() {
    let t = tiles([128, 256, 64, 32, 32]);
    let w = weights(128 * 256);
    let (codes, shape) = (encode_tl1(&w, t), [128, 256]);
    let refused = |bytes: Vec<u8>, given: &[TlTiles], parts: &[&str]| {
        let error = open(bytes, given).and_then(|f| trits(&f)).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{parts:?}: {error}");
    };
    let whole = || file(38, shape, &codes, "w_scale");
    refused(whole(), &[], &["`w`", "TL1", "the option `tl_tiles` must"]);
    refused(whole(), &[tiles([128, 128, 64, 32, 32])], &["`w`", "TL1", "the option `tl_tiles` must"]);
    refused(whole(), &[t, tiles([128, 256, 128, 32, 32])], &["`w`", "several tiles"]);
    refused(file(38, shape, &codes, "v_scale"), &[t], &["`w`", "no scale", "`w_scale`"]);
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let mut bytes = whole();
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&scale.to_le_bytes());
        refused(bytes, &[t], &["`w`", "one positive F32"]);
    }
    // Room for a scale behind the codes, codes cut short, and a file cut short.
    refused(
        file(38, shape, &[&codes[..], &[0; 32]].concat(), "w_scale"),
        &[t],
        &["`w`", "8224 bytes", "8192"],
    );
    refused(file(38, shape, &codes[..8000], "w_scale"), &[t], &["`w`", "needs 8192 bytes", "cut short"]);
    let cut = whole();
    refused(cut[..cut.len() - 100].to_vec(), &[t], &["`w`"]);
    // Codes without a meaning, in every part.
    let damaged = |id, shape, codes: &[u8], at: usize, byte, t| {
        let mut codes = codes.to_vec();
        codes[at] = byte;
        refused(file(id, shape, &codes, "w_scale"), &[t], &["`w`", "damaged or its tiles are others"]);
    };
    damaged(38, shape, &codes, 77, 0x94, t);
    let (t, zeros) = (tiles([64, 320, 64, 96, 32]), [0; 64 * 320]);
    let codes = encode_tl2(&zeros, t);
    let (indices, signs) = (64 * 288 / 6, 64 * 288 / 24);
    damaged(39, [64, 320], &codes, 5, 0x0e, t);
    damaged(39, [64, 320], &codes, indices + 5, 1, t);
    damaged(39, [64, 320], &codes, indices + signs + 5, 0x49, t);
}

#[test]
fn hostile_tiles_are_refused() {
    let numbers = [0, 1, 24, 31, 32, 96, 1 << 20, usize::MAX - 31, usize::MAX];
    for (id, shape) in [(38, [64, 256]), (39, [64, 320])] {
        let codes = vec![0x44; if id == 38 { 4096 } else { 4949 }];
        for bm in numbers {
            for bk in numbers {
                for bmm in numbers {
                    let t = tiles([shape[0], shape[1], bm, bk, bmm]);
                    if let Err(error) = open(file(id, shape, &codes, "w_scale"), &[t]).and_then(|f| trits(&f))
                    {
                        let error = error.to_string();
                        let known = ["`tl_tiles` must give others", "damaged or its tiles are others"];
                        assert!(known.iter().any(|part| error.contains(part)), "{error}");
                    }
                }
            }
        }
        // Shapes whose products are at the edge of what can be counted.
        for dims in [[1 << 40, 1 << 22], [32, 1 << 57], [1 << 57, 32], [96, (1 << 56) + 32]] {
            let t = tiles([dims[1], dims[0], 32, 32, 32]);
            let dims = dims.map(|d| d as u64);
            let bytes = Builder::new(3, 1, 0).tensor("w", &dims, id, 0).data(32, 64);
            assert!(open(bytes, &[t]).is_err());
        }
    }
}

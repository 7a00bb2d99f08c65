//! Many tokens by looking sums up instead of multiplying, after Vec-LUT (<https://arxiv.org/abs/2512.06443>).
//!
//! Four columns of ternary weights have 81 possible sums. For 16 or 32 tokens at once these are 81 vectors,
//! built once for all rows; then every row adds the vector that its byte of four codes selects, in place of
//! 64 multiply-adds for each 16-bit addition. A byte of a tile holds columns `b`, `4 + b`, `8 + b` and
//! `12 + b`, so it is the index as it stands, and nothing has to be unpacked.
//!
//! Entries are sums of weights, not codes: at most 4 · 128 = 512 in size, so that [`SPAN_TILES`] tiles of four
//! of them stay within 28 672, and are then widened to 32 bits.

use core::arch::x86_64::*;
use core::ops::Range;

use super::columns::Span;
use super::job::{Job, Out, with_scratch};
use super::{BlockScales, Factor, PackedMatrix, TILE_COLS, TileKernels, tile_kernels, widen};
use crate::kernels::Products;
use crate::matrix::Scales;
use crate::quant::Activations;

/// Tokens of a vector of 16-bit sums.
const LANES: usize = 16;
/// Tiles that are looked up before sums go back to memory. Two have tables of 41 KiB, which fit the 48 KiB of newer
/// first-level caches. Where only 32 are left, most lookups still find them there: on 48 KiB, three tiles are 5 %
/// slower than two, and 8 % faster than one.
const PASS_TILES: usize = 2;
/// Most tokens of a block: two vectors fill a cache line, and share the work of finding it.
const MAX_TOKENS: usize = 2 * LANES;
/// Rows of a panel.
const ROWS: usize = 32;
const TILE_BYTES: usize = ROWS * 4;
/// Panels that share the tables of a chunk: building costs as much as looking up for about a hundred rows,
/// and the sums of all rows of a chunk stay in the second-level cache.
const CHUNK_PANELS: usize = 64;
/// Fewest panels that tables are built for.
const LEAST_PANELS: usize = 8;
/// Tiles whose sums fit in 16 bits, in whole passes.
const SPAN_TILES: usize = 14;
/// Entries from one table to the next. Codes of 3 never occur, so a table uses only 27 of 64 sets of a cache, three
/// times each; the odd 13 spread the tables evenly over all sets.
const TABLE: usize = 256 + 13;

/// The sums of one group of four columns for each byte, four groups after one another.
type Tables<const V: usize> = [[__m256i; V]; 4 * TABLE];
/// 32-bit sums of one row, and the floats they are folded into.
type Wide<const V: usize> = [[__m256i; 2]; V];

/// From how many tokens on looking up is faster than multiplying, with a vector of 16 and then with two: measured,
/// see docs/kernels.md. Fewer are left over to the kernels that multiply.
fn least_tokens(products: Products) -> Option<[usize; 2]> {
    match products {
        Products::AvxVnni => Some([28, 28]),
        Products::Avx2 => Some([11, 27]),
        _ => None,
    }
}

/// Whether any tokens of a product are looked up.
pub(super) fn wanted(matrix: &PackedMatrix, acts: &Activations) -> bool {
    let least = least_tokens(matrix.kernels.products);
    matrix.rows >= LEAST_PANELS * ROWS && least.is_some_and(|[one, _]| acts.tokens() >= one)
}

/// How a product is cut up: a block of tokens with a part of the panels, block after block.
pub(super) struct Cut {
    tokens: usize,
    /// Blocks of two vectors; perhaps one of one vector; and what is left over.
    wide: usize,
    narrow: usize,
    blocks: usize,
    panels: usize,
    parts: usize,
}

impl Cut {
    pub(super) fn new(matrix: &PackedMatrix, tokens: usize, threads: usize) -> Self {
        let [one, two] = least_tokens(matrix.kernels.products).unwrap_or([usize::MAX; 2]);
        let rest = tokens % MAX_TOKENS;
        let wide = tokens / MAX_TOKENS + usize::from(rest >= two);
        let narrow = usize::from(rest >= one && rest < two);
        let left_over = tokens > wide * MAX_TOKENS + narrow * LANES;
        let blocks = wide + narrow + usize::from(left_over);
        let panels = matrix.rows.div_ceil(ROWS);
        let busy = if threads == 1 { 1 } else { (threads * 2).div_ceil(blocks) };
        let parts = panels.div_ceil(CHUNK_PANELS).max(busy.min(panels / LEAST_PANELS));
        Self { tokens, wide, narrow, blocks, panels, parts }
    }

    pub(super) fn chunks(&self) -> usize {
        self.blocks * self.parts
    }

    fn block(&self, block: usize) -> Range<usize> {
        let start = |b: usize| b.min(self.wide) * MAX_TOKENS + b.saturating_sub(self.wide) * LANES;
        let end = if block < self.wide + self.narrow { start(block + 1) } else { self.tokens };
        start(block)..end.min(self.tokens)
    }

    fn panels(&self, part: usize) -> Range<usize> {
        self.panels * part / self.parts..self.panels * (part + 1) / self.parts
    }
}

/// Chunk `chunk` of [`Cut::chunks`].
pub(super) fn run_chunk(job: &Job, cut: &Cut, chunk: usize) {
    let panels = cut.panels(chunk / cut.blocks);
    let block = chunk % cut.blocks;
    let tokens = cut.block(block);
    // SAFETY (both): only kernel sets with AVX2 and FMA come here, and they exist only where those do.
    if block < cut.wide {
        unsafe { run_block::<2>(job, panels, tokens) };
    } else if block < cut.wide + cut.narrow {
        unsafe { run_block::<1>(job, panels, tokens) };
    } else {
        let k = tile_kernels(job.matrix.kernels.products).expect("tables are looked up for tiles");
        panels.for_each(|panel| job.run_panel(k, panel, tokens.clone()));
    }
}

/// Splits the first `len` elements off `bytes`.
fn take<'a, T>(bytes: &mut &'a mut [u8], len: usize) -> &'a mut [T] {
    let (head, tail) = core::mem::take(bytes).split_at_mut(len * size_of::<T>());
    *bytes = tail;
    // SAFETY: called for vectors of integers alone, for which any bytes will do.
    let (before, vectors, _) = unsafe { head.align_to_mut() };
    assert!(before.is_empty() && vectors.len() == len, "scratch memory is aligned for vectors");
    vectors
}

#[target_feature(enable = "avx2,fma")]
fn run_block<const V: usize>(job: &Job, panels: Range<usize>, tokens: Range<usize>) {
    let rows = panels.len() * ROWS;
    let bytes =
        PASS_TILES * size_of::<Tables<V>>() + rows * (size_of::<[__m256i; V]>() + 2 * size_of::<Wide<V>>());
    with_scratch(bytes, |mut bytes| {
        let (tables, sums) = (take(&mut bytes, PASS_TILES), take(&mut bytes, rows));
        let (total, folded) = (take(&mut bytes, rows), take(&mut bytes, rows));
        Block::<V> { job, panels, tokens, tables, sums, total, folded }.run();
    });
}

/// A block of tokens with some panels, and the memory to work in.
struct Block<'a, const V: usize> {
    job: &'a Job<'a>,
    panels: Range<usize>,
    tokens: Range<usize>,
    /// Of each tile of a pass.
    tables: &'a mut [Tables<V>],
    /// 16-bit sums of each row.
    sums: &'a mut [[__m256i; V]],
    /// The same in 32 bits.
    total: &'a mut [Wide<V>],
    /// With scale blocks, floats.
    folded: &'a mut [Wide<V>],
}

impl<const V: usize> Block<'_, V> {
    #[target_feature(enable = "avx2,fma")]
    fn run(mut self) {
        let (job, m) = (self.job, self.job.matrix);
        let mut rows: [&[[i8; TILE_COLS]]; MAX_TOKENS] = [&[]; MAX_TOKENS];
        for (row, t) in rows.iter_mut().zip(self.tokens.clone()) {
            *row = job.act_row(t).as_chunks().0;
        }
        let zero = [[_mm256_setzero_si256(); 2]; V];
        self.sums.fill([_mm256_setzero_si256(); V]);
        self.total.fill(zero);
        self.folded.fill(zero);
        let whole = Span { first: 0, count: m.columns.tiles() };
        let spans = if job.by_block() { &m.spans } else { &[whole][..] };
        for (b, span) in spans.iter().enumerate() {
            let mut tiles = span.first..span.first + span.count;
            while !tiles.is_empty() {
                let end = tiles.end.min(tiles.start + SPAN_TILES);
                let folded = job.by_block() && end == tiles.end;
                for first in (tiles.start..end).step_by(PASS_TILES) {
                    let pass = first..end.min(first + PASS_TILES);
                    for (tile, tables) in pass.clone().zip(self.tables.iter_mut()) {
                        build(&activations(&rows, tile), tables);
                    }
                    // The last pass widens the sums, unless they are to be folded.
                    match (pass.len() == PASS_TILES, pass.end == end && !folded) {
                        (true, false) => self.look_up::<PASS_TILES, false>(first),
                        (true, true) => self.look_up::<PASS_TILES, true>(first),
                        (false, false) => self.look_up::<1, false>(first),
                        (false, true) => self.look_up::<1, true>(first),
                    }
                }
                if folded {
                    self.fold(b, span.count);
                }
                tiles.start = end;
            }
        }
        self.finish();
    }

    /// Adds the products of `P` tiles to the sums of every row and, to `WIDEN`, moves those on to 32 bits.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up<const P: usize, const WIDEN: bool>(&mut self, tile: usize) {
        let m = self.job.matrix;
        let panel_bytes = m.columns.tiles() * TILE_BYTES;
        let tables: &[Tables<V>; P] = self.tables.first_chunk().expect("tables of every tile");
        let (sums, total) = (self.sums.as_chunks_mut::<ROWS>().0, self.total.as_chunks_mut::<ROWS>().0);
        for ((panel, sums), total) in self.panels.clone().zip(sums).zip(total) {
            let codes = &m.bytes[panel * panel_bytes + tile * TILE_BYTES..][..P * TILE_BYTES];
            for line in (0..P * TILE_BYTES).step_by(64) {
                // The tiles after these are needed when all panels are done, the next panel's at once. Prefetching
                // never faults, wherever the address points.
                let next = codes.as_ptr().wrapping_add(line);
                _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(P * TILE_BYTES).cast());
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(panel_bytes).cast());
            }
            let codes = codes.as_chunks::<4>().0.as_chunks::<ROWS>().0;
            let codes: &[_; P] = codes.first_chunk().expect("codes of every tile");
            for (row, (sums, total)) in sums.iter_mut().zip(total).enumerate() {
                let mut acc = *sums;
                for (tables, codes) in tables.iter().zip(codes) {
                    // One load for four indices.
                    let word = u32::from_le_bytes(codes[row]);
                    for group in 0..4 {
                        let entry = &tables[group * TABLE + (word >> (8 * group)) as usize % 256];
                        for v in 0..V {
                            acc[v] = _mm256_add_epi16(acc[v], entry[v]);
                        }
                    }
                }
                if WIDEN {
                    for v in 0..V {
                        let [low, high] = halves(acc[v]);
                        total[v] = [_mm256_add_epi32(total[v][0], low), _mm256_add_epi32(total[v][1], high)];
                        acc[v] = _mm256_setzero_si256();
                    }
                }
                *sums = acc;
            }
        }
    }

    /// Folds all sums of scale block `b`, of so many tiles, into the floats and starts from zero.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn fold(&mut self, b: usize, tiles: usize) {
        let m = self.job.matrix;
        let blocks = m.columns.blocks();
        // Sums of a block that fits in 16 bits were never moved.
        let moved = tiles > SPAN_TILES;
        for (i, panel) in self.panels.clone().enumerate() {
            let mut scales = [0.0; ROWS];
            match m.block_scales.rows((panel * blocks + b) * ROWS, ROWS) {
                BlockScales::F32(from) => scales.copy_from_slice(from),
                BlockScales::F16(from) => {
                    scales.iter_mut().zip(from).for_each(|(to, &half)| *to = widen(half));
                }
            }
            for (row, scale) in scales.into_iter().enumerate() {
                let row = i * ROWS + row;
                let (sums, total, folded) =
                    (&mut self.sums[row], &mut self.total[row], &mut self.folded[row]);
                let scale = _mm256_set1_ps(scale);
                for v in 0..V {
                    let parts = halves(sums[v]);
                    for (h, mut part) in parts.into_iter().enumerate() {
                        if moved {
                            part = _mm256_add_epi32(part, total[v][h]);
                            total[v][h] = _mm256_setzero_si256();
                        }
                        let y = _mm256_castsi256_ps(folded[v][h]);
                        let y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), scale, y);
                        folded[v][h] = _mm256_castps_si256(y);
                    }
                    sums[v] = _mm256_setzero_si256();
                }
            }
        }
    }

    /// Writes the outputs: eight tokens of a panel at a time, turned so that rows are neighbours.
    #[target_feature(enable = "avx2,fma")]
    fn finish(&self) {
        let (job, m) = (self.job, self.job.matrix);
        let k = tile_kernels(m.kernels.products).expect("tables are looked up for tiles");
        let source = if job.by_block() { &*self.folded } else { &*self.total };
        for (panel, rows) in self.panels.clone().zip(source.as_chunks::<ROWS>().0) {
            let first = panel * ROWS;
            let valid = ROWS.min(m.rows - first);
            for (eight, start) in self.tokens.clone().step_by(8).enumerate() {
                let mut turned = [[0; ROWS]; 8];
                for (i, rows) in rows.as_chunks::<8>().0.iter().enumerate() {
                    let mut square = [_mm256_setzero_si256(); 8];
                    for (to, row) in square.iter_mut().zip(rows) {
                        *to = row[eight / 2][eight % 2];
                    }
                    for (token, vector) in turned.iter_mut().zip(transpose_words(square)) {
                        let to = &mut token.as_chunks_mut::<8>().0[i];
                        // SAFETY: eight lanes of room.
                        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), vector) };
                    }
                }
                for (t, sums) in (start..self.tokens.end).zip(&turned) {
                    // SAFETY: these rows of token `t` belong to this chunk alone.
                    unsafe { write(job, k, t, first, &sums[..valid]) };
                }
            }
        }
    }
}

/// Finishes rows `first..` of token `t`: `sums` are integers or, with scale blocks, the bits of floats.
///
/// # Safety
/// Nobody else touches those outputs, and the CPU has the instructions of `k`.
unsafe fn write(job: &Job, k: &TileKernels, t: usize, first: usize, sums: &[i32]) {
    let (m, at) = (job.matrix, t * job.matrix.rows + first);
    let inverse = job.acts.inverse(t);
    let out = match job.out {
        Out::I32(out) => {
            // SAFETY: the caller's promise; `sums` ends with the rows of the matrix.
            let out = unsafe { core::slice::from_raw_parts_mut(out.as_ptr().add(at), sums.len()) };
            return out.copy_from_slice(sums);
        }
        // SAFETY: as above.
        Out::F32(out) => unsafe { core::slice::from_raw_parts_mut(out.as_ptr().add(at), sums.len()) },
    };
    let factor = match &m.scales {
        Scales::Tensor(scale) => Factor::Tensor(scale * inverse),
        Scales::Row(scales) => Factor::Row(&scales[first..first + sums.len()], inverse),
        Scales::Block { .. } => {
            for (y, &folded) in out.iter_mut().zip(sums) {
                *y = f32::from_bits(folded as u32) * inverse;
            }
            return;
        }
    };
    // SAFETY: the caller vouches for the instruction set.
    unsafe { (k.finish)(sums, 0, factor, out) };
}

/// Sixteen 16-bit lanes as twice eight of 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(x: __m256i) -> [__m256i; 2] {
    let low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(x));
    [low, _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(x))]
}

/// Activations of a tile: for each column, the tokens as 16-bit lanes. Tokens without a row are zero.
#[inline]
#[target_feature(enable = "avx2")]
fn activations<const V: usize>(
    rows: &[&[[i8; TILE_COLS]]; MAX_TOKENS],
    tile: usize,
) -> [[__m256i; V]; TILE_COLS] {
    let mut columns = [[_mm256_setzero_si256(); V]; TILE_COLS];
    for v in 0..V {
        let mut x = [_mm_setzero_si128(); LANES];
        for (x, row) in x.iter_mut().zip(&rows[v * LANES..]) {
            if let Some(acts) = row.get(tile) {
                // SAFETY: 16 activations.
                *x = unsafe { _mm_loadu_si128(acts.as_ptr().cast()) };
            }
        }
        // Each round turns the eight bits of (row, column) by one; four of them swap the two.
        for _ in 0..4 {
            let mut next = x;
            for i in 0..8 {
                next[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
                next[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
            }
            x = next;
        }
        for (column, x) in columns.iter_mut().zip(x) {
            column[v] = _mm256_cvtepi8_epi16(x);
        }
    }
    columns
}

/// `±a ± b` and all between: entry `i + 3j` is `(i - 1) · a + (j - 1) · b`.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs<const V: usize>(a: [__m256i; V], b: [__m256i; V]) -> [[__m256i; V]; 9] {
    let zero = _mm256_setzero_si256();
    let mut pairs = [[zero; V]; 9];
    for v in 0..V {
        let thrice = |x| [_mm256_sub_epi16(zero, x), zero, x];
        for (j, b) in thrice(b[v]).into_iter().enumerate() {
            for (i, a) in thrice(a[v]).into_iter().enumerate() {
                pairs[i + 3 * j][v] = _mm256_add_epi16(a, b);
            }
        }
    }
    pairs
}

/// Fills the four tables of a tile from its activations.
#[inline]
#[target_feature(enable = "avx2")]
fn build<const V: usize>(acts: &[[__m256i; V]; TILE_COLS], tables: &mut Tables<V>) {
    // Where two codes stand in a byte: one field is worth 4.
    let place = |pair: usize| pair % 3 + pair / 3 * 4;
    for group in 0..4 {
        let table = &mut tables[group * TABLE..][..TABLE];
        let low = pairs(acts[group], acts[4 + group]);
        for (h, high) in pairs(acts[8 + group], acts[12 + group]).iter().enumerate() {
            let table = &mut table[16 * place(h)..][..16];
            for (l, low) in low.iter().enumerate() {
                for v in 0..V {
                    table[place(l)][v] = _mm256_add_epi16(low[v], high[v]);
                }
            }
        }
    }
}

/// Transposes 8 × 8 words.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_words(x: [__m256i; 8]) -> [__m256i; 8] {
    let [a, b, c, d, e, f, g, h] = x;
    let four = |a, b, c, d| {
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (ef, gh) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab, cd),
            _mm256_unpackhi_epi64(ab, cd),
            _mm256_unpacklo_epi64(ef, gh),
            _mm256_unpackhi_epi64(ef, gh),
        ]
    };
    let (top, bottom) = (four(a, b, c, d), four(e, f, g, h));
    let mut turned = x;
    for i in 0..4 {
        turned[i] = _mm256_permute2x128_si256::<0x20>(top[i], bottom[i]);
        turned[i + 4] = _mm256_permute2x128_si256::<0x31>(top[i], bottom[i]);
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;
    use crate::matrix::TernaryMatrix;
    use crate::quant::Activations;
    use crate::ternary::PackedMatrix;
    use crate::threads::Pool;
    use alloc::{vec, vec::Vec};

    const WIDTH: usize = 300;

    fn sets() -> impl Iterator<Item = &'static Kernels> {
        Kernels::available().filter(|k| least_tokens(k.products).is_some())
    }

    fn products(
        m: &TernaryMatrix,
        k: &'static Kernels,
        acts: &[i8],
        tokens: usize,
        pool: &Pool,
    ) -> (Vec<i32>, Vec<f32>) {
        let packed = PackedMatrix::pack(m, k, pool);
        let inverses: Vec<f32> = (0..tokens).map(|t| 0.3 + t as f32).collect();
        let acts = Activations::from_i8(&acts[..tokens * m.cols()], &inverses, m.cols());
        let (mut sums, mut floats) = (vec![0; tokens * m.rows()], vec![0.0; tokens * m.rows()]);
        packed.matmul_i32(&acts, &mut sums, pool);
        packed.matmul(&acts, &mut floats, pool);
        (sums, floats)
    }

    #[test]
    fn every_count_of_tokens_and_kind_of_scale_equals_scalar() {
        let cols = 16 * SPAN_TILES + 60;
        let mut state = 5u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        let trits: Vec<i8> = (0..WIDTH * cols).map(|_| (next() % 3) as i8 - 1).collect();
        let acts: Vec<i8> = (0..75 * cols).map(|_| next() as i8).collect();
        let mut floats = |n: usize| (0..n).map(|_| next() as f32 * 1e-7).collect::<Vec<f32>>();
        let mut scales = vec![Scales::Tensor(0.7), Scales::Row(floats(WIDTH))];
        for (rows, block) in [(1, 128), (3, 7), (1, 16 * SPAN_TILES + 5), (1, 4000)] {
            let values = floats(WIDTH.div_ceil(rows) * cols.div_ceil(block));
            scales.push(Scales::Block { rows, cols: block, values });
        }
        for (i, scales) in scales.into_iter().enumerate() {
            let m = TernaryMatrix::from_trits(WIDTH, cols, &trits, scales).unwrap();
            let scalar = Kernels::by_name("scalar").unwrap();
            let (sums, floats) = products(&m, scalar, &acts, 75, &Pool::new(2));
            for k in sets() {
                // All counts for one kind of scale; for the others those that end a block.
                let counts = (1..=75).filter(|n| i == 0 || [11, 16, 29, 43, 50, 75].contains(n));
                for tokens in counts {
                    let got = products(&m, k, &acts, tokens, &Pool::new(1 + tokens % 3));
                    let what = (k.name(), tokens, m.scales());
                    assert!(got.0 == sums[..tokens * WIDTH], "integers {what:?}");
                    assert!(got.1 == floats[..tokens * WIDTH], "floats {what:?}");
                }
            }
        }
    }

    #[test]
    fn the_largest_sums_fit_their_bits() {
        let cols = 16 * SPAN_TILES * 3 + 100;
        let pool = Pool::new(1);
        for (weight, act) in [(1, 127), (1, -128), (-1, 127), (-1, -128)] {
            let trits = vec![weight; WIDTH * cols];
            let values = vec![0.5; WIDTH * 2];
            let block = Scales::Block { rows: 1, cols: cols - 100, values };
            for scales in [Scales::Tensor(1.0), block] {
                let m = TernaryMatrix::from_trits(WIDTH, cols, &trits, scales.clone()).unwrap();
                let sum = cols as i32 * i32::from(weight) * i32::from(act);
                for k in sets() {
                    // From one token on, so that the kernels which multiply are held to it as well.
                    for tokens in [1, 2, 3, 4, 5, 6, 16, 32, 50] {
                        let (sums, floats) = products(&m, k, &vec![act; tokens * cols], tokens, &pool);
                        assert!(sums.iter().all(|&s| s == sum), "{} {tokens} tokens", k.name());
                        let scale = if scales == Scales::Tensor(1.0) { 1.0 } else { 0.5 };
                        for (t, row) in floats.chunks(WIDTH).enumerate() {
                            let y = sum as f32 * (scale * (0.3 + t as f32));
                            assert!(row.iter().all(|v| (v - y).abs() <= 1e-6 * y.abs()), "{}", k.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn transposing_words_swaps_rows_and_columns() {
        let Some(_) = Kernels::by_name("avx2") else { return };
        let words: Vec<i32> = (0..64).collect();
        let mut square = [[0i32; 8]; 8];
        // SAFETY: the CPU has AVX2; both sides are 64 words.
        unsafe {
            let x: [__m256i; 8] = words.as_ptr().cast::<[__m256i; 8]>().read_unaligned();
            square.as_mut_ptr().cast::<[__m256i; 8]>().write_unaligned(transpose_words(x));
        }
        for (i, row) in square.iter().enumerate() {
            for (j, &word) in row.iter().enumerate() {
                assert_eq!(word as usize, j * 8 + i);
            }
        }
    }
}

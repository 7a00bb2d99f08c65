//! A tile of a product in registers: rows of float coefficients times chunks of sixteen.

use crate::lanes::{Chunk, LANES, Lanes};
use crate::scratch::Plain;
use half::f16;

/// Chunks ahead of a stream from memory that are asked for.
const AHEAD: usize = 64;

/// What keys and values may be stored as without scales.
pub(super) trait Element: Plain + Default {
    fn load<S: Lanes>(s: S, p: &[Self; LANES]) -> S::V;
    fn store<S: Lanes>(s: S, v: S::V, p: &mut [Self; LANES]);
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Lanes>(s: S, p: &Chunk) -> S::V {
        s.load(p)
    }
    #[inline(always)]
    fn store<S: Lanes>(s: S, v: S::V, p: &mut Chunk) {
        s.store(v, p);
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<S: Lanes>(s: S, p: &[f16; LANES]) -> S::V {
        s.load_f16(p)
    }
    #[inline(always)]
    fn store<S: Lanes>(s: S, v: S::V, p: &mut [f16; LANES]) {
        s.store_f16(v, p);
    }
}

/// `sums[r][c] += Σ_k a[r][k] * b[k * stride + c]`, one chain of fused multiply-adds in rising `k`. What follows in `b` is asked
/// for: it often comes from memory.
#[inline(always)]
pub(super) fn product<S: Lanes, E: Element, const R: usize, const C: usize>(
    s: S,
    a: [&[f32]; R],
    b: &[[E; LANES]],
    stride: usize,
    sums: &mut [[S::V; C]; R],
) {
    let len = a[0].len();
    assert!(a.iter().all(|a| a.len() == len), "product: rows differ");
    for k in 0..len {
        let row = &b[k * stride..][..C];
        let mut v = [s.zero(); C];
        for c in 0..C {
            if size_of::<E>() == 4 || c % 2 == 0 {
                s.prefetch(row.as_ptr().wrapping_add(AHEAD + c));
            }
            v[c] = E::load(s, &row[c]);
        }
        for r in 0..R {
            let x = s.splat(a[r][k]);
            for c in 0..C {
                sums[r][c] = s.fma(x, v[c], sums[r][c]);
            }
        }
    }
}

// Few constants, because every one of these bodies is compiled for every instruction set and type of element.

/// Runs `$body` with constant numbers of columns `$C` until `$at..$end` is done: four or two, or one where registers do not hold
/// more sums for `$R` rows.
macro_rules! columns {
    ($S:ident, $R:ident, $at:ident < $end:expr, $C:ident => $body:expr) => {
        while $at < $end {
            if $end - $at >= 4 && ($S::WIDE || $R == 1) {
                const $C: usize = 4;
                $body;
                $at += 4;
            } else if $end - $at >= 2 && $S::WIDE {
                const $C: usize = 2;
                $body;
                $at += 2;
            } else {
                const $C: usize = 1;
                $body;
                $at += 1;
            }
        }
    };
}
pub(super) use columns;

/// Runs `$body` with constant numbers of rows `$R`, `$most`, 2 or 1, until all `$rows` are done.
macro_rules! rows {
    ($row:ident < $rows:expr, $R:ident of $most:literal => $body:expr) => {
        let mut $row = 0;
        while $row < $rows {
            match $rows - $row {
                1 => {
                    const $R: usize = 1;
                    $body;
                    $row += 1;
                }
                left if left < $most => {
                    const $R: usize = 2;
                    $body;
                    $row += 2;
                }
                _ => {
                    const $R: usize = $most;
                    $body;
                    $row += $most;
                }
            }
        }
    };
}
pub(super) use rows;

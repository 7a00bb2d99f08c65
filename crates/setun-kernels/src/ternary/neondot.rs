//! NEON with dot products (FEAT_DotProd): `sdot` multiplies four columns of four rows by one lane, which
//! holds four activations, of a vector of sixteen.
//!
//! For one token the fields are masked, not shifted, as for AVX-512: field `j` counts 4^j-fold until one
//! exact shift at the end. Both factors of `sdot` are signed, so the highest field, whose code 2 would be
//! negative in place, is the one that is shifted down as it is read: one instruction either way.

use core::arch::aarch64::*;
use core::arch::asm;

use super::neon::{self, ROWS, TILE_BYTES, VECTORS, activations, field, load, prefetch};
use super::{Sums, TILE_COLS, TileKernels, counted};

pub(super) static KERNELS: TileKernels = TileKernels {
    rows: ROWS,
    tile_cols: TILE_COLS,
    unit: TILE_COLS,
    pack_row: None,
    direct,
    direct_tokens: 4,
    direct_limit: 8,
    block_limit: 8,
    unpack: neon::unpack,
    unpacked,
    unpacked_tokens: 6,
    direct_blocks: None,
    unpacked_blocks: None,
    fold: neon::fold,
    scale: neon::scale,
    finish: neon::finish,
};

/// `acc[r] + Σ w[4r + i] · a[4L + i]`.
#[inline]
#[target_feature(enable = "dotprod")]
pub(crate) fn sdot<const L: usize>(mut acc: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes these registers only; the function's feature has the instruction.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {w:v}.16b, {a:v}.4b[{lane}]",
            acc = inout(vreg) acc, w = in(vreg) w, a = in(vreg) a, lane = const L,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// The body of `direct` for one token: `sums[0][row] = Σ code · activation`, field `f` of the weights read
/// by `$field(x)` and counted `4^shift`-fold.
macro_rules! one_token {
    ($weights:ident, $tiles:ident, $acts:ident, $sums:ident,
        $(($f:literal, $dot:ident, $shift:literal, $field:expr)),*) => {{
        let mut acc = [[vdupq_n_s32(0); 4]; VECTORS];
        for tile in 0..$tiles {
            let w = $weights.wrapping_add(tile * TILE_BYTES);
            prefetch(w);
            // SAFETY: a tile of weights and one of activations, within what the caller promised.
            let (x, [a]) = unsafe { (load(w), activations(&[$acts], tile * TILE_COLS)) };
            for (acc, x) in acc.iter_mut().zip(x) {
                $(acc[$f] = $dot::<$f>(acc[$f], $field(x), a);)*
            }
        }
        for (acc, to) in acc.iter().zip($sums[0].as_chunks_mut::<4>().0) {
            let mut sum = acc[0];
            $(if $f > 0 {
                sum = vaddq_s32(sum, vshlq_s32(acc[$f], vdupq_n_s32(-$shift)));
            })*
            // SAFETY: four lanes of room.
            unsafe { vst1q_s32(to.as_mut_ptr(), sum) };
        }
    }};
}
pub(super) use one_token;

/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn direct_one(weights: *const u8, tiles: usize, acts: *const i8, sums: &mut Sums) {
    let masked = |mask: u8| move |x| vreinterpretq_s8_u8(vandq_u8(x, vdupq_n_u8(mask)));
    one_token!(
        weights,
        tiles,
        acts,
        sums,
        (0, sdot, 0, masked(3)),
        (1, sdot, 2, masked(3 << 2)),
        (2, sdot, 4, masked(3 << 4)),
        (3, sdot, 0, |x| field::<3>(x))
    );
}

/// # Safety
/// As [`TileKernels::direct`]: `tiles` tiles at `weights`, `16 · tiles` activations at each of `acts`.
#[target_feature(enable = "dotprod")]
pub(super) unsafe fn direct(weights: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        match *acts {
            [a] => direct_one(weights, tiles, a, sums),
            _ => for_each_count!(acts, T => direct_many::<T>(weights, tiles, counted(acts), sums); 2, 3, 4),
        }
    }
}

/// `acc[t][v] += codes[v] · activations 4L to 4L + 3 of token t`.
#[inline]
#[target_feature(enable = "dotprod")]
fn step<const L: usize, const T: usize>(
    acc: &mut [[int32x4_t; VECTORS]; T],
    codes: [int8x16_t; VECTORS],
    acts: &[int8x16_t; T],
) {
    for v in 0..VECTORS {
        for t in 0..T {
            acc[t][v] = sdot::<L>(acc[t][v], codes[v], acts[t]);
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn store<const T: usize>(acc: &[[int32x4_t; VECTORS]; T], sums: &mut Sums) {
    for (acc, sums) in acc.iter().zip(sums) {
        for (sum, to) in acc.iter().zip(sums.as_chunks_mut::<4>().0) {
            // SAFETY: four lanes of room.
            unsafe { vst1q_s32(to.as_mut_ptr(), *sum) };
        }
    }
}

/// # Safety
/// As [`direct`].
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn direct_many<const T: usize>(
    weights: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    let mut acc = [[vdupq_n_s32(0); VECTORS]; T];
    for tile in 0..tiles {
        let w = weights.wrapping_add(tile * TILE_BYTES);
        prefetch(w);
        // SAFETY: a tile of weights and one of activations, within what the caller promised.
        let (x, a) = unsafe { (load(w), activations(&acts, tile * TILE_COLS)) };
        step::<0, T>(&mut acc, x.map(|x| field::<0>(x)), &a);
        step::<1, T>(&mut acc, x.map(|x| field::<1>(x)), &a);
        step::<2, T>(&mut acc, x.map(|x| field::<2>(x)), &a);
        step::<3, T>(&mut acc, x.map(|x| field::<3>(x)), &a);
    }
    store(&acc, sums);
}

/// # Safety
/// As [`TileKernels::unpacked`].
#[target_feature(enable = "dotprod")]
unsafe fn unpacked(panel: *const u8, tiles: usize, acts: &[*const i8], sums: &mut Sums) {
    // SAFETY (all): the caller's promise, with as many tokens as `acts` holds.
    unsafe {
        for_each_count!(acts, T => unpacked_many::<T>(panel, tiles, counted(acts), sums); 1, 2, 3, 4, 5, 6)
    }
}

/// # Safety
/// As [`unpacked`].
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn unpacked_many<const T: usize>(
    panel: *const u8,
    tiles: usize,
    acts: [*const i8; T],
    sums: &mut Sums,
) {
    let mut acc = [[vdupq_n_s32(0); VECTORS]; T];
    for tile in 0..tiles {
        // SAFETY: an unpacked tile and one of activations, within what the caller promised.
        unsafe {
            let w = panel.add(tile * TILE_BYTES * 4);
            let codes = |four: usize| load(w.add(four * TILE_BYTES)).map(|w| vreinterpretq_s8_u8(w));
            let a = activations(&acts, tile * TILE_COLS);
            step::<0, T>(&mut acc, codes(0), &a);
            step::<1, T>(&mut acc, codes(1), &a);
            step::<2, T>(&mut acc, codes(2), &a);
            step::<3, T>(&mut acc, codes(3), &a);
        }
    }
    store(&acc, sums);
}

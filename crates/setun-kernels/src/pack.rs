//! Codecs between trits (`-1, 0, +1` in an `i8`) and packed bytes.
//!
//! Two packings: two bits per trit, the code `w + 1`, four to a byte, lowest bits first; and base 3,
//! five to a byte, `Σ (w_i + 1)·3^i`, the first trit least significant (242 is the largest byte).
//! The last byte of either is filled with zero trits. Decoders refuse what no encoder writes.

use core::fmt;

/// Trits in a byte of the two-bit packing.
pub const TRITS_PER_BYTE: usize = 4;
/// Trits in a byte of the base-3 packing.
pub const BASE3_TRITS_PER_BYTE: usize = 5;
/// The byte of four zero trits.
pub(crate) const ZERO_BYTE: u8 = 0b01_01_01_01;
const BASE3_VALUES: u8 = 243;
const BASE3_ZERO_DIGIT: u8 = 1;

/// Why a packing could not be written or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackError {
    /// Input and output lengths do not belong together.
    Length {
        /// Trits to pack, or room for unpacked ones.
        trits: usize,
        /// Bytes that many trits need.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A value other than -1, 0 or +1.
    NotATrit {
        /// Position of the first one.
        index: usize,
        /// What stands there.
        value: i8,
    },
    /// The two-bit code 3, which is no trit.
    FourthCode {
        /// Position (in trits) of the first one.
        index: usize,
    },
    /// A base-3 byte above 242.
    NotBase3 {
        /// Position (in bytes) of the first one.
        index: usize,
        /// What stands there.
        value: u8,
    },
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { trits, expected, found } => {
                write!(f, "{trits} trits need {expected} packed bytes, but there are {found}")
            }
            Self::NotATrit { index, value } => {
                write!(f, "value {index} is {value}, but a ternary weight is -1, 0 or 1")
            }
            Self::FourthCode { index } => {
                write!(f, "trit {index} has the two-bit code 3, but only 0, 1 and 2 are ternary weights")
            }
            Self::NotBase3 { index, value } => {
                write!(f, "byte {index} is {value}, but five base-3 trits are at most 242")
            }
        }
    }
}

impl core::error::Error for PackError {}

fn check_lengths(trits: usize, bytes: usize, per_byte: usize) -> Result<(), PackError> {
    let expected = trits.div_ceil(per_byte);
    if bytes == expected { Ok(()) } else { Err(PackError::Length { trits, expected, found: bytes }) }
}

fn check_trits(trits: &[i8]) -> Result<(), PackError> {
    match trits.iter().position(|t| !(-1..=1).contains(t)) {
        Some(index) => Err(PackError::NotATrit { index, value: trits[index] }),
        None => Ok(()),
    }
}

/// Packs trits two bits each into `bytes`, which must be a quarter as long, rounded up.
///
/// # Errors
/// [`PackError::Length`] and [`PackError::NotATrit`]; `bytes` is then unchanged.
pub fn pack_2bit(trits: &[i8], bytes: &mut [u8]) -> Result<(), PackError> {
    check_lengths(trits.len(), bytes.len(), TRITS_PER_BYTE)?;
    check_trits(trits)?;
    for (byte, group) in bytes.iter_mut().zip(trits.chunks(TRITS_PER_BYTE)) {
        *byte = ZERO_BYTE;
        for (i, &t) in group.iter().enumerate() {
            // Code 1 is already there: -1 takes it to 0, +1 to 2.
            *byte = byte.wrapping_add_signed(t << (2 * i));
        }
    }
    Ok(())
}

/// Unpacks two-bit codes into all of `trits`.
///
/// # Errors
/// [`PackError::Length`], and [`PackError::FourthCode`] for a code 3 among the trits asked for
/// (codes after the last trit are not looked at). `trits` then holds no meaningful values.
pub fn unpack_2bit(bytes: &[u8], trits: &mut [i8]) -> Result<(), PackError> {
    check_lengths(trits.len(), bytes.len(), TRITS_PER_BYTE)?;
    for (b, group) in trits.chunks_mut(TRITS_PER_BYTE).enumerate() {
        for (i, t) in group.iter_mut().enumerate() {
            let code = (bytes[b] >> (2 * i)) & 3;
            if code == 3 {
                return Err(PackError::FourthCode { index: b * TRITS_PER_BYTE + i });
            }
            *t = code as i8 - 1;
        }
    }
    Ok(())
}

/// Packs trits five to a byte into `bytes`, which must be a fifth as long, rounded up.
///
/// # Errors
/// [`PackError::Length`] and [`PackError::NotATrit`]; `bytes` is then unchanged.
pub fn pack_base3(trits: &[i8], bytes: &mut [u8]) -> Result<(), PackError> {
    check_lengths(trits.len(), bytes.len(), BASE3_TRITS_PER_BYTE)?;
    check_trits(trits)?;
    for (byte, group) in bytes.iter_mut().zip(trits.chunks(BASE3_TRITS_PER_BYTE)) {
        *byte = (0..BASE3_TRITS_PER_BYTE).rev().fold(0, |value, i| {
            let digit = group.get(i).map_or(BASE3_ZERO_DIGIT, |&t| (t + 1) as u8);
            value * 3 + digit
        });
    }
    Ok(())
}

/// Unpacks base-3 bytes into all of `trits`.
///
/// # Errors
/// [`PackError::Length`], and [`PackError::NotBase3`] for a byte above 242.
/// `trits` then holds no meaningful values.
pub fn unpack_base3(bytes: &[u8], trits: &mut [i8]) -> Result<(), PackError> {
    check_lengths(trits.len(), bytes.len(), BASE3_TRITS_PER_BYTE)?;
    if let Some(index) = bytes.iter().position(|&b| b >= BASE3_VALUES) {
        return Err(PackError::NotBase3 { index, value: bytes[index] });
    }
    for (&byte, group) in bytes.iter().zip(trits.chunks_mut(BASE3_TRITS_PER_BYTE)) {
        let mut rest = byte;
        for t in group {
            *t = (rest % 3) as i8 - 1;
            rest /= 3;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{vec, vec::Vec};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpack_of_pack_is_identity_in_both_packings(trits in proptest::collection::vec(-1i8..=1, 0..70)) {
            let mut back = vec![9i8; trits.len()];
            let mut bytes = vec![0u8; trits.len().div_ceil(4)];
            pack_2bit(&trits, &mut bytes).unwrap();
            unpack_2bit(&bytes, &mut back).unwrap();
            prop_assert_eq!(&back, &trits);
            let mut bytes = vec![0u8; trits.len().div_ceil(5)];
            pack_base3(&trits, &mut bytes).unwrap();
            back.fill(9);
            unpack_base3(&bytes, &mut back).unwrap();
            prop_assert_eq!(&back, &trits);
        }
    }

    #[test]
    fn every_byte_value_decodes_or_is_refused() {
        for byte in 0..=255u8 {
            let mut four = [9i8; 4];
            let bad = (0..4).position(|i| (byte >> (2 * i)) & 3 == 3);
            match unpack_2bit(&[byte], &mut four) {
                Ok(()) => {
                    assert_eq!(bad, None);
                    let mut again = [0];
                    pack_2bit(&four, &mut again).unwrap();
                    assert_eq!(again, [byte]);
                }
                Err(e) => assert_eq!(Some(e), bad.map(|index| PackError::FourthCode { index })),
            }
            let mut five = [9i8; 5];
            match unpack_base3(&[byte], &mut five) {
                Ok(()) => {
                    assert!(byte <= 242);
                    let mut again = [0];
                    pack_base3(&five, &mut again).unwrap();
                    assert_eq!(again, [byte]);
                }
                Err(e) => {
                    assert!(byte > 242);
                    assert_eq!(e, PackError::NotBase3 { index: 0, value: byte });
                }
            }
        }
    }

    #[test]
    fn wrong_lengths_and_values_are_errors() {
        let error = pack_2bit(&[0; 5], &mut [0; 1]).unwrap_err();
        assert_eq!(error, PackError::Length { trits: 5, expected: 2, found: 1 });
        assert!(unpack_base3(&[0; 2], &mut [0; 5]).is_err());
        let error = pack_base3(&[0, 2], &mut [0]).unwrap_err();
        assert_eq!(error, PackError::NotATrit { index: 1, value: 2 });
        assert!(pack_2bit(&[-128], &mut [0]).is_err());
        let none: Vec<u8> = Vec::new();
        assert_eq!(unpack_2bit(&none, &mut []), Ok(()));
    }

    #[test]
    fn first_trit_is_lowest() {
        let mut byte = [0];
        pack_2bit(&[1, 0, 0, -1], &mut byte).unwrap();
        assert_eq!(byte, [0b00_01_01_10]);
        pack_base3(&[1, 0, 0, 0, -1], &mut byte).unwrap();
        assert_eq!(byte, [2 + 3 + 9 + 27]);
    }
}

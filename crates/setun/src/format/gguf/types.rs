//! The tensor types that GGUF files name by number.

use crate::format::Encoding;

/// Types that are read, and written by those who have their bytes. What 36, 39 and 42 mean depends on the file, see
/// `collisions`.
const READ: &[(u32, Encoding)] = &[
    (0, Encoding::F32),
    (1, Encoding::F16),
    (2, Encoding::Q4_0),
    (3, Encoding::Q4_1),
    (6, Encoding::Q5_0),
    (7, Encoding::Q5_1),
    (8, Encoding::Q8_0),
    (10, Encoding::Q2K),
    (11, Encoding::Q3K),
    (12, Encoding::Q4K),
    (13, Encoding::Q5K),
    (14, Encoding::Q6K),
    (20, Encoding::IQ4NL),
    (24, Encoding::I8),
    (30, Encoding::BF16),
    (34, Encoding::TQ1_0),
    (35, Encoding::TQ2_0),
    (I2_S, Encoding::I2S),
    (39, Encoding::MXFP4),
    (41, Encoding::Q1_0),
    (134, Encoding::IQ1BN),
    (135, Encoding::IQ2BN),
    (142, Encoding::PQ2_0),
    (143, Encoding::PTQ1_0),
];

/// The number of I2_S, in whichever layout; formerly of another type.
pub(crate) const I2_S: u32 = 36;
/// The number of Q2_0, in groups of 64 or of 128.
pub(crate) const Q2_0: u32 = 42;

/// A type whose size is known: id, name, elements per block, bytes per block.
struct Known(u32, &'static str, usize, usize);

/// Types that are recognised but not read, so that a file holding one can still be listed and the
/// refusal can say what it is. Ids 31 to 33 and 37 left the format; 36, 38, 39 and 42 mean different types in
/// different programs and are treated in `collisions`.
const NOT_READ: &[Known] = &[
    Known(9, "Q8_1", 32, 36),
    Known(15, "Q8_K", 256, 292),
    Known(16, "IQ2_XXS", 256, 66),
    Known(17, "IQ2_XS", 256, 74),
    Known(18, "IQ3_XXS", 256, 98),
    Known(19, "IQ1_S", 256, 50),
    Known(21, "IQ3_S", 256, 110),
    Known(22, "IQ2_S", 256, 82),
    Known(23, "IQ4_XS", 256, 136),
    Known(25, "I16", 1, 2),
    Known(26, "I32", 1, 4),
    Known(27, "I64", 1, 8),
    Known(28, "F64", 1, 8),
    Known(29, "IQ1_M", 256, 56),
];

/// Types of which only the name is known here: their sizes depend on the program or the shape.
const NAMED: &[(u32, &str)] = &[
    (4, "Q4_2 (removed)"),
    (5, "Q4_3 (removed)"),
    (31, "Q4_0_4_4 (removed)"),
    (32, "Q4_0_4_8 (removed)"),
    (33, "Q4_0_8_8 (removed)"),
    (37, "IQ4_NL_4_8 (removed)"),
    (40, "NVFP4"),
    (335, "IQ2_BN_R4"),
];

/// The encoding of a type id with one meaning. Every id gives one; those not read are [`Encoding::Other`] with
/// the type's name, or its number if it is unknown.
pub(crate) fn encoding(id: u32) -> Encoding {
    if let Some((_, encoding)) = READ.iter().find(|r| r.0 == id) {
        return encoding.clone();
    }
    let known = NOT_READ.iter().find(|k| k.0 == id).map(|k| k.1);
    let named = known.or_else(|| NAMED.iter().find(|n| n.0 == id).map(|n| n.1));
    Encoding::Other(named.map_or_else(|| format!("number {id}"), str::to_owned))
}

/// The id under which an encoding is written, if GGUF has one. I2_S is written in its published layout only,
/// because no reader could tell the others.
pub(crate) fn id(encoding: &Encoding) -> Option<u32> {
    match encoding {
        Encoding::Q2_0G64 | Encoding::Q2_0G128 => Some(Q2_0),
        _ => READ.iter().find(|r| r.1 == *encoding).map(|r| r.0),
    }
}

/// Elements and bytes of a block of type `id`, for types that are recognised but not read.
pub(crate) fn unread_block(id: u32) -> Option<(usize, usize)> {
    NOT_READ.iter().find(|k| k.0 == id).map(|k| (k.2, k.3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_one_meaning_and_every_type_read_has_a_size() {
        let mut numbers: Vec<u32> = READ.iter().map(|r| r.0).chain([Q2_0]).collect();
        numbers.extend(NOT_READ.iter().map(|k| k.0));
        numbers.extend(NAMED.iter().map(|n| n.0));
        numbers.sort_unstable();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
        for (number, read) in READ {
            assert_eq!((encoding(*number), id(read)), (read.clone(), Some(*number)));
            assert!(read.byte_len(&[4, 256]).is_some(), "{read}");
            assert!(Encoding::READABLE.contains(read.name()) || read.name().ends_with("_K"), "{read}");
        }
    }
}

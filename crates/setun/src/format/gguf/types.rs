//! The tensor types that GGUF files name by number.

use crate::format::Encoding;

/// A type whose size is known: id, name, elements per block, bytes per block.
struct Known(u32, &'static str, usize, usize);

/// Types that are recognised but not read, so that a file holding one can still be listed and the
/// refusal can say what it is. Ids 31 to 33 left the format; 36 to 39 and 40 mean different types in
/// different programs and are treated apart.
const NOT_READ: &[Known] = &[
    Known(2, "Q4_0", 32, 18),
    Known(3, "Q4_1", 32, 20),
    Known(6, "Q5_0", 32, 22),
    Known(7, "Q5_1", 32, 24),
    Known(9, "Q8_1", 32, 36),
    Known(10, "Q2_K", 256, 84),
    Known(11, "Q3_K", 256, 110),
    Known(12, "Q4_K", 256, 144),
    Known(13, "Q5_K", 256, 176),
    Known(14, "Q6_K", 256, 210),
    Known(15, "Q8_K", 256, 292),
    Known(16, "IQ2_XXS", 256, 66),
    Known(17, "IQ2_XS", 256, 74),
    Known(18, "IQ3_XXS", 256, 98),
    Known(19, "IQ1_S", 256, 50),
    Known(20, "IQ4_NL", 32, 18),
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
    (38, "TL1 or IQ4_NL_8_8"),
    (39, "MXFP4 or TL2"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "type 42"),
    (134, "IQ1_BN"),
    (135, "IQ2_BN"),
    (335, "IQ2_BN_R4"),
];

/// The encoding of a type id. Every id gives one; those not read are [`Encoding::Other`] with the
/// type's name, or its number if it is unknown.
pub(crate) fn encoding(id: u32) -> Encoding {
    match id {
        0 => Encoding::F32,
        1 => Encoding::F16,
        8 => Encoding::Q8_0,
        24 => Encoding::I8,
        30 => Encoding::BF16,
        34 => Encoding::TQ1_0,
        35 => Encoding::TQ2_0,
        36 => Encoding::I2S,
        _ => {
            let known = NOT_READ.iter().find(|k| k.0 == id).map(|k| k.1);
            let named = known.or_else(|| NAMED.iter().find(|n| n.0 == id).map(|n| n.1));
            Encoding::Other(named.map_or_else(|| format!("unknown type {id}"), str::to_owned))
        }
    }
}

/// The id under which an encoding is written, if GGUF has one.
pub(crate) fn id(encoding: &Encoding) -> Option<u32> {
    match encoding {
        Encoding::F32 => Some(0),
        Encoding::F16 => Some(1),
        Encoding::Q8_0 => Some(8),
        Encoding::I8 => Some(24),
        Encoding::BF16 => Some(30),
        Encoding::TQ1_0 => Some(34),
        Encoding::TQ2_0 => Some(35),
        Encoding::I2S => Some(36),
        Encoding::U8 | Encoding::Trit2 | Encoding::Other(_) => None,
    }
}

/// Elements and bytes of a block of type `id`, where both are fixed.
pub(crate) fn block(id: u32) -> Option<(usize, usize)> {
    match id {
        0 => Some((1, 4)),
        1 | 30 => Some((1, 2)),
        8 => Some((32, 34)),
        24 => Some((1, 1)),
        34 => Some((256, 54)),
        35 => Some((256, 66)),
        _ => NOT_READ.iter().find(|k| k.0 == id).map(|k| (k.2, k.3)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_encoding_that_is_written_reads_back_and_its_block_agrees() {
        for number in 0..400 {
            let encoding = encoding(number);
            if let Some(id) = id(&encoding) {
                assert_eq!(id, number);
                if let Some((elements, bytes)) = block(id) {
                    assert_eq!(encoding.byte_len(&[3, elements * 2]), Some(6 * bytes), "{number}");
                }
            }
        }
    }
}

//! Which instruction set runs: a value that a caller holds, never a global.

/// Instruction sets that float loops are compiled for. Private to the crate: a [`Kernels`] is handed out only
/// after the CPU check, so holding one is the proof that its instructions may be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Scalar,
}

/// Instruction sets that integer products are written for: finer than [`Isa`], since dot products came later
/// and one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Products {
    /// With byte permutations (VBMI): weights at 1.6 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Scalar,
}

/// One instruction set's kernels. All of them return the same integers, and the same float bits.
#[derive(Debug)]
pub struct Kernels {
    name: &'static str,
    pub(crate) isa: Isa,
    pub(crate) products: Products,
    supported: fn() -> bool,
}

#[cfg(all(target_arch = "x86_64", feature = "std"))]
fn avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}
/// Lanes of 32 bits are rows of four bytes in the order of memory.
#[cfg(target_arch = "aarch64")]
const LITTLE_ENDIAN: bool = cfg!(target_endian = "little");

// Fastest first; scalar is last and always supported.
static TABLE: &[Kernels] = &[
    #[cfg(target_arch = "x86_64")]
    Kernels {
        name: "avx512vbmi",
        isa: Isa::Avx512,
        products: Products::Avx512Vbmi,
        #[cfg(not(feature = "std"))]
        supported: || false,
        #[cfg(feature = "std")]
        supported: || avx512() && is_x86_feature_detected!("avx512vbmi"),
    },
    #[cfg(target_arch = "x86_64")]
    Kernels {
        name: "avx512",
        isa: Isa::Avx512,
        products: Products::Avx512,
        #[cfg(not(feature = "std"))]
        supported: || false,
        #[cfg(feature = "std")]
        supported: avx512,
    },
    #[cfg(target_arch = "x86_64")]
    Kernels {
        name: "avxvnni",
        isa: Isa::Avx2,
        products: Products::AvxVnni,
        #[cfg(not(feature = "std"))]
        supported: || false,
        #[cfg(feature = "std")]
        supported: || {
            is_x86_feature_detected!("avxvnni")
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        },
    },
    #[cfg(target_arch = "x86_64")]
    Kernels {
        name: "avx2",
        isa: Isa::Avx2,
        products: Products::Avx2,
        #[cfg(not(feature = "std"))]
        supported: || false,
        #[cfg(feature = "std")]
        supported: || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        },
    },
    #[cfg(target_arch = "aarch64")]
    Kernels {
        name: "neoni8mm",
        isa: Isa::Neon,
        products: Products::NeonI8mm,
        #[cfg(not(feature = "std"))]
        supported: || false,
        #[cfg(feature = "std")]
        supported: || {
            LITTLE_ENDIAN
                && std::arch::is_aarch64_feature_detected!("dotprod")
                && std::arch::is_aarch64_feature_detected!("i8mm")
        },
    },
    #[cfg(target_arch = "aarch64")]
    Kernels {
        name: "neondot",
        isa: Isa::Neon,
        products: Products::NeonDot,
        #[cfg(not(feature = "std"))]
        supported: || false,
        #[cfg(feature = "std")]
        supported: || LITTLE_ENDIAN && std::arch::is_aarch64_feature_detected!("dotprod"),
    },
    #[cfg(target_arch = "aarch64")]
    Kernels { name: "neon", isa: Isa::Neon, products: Products::Neon, supported: || LITTLE_ENDIAN },
    Kernels { name: "scalar", isa: Isa::Scalar, products: Products::Scalar, supported: || true },
];

impl Kernels {
    /// What this CPU can run, fastest first; `scalar` is always last.
    pub fn available() -> impl Iterator<Item = &'static Kernels> {
        TABLE.iter().filter(|k| (k.supported)())
    }

    /// The fastest set this CPU can run.
    pub fn best() -> &'static Kernels {
        Self::available().next().expect("scalar is always supported")
    }

    /// The set called `name`, if this CPU can run it.
    pub fn by_name(name: &str) -> Option<&'static Kernels> {
        Self::available().find(|k| k.name == name)
    }

    /// `avx512vbmi`, `avx512`, `avxvnni` or `avx2`, `neoni8mm`, `neondot` or `neon`, or `scalar`.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

/// Asks for the cache line at `p`, which may be any address.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
pub(crate) fn prefetch_near(p: *const u8) {
    // SAFETY: a prefetch changes no state and never faults.
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, preserves_flags, readonly))
    }
}

/// As [`prefetch_near`], into the second-level cache.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
pub(crate) fn prefetch_far(p: *const u8) {
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("prfm pldl2keep, [{}]", in(reg) p, options(nostack, preserves_flags, readonly))
    }
}

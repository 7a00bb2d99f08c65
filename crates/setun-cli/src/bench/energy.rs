//! Energy: what the processor's counters say, and what arithmetic alone would take by the estimate of the BitNet papers.
//!
//! The estimate counts operations of matrix products and nothing else: no memory traffic, which is most of the energy of a
//! token on a real machine, no norms, no attention. It compares number formats, not machines.

use std::path::PathBuf;

use serde::Serialize;

/// Where the energies per operation come from, as it is printed beside every estimate.
pub const SOURCE: &str = "arithmetic of matrix products only, no memory traffic: energies per operation as in BitNet \
                          (arXiv 2310.11453, after Horowitz 2014 for 45 nm and Zhang et al. 2022 for 7 nm)";

/// What one weight is multiplied with an activation in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    Fp32,
    /// bf16 as well, for which the tables have no row.
    Fp16,
    /// 4-bit weights as well, for which the tables have no row.
    Int8,
    /// Additions of int8 only, as the papers count ternary weights.
    TernaryInt8,
    /// Additions of fp16 only: ternary weights with float activations.
    TernaryFp16,
}

impl Arithmetic {
    /// Picojoules of one multiply-add at 45 and at 7 nm.
    fn picojoules(self) -> [f64; 2] {
        match self {
            Self::Fp32 => [0.9 + 3.7, 0.38 + 1.31],
            Self::Fp16 => [0.4 + 1.1, 0.16 + 0.34],
            Self::Int8 => [0.03 + 0.2, 0.007 + 0.07],
            Self::TernaryInt8 => [0.03, 0.007],
            Self::TernaryFp16 => [0.4, 0.16],
        }
    }
}

/// Joules of arithmetic per token: an estimate, see [`SOURCE`].
#[derive(Debug, Clone, Copy, Serialize, PartialEq)]
pub struct Estimate {
    pub joules_45nm: f64,
    pub joules_7nm: f64,
}

/// The estimate for so many multiply-adds of each kind.
pub fn estimate(work: &[(Arithmetic, usize)]) -> Estimate {
    let sum = |node: usize| work.iter().map(|(of, n)| of.picojoules()[node] * *n as f64 * 1e-12).sum();
    Estimate { joules_45nm: sum(0), joules_7nm: sum(1) }
}

/// The energy counters of the processor packages (RAPL by Linux's powercap), where they may be read. They count all that the
/// packages do, for whomever.
pub struct Meter {
    /// Counter, the value it starts again after, both in microjoules, and what it showed at the start.
    zones: Vec<(PathBuf, u64, u64)>,
}

impl Meter {
    pub fn start() -> Self {
        let number = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let zone = |entry: std::fs::DirEntry| {
            let path = entry.path();
            // Packages only: their parts would be counted twice.
            if !std::fs::read_to_string(path.join("name")).ok()?.starts_with("package") {
                return None;
            }
            let now = number(path.join("energy_uj"))?;
            Some((path.join("energy_uj"), number(path.join("max_energy_range_uj"))?, now))
        };
        let entries = std::fs::read_dir("/sys/class/powercap").into_iter().flatten().flatten();
        Self { zones: entries.filter_map(zone).collect() }
    }

    /// Joules since the start; `None` where there are no counters. Right for stretches in which no counter goes round twice.
    pub fn joules(&self) -> Option<f64> {
        if self.zones.is_empty() {
            return None;
        }
        self.zones.iter().try_fold(0.0, |sum, (path, range, before)| {
            let now: u64 = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
            Some(sum + since(*before, now, *range) as f64 / 1e6)
        })
    }
}

fn since(before: u64, now: u64, range: u64) -> u64 {
    now.checked_sub(before).unwrap_or_else(|| (range - before.min(range)).saturating_add(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ternary_arithmetic_of_the_3b_shape_is_71_times_below_fp16() {
        // 71.4 is BitNet b1.58's figure (arXiv 2402.17764, section 3) at 7 nm.
        let one = |of| estimate(&[(of, 1_000_000_000)]).joules_7nm;
        assert!((one(Arithmetic::Fp16) / one(Arithmetic::TernaryInt8) - 71.4).abs() < 0.1);
        assert!((one(Arithmetic::Fp32) - 1.69e-3).abs() < 1e-9);
    }

    #[test]
    fn a_counter_that_went_round_counts_on() {
        assert_eq!(since(10, 25, 100), 15);
        assert_eq!(since(90, 5, 100), 15);
    }
}

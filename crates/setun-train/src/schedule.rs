//! Learning rate and weight decay of every step.

use crate::config::{OptimizerSection, ScheduleKind};

/// What one step uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay, to be multiplied with the learning rate.
    pub weight_decay: f64,
}

/// Rates of step `step` (from 0) of `total`.
///
/// Every schedule rises linearly from `lr / warmup` over the warm-up. Then, with `x` the fraction of the whole run that is over:
///
/// - two-stage ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", <https://github.com/microsoft/unilm/tree/master/bitnet>,
///   section 3): linearly from `lr` towards `lr · final_fraction` at the end of the run, but at `switch` it drops to
///   `lr_second` and decays linearly from there. Weight decay ends at `switch`: masters near a rounding threshold act as
///   confidences, and decay would keep them there.
/// - cosine: `lr` to `lr · final_fraction` along half a cosine.
/// - linear: `lr` to `lr · final_fraction` along a line.
/// - constant: `lr`.
pub fn rates(settings: &OptimizerSection, step: u64, total: u64) -> Rates {
    let (lr, floor) = (settings.lr, settings.lr * settings.final_fraction);
    let warmup = settings.warmup_steps.min(total);
    let x = step as f64 / total.max(1) as f64;
    let second_stage = settings.schedule == ScheduleKind::TwoStage && x >= settings.switch;
    let weight_decay = if second_stage { 0.0 } else { settings.weight_decay };
    if step < warmup {
        return Rates { lr: lr * (step + 1) as f64 / warmup as f64, weight_decay };
    }
    // Fraction of the way from `from` to the last step, which is 1 there.
    let way = |from: f64| {
        let last = total.saturating_sub(1) as f64;
        if last > from { ((step as f64 - from) / (last - from)).clamp(0.0, 1.0) } else { 1.0 }
    };
    let linear = |high: f64, low: f64, way: f64| high + (low - high) * way;
    let lr = match settings.schedule {
        ScheduleKind::Constant => lr,
        ScheduleKind::Cosine => {
            linear(floor, lr, (1.0 + (std::f64::consts::PI * way(warmup as f64)).cos()) / 2.0)
        }
        ScheduleKind::TwoStage if second_stage => {
            let from = (settings.switch * total as f64).ceil().max(warmup as f64);
            linear(settings.second_lr(), floor, way(from))
        }
        ScheduleKind::TwoStage | ScheduleKind::Linear => linear(lr, floor, way(warmup as f64)),
    };
    Rates { lr, weight_decay }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [ScheduleKind; 4] =
        [ScheduleKind::TwoStage, ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Constant];

    fn settings(schedule: ScheduleKind) -> OptimizerSection {
        OptimizerSection {
            schedule,
            lr: 1.0,
            lr_second: Some(0.4),
            switch: 0.5,
            final_fraction: 0.1,
            warmup_steps: 10,
            ..OptimizerSection::default()
        }
    }

    #[test]
    fn warm_up_rises_to_the_peak_on_every_schedule() {
        for schedule in ALL {
            let lr = |step| rates(&settings(schedule), step, 100).lr;
            assert!((lr(0) - 0.1).abs() < 1e-12);
            assert_eq!(lr(9), 1.0);
            assert_eq!(lr(10), 1.0);
        }
    }

    #[test]
    fn the_second_stage_starts_at_its_own_peak_without_weight_decay_and_ends_at_the_floor() {
        let settings = settings(ScheduleKind::TwoStage);
        let at = |step| rates(&settings, step, 100);
        assert!(at(49).lr > 0.55 && at(49).weight_decay == settings.weight_decay);
        assert_eq!(at(50), Rates { lr: 0.4, weight_decay: 0.0 });
        assert!((at(99).lr - 0.1).abs() < 1e-12);
        assert!((50..99).all(|step| at(step).lr > at(step + 1).lr));
    }

    #[test]
    fn cosine_and_linear_fall_to_the_floor_and_constant_stays() {
        let linear = |step| rates(&settings(ScheduleKind::Linear), step, 100);
        assert!(
            (linear(54).lr - (0.1 + 0.9 * 45.0 / 89.0)).abs() < 1e-12 && (linear(99).lr - 0.1).abs() < 1e-12
        );
        assert_eq!(linear(99).weight_decay, settings(ScheduleKind::Linear).weight_decay);
        assert!((rates(&settings(ScheduleKind::Cosine), 99, 100).lr - 0.1).abs() < 1e-12);
        assert_eq!(rates(&settings(ScheduleKind::Constant), 99, 100).lr, 1.0);
    }

    #[test]
    fn runs_of_one_step_have_finite_rates() {
        for schedule in ALL {
            assert!(rates(&settings(schedule), 0, 1).lr.is_finite());
            let cold = OptimizerSection { warmup_steps: 0, ..settings(schedule) };
            assert!(rates(&cold, 0, 1).lr.is_finite());
        }
    }
}

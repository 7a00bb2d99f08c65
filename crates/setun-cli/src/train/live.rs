//! What `setun train` shows of a run: a panel of a few lines that changes in place on a terminal, plain lines elsewhere.

use setun_train::data::Score;
use setun_train::metrics::Metrics;
use setun_train::trainer::StepReport;

use crate::output;

/// Columns of the curve of losses.
const CURVE: usize = 40;
/// No line is longer: wrapped lines cannot be changed in place.
const WIDTH: usize = 78;

/// All that the panel shows.
#[derive(Default)]
pub struct Live {
    losses: Losses,
    last: Option<StepReport>,
    line: Option<Metrics>,
    /// Held-out scores by set, after which step.
    scores: Option<(u64, Vec<(String, Score)>)>,
}

impl Live {
    /// Takes up a step.
    pub fn step(&mut self, report: &StepReport) {
        self.losses.push(report.loss);
        self.last = Some(*report);
    }

    /// Takes up a line of the metrics.
    pub fn logged(&mut self, line: &Metrics) {
        // A line may hold held-out measures alone; speed and flips stay those of the line before.
        if line.loss.is_some() {
            self.line = Some(line.clone());
        }
    }

    /// Takes up a held-out measurement.
    pub fn evaluated(&mut self, step: u64, scores: &[(String, Score)]) {
        self.scores = Some((step, scores.to_vec()));
    }

    /// The step before, if there was one.
    pub fn last(&self) -> Option<StepReport> {
        self.last
    }

    /// The panel's lines.
    pub fn panel(&self) -> String {
        let Some(last) = &self.last else { return "the first step".into() };
        let mut lines = vec![format!("loss      {:<8.4} {}", last.loss, self.losses.curve())];
        if let Some((step, scores)) = &self.scores {
            lines.push(format!("held out  {} (step {step})", held_out(scores)));
        }
        let mut speed = format!("speed     {} tok/s", output::rate(last.tokens_per_s));
        let mut state = format!("rate      {:.2e}, gradient {:.3}", last.lr, last.grad_norm);
        if let Some(line) = &self.line {
            if let Some(share) = line.peak_share {
                speed += &format!(", {:.0} % of the machine's peak", share * 100.0);
            }
            state += &ternary(line);
        }
        speed += &format!(", {} M tokens seen", output::rate(last.tokens as f64 / 1e6));
        lines.extend([state, speed]);
        let cut = |line: String| line.chars().take(WIDTH).collect::<String>();
        lines.into_iter().map(cut).collect::<Vec<_>>().join("\n")
    }
}

/// A line of the metrics as a sentence for log files.
pub fn plain(line: &Metrics, total: u64) -> Option<String> {
    let mut text = format!("step {} of {total}: loss {:.4}", line.step, line.loss?);
    if let (Some(lr), Some(norm)) = (line.lr, line.grad_norm) {
        text += &format!(", rate {lr:.2e}, gradient norm {norm:.3}");
    }
    text += &ternary(line);
    if let Some(speed) = line.tokens_per_s {
        text += &format!(", {} tok/s", output::rate(speed));
    }
    if let Some(share) = line.peak_share {
        text += &format!(" ({:.0} % of peak)", share * 100.0);
    }
    Some(text)
}

/// Held-out scores, set by set.
pub fn held_out(scores: &[(String, Score)]) -> String {
    let score =
        |(name, s): &(String, Score)| format!("{name} {:.4} ({:.3} bits/byte)", s.loss(), s.bits_per_byte());
    scores.iter().map(score).collect::<Vec<_>>().join(", ")
}

fn ternary(line: &Metrics) -> String {
    let (Some(flips), Some(zeros)) = (line.flip_rate, line.zero_fraction) else { return String::new() };
    let dead =
        line.dead_rows.filter(|&rows| rows > 0).map_or(String::new(), |rows| format!(", {rows} dead rows"));
    format!(", flips {} %, zeros {:.1} %{dead}", short(flips * 100.0), zeros * 100.0)
}

/// Two digits that matter, of a number that may be small.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        1.0.. => format!("{value:.1}"),
        _ => {
            let decimals = (1.0 - value.abs().log10().floor()).clamp(0.0, 6.0) as usize;
            format!("{value:.decimals$}")
        }
    }
}

/// The losses of all steps so far, each column the mean of as many steps; how many doubles when all columns are full.
#[derive(Default)]
struct Losses {
    columns: Vec<f64>,
    /// Steps per column, as a power of two.
    doublings: u32,
    /// Sum and number of the steps of the column that is not full.
    open: (f64, u64),
}

impl Losses {
    fn push(&mut self, loss: f64) {
        self.open = (self.open.0 + loss, self.open.1 + 1);
        if self.open.1 < 1 << self.doublings {
            return;
        }
        self.columns.push(self.open.0 / self.open.1 as f64);
        self.open = (0.0, 0);
        if self.columns.len() == CURVE {
            self.columns =
                self.columns.chunks(2).map(|pair| pair.iter().sum::<f64>() / pair.len() as f64).collect();
            self.doublings += 1;
        }
    }

    /// The curve in eighths of a line. The first tenth does not set its height: losses there are several times the others.
    fn curve(&self) -> String {
        const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let late = &self.columns[self.columns.len() / 10..];
        let (low, high) =
            (late.iter().copied().fold(f64::NAN, f64::min), late.iter().copied().fold(f64::NAN, f64::max));
        let bar = |&loss: &f64| {
            let height = if high > low { (loss - low) / (high - low) } else { 0.0 };
            BARS[(height * 7.0).round().clamp(0.0, 7.0) as usize]
        };
        self.columns.iter().map(bar).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(step: u64, loss: f64) -> StepReport {
        StepReport {
            step,
            total_steps: 100,
            loss,
            grad_norm: 0.4217,
            lr: 1.5e-3,
            tokens: step * 4096,
            tokens_per_s: 9312.0,
            elapsed: step as f64,
        }
    }

    fn line() -> Metrics {
        Metrics {
            step: 50,
            loss: Some(2.4),
            lr: Some(1.5e-3),
            grad_norm: Some(0.4217),
            tokens_per_s: Some(9312.0),
            peak_share: Some(0.613),
            flip_rate: Some(0.00123),
            zero_fraction: Some(0.331),
            dead_rows: Some(2),
            ..Metrics::default()
        }
    }

    #[test]
    fn the_panel_shows_loss_held_out_rate_flips_speed_and_share_in_few_short_lines() {
        let mut live = Live::default();
        (1..=50).for_each(|step| live.step(&report(step, 8.0 / step as f64)));
        live.logged(&line());
        live.evaluated(50, &[("books".into(), Score { nats: 20.0, tokens: 10, bytes: 40 })]);
        live.logged(&Metrics { step: 51, ..Metrics::default() });
        let panel = live.panel();
        for text in [
            "0.1600",
            "books 2.0000 (0.721 bits/byte) (step 50)",
            "1.50e-3",
            "flips 0.12 %",
            "zeros 33.1 %",
            "2 dead rows",
            "61 % of the machine's peak",
            "tok/s",
        ] {
            assert!(panel.contains(text), "{text}: {panel}");
        }
        assert!(panel.lines().count() == 4 && panel.lines().all(|l| l.chars().count() <= WIDTH), "{panel}");
    }

    #[test]
    fn the_curve_of_any_number_of_losses_fits_and_falls() {
        let mut losses = Losses::default();
        assert_eq!(losses.curve(), "");
        for step in 1..=1000u32 {
            losses.push(2.0 + 6.0 * (-f64::from(step) / 300.0).exp());
            assert!(losses.curve().chars().count() <= CURVE, "{step}");
        }
        let curve: Vec<char> = losses.curve().chars().collect();
        assert!(curve.len() >= CURVE / 2 && curve.is_sorted_by(|a, b| a >= b), "{curve:?}");
        assert_eq!((curve[0], curve[curve.len() - 1]), ('█', '▁'));
    }

    #[test]
    fn a_log_file_gets_one_sentence_per_line_of_the_metrics() {
        let expected = "step 50 of 100: loss 2.4000, rate 1.50e-3, gradient norm 0.422, flips 0.12 %, zeros 33.1 %, \
                        2 dead rows, 9312 tok/s (61 % of peak)";
        assert_eq!(plain(&line(), 100).unwrap(), expected);
        assert_eq!(plain(&Metrics { step: 3, ..Metrics::default() }, 100), None);
    }
}

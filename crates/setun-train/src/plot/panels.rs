//! What a picture of runs shows: one panel per measure, read from their metrics.

use super::{Axis, PlotOptions};
use crate::metrics::Metrics;

/// Lines are drawn through this many points at most, each the mean of its neighbours.
const POINTS: usize = 400;

/// Panels of positive numbers whose largest is so many times the smallest get a logarithmic axis.
const DECADES: f64 = 30.0;

pub(super) type Point = (f64, f64);

/// Everything that is drawn.
pub(super) struct Sheet {
    pub panels: Vec<Panel>,
    /// Names of the runs, in the order of their colours.
    pub runs: Vec<String>,
    /// Names of the held-out sets, in the order of their marks.
    pub sets: Vec<String>,
    pub x_title: &'static str,
    pub x_max: f64,
}

/// One measure of all runs that have it.
pub(super) struct Panel {
    pub title: &'static str,
    pub curves: Vec<Curve>,
    pub log: bool,
    pub y: (f64, f64),
}

/// One measure of one run.
pub(super) struct Curve {
    pub run: usize,
    /// The held-out set, which is drawn with its mark.
    pub set: Option<usize>,
    /// The values as they are, where the line is smoothed.
    pub raw: Vec<Point>,
    pub line: Vec<Point>,
}

/// How the height of a panel is chosen.
#[derive(Clone, Copy, PartialEq)]
enum Height {
    /// By the values, without the first twentieth of each run: losses there are several times those of interest.
    Late,
    /// The same, logarithmic where they span decades.
    Decades,
    /// From 0.
    FromZero,
}

type Measure = (&'static str, Height, fn(&Metrics) -> Option<f64>);

/// Measures that a line has once; held-out ones come after the first of them.
const MEASURES: [Measure; 7] = [
    ("training loss (nats per token)", Height::Late, |l| l.loss),
    ("learning rate", Height::FromZero, |l| l.lr),
    ("gradient norm", Height::Decades, |l| l.grad_norm),
    ("flip rate (% of ternary weights changed since the last line)", Height::Decades, |l| {
        Some(100.0 * l.flip_rate?)
    }),
    ("zero weights (%)", Height::Late, |l| Some(100.0 * l.zero_fraction?)),
    ("tokens per second", Height::FromZero, |l| l.tokens_per_s),
    ("share of the machine's peak (%)", Height::FromZero, |l| Some(100.0 * l.peak_share?)),
];

impl Sheet {
    /// The panels that `runs` have numbers for.
    ///
    /// # Errors
    /// The run that has nothing to place its lines on the axis by, or that there is nothing to draw.
    pub fn new(runs: &[(String, Vec<Metrics>)], options: &PlotOptions) -> Result<Self, String> {
        let axis = options.x.unwrap_or_else(|| {
            let counted = |run: &[Metrics]| run.iter().any(|line| line.tokens.is_some());
            if runs.iter().all(|(_, run)| counted(run)) { Axis::Tokens } else { Axis::Steps }
        });
        let mut places = Vec::new();
        for (name, run) in runs {
            let missing =
                || format!("the metrics of `{name}` have no {}; --x steps needs none", axis.needs());
            places.push(axis.places(run).ok_or_else(missing)?);
        }
        let mut sets: Vec<String> = Vec::new();
        for set in runs.iter().flat_map(|(_, run)| run).flat_map(Metrics::eval_losses).map(|(set, _)| set) {
            if !sets.iter().any(|known| known == set) {
                sets.push(set.to_owned());
            }
        }

        let curve = |run: usize, set: Option<usize>, value: &dyn Fn(&Metrics) -> Option<f64>| {
            let points = runs[run].1.iter().zip(&places[run]);
            let points = points.filter_map(|(line, &x)| Some((x, value(line)?)));
            let points: Vec<Point> = points.filter(|p| p.1.is_finite()).collect();
            (!points.is_empty()).then_some((run, set, points))
        };
        let mut panels = Vec::new();
        for (n, (title, height, value)) in MEASURES.into_iter().enumerate() {
            // A schedule is drawn as it is.
            let smooth = if title == "learning rate" { Some(1) } else { options.smooth };
            let found = (0..runs.len()).filter_map(|run| curve(run, None, &value));
            let curves = found.map(|(run, set, points)| Curve::smoothed(run, set, &points, smooth)).collect();
            panels.extend(Panel::new(title, height, curves));
            if n == 0 {
                let pairs = (0..runs.len()).flat_map(|run| (0..sets.len()).map(move |set| (run, set)));
                let found = pairs
                    .filter_map(|(run, set)| curve(run, Some(set), &|line| line.bits_per_byte(&sets[set])));
                let curves =
                    found.map(|(run, set, line)| Curve { run, set, raw: Vec::new(), line }).collect();
                panels.extend(Panel::new("held out (bits per byte)", Height::Late, curves));
            }
        }
        let points = panels.iter().flat_map(|p| &p.curves).flat_map(|c| &c.line);
        let x_max = points.map(|p| p.0).fold(f64::NAN, f64::max);
        if x_max.is_nan() {
            return Err("the metrics hold no numbers to draw".into());
        }
        let runs = runs.iter().map(|(name, _)| name.clone()).collect();
        let x_max = if x_max > 0.0 { x_max * 1.01 } else { 1.0 };
        Ok(Self { panels, runs, sets, x_title: axis.title(), x_max })
    }
}

impl Panel {
    fn new(title: &'static str, height: Height, curves: Vec<Curve>) -> Option<Self> {
        let late = |curve: &Curve| {
            let from = curve.line.last().map_or(0.0, |p| p.0) / 20.0;
            let from = if height == Height::FromZero { f64::NEG_INFINITY } else { from };
            curve.line.iter().filter(move |p| p.0 >= from).map(|p| p.1).collect::<Vec<_>>()
        };
        let mut values: Vec<f64> = curves.iter().flat_map(late).collect();
        values.sort_by(f64::total_cmp);
        let (&low, &high) = (values.first()?, values.last()?);
        // A single outlier does not flatten all the rest.
        let high = if high > 0.0 { high.min(values[values.len() * 98 / 100] * 2.0).max(low) } else { high };
        let log = height == Height::Decades && low > 0.0 && high / low > DECADES;
        let margin = match (high - low) * 0.08 {
            0.0 => high.abs().max(1e-6) * 0.1,
            margin => margin,
        };
        let y = match height {
            _ if log => (low / 1.3, high * 1.3),
            Height::FromZero => (0.0, if high > 0.0 { high * 1.1 } else { 1.0 }),
            Height::Decades => (0.0, high + margin),
            Height::Late => ((low - margin).max(0.0), high + margin),
        };
        Some(Self { title, curves, log, y })
    }
}

impl Curve {
    /// `smooth`: how many lines one point is the mean of; by default a fiftieth of them.
    fn smoothed(run: usize, set: Option<usize>, points: &[Point], smooth: Option<usize>) -> Self {
        let width = smooth.unwrap_or(points.len() / 50).max(1);
        let raw = if width > 1 { thinned(points) } else { Vec::new() };
        Self { run, set, raw, line: thinned(&moving_mean(points, width)) }
    }
}

/// Every value the mean of the `width` values around it, fewer at the ends.
fn moving_mean(points: &[Point], width: usize) -> Vec<Point> {
    // Sums of all values before each, so that a wide window costs no more than a narrow one.
    let sums = points.iter().scan(0.0, |sum, p| {
        *sum += p.1;
        Some(*sum)
    });
    let sums: Vec<f64> = std::iter::once(0.0).chain(sums).collect();
    let mean = |(i, p): (usize, &Point)| {
        let reach = (width / 2).min(i).min(points.len() - 1 - i);
        let (from, to) = (i - reach, i + reach + 1);
        (p.0, (sums[to] - sums[from]) / (to - from) as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

/// At most [`POINTS`] means of neighbouring points.
fn thinned(points: &[Point]) -> Vec<Point> {
    let width = points.len().div_ceil(POINTS).max(1);
    let mean = |chunk: &[Point]| {
        let n = chunk.len() as f64;
        let sums = chunk.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0, y + p.1));
        (sums.0 / n, sums.1 / n)
    };
    points.chunks(width).map(mean).collect()
}

impl Axis {
    fn title(self) -> &'static str {
        match self {
            Axis::Steps => "steps",
            Axis::Tokens => "training tokens (millions)",
            Axis::Hours => "hours of training",
        }
    }

    fn needs(self) -> &'static str {
        match self {
            Axis::Steps => "steps",
            Axis::Tokens => "token counts",
            Axis::Hours => "`elapsed`",
        }
    }

    /// Where every line of a run stands. Lines of held-out measures alone have only their step: they stand between
    /// their neighbours. `None` where no line says anything.
    fn places(self, run: &[Metrics]) -> Option<Vec<f64>> {
        let known = |line: &Metrics| match self {
            Axis::Steps => Some(line.step as f64),
            Axis::Tokens => Some(line.tokens? as f64 / 1e6),
            Axis::Hours => Some(line.elapsed? / 3600.0),
        };
        let points: Vec<Point> =
            run.iter().filter_map(|line| Some((line.step as f64, known(line)?))).collect();
        if points.is_empty() && !run.is_empty() {
            return None;
        }
        let between = |step: f64| {
            let after = points.partition_point(|p| p.0 < step);
            let left = after.checked_sub(1).map_or((0.0, 0.0), |before| points[before]);
            match points.get(after) {
                Some(right) if right.0 > left.0 => {
                    left.1 + (right.1 - left.1) * (step - left.0) / (right.0 - left.0)
                }
                Some(right) => right.1,
                // After the last one: as fast as all before it.
                None if left.0 > 0.0 => left.1 * step / left.0,
                None => left.1,
            }
        };
        Some(run.iter().map(|line| known(line).unwrap_or_else(|| between(line.step as f64))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moving_mean_keeps_a_straight_line_and_the_number_of_points() {
        let line: Vec<Point> = (0..50).map(|i| (f64::from(i), 3.0 * f64::from(i))).collect();
        for width in [1, 2, 7, 49, 500] {
            let smooth = moving_mean(&line, width);
            assert_eq!(smooth.len(), 50);
            for (a, b) in smooth.iter().zip(&line) {
                assert!((a.1 - b.1).abs() < 1e-9 && a.0 == b.0, "{width}: {a:?} {b:?}");
            }
        }
        let noise: Vec<Point> = (0..50).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let inner = &moving_mean(&noise, 21)[10..40];
        assert!(inner.iter().all(|p| (p.1 - 0.5).abs() < 0.03), "{inner:?}");
    }

    #[test]
    fn lines_without_a_count_stand_between_their_neighbours() {
        let line = |step, tokens| Metrics { step, tokens, ..Metrics::default() };
        let run = [line(5, None), line(10, Some(10_000_000)), line(15, None), line(20, Some(30_000_000))];
        assert_eq!(Axis::Tokens.places(&run).unwrap(), [5.0, 10.0, 20.0, 30.0]);
        assert_eq!(Axis::Hours.places(&run), None);
        let run = [line(10, Some(10_000_000)), line(15, None)];
        assert_eq!(Axis::Tokens.places(&run).unwrap(), [10.0, 15.0]);
    }

    #[test]
    fn an_outlier_does_not_flatten_the_rest() {
        let mut points: Vec<Point> = (0..200).map(|i| (f64::from(i), 1.0 + f64::from(i % 7) * 0.1)).collect();
        points[120].1 = 1e6;
        let curve = Curve { run: 0, set: None, raw: Vec::new(), line: points };
        let panel = Panel::new("gradient norm", Height::Decades, vec![curve]).unwrap();
        assert!(panel.y.1 < 10.0 && !panel.log, "{:?}", panel.y);
    }
}

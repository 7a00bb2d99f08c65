//! Loss curves as a picture: training loss as a line, held-out losses as marks, several runs in one frame.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::error::TrainError;
use crate::metrics;
use crate::vocabulary::write_whole;

const SIZE: (u32, u32) = (960, 540);

/// One colour per run: Okabe and Ito's, which stay apart for colour-blind readers and in print.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

const INK: RGBColor = RGBColor(40, 40, 40);

/// Lines of training loss are drawn through this many points at most, each the mean of its neighbours.
const POINTS: usize = 400;

/// What is drawn of one run; x is millions of tokens, or steps where a run has no token counts.
struct Curve {
    label: String,
    training: Vec<(f64, f64)>,
    held_out: Vec<(String, Vec<(f64, f64)>)>,
}

/// Draws the runs of `runs`, (label, metrics file), into the SVG file `out`.
///
/// # Errors
/// When a metrics file cannot be read or no run has a loss to draw, or the picture cannot be written.
pub fn plot_runs(runs: &[(String, std::path::PathBuf)], out: &Path) -> Result<(), TrainError> {
    let mut lines = Vec::new();
    for (label, path) in runs {
        lines.push((label, metrics::read(path)?));
    }
    let by_tokens = lines.iter().all(|(_, run)| run.iter().all(|line| line.tokens.is_some()));
    let curves: Vec<Curve> = lines.iter().map(|(label, run)| Curve::new(label, run, by_tokens)).collect();
    let frame = Frame::around(&curves)
        .ok_or_else(|| TrainError::Plot { path: out.to_owned(), what: "the metrics hold no loss".into() })?;
    let mut svg = String::new();
    let axis = if by_tokens { "training tokens (millions)" } else { "steps" };
    draw(&curves, &frame, axis, &mut svg)
        .map_err(|e| TrainError::Plot { path: out.to_owned(), what: e.to_string() })?;
    write_whole(out, svg.as_bytes())
}

impl Curve {
    fn new(label: &str, run: &[metrics::Metrics], by_tokens: bool) -> Self {
        let x = |line: &metrics::Metrics| match line.tokens {
            Some(tokens) if by_tokens => tokens as f64 / 1e6,
            _ => line.step as f64,
        };
        let training = run.iter().filter_map(|line| Some((x(line), line.loss?)));
        let training: Vec<_> = training.filter(|point| point.1.is_finite()).collect();
        let mut held_out: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
        for line in run {
            for (set, loss) in line.eval_losses() {
                let known = held_out.iter().position(|(name, _)| name == set);
                let at = known.unwrap_or_else(|| {
                    held_out.push((set.to_owned(), Vec::new()));
                    held_out.len() - 1
                });
                held_out[at].1.push((x(line), loss));
            }
        }
        Self { label: label.to_owned(), training: smooth(&training), held_out }
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        let held_out = self.held_out.iter().flat_map(|(_, points)| points);
        self.training.iter().chain(held_out).copied()
    }
}

/// At most [`POINTS`] means of neighbouring points.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let width = points.len().div_ceil(POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        let sums = chunk.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0, y + p.1));
        (sums.0 / n, sums.1 / n)
    };
    points.chunks(width).map(mean).collect()
}

/// The ranges of the axes.
struct Frame {
    x: f64,
    y: (f64, f64),
}

impl Frame {
    /// The first twentieth of the run does not set the height: losses there are several times those of interest.
    fn around(curves: &[Curve]) -> Option<Self> {
        let all = || curves.iter().flat_map(Curve::points);
        let x = all().map(|p| p.0).fold(f64::NAN, f64::max);
        if x.is_nan() {
            return None;
        }
        let late = || all().filter(|p| p.0 >= x / 20.0).map(|p| p.1);
        let (low, high) = (late().fold(f64::NAN, f64::min), late().fold(f64::NAN, f64::max));
        let margin = ((high - low) * 0.08).max(0.05);
        Some(Self { x: if x > 0.0 { x * 1.01 } else { 1.0 }, y: ((low - margin).max(0.0), high + margin) })
    }

    /// `points` without those above the frame.
    fn inside<'a>(&self, points: &'a [(f64, f64)]) -> impl Iterator<Item = (f64, f64)> + 'a {
        let top = self.y.1;
        points.iter().copied().filter(move |p| p.1 <= top)
    }
}

type DrawResult<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn draw<'a>(curves: &[Curve], frame: &Frame, axis: &str, svg: &'a mut String) -> DrawResult<'a> {
    let area: DrawingArea<SVGBackend<'a>, Shift> = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .margin_right(28)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..frame.x, frame.y.0..frame.y.1)?;
    chart
        .configure_mesh()
        .x_desc(axis)
        .y_desc("loss (nats per token)")
        .label_style(font(15))
        .axis_desc_style(font(16))
        .axis_style(INK)
        .bold_line_style(INK.mix(0.12))
        .light_line_style(WHITE)
        .y_label_formatter(&|y| format!("{y:.1}"))
        .draw()?;
    for (curve, &colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        if !curve.training.is_empty() {
            let line = colour.mix(0.45).stroke_width(1);
            chart
                .draw_series(LineSeries::new(frame.inside(&curve.training), line))?
                .label(format!("{}, training", curve.label))
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 24, y)], line));
        }
        for (n, (set, points)) in curve.held_out.iter().enumerate() {
            let line = colour.stroke_width(2);
            chart.draw_series(LineSeries::new(frame.inside(points), line))?;
            let place = |at| EmptyElement::at(at) + Polygon::new(mark(n, (0, 0)), colour);
            chart
                .draw_series(frame.inside(points).map(place))?
                .label(format!("{}, held out: {set}", curve.label))
                .legend(move |(x, y)| {
                    let stroke = PathElement::new(vec![(0, 0), (24, 0)], line);
                    EmptyElement::at((x, y)) + stroke + Polygon::new(mark(n, (12, 0)), colour)
                });
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .border_style(INK.mix(0.3))
        .label_font(font(15))
        .legend_area_size(34)
        .margin(12)
        .draw()?;
    area.present()
}

/// Corners of the mark of the `n`-th held-out set around `(x, y)`, in pixels: disc, triangle, square.
fn mark(n: usize, (x, y): (i32, i32)) -> Vec<(i32, i32)> {
    let (corners, radius, turn): (usize, f64, f64) = match n % 3 {
        0 => (16, 4.5, 0.0),
        1 => (3, 6.5, -0.25),
        _ => (4, 6.0, 0.125),
    };
    let corner = |k: usize| {
        let angle = (k as f64 / corners as f64 + turn) * std::f64::consts::TAU;
        let at = |centre: i32, offset: f64| centre + (radius * offset).round() as i32;
        (at(x, angle.cos()), at(y, angle.sin()))
    };
    (0..corners).map(corner).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Score;
    use crate::metrics::{Metrics, MetricsWriter};

    /// A run whose loss falls from `ln 4096` towards `floor`.
    fn run(path: &Path, floor: f64) {
        let mut writer = MetricsWriter::open(path, 0).unwrap();
        for step in (10u64..=2000).step_by(10) {
            let noise = (step as f64 * 12.9898).sin() * 0.06;
            let loss = floor + (8.3 - floor) * (-(step as f64) / 180.0).exp();
            let mut line =
                Metrics { step, tokens: Some(step * 4096), loss: Some(loss + noise), ..Metrics::default() };
            if step % 200 == 0 {
                for (set, extra) in [("stories", 0.05), ("books", 0.9)] {
                    let score = Score { nats: (loss + extra) * 100.0, tokens: 100, bytes: 400 };
                    line.add_eval(set, &score);
                }
            }
            writer.write(&line).unwrap();
        }
    }

    #[test]
    fn the_picture_names_every_run_set_and_axis() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        run(&at("a.jsonl"), 2.0);
        run(&at("b.jsonl"), 1.9);
        let runs = [("ternary <1>".into(), at("a.jsonl")), ("float".into(), at("b.jsonl"))];
        plot_runs(&runs, &at("loss.svg")).unwrap();
        let svg = std::fs::read_to_string(at("loss.svg")).unwrap();
        for text in [
            "ternary &lt;1&gt;, training",
            "float, training",
            "float, held out: stories",
            "float, held out: books",
            "training tokens (millions)",
            "loss (nats per token)",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
        // Kept for the eye where asked.
        if let Some(copy) = std::env::var_os("SETUN_KEEP_PLOT") {
            std::fs::copy(at("loss.svg"), copy).unwrap();
        }
    }

    #[test]
    fn a_run_of_one_line_and_one_without_token_counts_are_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("one.jsonl"), "{\"step\":0,\"loss\":8.0}\n").unwrap();
        plot_runs(&[("one".into(), at("one.jsonl"))], &at("one.svg")).unwrap();
        let svg = std::fs::read_to_string(at("one.svg")).unwrap();
        assert!(svg.contains("steps") && !svg.contains("NaN"));
    }

    #[test]
    fn metrics_without_a_loss_are_an_error_and_leave_no_picture() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("a.jsonl"), "{\"step\":1}\n").unwrap();
        let error = plot_runs(&[("a".into(), at("a.jsonl"))], &at("a.svg")).unwrap_err();
        assert!(error.to_string().contains("hold no loss"), "{error}");
        assert!(!at("a.svg").exists());
    }
}

//! `--plot`: small multiples, a row for each kind of matrix, a column for each thing that can go wrong with it.
//!
//! Left, the histogram of a ternary matrix: its shares of −1, 0 and +1, layer by layer. Right, the spread of its scales (or the root
//! mean square and largest value of a float one) on a logarithmic axis. A layer that differs from its neighbours is seen at once.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use setun::inspect::{Survey, TensorFacts, Values};

use super::Facts;
use crate::output;

const WIDTH: u32 = 1000;
const HEAD: u32 = 64;
const ROW: u32 = 132;
const FOOT: u32 = 28;
/// Rows of a picture; a hybrid's further kinds are left out.
const ROWS: usize = 24;

// Okabe and Ito's, which stay apart for colour-blind readers and in print.
const MINUS: RGBColor = RGBColor(0, 114, 178);
const ZERO: RGBColor = RGBColor(214, 214, 214);
const PLUS: RGBColor = RGBColor(213, 94, 0);
const INK: RGBColor = RGBColor(40, 40, 40);

type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What is drawn of a kind's matrices in one layer.
#[derive(Default, Clone)]
struct Layer {
    /// −1, 0, +1.
    counts: [usize; 3],
    low: f64,
    middle: Vec<f64>,
    high: f64,
}

struct Kind {
    name: String,
    ternary: bool,
    /// By layer; matrices outside the blocks are layer 0 of their own kind.
    layers: BTreeMap<usize, Layer>,
}

pub(super) fn draw(facts: &Facts, path: &Path) -> Result<()> {
    let kinds = facts.found.as_ref().map(kinds).unwrap_or_default();
    if kinds.is_empty() {
        anyhow::bail!("{} has no matrix whose values can be drawn", facts.file.path().display());
    }
    let mut svg = String::new();
    let name =
        facts.file.path().file_name().map_or_else(Default::default, |n| n.to_string_lossy().into_owned());
    picture(&name, &kinds, &mut svg).map_err(|e| anyhow::anyhow!("cannot draw {}: {e}", path.display()))?;
    output::write_whole(path, &svg)
}

fn kinds(found: &Survey) -> Vec<Kind> {
    let of_kind = |kind: &str| -> Kind {
        let mut layers = BTreeMap::<usize, Layer>::new();
        let mut ternary = false;
        for t in found.tensors.iter().filter(|t| t.kind == kind) {
            ternary |= add(layers.entry(t.layer.unwrap_or(0)).or_default(), t);
        }
        layers.retain(|_, layer| !layer.middle.is_empty());
        Kind { name: kind.to_owned(), ternary, layers }
    };
    let all = found.kinds.iter().take(ROWS).map(|kind| of_kind(&kind.kind));
    all.filter(|kind| !kind.layers.is_empty()).collect()
}

/// Adds a matrix to its layer; whether it is ternary.
fn add(layer: &mut Layer, t: &TensorFacts) -> bool {
    let (low, middle, high, counts) = match &t.values {
        Some(Values::Ternary { minus, zero, plus, scales, .. }) => {
            (scales.min, scales.median, scales.max, [*minus, *zero, *plus])
        }
        Some(Values::Float { rms, largest }) => (*rms, *rms, *largest, [0; 3]),
        None => return false,
    };
    for (sum, count) in layer.counts.iter_mut().zip(counts) {
        *sum += count;
    }
    if low > 0.0 && high.is_finite() {
        let first = layer.middle.is_empty();
        layer.low = if first { f64::from(low) } else { layer.low.min(f64::from(low)) };
        layer.high = layer.high.max(f64::from(high));
        layer.middle.push(f64::from(middle));
    }
    counts != [0; 3]
}

fn picture<'a>(name: &str, kinds: &[Kind], svg: &'a mut String) -> Drawn<'a> {
    let height = HEAD + ROW * kinds.len() as u32 + FOOT;
    let area: Area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
    area.draw(&Text::new(name.to_owned(), (16, 12), font(18)))?;
    let mut x = 150;
    for (label, colour) in [("−1", MINUS), ("0", ZERO), ("+1", PLUS)] {
        area.draw(&Rectangle::new([(x, 42), (x + 12, 54)], colour.filled()))?;
        area.draw(&Text::new(label, (x + 18, 41), font(14)))?;
        x += 56;
    }
    area.draw(&Text::new("of all weights, by layer", (x, 41), font(14)))?;
    let right = "scales, smallest to largest; dot: median (float: root mean square to largest)";
    area.draw(&Text::new(right, (490, 41), font(13)))?;
    let (_, rest) = area.split_vertically(HEAD);
    let (rows, foot) = rest.split_vertically(ROW * kinds.len() as u32);
    for (kind, row) in kinds.iter().zip(rows.split_evenly((kinds.len(), 1))) {
        let (label, panels) = row.split_horizontally(136);
        let shown: String = kind.name.chars().take(18).collect();
        label.draw(&Text::new(shown, (16, ROW as i32 / 2 - 20), font(14)))?;
        let (left, right) = panels.split_horizontally((WIDTH - 136) * 9 / 20);
        if kind.ternary {
            shares(kind, &left)?;
        }
        spread(kind, &right)?;
    }
    foot.draw(&Text::new("layer", (136 + 180, 4), font(13)))?;
    foot.draw(&Text::new("layer", (WIDTH as i32 - 270, 4), font(13)))?;
    area.present()
}

/// The axis of layers, each in the middle of its place.
fn layers(kind: &Kind) -> std::ops::Range<f64> {
    -0.5..kind.layers.keys().next_back().map_or(0.0, |&n| n as f64) + 0.5
}

/// Whole numbers only: there is no layer between two.
fn layer_label(kind: &Kind, x: f64) -> String {
    let whole = (x - x.round()).abs() < 1e-6 && kind.layers.len() > 1;
    if whole { format!("{:.0}", x.abs()) } else { String::new() }
}

fn shares<'a>(kind: &Kind, area: &Area<'a>) -> Drawn<'a> {
    let mut chart = ChartBuilder::on(area)
        .margin(6)
        .x_label_area_size(18)
        .y_label_area_size(44)
        .build_cartesian_2d(layers(kind), 0.0..1.0)?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_labels(8)
        .y_labels(3)
        .x_label_formatter(&|&x| layer_label(kind, x))
        .y_label_formatter(&|y| format!("{:.0} %", y * 100.0))
        .label_style(("sans-serif", 12).into_font().color(&INK))
        .axis_style(INK)
        .draw()?;
    for (&n, layer) in &kind.layers {
        let total = layer.counts.iter().sum::<usize>().max(1) as f64;
        let mut from = 0.0;
        for (count, colour) in layer.counts.iter().zip([MINUS, ZERO, PLUS]) {
            let to = from + *count as f64 / total;
            let (a, b) = (n as f64 - 0.44, n as f64 + 0.44);
            chart.draw_series([Rectangle::new([(a, from), (b, to)], colour.filled())])?;
            from = to;
        }
    }
    Ok(())
}

fn spread<'a>(kind: &Kind, area: &Area<'a>) -> Drawn<'a> {
    let low = kind.layers.values().map(|l| l.low).fold(f64::MAX, f64::min);
    let high = kind.layers.values().map(|l| l.high).fold(0.0, f64::max);
    // At least a factor of four, so that equal scales do not look wild.
    let middle = (low * high).sqrt();
    let (low, high) = ((low / 1.3).min(middle / 2.0).log10(), (high * 1.3).max(middle * 2.0).log10());
    let mut chart = ChartBuilder::on(area)
        .margin(6)
        .x_label_area_size(18)
        .y_label_area_size(64)
        .build_cartesian_2d(layers(kind), low..high)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(8)
        .y_labels(4)
        .x_label_formatter(&|&x| layer_label(kind, x))
        .y_label_formatter(&|y| format!("{:.1e}", 10f64.powf(*y)))
        .label_style(("sans-serif", 12).into_font().color(&INK))
        .axis_style(INK)
        .bold_line_style(INK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (&n, layer) in &kind.layers {
        let at = n as f64;
        let colour = if kind.ternary { PLUS } else { MINUS };
        chart.draw_series([PathElement::new(
            vec![(at, layer.low.log10()), (at, layer.high.log10())],
            colour.stroke_width(2),
        )])?;
        let mut middles = layer.middle.clone();
        middles.sort_by(f64::total_cmp);
        chart.draw_series([Circle::new((at, middles[middles.len() / 2].log10()), 3, INK.filled())])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(counts: [usize; 3], low: f64, high: f64) -> Layer {
        Layer { counts, low, middle: vec![low], high }
    }

    #[test]
    fn every_kind_has_its_name_and_its_bars_in_the_picture() {
        let kinds = [
            Kind {
                name: "q_proj <x>".into(),
                ternary: true,
                layers: (0..30).map(|n| (n, layer([3, 4, 3], 0.01, 0.02))).collect(),
            },
            Kind {
                name: "embed_tokens".into(),
                ternary: false,
                layers: [(0, layer([0; 3], 0.5, 0.5))].into(),
            },
        ];
        let mut svg = String::new();
        picture("model.gguf", &kinds, &mut svg).unwrap();
        for text in ["model.gguf", "q_proj &lt;x&gt;", "embed_tokens", "of all weights, by layer"] {
            assert!(svg.contains(text), "{text}");
        }
        for colour in ["#0072B2", "#D6D6D6", "#D55E00"] {
            let bars = svg.matches(&format!("fill=\"{colour}\"")).count();
            assert!(bars >= 31, "{bars} of {colour}");
        }
        assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN") && !svg.contains("inf"));
    }
}

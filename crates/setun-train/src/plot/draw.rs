//! Draws a sheet: the legend on top, panels in two columns below.

use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::panels::{Curve, Panel, Point, Sheet};

/// A panel, in pixels; a sheet has two columns of them unless it has only one panel.
const PANEL: (u32, u32) = (620, 300);
const MARGIN: u32 = 12;
const LEGEND_LINE: u32 = 24;
/// About the width of a letter of the legend.
const LETTER: f64 = 7.6;

/// One colour per run: Okabe and Ito's, which stay apart for colour-blind readers and in print.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(110, 110, 110),
];

const INK: RGBColor = RGBColor(40, 40, 40);

pub(super) type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn colour(run: usize) -> RGBColor {
    COLOURS[run % COLOURS.len()]
}

fn font(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

/// Where the entries of the legend stand, in pixels, and how high it is.
fn legend(runs: &[String], width: u32) -> (Vec<(i32, i32)>, u32) {
    let (mut x, mut y) = (i64::from(MARGIN), i64::from(MARGIN) + 12);
    let mut places = Vec::new();
    for name in runs {
        let entry = 54 + (name.chars().count() as f64 * LETTER) as i64;
        if x > i64::from(MARGIN) && x + entry > i64::from(width) {
            (x, y) = (i64::from(MARGIN), y + i64::from(LEGEND_LINE));
        }
        places.push((x as i32, y as i32));
        x += entry;
    }
    (places, y as u32 + LEGEND_LINE)
}

pub(super) fn draw<'a>(sheet: &Sheet, svg: &'a mut String) -> Drawn<'a> {
    let columns = sheet.panels.len().min(2);
    let rows = sheet.panels.len().div_ceil(columns);
    let (panel_width, panel_height) = if columns == 1 { (960, 500) } else { PANEL };
    let width = panel_width * columns as u32 + MARGIN;
    let (places, head) = legend(&sheet.runs, width);
    let size = (width, head + panel_height * rows as u32 + MARGIN);
    let area: Area<'a> = SVGBackend::with_string(svg, size).into_drawing_area();
    area.fill(&WHITE)?;
    for ((run, name), (x, y)) in sheet.runs.iter().enumerate().zip(places) {
        area.draw(&PathElement::new(vec![(x, y), (x + 26, y)], colour(run).stroke_width(3)))?;
        area.draw(&Text::new(name.clone(), (x + 34, y - 8), font(16)))?;
    }
    let (_, below) = area.split_vertically(head);
    let (below, _) = below.split_vertically(panel_height * rows as u32);
    for (panel, area) in sheet.panels.iter().zip(below.split_evenly((rows, columns))) {
        draw_panel(panel, sheet, &area)?;
    }
    area.present()
}

fn draw_panel<'a>(panel: &Panel, sheet: &Sheet, area: &Area<'a>) -> Drawn<'a> {
    let mut builder = ChartBuilder::on(area);
    builder
        .margin(8)
        .margin_right(18)
        .caption(panel.title, ("sans-serif", 16).into_font().color(&INK))
        .x_label_area_size(40)
        .y_label_area_size(62);
    let (x, y) = (0.0..sheet.x_max, panel.y.0..panel.y.1);
    if panel.log {
        fill(&mut builder.build_cartesian_2d(x, y.log_scale())?, panel, sheet)
    } else {
        fill(&mut builder.build_cartesian_2d(x, y)?, panel, sheet)
    }
}

type Chart<'a, 'b, Y> = ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, Y>>;

fn fill<'a: 'b, 'b, Y>(chart: &mut Chart<'a, 'b, Y>, panel: &Panel, sheet: &Sheet) -> Drawn<'a>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let span = if panel.log { 0.0 } else { panel.y.1 - panel.y.0 };
    chart
        .configure_mesh()
        .x_desc(sheet.x_title)
        .x_labels(8)
        .y_labels(6)
        .label_style(font(13))
        .axis_desc_style(font(14))
        .axis_style(INK)
        .bold_line_style(INK.mix(0.12))
        .light_line_style(INK.mix(0.0))
        .x_label_formatter(&|x| tick(*x, sheet.x_max))
        .y_label_formatter(&|y| tick(*y, span))
        .draw()?;
    for curve in &panel.curves {
        let colour = colour(curve.run);
        for piece in inside(&curve.raw, panel.y) {
            chart.draw_series(LineSeries::new(piece, colour.mix(0.25).stroke_width(1)))?;
        }
        for piece in inside(&curve.line, panel.y) {
            chart.draw_series(LineSeries::new(piece, colour.stroke_width(2)))?;
        }
        if let Some(set) = curve.set {
            let place = |at| EmptyElement::at(at) + Polygon::new(mark(set, (0, 0)), colour);
            chart.draw_series(inside(&curve.line, panel.y).flatten().map(place))?;
        } else if let [point] = curve.line[..] {
            chart.draw_series([Circle::new(point, 3, colour.filled())])?; // A line of one point is none.
        }
    }
    marks(chart, panel, sheet)
}

/// Names the held-out sets by their marks.
fn marks<'a: 'b, 'b, Y>(chart: &mut Chart<'a, 'b, Y>, panel: &Panel, sheet: &Sheet) -> Drawn<'a>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let drawn = |set: usize| panel.curves.iter().any(|curve: &Curve| curve.set == Some(set));
    let sets: Vec<usize> = (0..sheet.sets.len()).filter(|&set| drawn(set)).collect();
    for &set in &sets {
        let nothing: [Circle<Point, i32>; 0] = [];
        chart.draw_series(nothing)?.label(sheet.sets[set].clone()).legend(move |(x, y)| {
            let stroke = PathElement::new(vec![(0, 0), (24, 0)], INK);
            EmptyElement::at((x, y)) + stroke + Polygon::new(mark(set, (12, 0)), INK)
        });
    }
    if !sets.is_empty() {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(INK.mix(0.3))
            .label_font(font(13))
            .legend_area_size(34)
            .margin(8)
            .draw()?;
    }
    Ok(())
}

/// The pieces of a line that lie within the height of a panel.
fn inside(points: &[Point], (low, high): (f64, f64)) -> impl Iterator<Item = Vec<Point>> + '_ {
    let pieces = points.split(move |p| p.1 < low || p.1 > high);
    pieces.filter(|piece| !piece.is_empty()).map(<[Point]>::to_vec)
}

/// A number on an axis that is `span` long (0: logarithmic), with the decimals that tell neighbours apart.
fn tick(value: f64, span: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let step = if span > 0.0 { span / 6.0 } else { value.abs() };
    let decimals = (-step.log10()).ceil().clamp(0.0, 12.0) as usize;
    match value.abs() {
        _ if decimals > 5 => format!("{value:.1e}"),
        1e6.. => format!("{}M", trimmed(value / 1e6)),
        1e4.. => format!("{}k", trimmed(value / 1e3)),
        _ => format!("{value:.decimals$}"),
    }
}

fn trimmed(value: f64) -> String {
    format!("{value:.1}").trim_end_matches('0').trim_end_matches('.').to_owned()
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

    #[test]
    fn ticks_tell_neighbours_apart_and_stay_short() {
        for (value, span, text) in [
            (0.0, 1.0, "0"),
            (0.0005, 0.002, "0.0005"),
            (2.25, 0.3, "2.25"),
            (9500.0, 10_000.0, "9500"),
            (12_500.0, 20_000.0, "12.5k"),
            (20_000.0, 20_000.0, "20k"),
            (0.001, 0.0, "0.001"),
            (10.0, 0.0, "10"),
            (1e-9, 0.0, "1.0e-9"),
        ] {
            assert_eq!(tick(value, span), text);
        }
    }

    #[test]
    fn a_legend_of_many_names_wraps_and_stays_within_the_sheet() {
        let names: Vec<String> = (0..12).map(|n| format!("a run with a long name {n}")).collect();
        let (places, height) = legend(&names, 1200);
        assert!(height > 2 * LEGEND_LINE && places.iter().all(|p| (0..1200).contains(&p.0)));
        let mut unique = places.clone();
        unique.dedup();
        assert_eq!(unique.len(), 12);
    }
}

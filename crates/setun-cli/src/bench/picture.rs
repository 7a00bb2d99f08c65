//! `--svg`: the roofline of a machine with what was measured on it, or the ladder as bars.

use std::path::Path;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::ladder::{Ladder, Rung};
use super::measure::{Measured, Peaks};
use crate::output;

const SIZE: (u32, u32) = (900, 560);
/// Where the names of the roofline's points begin.
const LEGEND: u32 = 620;

// Okabe and Ito's, which stay apart for colour-blind readers and in print.
const BLUE: RGBColor = RGBColor(0, 114, 178);
const RED: RGBColor = RGBColor(213, 94, 0);
const GREY: RGBColor = RGBColor(150, 150, 150);
const INK: RGBColor = RGBColor(40, 40, 40);

type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Multiply-adds per byte against multiply-adds per second, both logarithmic.
pub fn roofline(title: &str, peaks: &Peaks, results: &[Measured], path: &Path) -> Result<()> {
    write(path, |svg| draw_roofline(title, peaks, results, svg))
}

/// Decode and prefill speed, bytes and energy of every rung.
pub fn ladder(ladder: &Ladder, path: &Path) -> Result<()> {
    write(path, |svg| draw_ladder(ladder, svg))
}

fn write(path: &Path, draw: impl for<'a> FnOnce(&'a mut String) -> Drawn<'a>) -> Result<()> {
    let mut svg = String::new();
    draw(&mut svg).map_err(|e| anyhow::anyhow!("cannot draw {}: {e}", path.display()))?;
    output::write_whole(path, &svg)
}

fn font(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

fn sheet(svg: &mut String) -> std::result::Result<Area<'_>, DrawingAreaErrorKind<std::io::Error>> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    Ok(area)
}

fn draw_roofline<'a>(title: &str, peaks: &Peaks, results: &[Measured], svg: &'a mut String) -> Drawn<'a> {
    let area = sheet(svg)?;
    area.draw(&Text::new(format!("Roofline: {title}"), (24, 14), font(18)))?;
    let (_, area) = area.split_vertically(40);
    let (area, legend) = area.split_horizontally(LEGEND);
    let within = |least: f64, most: f64, value: f64| (least.min(value / 2.0), most.max(value * 2.0));
    let (mut left, mut right) = (0.25, 2.0 * peaks.int8_gmac_per_s / peaks.read_gb_per_s);
    let (mut low, mut high) = (peaks.read_gb_per_s * 0.25, peaks.int8_gmac_per_s * 2.0);
    for r in results {
        (left, right) = within(left, right, r.macs_per_byte);
        (low, high) = within(low, high, r.gmac_per_s);
    }
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d((left..right).log_scale(), (low..high).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("multiply-adds per byte read")
        .y_desc("GMAC/s")
        .light_line_style(WHITE)
        .label_style(font(13))
        .axis_desc_style(font(14))
        .axis_style(INK)
        .draw()?;
    let roofs = [
        (peaks.int8_gmac_per_s, BLUE, format!("int8 {} GMAC/s", output::rate(peaks.int8_gmac_per_s))),
        (
            peaks.float_gflop_per_s / 2.0,
            GREY,
            format!("float {} GMAC/s", output::rate(peaks.float_gflop_per_s / 2.0)),
        ),
    ];
    for (roof, colour, label) in roofs {
        let ridge = roof / peaks.read_gb_per_s;
        let start = (left, left * peaks.read_gb_per_s);
        let line = [start, (ridge.max(left), roof), (right.max(ridge), roof)];
        chart.draw_series(LineSeries::new(
            line.into_iter().filter(|(_, y)| *y >= low),
            colour.stroke_width(2),
        ))?;
        let at = chart.backend_coord(&(right, roof));
        area.draw(&Text::new(label, (at.0 - 150, at.1 - 40 - 18), font(13).color(&colour)))?;
    }
    let slope = (left * 1.15, left * 1.15 * peaks.read_gb_per_s);
    let at = chart.backend_coord(&slope);
    let label = format!("read {} GB/s", output::rate(peaks.read_gb_per_s));
    area.draw(&Text::new(label, (at.0 + 14, at.1 - 40 + 2), font(13)))?;
    // Points lie close together, so their names are beside the chart.
    for (i, r) in results.iter().enumerate() {
        let colour = if r.phase == "decode" { RED } else { BLUE };
        let (point, number) = ((r.macs_per_byte, r.gmac_per_s), (i + 1).to_string());
        chart.draw_series([Circle::new(point, 5, colour.filled())])?;
        let at = chart.backend_coord(&point);
        // Above and below in turn.
        let above = if i % 2 == 0 { 18 } else { -7 };
        area.draw(&Text::new(number.clone(), (at.0 - 4, at.1 - 40 - above), font(13)))?;
        let line = 20 + 20 * i as i32;
        legend.draw(&Circle::new((8, line + 7), 5, colour.filled()))?;
        legend.draw(&Text::new(format!("{number}  {}", label_of(r)), (20, line), font(13)))?;
    }
    area.present()
}

fn label_of(r: &Measured) -> String {
    let (share, limit) = match r.read_share > r.arithmetic_share {
        true => (r.read_share, "reading"),
        false => (r.arithmetic_share, "arithmetic"),
    };
    let share = format!("{:.0} % of {limit}", share * 100.0);
    match (r.phase, r.batch) {
        ("decode", 1) => format!("decode after {}: {share}", r.depth),
        ("decode", n) => format!("{n} at once after {}: {share}", r.depth),
        _ => format!("prefill {}: {share}", r.tokens),
    }
}

fn draw_ladder<'a>(ladder: &Ladder, svg: &'a mut String) -> Drawn<'a> {
    let area = sheet(svg)?;
    area.draw(&Text::new(format!("One engine, one shape: {}", ladder.shape), (24, 14), font(18)))?;
    let (_, area) = area.split_vertically(44);
    let speed = |rung: &Rung, phase: &str| rung.phase(phase).map(|r| r.tokens_per_s);
    let panels = area.split_evenly((2, 2));
    bars(&panels[0], "decode, tokens/s", &ladder.rungs, &|rung| speed(rung, "decode"))?;
    bars(&panels[1], "prefill, tokens/s", &ladder.rungs, &|rung| speed(rung, "prefill"))?;
    let read = |rung: &Rung| rung.phase("decode").map(|r| r.bytes_per_token / 1e6);
    bars(&panels[2], "MB read per token", &ladder.rungs, &read)?;
    let energy = |rung: &Rung| Some(rung.energy_estimate_per_token.joules_7nm * 1e3);
    bars(&panels[3], "mJ of arithmetic per token, 7 nm (estimate)", &ladder.rungs, &energy)?;
    area.present()
}

fn bars<'a>(area: &Area<'a>, name: &str, rungs: &[Rung], value: &dyn Fn(&Rung) -> Option<f64>) -> Drawn<'a> {
    area.draw(&Text::new(name.to_owned(), (24, 4), font(14)))?;
    let values: Vec<Option<f64>> = rungs.iter().map(value).collect();
    let most = values.iter().flatten().fold(0.0, |a: f64, b| a.max(*b)).max(1e-12);
    let (width, height) = area.dim_in_pixel();
    let (top, left, right) = (26, 84, width as i32 - 90);
    let row = (height as i32 - top - 10) / rungs.len().max(1) as i32;
    for (i, (rung, value)) in rungs.iter().zip(values).enumerate() {
        let y = top + i as i32 * row;
        area.draw(&Text::new(rung.weights, (24, y + row / 2 - 8), font(13)))?;
        let Some(value) = value else { continue };
        let end = left + (f64::from(right - left) * value / most) as i32;
        let colour = if rung.weights == "ternary" { RED } else { BLUE };
        area.draw(&Rectangle::new([(left, y + 3), (end, y + row - 3)], colour.filled()))?;
        area.draw(&Text::new(output::rate(value), (end + 6, y + row / 2 - 8), font(13)))?;
    }
    Ok(())
}

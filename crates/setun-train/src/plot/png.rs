//! A picture as pixels, for places that show no SVG.

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};

/// Pixels per unit of the SVG: sharp on screens of high density too.
const SCALE: f32 = 2.0;

/// The picture `svg` as the bytes of a PNG file, with the fonts of this machine.
///
/// # Errors
/// When there is no font, or the picture is too large.
pub(super) fn png(svg: &str) -> Result<Vec<u8>, String> {
    let mut options = Options::default();
    let fonts = options.fontdb_mut();
    fonts.load_system_fonts();
    let Some(family) = family(fonts) else {
        return Err("this machine has no fonts to write with; an .svg needs none".into());
    };
    fonts.set_sans_serif_family(family);
    let tree = Tree::from_str(svg, &options).map_err(|e| e.to_string())?;
    let size = tree.size().to_int_size().scale_by(SCALE).ok_or("the picture is too large")?;
    let mut pixels = Pixmap::new(size.width(), size.height()).ok_or("the picture is too large")?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().map_err(|e| e.to_string())
}

/// A plain sans-serif family if there is one, else any.
fn family(fonts: &resvg::usvg::fontdb::Database) -> Option<String> {
    let names = || fonts.faces().filter_map(|face| Some(face.families.first()?.0.clone()));
    let usual = ["DejaVu Sans", "Noto Sans", "Liberation Sans", "Arial", "Helvetica", "Segoe UI"];
    let known = usual.iter().find_map(|usual| names().find(|name| name == usual));
    known.or_else(|| names().find(|name| name.contains("Sans"))).or_else(|| names().next())
}

use super::job::even_groups;
use super::*;

#[test]
fn groups_cover_all_tokens_evenly() {
    for tokens in 0..40 {
        for most in 1..7 {
            let mut next = 5;
            for group in even_groups(5..5 + tokens, most) {
                assert!(group.start == next && (1..=most).contains(&group.len()));
                next = group.end;
            }
            assert_eq!(next, 5 + tokens);
        }
    }
}

#[test]
fn spans_hold_their_blocks_and_follow_one_another() {
    let shapes = [(0, 4), (5, 7), (100, 7), (256, 64), (40, 16), (33, 1), (640, 128), (400, 100)];
    for (cols, block) in shapes {
        for (tile, unit) in [(16, 16), (16, 4), (20, 4)] {
            let scales = Scales::Block { rows: 1, cols: block, values: Vec::new() };
            let columns = Columns::new(cols, &scales, tile, unit);
            let spans = columns.spans();
            assert_eq!(spans.len(), columns.blocks());
            let mut next = 0;
            for (b, span) in spans.iter().enumerate() {
                assert_eq!((span.first, span.first * unit), (next, columns.start(b)));
                assert!(span.count * unit >= columns.range(b).len() && span.count > 0);
                next += span.count;
            }
            assert_eq!((next * unit, next.div_ceil(tile / unit)), (columns.positions(), columns.tiles()));
        }
    }
}

#[test]
fn halves_widen_as_the_library_says() {
    for half in (0..=u16::MAX).map(f16::from_bits).filter(|half| half.is_finite()) {
        assert_eq!(widen(half).to_bits(), half.to_f32().to_bits(), "{half}");
    }
}

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
fn spans_hold_their_blocks_and_activations_do_not_overlap() {
    let shapes = [(0, 4), (5, 7), (100, 7), (256, 64), (40, 16), (33, 1), (640, 128), (400, 100)];
    for (cols, block) in shapes {
        for (tile, unit) in [(16, 16), (16, 4), (20, 4)] {
            let scales = Scales::Block { rows: 1, cols: block, values: Vec::new() };
            let columns = Columns::new(cols, &scales, tile, unit);
            let (direct, unpacked) = (columns.direct_spans(), columns.unpacked_spans());
            assert_eq!((direct.len(), unpacked.len()), (columns.blocks(), columns.blocks()));
            let (mut tiles, mut acts) = (0, 0);
            for (b, (d, u)) in direct.iter().zip(&unpacked).enumerate() {
                let positions = columns.start(b)..columns.start(b) + columns.range(b).len();
                assert!(d.first * tile <= positions.start && positions.end <= (d.first + d.count) * tile);
                assert!(d.first == tiles || d.first + 1 == tiles, "a block starts in the last tile at most");
                assert_eq!((u.first * unit, u.acts), (positions.start, positions.start));
                assert!(u.count * unit >= positions.len());
                assert!(acts <= d.acts && d.count * tile <= columns.own_row());
                if !columns.blocks_own_tiles() {
                    assert_eq!(columns.own_start(b) - d.acts, positions.start - d.first * tile);
                }
                (tiles, acts) = (d.first + d.count, d.acts + d.count * tile);
            }
            assert_eq!(tiles, columns.tiles());
        }
    }
}

#[test]
fn halves_widen_as_the_library_says() {
    for half in (0..=u16::MAX).map(f16::from_bits).filter(|half| half.is_finite()) {
        assert_eq!(widen(half).to_bits(), half.to_f32().to_bits(), "{half}");
    }
}

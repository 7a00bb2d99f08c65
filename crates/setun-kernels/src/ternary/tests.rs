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
fn blocks_start_on_tiles_and_hold_their_columns() {
    for (cols, block) in [(0, 4), (5, 7), (100, 7), (256, 64), (40, 16), (33, 1)] {
        let scales = Scales::Block { rows: 1, cols: block, values: Vec::new() };
        let columns = Columns::new(cols, &scales);
        let mut tile = 0;
        for b in 0..columns.blocks() {
            assert_eq!(columns.tiles(b).start, tile);
            assert!(columns.tiles(b).len() * TILE_COLS >= columns.range(b).len());
            tile = columns.tiles(b).end;
        }
        assert_eq!(tile, columns.all_tiles());
    }
}

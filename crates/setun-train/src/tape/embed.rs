//! The embedding: rows picked forwards, added up backwards.

use super::{Tape, Var};
use crate::engine::{add_assign, rows_per_chunk};
use crate::params::ParamId;

impl Tape<'_> {
    /// Rows `ids` of `table`. An id outside it gives a row of zeros: data is checked before it gets here.
    pub(super) fn embed_rows(&mut self, table: ParamId, ids: &[u32]) -> Var {
        assert_eq!(ids.len(), self.tokens(), "ids of {} tokens", self.tokens());
        let on = self.on;
        let width = on.params[table].cols;
        let mut y = on.engine.scratch(ids.len() * width);
        let rows = rows_per_chunk(width);
        on.engine.pool.run_chunks_mut(&mut y, rows * width, |i, y| {
            let table = &on.params[table].values;
            for (y, &id) in y.chunks_exact_mut(width).zip(&ids[i * rows..]) {
                match table.get(id as usize * width..).filter(|rest| rest.len() >= width) {
                    Some(row) => y.copy_from_slice(&row[..width]),
                    None => y.fill(0.0),
                }
            }
        });
        let y = self.var(y, width);
        let (to, ids) = (y.id, ids.to_vec());
        self.record(move |tape| {
            let Some(grad) = tape.take(to).filter(|_| tape.trains(table)) else { return };
            let pool = &tape.on.engine.pool;
            // Each chunk of the table looks for its own ids, so every row adds up in the order of the tokens.
            let vocab = tape.on.params[table].rows;
            let rows = vocab.div_ceil(16).max(1);
            pool.run_chunks_mut(tape.param_grad(table), rows * width, |i, sums| {
                let own = i * rows..i * rows + sums.len() / width;
                for (grad, &id) in grad.chunks_exact(width).zip(&ids) {
                    if own.contains(&(id as usize)) {
                        let sum = &mut sums[(id as usize - own.start) * width..][..width];
                        add_assign(sum, grad);
                    }
                }
            });
        });
        y
    }
}

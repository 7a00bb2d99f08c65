//! LoRA: what an adapter adds to the output of a linear layer.

use std::sync::Arc;

use setun::ops::LowRank;
use setun_kernels::gemm::{Into, View, ViewMut, gemm_on};

use super::{Tape, Var};
use crate::params::ParamId;

impl Tape<'_> {
    /// `y + s · (x Aᵀ) Bᵀ` (<https://arxiv.org/abs/2106.09685>, section 4.1); `x` is not rounded.
    ///
    /// Backwards, with `u = x Aᵀ` and `du = s · dy B`: `dB = s · dyᵀ u`, `dA = duᵀ x`, `dx = du A`.
    pub(super) fn adapt(&mut self, x: &Var, y: Var, by: &LowRank<ParamId>) -> Var {
        let on = self.on;
        let (a, b, scale) = (by.a, by.b, by.scale);
        let (tokens, cols, rows) = (self.tokens(), x.width, y.width);
        let rank = on.params[a].rows;
        let a_view = move || View::new(&on.params[a].values, rank, cols, cols);
        let b_view = move || View::new(&on.params[b].values, rows, rank, rank);

        let mut u = on.engine.scratch(tokens * rank);
        let input = View::new(&x.value, tokens, cols, cols);
        gemm_on(
            &on.engine.pool,
            ViewMut::new(&mut u, tokens, rank, rank),
            Into::Set,
            1.0,
            input,
            a_view().t(),
        );
        let (to, mut sum) = (y.id, self.own(y.value));
        let u_view = View::new(&u, tokens, rank, rank);
        gemm_on(
            &on.engine.pool,
            ViewMut::new(&mut sum, tokens, rows, rows),
            Into::Add,
            scale,
            u_view,
            b_view().t(),
        );
        let out = self.var(sum, rows);

        let (from, input, u, result) = (x.id, x.value.clone(), Arc::new(u), out.id);
        self.record(move |tape| {
            let Some(dy) = tape.take(result) else { return };
            let pool = &on.engine.pool;
            let dy_view = View::new(&dy, tokens, rows, rows);
            let mut du = on.engine.scratch(tokens * rank);
            gemm_on(pool, ViewMut::new(&mut du, tokens, rank, rank), Into::Set, scale, dy_view, b_view());
            let du_view = View::new(&du, tokens, rank, rank);
            if tape.trains(b) {
                let db = ViewMut::new(tape.param_grad(b), rows, rank, rank);
                gemm_on(pool, db, Into::Add, scale, dy_view.t(), View::new(&u, tokens, rank, rank));
            }
            if tape.trains(a) {
                let da = ViewMut::new(tape.param_grad(a), rank, cols, cols);
                gemm_on(pool, da, Into::Add, 1.0, du_view.t(), View::new(&input, tokens, cols, cols));
            }
            let mut dx = on.engine.scratch(tokens * cols);
            gemm_on(pool, ViewMut::new(&mut dx, tokens, cols, cols), Into::Set, 1.0, du_view, a_view());
            tape.give(from, dx);
            tape.give_shared(to, dy);
        });
        out
    }
}

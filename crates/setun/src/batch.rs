//! One pass for several sequences: weights are read once for all of them.

use crate::cpu::{Buf, CpuOps, Part};
use crate::engine::{Engine, Session};
use crate::error::ModelError;
use crate::head::{Candidates, LogitsNeed};
use crate::ops::Ops;

impl Engine {
    /// Feeds each session its one of `ids`; afterwards its [`Session::logits`] have the bits that feeding it alone gives.
    ///
    /// # Errors
    /// [`ModelError::ContextFull`] where a session has no room, [`ModelError::UnknownToken`] for an id outside the vocabulary;
    /// nothing is fed then.
    ///
    /// # Panics
    /// Unless there is one id for each session, and all sessions are this engine's.
    pub fn decode_batch(&self, sessions: &mut [Session<'_>], ids: &[u32]) -> Result<(), ModelError> {
        let mut all = vec![Vec::new(); sessions.len()];
        self.batch(sessions, ids, |ops, hidden| {
            let logits = self.model.logits(ops, hidden);
            for (own, row) in all.iter_mut().zip(logits.data.chunks_exact(logits.width)) {
                own.extend_from_slice(row);
            }
            ops.release(logits);
        })?;
        sessions.iter_mut().zip(all).for_each(|(session, own)| session.logits = own);
        Ok(())
    }

    /// The same with what `needs` ask for, one for each session, in its [`Session::candidates`], as [`Session::feed_for`] has it.
    ///
    /// # Errors
    /// As [`Engine::decode_batch`].
    ///
    /// # Panics
    /// As [`Engine::decode_batch`], and unless there is one need for each session.
    pub fn decode_batch_for(
        &self,
        sessions: &mut [Session<'_>],
        ids: &[u32],
        needs: &[&LogitsNeed],
    ) -> Result<(), ModelError> {
        assert_eq!(sessions.len(), needs.len(), "one need for each session");
        let mut all = vec![Candidates::default(); sessions.len()];
        let mut work = sessions.first_mut().map(|first| std::mem::take(&mut first.head)).unwrap_or_default();
        let fed =
            self.batch(sessions, ids, |ops, hidden| self.choose(ops, hidden, needs, &mut work, &mut all));
        if let Some(first) = sessions.first_mut() {
            first.head = work;
        }
        fed?;
        for (session, own) in sessions.iter_mut().zip(all) {
            session.logits.clear();
            session.candidates = vec![own];
        }
        Ok(())
    }

    /// One pass over the next token of every session; `finish` receives their hidden states, `[sessions, hidden_size]`.
    fn batch(
        &self,
        sessions: &mut [Session<'_>],
        ids: &[u32],
        finish: impl FnOnce(&mut CpuOps, &Buf),
    ) -> Result<(), ModelError> {
        assert_eq!(sessions.len(), ids.len(), "one id for each session");
        for (session, id) in sessions.iter().zip(ids) {
            assert!(std::ptr::eq(session.engine, self), "a session of another engine");
            session.check(std::slice::from_ref(id))?;
        }
        let Some((first, rest)) = sessions.split_first_mut() else { return Ok(()) };
        let caches = std::iter::once(&mut first.cache).chain(rest.iter_mut().map(|s| &mut s.cache));
        let mut parts: Vec<Part> =
            caches.map(|cache| Part { length: cache.len() + 1, cache, tokens: 1 }).collect();
        let mut ops = CpuOps::new(self.kernels, &self.pool, &mut first.work, &mut parts, None);
        let hidden = self.model.hidden(&mut ops, ids);
        finish(&mut ops, &hidden);
        ops.release(hidden);
        ops.finish();
        sessions.iter_mut().zip(ids).for_each(|(session, &id)| session.ids.push(id));
        Ok(())
    }
}

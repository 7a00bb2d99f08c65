//! Ctrl-C: asks work that can stop cleanly to do so, and ends the program otherwise.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Ctrl-C asks the work in hand to stop; without any, or a second time, it ends the program.
#[derive(Clone)]
pub struct Interrupt(Arc<[AtomicBool; 2]>);

const WORKING: usize = 0;
const ASKED: usize = 1;

impl Interrupt {
    /// Listens from now on; can be called once.
    pub fn install() -> Result<Self> {
        let this = Self(Arc::default());
        let flags = this.clone();
        ctrlc::set_handler(move || {
            if !flags.0[WORKING].load(Ordering::Relaxed) || flags.0[ASKED].swap(true, Ordering::Relaxed) {
                std::process::exit(130); // As shells report a program that Ctrl-C ended.
            }
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(this)
    }

    /// Work begins.
    pub fn begin(&self) {
        self.0[ASKED].store(false, Ordering::Relaxed);
        self.0[WORKING].store(true, Ordering::Relaxed);
    }

    /// Whether the work is to stop.
    pub fn asked(&self) -> bool {
        self.0[ASKED].load(Ordering::Relaxed)
    }

    /// What becomes true when the work is to stop, for a library to look at.
    pub fn flag(&self) -> &AtomicBool {
        &self.0[ASKED]
    }

    /// The work is over.
    pub fn end(&self) {
        self.0[WORKING].store(false, Ordering::Relaxed);
    }
}

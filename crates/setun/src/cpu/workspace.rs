//! Buffers of a pass, lent again and again.

use setun_kernels::quant::Activations;

use crate::config::{ActivationType, ModelConfig, RopeTable};

/// Activations `[tokens, width]`.
#[derive(Debug)]
pub struct Buf {
    pub(crate) data: Floats,
    pub(crate) width: usize,
    /// Tells what is in it from all that was before.
    pub(super) contents: u64,
}

/// Memory for some floats, of which the first `used` are meant: it is lent again without being cleared or moved, which for
/// a prompt's activations costs as much as a layer's arithmetic.
#[derive(Debug)]
pub(crate) struct Floats {
    memory: Vec<f32>,
    used: usize,
}

impl std::ops::Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.memory[..self.used]
    }
}

impl std::ops::DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[..self.used]
    }
}

/// Memory that a pass needs and the next one reuses.
#[derive(Debug)]
pub struct Workspace {
    /// From the smallest to the largest.
    free: Vec<Vec<f32>>,
    pub(super) activations: Activations,
    /// Which buffer's contents `activations` are.
    pub(super) quantized: u64,
    /// Whether a product has asked for int8 inputs: then results of norms and gates, which are most often its inputs, are
    /// rounded with them.
    pub(super) int8: bool,
    contents: u64,
    pub(super) rope: RopeTable,
}

impl Workspace {
    /// An empty workspace for models with the position encoding of `config`, whose ternary layers multiply with `activations`.
    pub fn new(config: &ModelConfig, activations: ActivationType) -> Self {
        Self {
            free: Vec::new(),
            activations: Activations::rounded(activations.rounding().unwrap_or_default()),
            quantized: 0,
            int8: false,
            contents: 0,
            rope: RopeTable::new(&config.rope),
        }
    }

    /// A buffer with values of no meaning: the smallest that holds as many, else a new one in place of the largest.
    pub(super) fn buf(&mut self, tokens: usize, width: usize) -> Buf {
        let used = tokens * width;
        let at = self.free.partition_point(|memory| memory.len() < used);
        let memory = if at < self.free.len() {
            self.free.remove(at)
        } else {
            self.free.pop();
            let mut memory = vec![0.0; used];
            setun_kernels::advise_huge_pages(&mut memory);
            memory
        };
        Buf { data: Floats { memory, used }, width, contents: self.fresh() }
    }

    pub(super) fn fresh(&mut self) -> u64 {
        self.contents += 1;
        self.contents
    }

    pub(super) fn put_back(&mut self, buf: Buf) {
        let memory = buf.data.memory;
        let at = self.free.partition_point(|other| other.len() < memory.len());
        self.free.insert(at, memory);
    }
}

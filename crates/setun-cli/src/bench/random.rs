//! Models of known shapes with random weights, made as fast as memory takes them.

use anyhow::Result;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use setun::config::{
    Activation, ActivationType, Family, ModelConfig, Numerics, Rope, Shape, Storage, Ternary,
};
use setun::cpu::CpuMatrix;
use setun::engine::{Engine, EngineOptions};
use setun::error::ModelError;
use setun::model::{Model, Role, Source};
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::MatrixError;
use setun_kernels::threads::{Pool, physical_cores_allowed};
use setun_kernels::{Kernels, PackedMatrix, Scales, TernaryMatrix, advise_huge_pages};

/// Share of zeros among trained ternary weights, as measured on BitNet-b1.58-2B-4T.
const ZEROS: f64 = 0.42;

pub struct NamedShape {
    pub name: &'static str,
    shape: Shape,
    /// Qwen3: heads of 128 with norms, ternary everywhere with a scale for every 128 weights of a row.
    qwen3: bool,
}

/// What random weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    /// The blocks in trits; embedding and head in bf16, as BitNet-b1.58-2B-4T has them, or in trits too where the shape is so.
    Ternary,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Ternary => "ternary",
        }
    }

    /// Bits of a weight in the blocks, scales included.
    pub fn bits(self) -> f64 {
        match self {
            Self::F32 => 32.0,
            Self::F16 | Self::Bf16 => 16.0,
            Self::Q8_0 => 8.5,
            Self::Q4_0 => 4.5,
            Self::Ternary => 2.0,
        }
    }
}

/// Weights that share a scale in the shapes of Qwen3.
const GROUP: usize = 128;

/// A Llama-like shape: SiLU, no sub-norms.
const fn llama(
    name: &'static str,
    [hidden_size, intermediate_size, num_layers, heads, kv_heads]: [usize; 5],
    vocab_size: usize,
    tied: bool,
) -> NamedShape {
    let shape = Shape {
        vocab_size,
        hidden_size,
        intermediate_size,
        num_layers,
        heads,
        kv_heads,
        max_positions: 4096,
        rope_theta: 10000.0,
        tied,
        sub_norms: false,
        activation: Activation::Silu,
    };
    NamedShape { name, shape, qwen3: false }
}

/// The same with BitNet's sub-norms and squared ReLU.
const fn bitnet(mut named: NamedShape) -> NamedShape {
    named.shape.sub_norms = true;
    named.shape.activation = Activation::Relu2;
    named
}

/// Qwen3 as published: SiLU, norms of queries and keys, eight key heads.
const fn qwen3(name: &'static str, [hidden, inner, layers, heads]: [usize; 4], tied: bool) -> NamedShape {
    let mut named = llama(name, [hidden, inner, layers, heads, 8], 151_936, tied);
    named.qwen3 = true;
    named
}

static SHAPES: &[NamedShape] = &[
    bitnet(llama("tiny", [256, 688, 6, 8, 4], 4096, true)),
    llama("125m", [768, 2048, 12, 12, 12], 32000, true),
    llama("350m", [1024, 2816, 24, 16, 16], 32000, true),
    llama("700m", [1536, 4096, 24, 24, 24], 32000, true),
    llama("1.3b", [2048, 5504, 24, 32, 32], 32000, false),
    bitnet(llama("2b4t", [2560, 6912, 30, 20, 5], 128_256, true)),
    llama("3b", [3200, 8640, 26, 32, 32], 32000, false),
    llama("7b", [4096, 11008, 32, 32, 32], 32000, false),
    llama("8b", [4096, 14336, 32, 32, 8], 128_256, false),
    qwen3("qwen3-1.7b", [2048, 6144, 28, 16], true),
    qwen3("qwen3-4b", [2560, 9728, 36, 32], true),
    qwen3("qwen3-8b", [4096, 12288, 36, 32], false),
];

/// The shape of this name, for clap.
pub fn shape(name: &str) -> Result<&'static NamedShape, String> {
    SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| {
        let names: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
        format!("known shapes are {}", names.join(", "))
    })
}

impl NamedShape {
    /// Whether embedding and head are ternary as well.
    pub fn ternary_head(&self) -> bool {
        self.qwen3
    }

    /// The configuration with weights of `kind`.
    pub fn config(&self, kind: Kind) -> Result<ModelConfig, ModelError> {
        let mut config = ModelConfig::fresh(&self.shape, kind == Kind::Ternary)?;
        if self.qwen3 {
            config.family = Family::Qwen3;
            config.qk_norm = true;
            config.head_dim = 128;
            config.rope = Rope::new(1e6, config.head_dim);
            if kind == Kind::Ternary {
                let activations = ActivationType::Float;
                let ternary = Ternary { activations, storage: Storage::SelfDescribed, exceptions: None };
                config.numerics = Numerics::Ternary(ternary);
            }
        }
        Ok(config)
    }
}

/// A model of `shape` with weights of `kind` that depend on `seed` alone.
pub fn engine(shape: &NamedShape, kind: Kind, options: &EngineOptions, seed: u64) -> Result<Engine> {
    let pool = Pool::new(options.threads.unwrap_or_else(physical_cores_allowed));
    let kernels = options.kernels.unwrap_or_else(Kernels::best);
    let mut source = RandomSource::new(kernels, &pool, seed);
    (source.kind, source.groups, source.tied) = (kind, shape.qwen3, shape.shape.tied);
    let model = Model::build(shape.config(kind)?, &mut source)?;
    Ok(Engine::from_model(model, options))
}

/// Entries of the tables that random numbers choose from.
const TABLE_BITS: u32 = 12;

struct RandomSource<'a> {
    kernels: &'static Kernels,
    pool: &'a Pool,
    random: Random,
    /// Bytes of four codes, with the right share of zeros.
    codes: Vec<u8>,
    /// Small values around 0.
    floats: Vec<f32>,
    kind: Kind,
    /// Whether all matrices are ternary, with scales for groups of a row.
    groups: bool,
    tied: bool,
}

impl<'a> RandomSource<'a> {
    fn new(kernels: &'static Kernels, pool: &'a Pool, seed: u64) -> Self {
        let mut random = Random(seed);
        let code = |random: &mut Random| match random.unit() {
            u if u < ZEROS => 1,
            u if u < (1.0 + ZEROS) / 2.0 => 0,
            _ => 2u8,
        };
        let byte = |random: &mut Random| (0..4).fold(0, |byte, _| byte << 2 | code(random));
        let codes = (0..1 << TABLE_BITS).map(|_| byte(&mut random)).collect();
        let floats = (0..1 << TABLE_BITS).map(|_| ((random.unit() - 0.5) * 0.1) as f32).collect();
        Self { kernels, pool, random, codes, floats, kind: Kind::Ternary, groups: false, tied: true }
    }

    /// `len` draws from `table`; the same on any number of threads.
    fn draw<T: Copy + Default + Send + Sync>(table: &[T], len: usize, seed: u64, pool: &Pool) -> Vec<T> {
        let mut out = vec![T::default(); len];
        advise_huge_pages(&mut out);
        pool.run_chunks_mut(&mut out, 1 << 16, |chunk, part| {
            let mut random = Random(seed ^ (chunk as u64) << 32);
            for group in part.chunks_mut((64 / TABLE_BITS) as usize) {
                let mut bits = random.next();
                for value in group {
                    *value = table[(bits % (1 << TABLE_BITS)) as usize];
                    bits >>= TABLE_BITS;
                }
            }
        });
        out
    }
}

impl RandomSource<'_> {
    fn ternary(&self, rows: usize, cols: usize, seed: u64) -> Result<TernaryMatrix, MatrixError> {
        let codes = Self::draw(&self.codes, rows * cols.div_ceil(4), seed, self.pool);
        // Outputs keep the size of inputs.
        let scale = 1.0 / ((1.0 - ZEROS as f32) * cols as f32).sqrt();
        let scales = match self.groups {
            false => Scales::Tensor(scale),
            true => {
                // As files hold them, in half precision.
                let scale = f16::from_f32(scale).to_f32();
                Scales::Block { rows: 1, cols: GROUP, values: vec![scale; rows * cols.div_ceil(GROUP)] }
            }
        };
        TernaryMatrix::new(rows, cols, codes, scales)
    }

    fn dense(&self, rows: usize, cols: usize, seed: u64) -> DenseData {
        let count = rows * cols;
        // As integers, whose zeros the system gives untouched, so that the advice on pages comes first.
        let halves = |bits: fn(f32) -> u16| {
            let table: Vec<u16> = self.floats.iter().map(|&value| bits(value)).collect();
            Self::draw(&table, count, seed, self.pool)
        };
        let blocks = |bytes: usize, scale: f32| {
            let table: Vec<u8> = (0..1 << TABLE_BITS).map(|i| ((i * 167) >> 4) as u8).collect();
            let mut out = Self::draw(&table, rows * (cols / 32) * bytes, seed, self.pool);
            let scale = f16::from_f32(scale).to_le_bytes();
            self.pool.run_chunks_mut(&mut out, bytes << 12, |_, part| {
                part.chunks_exact_mut(bytes).for_each(|block| block[..2].copy_from_slice(&scale));
            });
            out
        };
        match self.kind {
            Kind::F32 => DenseData::F32(Self::draw(&self.floats, count, seed, self.pool)),
            Kind::F16 => DenseData::F16(halves(|x| f16::from_f32(x).to_bits()).reinterpret_into()),
            Kind::Bf16 | Kind::Ternary => {
                DenseData::BF16(halves(|x| bf16::from_f32(x).to_bits()).reinterpret_into())
            }
            Kind::Q8_0 => DenseData::Q8_0(blocks(34, 0.05 / 128.0)),
            Kind::Q4_0 => DenseData::Q4_0(blocks(18, 0.05 / 8.0)),
        }
    }
}

impl Source for RandomSource<'_> {
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<CpuMatrix, ModelError> {
        let seed = self.random.next();
        let wrong = |why: String| ModelError::Tensor { name: name.to_owned(), what: why };
        if self.kind == Kind::Ternary && (role == Role::Ternary || self.groups) {
            let matrix = self.ternary(rows, cols, seed).map_err(|e| wrong(e.to_string()))?;
            let product = || PackedMatrix::pack(&matrix, self.kernels, self.pool);
            return Ok(match role {
                Role::Embedding if self.tied => CpuMatrix::Tied { product: product(), rows: matrix },
                Role::Embedding => CpuMatrix::Codes(matrix),
                _ => CpuMatrix::Ternary(product()),
            });
        }
        let data = self.dense(rows, cols, seed);
        DenseMatrix::new(rows, cols, data).map(CpuMatrix::Dense).map_err(|e| wrong(e.to_string()))
    }

    fn vector(&mut self, _name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(vec![1.0; len])
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): any seed is a good one.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use setun::head::HeadMode;

    use super::*;

    #[test]
    fn every_shape_is_a_valid_model_near_its_name() {
        for (name, parameters) in [
            ("tiny", 6e6),
            ("125m", 110e6),
            ("350m", 340e6),
            ("700m", 730e6),
            ("1.3b", 1.34e9),
            ("2b4t", 2.41e9),
            ("3b", 3.4e9),
            ("7b", 6.74e9),
            ("8b", 8.03e9),
            ("qwen3-1.7b", 1.72e9),
            ("qwen3-4b", 4.02e9),
            ("qwen3-8b", 8.19e9),
        ] {
            let config = shape(name).unwrap().config(Kind::Ternary).unwrap();
            let ratio = config.parameters() as f64 / parameters;
            assert!((0.9..1.1).contains(&ratio), "{name}: {} parameters", config.parameters());
        }
        assert_eq!(shape("2b4t").unwrap().config(Kind::Ternary).unwrap().block_weights(), 2_084_044_800);
    }

    #[test]
    fn every_kind_of_weights_runs_and_takes_its_bits() {
        let options = EngineOptions { threads: Some(2), head: HeadMode::Exact, ..Default::default() };
        for kind in [Kind::F32, Kind::F16, Kind::Bf16, Kind::Q8_0, Kind::Q4_0] {
            let engine = engine(shape("125m").unwrap(), kind, &options, 1).unwrap();
            let config = engine.config();
            let weights = config.block_weights() + config.vocab_size * config.hidden_size;
            assert_eq!(engine.bytes_per_token() as f64, weights as f64 * kind.bits() / 8.0, "{kind:?}");
            let mut session = engine.session(Default::default(), Some(2));
            let logits = session.feed(&[1, 2]).unwrap();
            assert!(
                logits.iter().all(|l| l.is_finite()) && logits.iter().any(|l| *l != logits[0]),
                "{kind:?}"
            );
        }
    }

    #[test]
    fn random_weights_have_their_share_of_zeros_and_do_not_depend_on_threads() {
        let draw = |threads| {
            let pool = Pool::new(threads);
            let codes = RandomSource::new(Kernels::best(), &pool, 5).codes;
            RandomSource::draw(&codes, 300_000, 7, &pool)
        };
        let codes = draw(1);
        assert_eq!(codes, draw(3));
        let matrix = TernaryMatrix::new(300, 4000, codes, Scales::Tensor(1.0)).unwrap();
        assert!((matrix.zero_fraction() - ZEROS).abs() < 0.02, "{}", matrix.zero_fraction());
    }
}

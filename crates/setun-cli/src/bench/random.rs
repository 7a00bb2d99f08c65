//! Models of known shapes with random weights, made as fast as memory takes them.

use anyhow::Result;
use half::f16;
use setun::config::{Activation, ModelConfig, Shape};
use setun::cpu::CpuMatrix;
use setun::engine::{Engine, EngineOptions};
use setun::error::ModelError;
use setun::model::{Model, Role, Source};
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::threads::{Pool, physical_cores_allowed};
use setun_kernels::{Kernels, PackedMatrix, Scales, TernaryMatrix};

/// Share of zeros among trained ternary weights, as measured on BitNet-b1.58-2B-4T.
const ZEROS: f64 = 0.42;

pub struct NamedShape {
    pub name: &'static str,
    shape: Shape,
}

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
    NamedShape { name, shape }
}

/// The same with BitNet's sub-norms and squared ReLU.
const fn bitnet(mut named: NamedShape) -> NamedShape {
    named.shape.sub_norms = true;
    named.shape.activation = Activation::Relu2;
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
];

/// The shape of this name, for clap.
pub fn shape(name: &str) -> Result<&'static NamedShape, String> {
    SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| {
        let names: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
        format!("known shapes are {}", names.join(", "))
    })
}

/// A model of `shape` with weights that depend on `seed` alone.
pub fn engine(shape: &NamedShape, options: &EngineOptions, seed: u64) -> Result<Engine> {
    let pool = Pool::new(options.threads.unwrap_or_else(physical_cores_allowed));
    let kernels = options.kernels.unwrap_or_else(Kernels::best);
    let config = ModelConfig::fresh(&shape.shape, true)?;
    let model = Model::build(config, &mut RandomSource::new(kernels, &pool, seed))?;
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
    floats: Vec<f16>,
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
        let floats = (0..1 << TABLE_BITS).map(|_| f16::from_f64((random.unit() - 0.5) * 0.1)).collect();
        Self { kernels, pool, random, codes, floats }
    }

    /// `len` draws from `table`; the same on any number of threads.
    fn draw<T: Copy + Default + Send + Sync>(table: &[T], len: usize, seed: u64, pool: &Pool) -> Vec<T> {
        let mut out = vec![T::default(); len];
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

impl Source for RandomSource<'_> {
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<CpuMatrix, ModelError> {
        let seed = self.random.next();
        let wrong = |why: String| ModelError::Tensor { name: name.to_owned(), what: why };
        if role == Role::Ternary {
            let codes = Self::draw(&self.codes, rows * cols.div_ceil(4), seed, self.pool);
            // Outputs keep the size of inputs.
            let scale = Scales::Tensor(1.0 / ((1.0 - ZEROS as f32) * cols as f32).sqrt());
            let matrix = TernaryMatrix::new(rows, cols, codes, scale).map_err(|e| wrong(e.to_string()))?;
            return Ok(CpuMatrix::Ternary(PackedMatrix::pack(&matrix, self.kernels, self.pool)));
        }
        let data = DenseData::F16(Self::draw(&self.floats, rows * cols, seed, self.pool));
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
        ] {
            let config = ModelConfig::fresh(&shape(name).unwrap().shape, true).unwrap();
            let ratio = config.parameters() as f64 / parameters;
            assert!((0.9..1.1).contains(&ratio), "{name}: {} parameters", config.parameters());
        }
        assert_eq!(
            ModelConfig::fresh(&shape("2b4t").unwrap().shape, true).unwrap().block_weights(),
            2_084_044_800
        );
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

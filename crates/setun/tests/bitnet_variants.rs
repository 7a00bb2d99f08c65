//! Published W1.58A8 variants whose configurations differ from BitNet 2B-4T's, run end to end on tiny random folders against a
//! plain f64 forward pass written here: 1bitLLM (latent floats, older names of sub-norms, odd sizes), HF1BitLLM and Falcon3-1.58bit or
//! Falcon-E (packed bytes under inverted scales, heads of a width of their own).

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value as Json, json};
use setun::config::{Activation, ActivationType, Family, ModelConfig};
use setun::convert::{ConvertOptions, convert};
use setun::engine::{Engine, EngineOptions};
use setun::format::{Checkpoint, Encoding, SafetensorsWriter, TensorSpec};
use setun::kv_cache::KvType;

/// How a folder keeps its ternary layers.
#[derive(Clone, Copy, PartialEq)]
enum Kept {
    Masters,
    Inverted,
}

/// A model as its definition has it: ternary layers hold `t · γ`.
struct Naive {
    config: Json,
    kept: Kept,
    values: BTreeMap<String, (usize, usize, Vec<f64>)>,
    stored: BTreeMap<String, (Vec<usize>, Encoding, Vec<u8>)>,
    state: u64,
}

const TOKENS: usize = 20;

fn bf16(x: f64) -> f32 {
    let bits = (x as f32).to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

impl Naive {
    fn new(config: Json, kept: Kept) -> Self {
        let mut this = Self { config, kept, values: BTreeMap::new(), stored: BTreeMap::new(), state: 7 };
        let [h, f, v] = ["hidden_size", "intermediate_size", "vocab_size"].map(|key| this.size(key));
        let (heads, kv, d) = this.heads();
        this.float("model.embed_tokens.weight", v, h);
        for n in 0..this.size("num_hidden_layers") {
            let layer = format!("model.layers.{n}");
            for (part, rows, cols) in [
                ("self_attn.q_proj", heads * d, h),
                ("self_attn.k_proj", kv * d, h),
                ("self_attn.v_proj", kv * d, h),
                ("self_attn.o_proj", h, heads * d),
                ("mlp.gate_proj", f, h),
                ("mlp.up_proj", f, h),
                ("mlp.down_proj", h, f),
            ] {
                this.ternary(&format!("{layer}.{part}"), rows, cols);
            }
            this.norm(&format!("{layer}.input_layernorm.weight"), h);
            this.norm(&format!("{layer}.post_attention_layernorm.weight"), h);
            if this.has_sub_norms() {
                this.norm(&format!("{layer}.self_attn.inner_attn_ln.weight"), heads * d);
                this.norm(&format!("{layer}.mlp.ffn_layernorm.weight"), f);
            }
        }
        this.norm("model.norm.weight", h);
        if this.config["tie_word_embeddings"] == json!(false) {
            this.float("lm_head.weight", v, h);
        }
        this
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap() as usize
    }

    fn heads(&self) -> (usize, usize, usize) {
        let (heads, kv) = (self.size("num_attention_heads"), self.size("num_key_value_heads"));
        let d = self.config["head_dim"].as_u64().map_or(self.size("hidden_size") / heads, |d| d as usize);
        (heads, kv, d)
    }

    fn has_sub_norms(&self) -> bool {
        self.config["architectures"][0] == "BitnetForCausalLM"
    }

    /// Uniform in −1 … 1.
    fn next(&mut self) -> f64 {
        self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
    }

    /// Packed folders keep their floats in BF16, latent ones in F32.
    fn put(&mut self, name: &str, shape: Vec<usize>, values: Vec<f64>) {
        let (encoding, values): (_, Vec<f32>) = match self.kept {
            Kept::Masters => (Encoding::F32, values.iter().map(|&x| x as f32).collect()),
            Kept::Inverted => (Encoding::BF16, values.iter().map(|&x| bf16(x)).collect()),
        };
        let bytes = values.iter().flat_map(|x| match encoding {
            Encoding::F32 => x.to_le_bytes().to_vec(),
            _ => x.to_le_bytes()[2..].to_vec(),
        });
        self.stored.insert(name.to_owned(), (shape.clone(), encoding.clone(), bytes.collect()));
        let (rows, cols) = (shape[0], shape.get(1).copied().unwrap_or(1));
        self.values.insert(name.to_owned(), (rows, cols, values.into_iter().map(f64::from).collect()));
    }

    fn float(&mut self, name: &str, rows: usize, cols: usize) {
        let values = (0..rows * cols).map(|_| self.next()).collect();
        self.put(name, vec![rows, cols], values);
    }

    fn norm(&mut self, name: &str, len: usize) {
        let values = (0..len).map(|_| 1.0 + 0.5 * self.next()).collect();
        self.put(name, vec![len], values);
    }

    fn ternary(&mut self, module: &str, rows: usize, cols: usize) {
        let name = format!("{module}.weight");
        let effective: Vec<f64> = match self.kept {
            Kept::Masters => {
                self.float(&name, rows, cols);
                let masters = &self.values[&name].2;
                let scale = masters.iter().map(|w| w.abs()).sum::<f64>() / masters.len() as f64;
                masters.iter().map(|w| (w / scale).round_ties_even().clamp(-1.0, 1.0) * scale).collect()
            }
            Kept::Inverted => {
                let trits: Vec<i8> = (0..rows * cols).map(|_| (self.next() * 1.5).round() as i8).collect();
                self.put(&format!("{name}_scale"), vec![1], vec![(cols as f64).sqrt() * 0.7]);
                let divisor = self.values.remove(&format!("{name}_scale")).unwrap().2[0];
                // Four rows to a byte, a quarter of the matrix apart.
                let quarter = rows / 4;
                let code = |r: usize, c: usize, i: usize| {
                    ((trits[(r + i * quarter) * cols + c] + 1) as u8) << (2 * i)
                };
                let bytes = (0..quarter * cols)
                    .map(|at| (0..4).map(|i| code(at / cols, at % cols, i)).sum())
                    .collect();
                self.stored.insert(name.clone(), (vec![quarter, cols], Encoding::U8, bytes));
                trits.iter().map(|&t| f64::from(t) / divisor).collect()
            }
        };
        self.values.insert(name, (rows, cols, effective));
    }

    fn write(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let specs = self.stored.iter().map(|(name, (shape, encoding, _))| TensorSpec {
            name: name.clone(),
            shape: shape.clone(),
            encoding: encoding.clone(),
        });
        let path = folder.join("model.safetensors");
        let mut writer = SafetensorsWriter::create(&path, &[], specs.collect()).unwrap();
        while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
            writer.tensor(&self.stored[&name].2).unwrap();
        }
        writer.finish().unwrap();
    }

    fn rms(&self, x: &[f64], name: &str) -> Vec<f64> {
        let eps = self.config["rms_norm_eps"].as_f64().unwrap();
        let by = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
        x.iter().zip(&self.values[name].2).map(|(v, w)| v * by * w).collect()
    }

    fn product(&self, x: &[f64], name: &str) -> Vec<f64> {
        let (_, cols, values) = &self.values[name];
        values.chunks(*cols).map(|row| row.iter().zip(x).map(|(w, v)| w * v).sum()).collect()
    }

    /// `BitLinear`: the input rounded to int8 by its absmax.
    fn bit_linear(&self, x: &[f64], module: &str) -> Vec<f64> {
        let scale = 127.0 / x.iter().fold(1e-5f64, |m, v| m.max(v.abs()));
        let rounded: Vec<f64> =
            x.iter().map(|v| (v * scale).round_ties_even().clamp(-128.0, 127.0) / scale).collect();
        self.product(&rounded, &format!("{module}.weight"))
    }

    fn rope(&self, x: &mut [f64], position: usize) {
        let (.., d) = self.heads();
        let theta = self.config["rope_theta"].as_f64().unwrap();
        for head in x.chunks_mut(d) {
            for j in 0..d / 2 {
                let angle = position as f64 * theta.powf(-2.0 * j as f64 / d as f64);
                let (a, b) = (head[j], head[j + d / 2]);
                head[j] = a * angle.cos() - b * angle.sin();
                head[j + d / 2] = b * angle.cos() + a * angle.sin();
            }
        }
    }

    /// Logits of every position.
    fn logits(&self, ids: &[u32]) -> Vec<f64> {
        let h = self.size("hidden_size");
        let (heads, kv, d) = self.heads();
        let embedding = &self.values["model.embed_tokens.weight"].2;
        let mut xs: Vec<Vec<f64>> =
            ids.iter().map(|&id| embedding[id as usize * h..][..h].to_vec()).collect();
        for n in 0..self.size("num_hidden_layers") {
            let layer = format!("model.layers.{n}");
            let attention = |part: &str| format!("{layer}.self_attn.{part}");
            let (mut keys, mut values): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (Vec::new(), Vec::new());
            for (t, x) in xs.iter_mut().enumerate() {
                let normed = self.rms(x, &format!("{layer}.input_layernorm.weight"));
                let mut q = self.bit_linear(&normed, &attention("q_proj"));
                let mut k = self.bit_linear(&normed, &attention("k_proj"));
                self.rope(&mut q, t);
                self.rope(&mut k, t);
                keys.push(k);
                values.push(self.bit_linear(&normed, &attention("v_proj")));
                let mut mixed = vec![0.0; heads * d];
                for (head, out) in mixed.chunks_mut(d).enumerate() {
                    let at = head / (heads / kv) * d;
                    let score = |key: &Vec<f64>| {
                        let dot: f64 = q[head * d..][..d].iter().zip(&key[at..]).map(|(a, b)| a * b).sum();
                        (dot / (d as f64).sqrt()).exp()
                    };
                    let scores: Vec<f64> = keys.iter().map(score).collect();
                    let sum: f64 = scores.iter().sum();
                    for (score, value) in scores.iter().zip(&values) {
                        out.iter_mut().zip(&value[at..]).for_each(|(o, v)| *o += score / sum * v);
                    }
                }
                if self.has_sub_norms() {
                    mixed = self.rms(&mixed, &attention("inner_attn_ln.weight"));
                }
                let out = self.bit_linear(&mixed, &attention("o_proj"));
                x.iter_mut().zip(out).for_each(|(x, o)| *x += o);
                let normed = self.rms(x, &format!("{layer}.post_attention_layernorm.weight"));
                let gate = self.bit_linear(&normed, &format!("{layer}.mlp.gate_proj"));
                let up = self.bit_linear(&normed, &format!("{layer}.mlp.up_proj"));
                let mut gated: Vec<f64> =
                    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                if self.has_sub_norms() {
                    gated = self.rms(&gated, &format!("{layer}.mlp.ffn_layernorm.weight"));
                }
                let out = self.bit_linear(&gated, &format!("{layer}.mlp.down_proj"));
                x.iter_mut().zip(out).for_each(|(x, o)| *x += o);
            }
        }
        let head = match self.values.contains_key("lm_head.weight") {
            true => "lm_head.weight",
            false => "model.embed_tokens.weight",
        };
        xs.iter().flat_map(|x| self.product(&self.rms(x, "model.norm.weight"), head)).collect()
    }
}

fn engine(path: &Path) -> Engine {
    Engine::open(path, &EngineOptions { threads: Some(1), ..EngineOptions::default() })
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Logits of the folder against the naive ones, relative to their deviation. None of these inputs has an int8 code so near a
/// rounding boundary that f32 and f64 fall on different sides; then they agree to 2e-6 (docs/numerics.md on when not).
fn check(name: &str, naive: &Naive, path: &Path) -> Vec<f32> {
    let engine = engine(path);
    assert_eq!(engine.activations(), ActivationType::Int8, "{name}");
    let vocab = naive.size("vocab_size") as u32;
    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| (1 + 5 * i) % vocab).collect();
    let expected = naive.logits(&ids);
    let found = engine.session(KvType::F32, None).feed_all(&ids, None).unwrap().to_vec();
    assert_eq!(found.len(), expected.len());
    let deviation = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    let gaps: Vec<f64> =
        found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs() / deviation).collect();
    let (max, mean) =
        (gaps.iter().copied().fold(0.0, f64::max), gaps.iter().sum::<f64>() / gaps.len() as f64);
    eprintln!("{name}: max {max:.2e}, mean {mean:.2e} of the deviation {deviation:.2}");
    assert!(max <= 1e-4 && mean <= 1e-5, "{name}: max {max}, mean {mean}");
    found
}

/// Sizes of 1bitLLM's models in small: a feed-forward width that is no multiple of 8, as 5460 is not, and heads of 100.
fn one_bit_llm(tied: Option<bool>) -> Json {
    let mut config = json!({
        "architectures": ["BitnetForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 200,
        "intermediate_size": 84, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 34, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null,
        "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32, "weight_bits": 1, "input_bits": 8,
        "torch_dtype": "float16", "use_cache": true,
    });
    if let Some(tied) = tied {
        config["tie_word_embeddings"] = json!(tied);
    }
    config
}

#[test]
fn latent_floats_under_the_older_names_of_sub_norms_run_as_1bitllm_defines_them() {
    let folder = tempfile::tempdir().unwrap();
    for tied in [None, Some(true), Some(false)] {
        let naive = Naive::new(one_bit_llm(tied), Kept::Masters);
        naive.write(folder.path());
        let config = ModelConfig::of(&Checkpoint::open(folder.path()).unwrap()).unwrap();
        assert_eq!((config.family, config.activation), (Family::BitNetSilu, Activation::Silu));
        assert_eq!((config.head_dim, config.tied), (100, tied != Some(false)));
        let expected = check(&format!("1bitLLM, tied: {tied:?}"), &naive, folder.path());
        // Rows of 84 are no whole blocks of a ternary GGUF type, but float copies of the trits are one.
        let file = Checkpoint::open(folder.path()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("a.gguf");
        let to = |linear_type| ConvertOptions {
            linear_type,
            without_tokenizer: true,
            verify: true,
            ..ConvertOptions::default()
        };
        let error = convert(&file, &path, &to(None), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("multiple of 128") && error.contains("f32"), "{error}");
        convert(&file, &path, &to(Some(Encoding::F32)), &mut |_| {}).unwrap();
        assert_eq!(check("1bitLLM as GGUF", &naive, &path), expected);
    }
}

#[test]
fn packed_llamas_divide_by_their_scales() {
    // Llama3-8B-1.58: no linear_class, no list of exceptions, grouped heads. Falcon3-1.58bit and Falcon-E: heads of their own width.
    let llama = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
        "intermediate_size": 84, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 40, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": false, "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": null},
    });
    let mut falcon = llama.clone();
    falcon["head_dim"] = json!(32);
    falcon["rope_theta"] = json!(1000042);
    falcon["rms_norm_eps"] = json!(1e-6);
    falcon["quantization_config"] = json!({"quant_method": "bitnet"});
    let mut falcon_e = falcon.clone();
    falcon_e["quantization_config"] = json!({"quant_method": "bitnet", "linear_class": "bitlinear",
        "modules_to_not_convert": ["lm_head"], "quantization_mode": "offline"});
    let folder = tempfile::tempdir().unwrap();
    for (name, config) in [("HF1BitLLM", llama), ("Falcon3-1.58bit", falcon), ("Falcon-E", falcon_e)] {
        let naive = Naive::new(config, Kept::Inverted);
        naive.write(folder.path());
        check(name, &naive, folder.path());
    }
}

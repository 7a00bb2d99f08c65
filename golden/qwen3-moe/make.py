#!/usr/bin/env python3
"""Makes two tiny random Qwen3-MoE models and what they compute.

usage: make.py HERE

`float/` is a Hugging Face folder (BF16, experts one by one, a dense layer among them, weights of experts not renormalised). `ternary.gguf` has
ternary matrices under f16 scales for groups of 128 (type 42), F16 embeddings and an F32 router, as CAT-Q's files have. Both are run by
transformers' Qwen3MoeForCausalLM in float32, the second from its dequantised weights. The GGUF file is written here, byte by byte.
"""
import json
import pathlib
import struct
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shape(**changes):
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "max_position_embeddings": 256, "attention_bias": False, "tie_word_embeddings": False,
            "decoder_sparse_step": 1, "bos_token_id": 1, "eos_token_id": 2, **changes}


def tensors(c, ternary, seed):
    """Weights by their names in files, experts one by one."""
    draw = np.random.default_rng(seed)

    def matrix(rows, cols, gain=1.0):
        if not ternary:
            return draw.normal(0, gain * 1.2 / np.sqrt(cols), (rows, cols))
        trits = draw.integers(-1, 2, (rows, cols // 128, 128))
        scales = draw.uniform(0.6, 2.4, (rows, cols // 128, 1)) * gain / np.sqrt(cols)
        return (trits * scales.astype(np.float16).astype(np.float64)).reshape(rows, cols)

    h, d = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    norm = lambda n: draw.uniform(0.5, 1.5, n)
    out = {"model.embed_tokens.weight": draw.normal(0, 1, (c["vocab_size"], h))}
    for n in range(c["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        out[f"{layer}.input_layernorm.weight"] = norm(h)
        for part, rows, cols in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
            out[f"{layer}.self_attn.{part}_proj.weight"] = matrix(rows, cols)
        out[f"{layer}.self_attn.q_norm.weight"], out[f"{layer}.self_attn.k_norm.weight"] = norm(d), norm(d)
        out[f"{layer}.post_attention_layernorm.weight"] = norm(h)

        def gated(name, ff):
            for part, rows, cols in (("gate", ff, h), ("up", ff, h), ("down", h, ff)):
                out[f"{name}.{part}_proj.weight"] = matrix(rows, cols, 1.4)

        if n in c["mlp_only_layers"]:
            gated(f"{layer}.mlp", c["intermediate_size"])
            continue
        out[f"{layer}.mlp.gate.weight"] = draw.normal(0, 1.5 / np.sqrt(h), (c["num_experts"], h))
        for e in range(c["num_experts"]):
            gated(f"{layer}.mlp.experts.{e}", c["moe_intermediate_size"])
    out["model.norm.weight"] = norm(h)
    out["lm_head.weight"] = draw.normal(0, 1.5 / np.sqrt(h), (c["vocab_size"], h))
    return out


def reference(c, weights):
    """transformers' model with these weights, which it fuses as it loads them."""
    config = Qwen3MoeConfig(**{k: v for k, v in c.items() if k not in ("architectures", "model_type", "rope_theta")},
                            rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]})
    model = Qwen3MoeForCausalLM(config).float().eval()
    state = {k: torch.from_numpy(v.astype(np.float32)) for k, v in weights.items()}
    for n in range(c["num_hidden_layers"]):
        mlp = f"model.layers.{n}.mlp"
        if f"{mlp}.gate.weight" not in state:
            continue
        take = lambda part: [state.pop(f"{mlp}.experts.{e}.{part}_proj.weight") for e in range(c["num_experts"])]
        state[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(take("gate"), take("up"))])
        state[f"{mlp}.experts.down_proj"] = torch.stack(take("down"))
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def expected(c, weights, folder, seed):
    model, draw = reference(c, weights), np.random.default_rng(seed)
    values, facts = {}, {"transformers": transformers.__version__, "torch": torch.__version__, "sequences": []}
    for i, length in enumerate((24, 1, 7)):
        ids = draw.integers(3, c["vocab_size"], length).tolist()
        run = model(torch.tensor([ids]), output_hidden_states=True)
        values[f"logits.{i}"] = run.logits[0].contiguous()
        if i == 0:
            # After the embedding and every block but the last.
            values["hidden.0"] = torch.stack([h[0] for h in run.hidden_states[:-1]]).contiguous()
        greedy, margin, grown = [], [], list(ids)
        for _ in range(16):
            top = model(torch.tensor([grown])).logits[0, -1].topk(2)
            greedy.append(int(top.indices[0]))
            margin.append(float(top.values[0] - top.values[1]))
            grown.append(greedy[-1])
        facts["sequences"].append({"tokens": ids, "greedy": greedy, "smallest_margin": min(margin)})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(values, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(folder, [s["smallest_margin"] for s in facts["sequences"]], float(values["logits.0"].std()))


def q2_0_g128(values):
    """GGUF type 42 with groups of 128: an f16 scale, then weight 4m + n at bits 2n of byte m."""
    groups = values.reshape(-1, 128)
    scale = np.abs(groups).max(axis=1, keepdims=True)
    codes = (np.rint(groups / np.where(scale == 0, 1, scale)) + 1).astype(np.uint8).reshape(-1, 32, 4)
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    return np.concatenate([scale.astype("<f2").view(np.uint8), packed], axis=1).tobytes()


def gguf(path, c, weights):
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp"}
    parts |= {f"self_attn.{hf}": f"attn_{ours}" for hf, ours in (
        ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "output"), ("q_norm", "q_norm"), ("k_norm", "k_norm"))}
    entries, stacks = [], {}
    for name, value in weights.items():
        module = name.removesuffix(".weight")
        if module in names:
            entries.append((f"{names[module]}.weight", value, 0 if value.ndim == 1 else 1))
            continue
        _, _, n, part = module.split(".", 3)
        if part.startswith("mlp.experts."):
            kind = part.split(".")[-1].removesuffix("_proj")
            stacks.setdefault(f"blk.{n}.ffn_{kind}_exps.weight", []).append(value)
        else:
            entries.append((f"blk.{n}.{parts[part]}.weight", value, 42 if part.endswith("_proj") else 0))
    entries += [(name, np.stack(values), 42) for name, values in stacks.items()]

    string = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()
    u32, f32 = lambda v: struct.pack("<II", 4, v), lambda v: struct.pack("<If", 6, v)
    keys = {"general.architecture": struct.pack("<I", 8) + string("qwen3moe"), "general.alignment": u32(32)}
    own = {"vocab_size": c["vocab_size"], "context_length": c["max_position_embeddings"], "embedding_length": c["hidden_size"],
           "block_count": c["num_hidden_layers"], "feed_forward_length": c["intermediate_size"],
           "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": c["num_key_value_heads"],
           "attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"], "expert_count": c["num_experts"],
           "expert_used_count": c["num_experts_per_tok"], "expert_feed_forward_length": c["moe_intermediate_size"]}
    keys |= {f"qwen3moe.{key}": u32(value) for key, value in own.items()}
    keys["qwen3moe.attention.layer_norm_rms_epsilon"] = f32(c["rms_norm_eps"])
    keys["qwen3moe.rope.freq_base"] = f32(c["rope_theta"])
    keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"] = u32(1), u32(2)

    encode = {0: lambda v: v.astype("<f4").tobytes(), 1: lambda v: v.astype("<f2").tobytes(), 42: q2_0_g128}
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys))
    header += b"".join(string(key) + value for key, value in keys.items())
    body = b""
    for name, value, kind in entries:
        header += string(name) + struct.pack("<I", value.ndim) + struct.pack(f"<{value.ndim}Q", *reversed(value.shape))
        header += struct.pack("<IQ", kind, len(body))
        body += encode[kind](value)
        body += b"\0" * (-len(body) % 32)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + body)


def main(here):
    c = shape(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=False, mlp_only_layers=[1])
    folder = here / "float"
    weights = {k: torch.from_numpy(v).to(torch.bfloat16) for k, v in tensors(c, False, 1).items()}
    expected(c, {k: v.double().numpy() for k, v in weights.items()}, folder, 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c | {"torch_dtype": "bfloat16"}, indent=1) + "\n")

    c = shape(vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
              head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True, mlp_only_layers=[])
    weights = tensors(c, True, 3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].astype(np.float16).astype(np.float64)
    expected(c, weights, here / "ternary", 4)
    gguf(here / "ternary" / "model-q2_0-g128.gguf", c, weights)


main(pathlib.Path(sys.argv[1]))

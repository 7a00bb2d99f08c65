#!/usr/bin/env python3
"""Builds corpus/ for the fuzz targets from the small fixtures in ../golden and the past findings in regressions/."""

import json
import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"
# As in src/drive.rs.
NAMES = [
    "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "chat_template.jinja", "tokenizer.model",
]
LARGEST = 300_000


def put(target, name, data):
    if len(data) <= LARGEST:
        folder = HERE / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def gguf(pairs, tensors):
    """A GGUF file of (key, type, packed value) and (name, dims fastest first, type, data)."""
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    head += b"".join(text(k) + struct.pack("<I", t) + v for k, t, v in pairs)
    offset = 0
    for name, dims, kind, data in tensors:
        head += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
        head += struct.pack("<IQ", kind, offset)
        offset += -(-len(data) // 32) * 32
    head += bytes(-len(head) % 32)
    return head + b"".join(data + bytes(-len(data) % 32) for *_, data in tensors)


def tiny_model(arch, kind, block, size, tail):
    """One layer, 128 wide: small enough that mutations reach everything that loading does."""
    word, flt = (lambda v: struct.pack("<I", v)), (lambda v: struct.pack("<f", v))
    keys = {"context_length": 64, "embedding_length": 128, "block_count": 1, "feed_forward_length": 128,
            "attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 4, "rope.dimension_count": 64}
    pairs = [("general.architecture", 8, struct.pack("<Q", len(arch)) + arch.encode())]
    pairs += [(f"{arch}.{k}", 4, word(v)) for k, v in keys.items()]
    pairs += [(f"{arch}.attention.layer_norm_rms_epsilon", 6, flt(1e-5)), (f"{arch}.rope.freq_base", 6, flt(1e4))]
    norm = struct.pack("<128f", *[1.0] * 128)
    tensors = [("token_embd.weight", [128, 4], 1, bytes([0, 0x2c] * 512)), ("output_norm.weight", [128], 0, norm)]
    norms = ["attn_norm", "ffn_norm"] + (["attn_sub_norm", "ffn_sub_norm"] if arch.startswith("bitnet") else [])
    tensors += [(f"blk.0.{n}.weight", [128], 0, norm) for n in norms]
    if arch == "qwen3":
        tensors += [(f"blk.0.{n}.weight", [64], 0, norm[:256]) for n in ["attn_q_norm", "attn_k_norm"]]
    for name, rows in [("attn_q", 128), ("attn_k", 64), ("attn_v", 64), ("attn_output", 128),
                       ("ffn_gate", 128), ("ffn_up", 128), ("ffn_down", 128)]:
        data = bytes([0x24] * size) * (rows * 128 // block)  # Codes 0, 1 and 2; a small scale.
        data += flt(0.5) + bytes(28) if tail else b""
        tensors.append((f"blk.0.{name}.weight", [128, rows], kind, data))
    return gguf(pairs, tensors)


def folder(path, extra=()):
    """Records of a folder's files, as the target unpacks them."""
    out = b""
    for index, name in enumerate(NAMES):
        data = dict(extra).get(name) or ((path / name).read_bytes() if (path / name).is_file() else None)
        if data is not None:
            out += bytes([index]) + struct.pack("<I", len(data)) + data
    return out


def safetensors(tensors):
    header, data = {}, b""
    for name, dtype, shape, raw in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tiny_folder(sharded):
    width, vocabulary = 16, 8
    config = {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_size": width,
              "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
              "vocab_size": vocabulary, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "hidden_act": "relu2", "tie_word_embeddings": True,
              "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                      "quantization_mode": "offline"}}
    one = struct.pack("<f", 1.0)
    tensors = [("model.embed_tokens.weight", "F32", [vocabulary, width], one * vocabulary * width),
               ("model.norm.weight", "F32", [width], one * width)]
    layer = "model.layers.0."
    for name in ["input_layernorm", "post_attention_layernorm", "self_attn.attn_sub_norm", "mlp.ffn_sub_norm"]:
        tensors.append((f"{layer}{name}.weight", "F32", [width], one * width))
    for name, rows in [("self_attn.q_proj", 16), ("self_attn.k_proj", 8), ("self_attn.v_proj", 8),
                       ("self_attn.o_proj", 16), ("mlp.gate_proj", 16), ("mlp.up_proj", 16), ("mlp.down_proj", 16)]:
        tensors.append((f"{layer}{name}.weight", "U8", [rows // 4, width], bytes([0x24] * (rows // 4 * width))))
        tensors.append((f"{layer}{name}.weight_scale", "F32", [1], one))
    files = {"config.json": json.dumps(config).encode()}
    if sharded:
        halves = [tensors[:9], tensors[9:]]
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        files |= {name: safetensors(half) for name, half in zip(names, halves)}
        places = {t[0]: name for name, half in zip(names, halves) for t in half}
        files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": places}).encode()
    else:
        files["model.safetensors"] = safetensors(tensors)
    return folder(Path("/nowhere"), files.items())


TEMPLATES = [
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] | trim }}{% endfor %}",
    "{%- set ns = namespace(last='', n=0) -%}{%- for m in messages -%}{%- set ns.last = ns.last ~ m.content -%}"
    "{%- set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.last[::-1] }}{{ ns.n * 2 }}",
    "{% macro f(x, y=1) %}{{ x | tojson(indent=2) }}{{ y }}{% endmacro %}{{ f(tools) }}{{ f(messages, y=[1, 2] * 3) }}",
    "{% set x = [1, 2, 3] %}{% set x = x + x %}{{ x | map('string') | join(',') }}{{ 'ab' * 3 }}{{ x | length }}",
    "{% if messages[0].role == 'system' and 'b' in messages[0].content %}{{ messages[0].content.split('e')[-1] }}"
    "{% elif messages | length > 2 %}{{ raise_exception('no') }}{% else %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    "{% set t %}{% for i in range(10) %}abc{% if i is odd %}{% continue %}{% endif %}{% endfor %}{% endset %}"
    "{{ t | replace('a', 'bb') | indent(4) | upper }}{{ '%5d' | format(3) }}{{ {'a': 1}.items() | list }}",
    "{% filter upper %}{{ bos_token }}x{{ eos_token }}{% endfilter %}{{ messages | selectattr('role', 'equalto', 'user')"
    " | map(attribute='content') | first }}{% call(z) f() %}{{ z }}{% endcall %}",
]


def main():
    for path in sorted(GOLDEN.rglob("*.gguf")):
        put("gguf", path.name, path.read_bytes())
    for arch in ["bitnet-b1.58", "llama", "qwen2", "qwen3"]:
        for kind, block, size, tail in [(36, 4, 1, 1), (41, 128, 18, 0), (42, 64, 18, 0), (42, 128, 34, 0),
                                        (142, 128, 34, 0), (143, 128, 28, 0), (2, 32, 18, 0), (8, 32, 34, 0),
                                        (0, 1, 4, 0), (1, 1, 2, 0), (30, 1, 2, 0), (39, 32, 17, 0), (38, 4, 1, 1)]:
            put("gguf", f"tiny-{arch}-{kind}-{size}", tiny_model(arch, kind, block, size, tail))
    for path in sorted(GOLDEN.rglob("*.safetensors")):
        put("safetensors", "lone-" + "-".join(path.relative_to(GOLDEN).parts), path.read_bytes())
    for path in sorted((GOLDEN / "models").iterdir()):
        if (path / "config.json").is_file():
            put("safetensors", f"folder-{path.name}", folder(path))
    put("safetensors", "tiny", tiny_folder(False))
    put("safetensors", "tiny-sharded", tiny_folder(True))
    for path in sorted([*GOLDEN.rglob("tokenizer.json"), *GOLDEN.rglob("tok*.model")]):
        put("tokenizer_json", "-".join(path.relative_to(GOLDEN).parts), path.read_bytes())
    for path in sorted(GOLDEN.rglob("*.gguf")):
        put("tokenizer_json", path.name, path.read_bytes())
    for path in sorted(GOLDEN.rglob("chat_template.jinja")):
        put("chat_template", path.parent.name, path.read_bytes())
    for path in sorted(GOLDEN.rglob("tokenizer_config.json")):
        template = json.loads(path.read_text()).get("chat_template")
        if isinstance(template, str):
            put("chat_template", path.parent.name + "-config", template.encode())
    messages = json.dumps([["system", "s"], ["user", "hello"], ["assistant", "<think>x</think>y"], ["user", "é\n"]])
    for index, template in enumerate(TEMPLATES):
        put("chat_template", f"own-{index}", template.encode())
        put("chat_template", f"own-{index}-messages", template.encode() + b"\0" + messages.encode())
    for path in sorted((HERE / "regressions").glob("*/*")):
        put(path.parent.name, "regression-" + path.name, path.read_bytes())


main()

#!/usr/bin/env python3
"""Peak memory of `setun convert` on a synthetic sharded checkpoint (30 GB by default), which is mostly holes on the disk.

Writes a Hugging Face folder of bf16 BitNet masters under a temporary folder, converts it to GGUF and samples the
process: anonymous memory (what the program holds) apart from mapped file pages (which the system takes back). Both
folders are removed at the end. Linux only; needs room for the output (about a fifth of the input).

    python3 runs/convert_memory.py [--setun target/release/setun] [--gb 30] [--to gguf|hf] [--verify] [--dir /tmp]
"""

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 8192, 28672, 64, 8, 128256
SHARD = 5_000_000_000


def tensors(layers):
    yield "model.embed_tokens.weight", [VOCAB, HIDDEN]
    for n in range(layers):
        kv = HIDDEN // HEADS * KV_HEADS
        for name, shape in [
            ("input_layernorm", [HIDDEN]),
            ("self_attn.q_proj", [HIDDEN, HIDDEN]),
            ("self_attn.k_proj", [kv, HIDDEN]),
            ("self_attn.v_proj", [kv, HIDDEN]),
            ("self_attn.attn_sub_norm", [HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, HIDDEN]),
            ("post_attention_layernorm", [HIDDEN]),
            ("mlp.gate_proj", [FFN, HIDDEN]),
            ("mlp.up_proj", [FFN, HIDDEN]),
            ("mlp.ffn_sub_norm", [FFN]),
            ("mlp.down_proj", [HIDDEN, FFN]),
        ]:
            yield f"model.layers.{n}.{name}.weight", shape
    yield "model.norm.weight", [HIDDEN]


def size(shape):
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


def make(folder, layers):
    """The first rows of every matrix are random bf16 numbers, the rest is a hole; norms are ones."""
    shards, here = [[]], 0
    for name, shape in tensors(layers):
        if here and here + size(shape) > SHARD:
            shards.append([])
            here = 0
        shards[-1].append((name, shape))
        here += size(shape)
    places, total = {}, 0
    draw = random.Random(7)
    for n, shard in enumerate(shards, 1):
        file_name = f"model-{n:05}-of-{len(shards):05}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size(shape)]}
            places[name] = file_name
            at += size(shape)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(folder, file_name), "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            start = out.tell()
            out.truncate(start + at)
            for name, shape in shard:
                out.seek(start + header[name]["data_offsets"][0])
                if len(shape) == 1:
                    out.write(struct.pack("<H", 0x3F80) * shape[0])
                else:
                    numbers = [struct.unpack("<I", struct.pack("<f", draw.gauss(0, 0.02)))[0] >> 16 for _ in range(2 * shape[1])]
                    out.write(struct.pack(f"<{len(numbers)}H", *numbers))
        total += at
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as out:
        json.dump({"metadata": {"total_size": total}, "weight_map": places}, out)
    config = {
        "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"},
    }
    with open(os.path.join(folder, "config.json"), "w") as out:
        json.dump(config, out)
    return total, len(shards)


def kib(status, key):
    line = next((line for line in status.splitlines() if line.startswith(key + ":")), None)
    return int(line.split()[1]) if line else 0


def watch(command):
    """Runs it; gives the seconds and the peaks of anonymous and of all resident memory, in bytes."""
    started, peak, all_peak = time.time(), 0, 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as file:
                status = file.read()
        except OSError:
            break
        peak = max(peak, kib(status, "RssAnon") * 1024)
        all_peak = max(all_peak, kib(status, "VmHWM") * 1024)
        time.sleep(0.005)
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} failed")
    return time.time() - started, peak, all_peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setun", default="target/release/setun")
    parser.add_argument("--gb", type=float, default=30)
    parser.add_argument("--to", default="gguf", choices=["gguf", "hf"])
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--dir", default=None)
    args = parser.parse_args()
    one = sum(size(shape) for name, shape in tensors(1) if name.startswith("model.layers."))
    layers = max(1, round((args.gb * 1e9 - 2 * VOCAB * HIDDEN) / one))
    folder = tempfile.mkdtemp(prefix="setun-memory-", dir=args.dir)
    try:
        source, output = os.path.join(folder, "source"), os.path.join(folder, "output")
        os.mkdir(source)
        total, shards = make(source, layers)
        command = [args.setun, "convert", source, output, "--to", args.to] + ["--verify"] * args.verify
        seconds, anonymous, resident = watch(command)
        files = [os.path.join(root, name) for root, _, names in os.walk(output) for name in names] or [output]
        print(json.dumps({
            "input_bytes": total, "shards": shards, "layers": layers,
            "output_bytes": sum(os.path.getsize(file) for file in files), "to": args.to, "verify": args.verify,
            "seconds": round(seconds, 1), "peak_anonymous_bytes": anonymous, "peak_resident_bytes": resident,
        }))
        if anonymous >= 1_000_000_000:
            sys.exit("more than 1 GB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Setun's files in other programs, and theirs in Setun.

    gguf          (PyPI) reads what `setun convert` writes, tensor by tensor, and writes files that Setun runs
    transformers  loads exported folders, split ones too, and saves folders that Setun runs; logits are compared
    llama_cpp     (llama-cpp-python) runs the GGUF types it knows; greedy ids and logits are compared

A part whose package is absent is skipped aloud, and fails where SETUN_REQUIRE_EXTERNAL=1 unless --only leaves it out.

    python3 runs/roundtrip.py [--setun target/release/setun] [--only gguf,transformers,llama_cpp]
"""

import argparse
import importlib
import json
import os
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, "golden")
IDS = [3, 10, 17, 24, 31, 38, 45, 52, 59, 66, 73, 80]


class Setun:
    def __init__(self, program, folder):
        self.program, self.folder = program, folder

    def run(self, *args):
        done = subprocess.run([self.program, *map(str, args)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"setun {' '.join(map(str, args))}: {done.stderr}")
        return done.stdout

    def path(self, name):
        return os.path.join(self.folder, name)

    def convert(self, source, name, *options):
        source = source if os.path.isabs(source) else os.path.join(GOLDEN, source)
        self.run("convert", source, self.path(name), "--verify", "--force", *options)
        return self.path(name)

    def logits(self, model, *options, ids=None):
        with open(self.path("ids.json"), "w") as out:
            json.dump([ids or IDS], out)
        out = self.path("logits.safetensors")
        self.run("logits", model, "--tokens", self.path("ids.json"), "--out", out, *options)
        return tensors(out)["logits.0"]


def tensors(path):
    """A safetensors file as arrays; bf16 becomes f32, which numpy has."""
    import numpy as np

    with open(path, "rb") as file:
        data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    out = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        stored = data[8 + length + start : 8 + length + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(stored, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(stored, {"F32": np.float32, "F16": np.float16, "U8": np.uint8}[entry["dtype"]])
        out[name] = values.reshape(entry["shape"])
    return out


def report(part, what, figure):
    print(f"{part:13} {what:66} {figure}")


def check(condition, what):
    if not condition:
        sys.exit(f"FAILED: {what}")


# ---- gguf -------------------------------------------------------------------------------------------------------------


def packed_folder(path):
    """The tensors of a packed Hugging Face folder under GGUF's names, decoded here and not by Setun."""
    import numpy as np
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm",
    }
    stored = tensors(os.path.join(path, "model.safetensors"))
    out = {}
    for name, values in stored.items():
        if name.endswith("_scale"):
            continue
        if values.dtype == np.uint8:
            codes = np.concatenate([(values >> shift) & 3 for shift in (0, 2, 4, 6)]).astype(np.float32)
            values = (codes - 1) * stored[name + "_scale"].astype(np.float32)
        parts = name.removesuffix(".weight").split(".")
        if parts[1] == "layers":
            name = f"blk.{parts[2]}.{names['.'.join(parts[3:])]}.weight"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"
        out[name] = values.astype(np.float32)
    return out


def gguf_part(setun):
    import gguf
    import numpy as np

    source = os.path.join(GOLDEN, "models/bitnet-tied-packed-small")
    expected = packed_folder(source)
    for linear in ["tq1_0", "tq2_0", "f32", "f16"]:
        for embedding in ["f32", "f16", "bf16", "q8_0", "q6_k", "q4_0"]:
            path = setun.convert(source, "a.gguf", "--to", "gguf", "--type", linear, "--embedding-type", embedding)
            reader = gguf.GGUFReader(path)
            check({t.name for t in reader.tensors} == set(expected), f"tensor names of {linear}")
            for tensor in reader.tensors:
                found, want = gguf.dequantize(tensor.data, tensor.tensor_type), expected[tensor.name]
                found = found.reshape(want.shape)
                if tensor.name != "token_embd.weight" or embedding == "f32":
                    check(np.array_equal(found, want), f"{linear} {tensor.name}")
                    continue
                check(tensor.tensor_type.name.lower() == embedding, f"{embedding} is {tensor.tensor_type.name}")
                try:
                    theirs = gguf.quantize(want, tensor.tensor_type)
                    same = np.array_equal(theirs.view(np.uint8).ravel(), np.asarray(tensor.data).view(np.uint8).ravel())
                    check(same, f"bytes of {embedding}")
                except NotImplementedError:
                    off = np.sqrt(np.mean((found - want) ** 2)) / np.sqrt(np.mean(want**2))
                    check(off < 0.02, f"{embedding} is {off} off")
            losses = reader.fields.get("setun.convert.losses")
            check(embedding != "q4_0" or "Q4_0" in str(losses.contents()), "the loss is not named")
        report("gguf", f"{linear} beside six types of embedding", "every value equal, block bytes equal but Q6_K's")

    # What it writes: the same model with its own encoders.
    for kind in ["TQ1_0", "TQ2_0"]:
        reader = gguf.GGUFReader(setun.convert(source, "a.gguf", "--to", "gguf", "--type", "tq1_0"))
        path = setun.path("theirs.gguf")
        architecture = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(path, architecture)
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
        for tensor in reader.tensors:
            want = expected[tensor.name]
            block = tensor.name.startswith("blk.") and want.ndim == 2
            to = gguf.GGMLQuantizationType[kind if block else "F32"]
            writer.add_tensor(tensor.name, gguf.quantize(want, to), raw_dtype=to)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        same = np.array_equal(setun.logits(path), setun.logits(source))
        check(same, f"logits of a {kind} file written by gguf")
        back = setun.convert(path, "back", "--to", "hf")
        again = packed_folder(back)
        check(all(np.array_equal(again[name], values) for name, values in expected.items()), f"{kind} and back")
        report("gguf", f"a file of {kind} written by it", "logits equal in every bit, and the folder made of it")


# ---- transformers -----------------------------------------------------------------------------------------------------


def transformers_part(setun):
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(1)
    torch._dynamo.config.disable = True

    def theirs(path):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        # Packed layers keep the float type of the file; its numbers are exact in f32.
        for held in [*model.parameters(), *model.buffers()]:
            if held.is_floating_point():
                held.data = held.data.float()
        with torch.no_grad():
            return model, model(torch.tensor([IDS])).logits[0].float().numpy()

    cases = [
        ("models/llama-bf16-gguf/llama-bf16-q8_0.gguf", [], 1e-3),
        ("models/llama-bf16-gguf/llama-bf16-q8_0.gguf", ["--shard-size", "300KB"], 1e-3),
        ("models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf", ["--scales", "multiply"], 0.1),
        ("models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-tq1_0.gguf", ["--shard-size", "100KB"], 0.1),
        ("models/llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf", [], 0.1),
        ("models/llama-bitnet-packed", ["--scales", "divide"], 0.1),
        ("models/llama-bitnet-online-rmsnorm", ["--scales", "multiply"], 0.1),
        ("bonsai/qwen3-tied/model-tq1_0.gguf", [], 2e-3),
        ("bonsai/qwen3-untied-hd128/model-ptq1_0.gguf", ["--shard-size", "500KB"], 2e-3),
        ("bonsai/declaration/ok-v1-explicit.gguf", ["--allow-loss"], 2e-3),
        ("models/rope-llama-llama3", [], 5e-3),
        ("models/mistral-sliding-window", [], 5e-3),
        ("models/qwen2-bias", [], 5e-3),
    ]
    for source, options, tolerance in cases:
        path = setun.convert(source, "hf", "--to", "hf", *options)
        _, found = theirs(path)
        ours = setun.logits(os.path.join(GOLDEN, source))
        off = np.abs(found - ours)
        agree = np.mean(found.argmax(1) == ours.argmax(1))
        what = f"{source.split('/')[-1]} {' '.join(options)}"
        check(off.max() <= tolerance and agree >= 0.9, f"{what}: {off.max()} off, {agree} of argmax")
        report("transformers", what, f"max {off.max():.1e}, mean {off.mean():.1e}, argmax {agree:.0%}")

    for source in ["models/rope-llama-default", "models/qwen2-bias"]:
        model, expected = theirs(os.path.join(GOLDEN, source))
        model.save_pretrained(setun.path("saved"), max_shard_size="100KB")
        check(os.path.exists(setun.path("saved/model.safetensors.index.json")), "it was not split")
        back = setun.convert(setun.path("saved"), "a.gguf", "--to", "gguf")
        for path in [setun.path("saved"), back]:
            off = np.abs(setun.logits(path) - expected).max()
            check(off <= 5e-3, f"{source} saved by transformers: {off} off")
        report("transformers", f"{source.split('/')[-1]} as it saves it, split, and our GGUF of it", f"max {off:.1e}")


# ---- llama-cpp-python -------------------------------------------------------------------------------------------------


def llama_cpp_part(setun):
    import numpy as np
    import llama_cpp

    tied = "bonsai/qwen3-tied/model-tq1_0.gguf"
    llama = "models/llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf"
    plain = "models/llama-bf16-gguf/llama-bf16-q8_0.gguf"
    cases = [
        (plain, ["--type", "f32", "--embedding-type", "f32"], 0.02),
        (plain, ["--type", "f16", "--embedding-type", "f16"], 0.02),
        (plain, ["--type", "bf16", "--embedding-type", "q6_k"], 0.1),
        (plain, ["--type", "q8_0", "--embedding-type", "q8_0"], 0.1),
        (plain, ["--type", "q6_k", "--embedding-type", "q4_0"], 0.1),
        (llama, ["--type", "tq1_0"], 0.1),
        (llama, ["--type", "tq2_0"], 0.1),
        (tied, ["--type", "tq1_0"], 0.1),
        (tied, ["--type", "tq2_0"], 0.1),
        (tied, ["--type", "q2_0"], 0.1),
        (tied, ["--type", "f16", "--embedding-type", "f16"], 0.02),
        ("bonsai/qwen3-untied-hd128/model-ptq1_0.gguf", ["--type", "f16", "--embedding-type", "q8_0"], 0.1),
        ("models/bitnet-tied-packed-small", ["--type", "tq2_0"], 0.1),
    ]
    for source, options, tolerance in cases:
        path = setun.convert(source, "a.gguf", "--to", "gguf", *options)
        what = f"{os.path.splitext(os.path.basename(source))[0]} {' '.join(options)}"
        try:
            model = llama_cpp.Llama(path, n_ctx=64, n_threads=1, logits_all=True, verbose=False)
        except (ValueError, AssertionError) as error:
            report("llama_cpp", what, f"not loaded by this version: {error}")
            check("q2_0" in options or "bitnet" in source, f"{what} does not load")
            continue
        model.eval(IDS)
        found = np.array(model.scores[: len(IDS)])
        # It never rounds activations as BitNets do, so ours do not here either; it rounds them to its own blocks instead.
        ours = setun.logits(path, "--activations", "float")
        scale = ours.std()
        off = np.abs(found - ours) / scale
        agree = np.mean(found.argmax(1) == ours.argmax(1))
        check(off.mean() <= tolerance and agree >= 0.75, f"{what}: {off.mean()} off, {agree} of argmax")
        report("llama_cpp", what, f"mean {off.mean():.1e}, max {off.max():.1e} of the logits' deviation, argmax {agree:.0%}")
        model.close()


PARTS = {"gguf": gguf_part, "transformers": transformers_part, "llama_cpp": llama_cpp_part}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    parser.add_argument("--setun", default=os.path.join(target, "release/setun"))
    parser.add_argument("--only", default=",".join(PARTS))
    args = parser.parse_args()
    for part in args.only.split(","):
        try:
            for package in [part, "numpy"]:
                importlib.import_module(package)
        except ImportError as error:
            if os.environ.get("SETUN_REQUIRE_EXTERNAL") == "1":
                sys.exit(f"FAILED: {part}: {error}, but SETUN_REQUIRE_EXTERNAL=1 asks for it")
            print(f"skipped: {part}: {error}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Setun(args.setun, folder))


if __name__ == "__main__":
    main()

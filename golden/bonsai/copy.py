#!/usr/bin/env python3
"""Copies the Ternary Bonsai references that the tests need out of the full set of golden folders.

usage: copy.py FULL_SET/bonsai HERE

Expected values keep the logits and one sequence's hidden states; vectors keep their first row. The full set was computed with
transformers 5.23.0 in float32 and checked with a float64 program that reads the GGUF files.
"""
import json
import pathlib
import shutil
import struct
import sys

MODELS = {
    "qwen3-tied": ["model-tq1_0.gguf"],
    "qwen3-untied-hd128": ["model-ptq1_0.gguf"],
    "qwen35-basic": ["model-pq2_0.gguf", "tokenizer_cases.json"],
}


def trim(source, target, keep, rows=None):
    data = source.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    kept, body = {}, b""
    for name, info in header.items():
        if name == "__metadata__" or not keep(name):
            continue
        begin, end = info["data_offsets"]
        shape = info["shape"]
        if rows and len(shape) == 2:
            end = begin + (end - begin) // shape[0] * rows
            shape = [rows, shape[1]]
        kept[name] = {**info, "shape": shape, "data_offsets": [len(body), len(body) + end - begin]}
        body += data[8 + size + begin:8 + size + end]
    text = json.dumps(kept, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(struct.pack("<Q", len(text)) + text + body)


full, here = map(pathlib.Path, sys.argv[1:])
for folder, models in MODELS.items():
    trim(full / folder / "expected.safetensors", here / folder / "expected.safetensors",
         lambda name: name.startswith("logits.") or name == "hidden.0")
    for name in ["expected.json", *models]:
        shutil.copyfile(full / folder / name, here / folder / name)
    config = full / folder / "config.json"
    shutil.copyfile(config if config.exists() else full / folder / "hf-unpacked" / "config.json", here / folder / "config.json")
shutil.copytree(full / "qwen3-tied" / "mlx-2bit", here / "qwen3-tied" / "mlx-2bit", dirs_exist_ok=True)
(here / "declaration").mkdir(exist_ok=True)
for name in ["ok-v1-explicit.gguf", "expected.safetensors"]:
    shutil.copyfile(full / "declaration" / name, here / "declaration" / name)
trim(full / "transform" / "transform.safetensors", here / "transform" / "transform.safetensors",
     lambda name: name[0] in "0123" or name.startswith("perm"), rows=1)
trim(full / "published-fragments" / "fragments.safetensors", here / "published-fragments" / "fragments.safetensors",
     lambda name: name in ["x_5120", "forward_5120", "inverse_5120", "signs_5120"], rows=1)

#!/usr/bin/env python3
"""Copies the reference models that the parity tests need out of the full set of golden folders.

usage: copy.py FULL_SET HERE

Expected values lose what no test reads (outputs inside blocks); everything else is copied as it is. The full set was computed
with independent programs: transformers 5.23.0 in float32, and bitnet.cpp for `I2_S.logits_bitnetcpp`.
"""
import json
import pathlib
import shutil
import struct
import sys

FOLDERS = {
    "bitnet-tied-packed-small": None,
    "bitnet-tied-packed-small-gguf": ["bitnet-tied-packed-small-i2_s.gguf", "bitnet-tied-packed-small-tq1_0.gguf"],
    "bitnet-untied-packed": None,
    "llama-bitnet-packed": None,
    "llama-bitnet-packed-gguf": ["llama-bitnet-packed-tq2_0.gguf", "llama-bitnet-packed-i2_s-by-bitnetcpp.gguf"],
    "llama-bitnet-online-rmsnorm": None,
    "llama-bf16-gguf": ["llama-bf16-q8_0.gguf"],
    "rope-llama-default": None,
    "rope-llama-linear": None,
    "rope-llama-dynamic": None,
    "rope-llama-yarn": None,
    "rope-llama-llama3": None,
    "mistral-sliding-window": None,
    "qwen2-bias": None,
}


def trim(source, target):
    data = source.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    kept, body = {}, b""
    for name, info in header.items():
        if name == "__metadata__" or name.startswith("inner."):
            continue
        begin, end = info["data_offsets"]
        kept[name] = {**info, "data_offsets": [len(body), len(body) + end - begin]}
        body += data[8 + size + begin:8 + size + end]
    text = json.dumps(kept, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + body)


full, here = map(pathlib.Path, sys.argv[1:])
for folder, models in FOLDERS.items():
    (here / folder / "expected").mkdir(parents=True, exist_ok=True)
    for file in sorted((full / folder).iterdir()):
        if file.is_file() and (models is None or file.name in models):
            shutil.copyfile(file, here / folder / file.name)
    for file in sorted((full / folder / "expected").iterdir()):
        target = here / folder / "expected" / file.name
        if file.name == "values.safetensors":
            trim(file, target)
        else:
            shutil.copyfile(file, target)

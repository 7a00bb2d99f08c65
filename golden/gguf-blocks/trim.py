"""Makes blocks.safetensors: the block types this library reads, taken from a larger fixture.

Usage: trim.py GGUF_BLOCKS.safetensors BITLINEAR_OPS.safetensors OUT.safetensors
"""

import json
import struct
import sys

BLOCKS = [
    "source", "ternary.source",
    "F16.bytes", "F16.f32", "BF16.bytes", "BF16.f32", "Q8_0.bytes", "Q8_0.f32",
    "TQ1_0.bytes", "TQ1_0.f32", "TQ2_0.bytes", "TQ2_0.f32",
    "TQ1_0.nonternary.bytes", "TQ1_0.nonternary.f32",
    "TQ2_0.nonternary.bytes", "TQ2_0.nonternary.f32",
    "I2_S.x86.bytes",
]
PACKING = [
    "edge.pack.ternary", "edge.pack.packed", "basic.w_ternary", "basic.w_packed_u8",
    "batch3d.w_ternary", "batch3d.w_packed_u8", "edge.conv.packed",
    "edge.conv.autobitlinear_weight_scale", "edge.conv.bitlinear_weight_scale",
]


def read(path):
    with open(path, "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def main(blocks, ops, out):
    header, body = {}, b""
    chosen = [(read(blocks), name) for name in BLOCKS] + [(read(ops), name) for name in PACKING]
    width = {"F32": 0, "I8": 1, "U8": 1}
    chosen.sort(key=lambda c: width[c[0][0][c[1]]["dtype"]])
    for (entries, data), name in chosen:
        entry = entries[name]
        start, end = entry["data_offsets"]
        header[name] = dict(entry, data_offsets=[len(body), len(body) + end - start])
        body += data[start:end]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + body)


main(*sys.argv[1:])

"""Makes blocks.safetensors: the block types this library reads, taken from a larger fixture.

Usage: trim.py GGUF_BLOCKS.safetensors BITLINEAR_OPS.safetensors OUT.safetensors
"""

import json
import struct
import sys

WITH_VALUES = [
    "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "MXFP4",
    "TQ1_0", "TQ2_0", "TQ1_0.nonternary", "TQ2_0.nonternary",
]
BLOCKS = ["source", "ternary.source"]
BLOCKS += [f"{name}.{part}" for name in WITH_VALUES for part in ("bytes", "f32")]
BLOCKS += [f"{name}.bytes" for name in ("I2_S.x86", "I2_S.neon", "I2_S.rows4", "IQ1_BN", "IQ2_BN")]
TILES = ["TL1.128x256", "TL1.320x256", "TL2.128x384", "TL2.160x416"]
BLOCKS += [f"{name}.{part}" for name in TILES for part in ("bytes", "ternary")]
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


def write(chosen, out):
    """Writes tensors given as (what `read` returned, name), in their order, wider types first."""
    header, body = {}, b""
    width = {"F32": 0, "I8": 1, "U8": 1}
    for (entries, data), name in sorted(chosen, key=lambda c: width[c[0][0][c[1]]["dtype"]]):
        entry = entries[name]
        start, end = entry["data_offsets"]
        header[name] = dict(entry, data_offsets=[len(body), len(body) + end - start])
        body += data[start:end]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + body)


def main(blocks, ops, out):
    write([(read(blocks), name) for name in BLOCKS] + [(read(ops), name) for name in PACKING], out)


if __name__ == "__main__":
    main(*sys.argv[1:])

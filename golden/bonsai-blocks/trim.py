"""Makes blocks.safetensors: the ternary block types of the Bonsai releases, and one published row.

Usage: trim.py BLOCKS.safetensors FRAGMENTS.safetensors OUT.safetensors
"""

import json
import struct
import sys

FRAGMENTS = ["ffn_gate_row0_f32", "ffn_gate_row0_ptq1_0"]


def read(path):
    with open(path, "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def main(blocks, fragments, out):
    header, body = {}, b""
    blocks, fragments = read(blocks), read(fragments)
    chosen = [(blocks, name) for name in blocks[0]] + [(fragments, name) for name in FRAGMENTS]
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

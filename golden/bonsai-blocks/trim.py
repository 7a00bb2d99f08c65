"""Makes blocks.safetensors: the ternary block types of the Bonsai releases, and one published row.

Usage: trim.py BLOCKS.safetensors FRAGMENTS.safetensors OUT.safetensors
"""

import pathlib
import sys

sys.dont_write_bytecode = True  # leave no cache beside the scripts
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "gguf-blocks"))

from trim import read, write

FRAGMENTS = ["ffn_gate_row0_f32", "ffn_gate_row0_ptq1_0"]


def main(blocks, fragments, out):
    blocks, fragments = read(blocks), read(fragments)
    write([(blocks, name) for name in blocks[0]] + [(fragments, name) for name in FRAGMENTS], out)


if __name__ == "__main__":
    main(*sys.argv[1:])

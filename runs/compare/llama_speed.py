#!/usr/bin/env python3
"""Speed of the same random model in llama.cpp and in Setun, for docs/results.md.

usage: llama_speed.py [--setun PROGRAM] [--types TQ1_0,TQ2_0,Q4_0] [--layers N] [--threads N] [--repeats N] [--json FILE]

The shape is BitNet-b1.58-2B-4T's (hidden 2560, feed-forward 6912, 30 layers, 20 heads, 5 key heads, vocabulary 128,256, tied f16
embedding) with plain Llama layers, since llama.cpp does not load `bitnet-b1.58` files. One file of each type is written, run by both
programs in fresh processes in the order A B B A, and removed: prefill of 512 tokens, then 64 tokens one by one after 16. Needs
`llama-cpp-python` and `numpy`; about 2 GB of disk.
"""
import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, INNER, KV, HEADS, KV_HEADS, VOCAB = 2560, 6912, 640, 20, 5, 128_256
PREFILL, DECODE, DEPTH = 512, 64, 16
# Number in GGUF, weights and bytes of a block.
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66)}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--setun", default="target/release/setun")
parser.add_argument("--types", default="TQ1_0,TQ2_0,Q4_0")
parser.add_argument("--layers", type=int, default=30)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--json", type=Path)
parser.add_argument("--child", help=argparse.SUPPRESS)
args = parser.parse_args()
random = np.random.default_rng(1)


def draw(table, count):
    """`count` bytes from a table, fast enough for gigabytes."""
    return table[random.integers(0, len(table), count, dtype=np.uint16)]


def data(kind, rows, cols):
    """Random weights: the scale of a block keeps outputs as large as inputs."""
    count = rows * cols
    if kind == "F32":
        return np.ones(count, np.float32)
    if kind == "F16":
        return draw(random.normal(0, 0.02, 4096).astype(np.float16), count)
    _, weights, size = TYPES[kind]
    blocks = np.empty((count // weights, size), np.uint8)
    scale = np.frombuffer(np.float16(1.3 / cols**0.5).tobytes(), np.uint8)
    if kind == "Q4_0":
        blocks[:, 2:] = draw(np.arange(256, dtype=np.uint8), blocks.shape[0] * 16).reshape(-1, 16)
        blocks[:, :2] = np.frombuffer(np.float16(0.2 / cols**0.5).tobytes(), np.uint8)
    elif kind == "TQ2_0":
        codes = [a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
        blocks[:, :64] = draw(np.array(codes, np.uint8), blocks.shape[0] * 64).reshape(-1, 64)
        blocks[:, 64:] = scale
    else:
        five = np.array([(n * 256 + 242) // 243 for n in range(243)], np.uint8)
        four = np.array([(3 * n * 256 + 242) // 243 for n in range(81)], np.uint8)
        blocks[:, :48] = draw(five, blocks.shape[0] * 48).reshape(-1, 48)
        blocks[:, 48:52] = draw(four, blocks.shape[0] * 4).reshape(-1, 4)
        blocks[:, 52:] = scale
    return blocks


def write(path, kind):
    """A GGUF file without a vocabulary of its own."""
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    number = lambda v: struct.pack("<II", 4, v)
    metadata = {
        "general.architecture": struct.pack("<I", 8) + text("llama"),
        "tokenizer.ggml.model": struct.pack("<I", 8) + text("none"),
        "llama.vocab_size": number(VOCAB),
        "llama.context_length": number(4096),
        "llama.embedding_length": number(HIDDEN),
        "llama.block_count": number(args.layers),
        "llama.feed_forward_length": number(INNER),
        "llama.attention.head_count": number(HEADS),
        "llama.attention.head_count_kv": number(KV_HEADS),
        "llama.rope.dimension_count": number(HIDDEN // HEADS),
        "llama.rope.freq_base": struct.pack("<If", 6, 500000.0),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", 6, 1e-5),
    }
    tensors = [("token_embd.weight", "F16", VOCAB, HIDDEN), ("output_norm.weight", "F32", 1, HIDDEN)]
    for n in range(args.layers):
        tensors += [(f"blk.{n}.{name}.weight", "F32", 1, HIDDEN) for name in ("attn_norm", "ffn_norm")]
        shapes = [("attn_q", HIDDEN, HIDDEN), ("attn_k", KV, HIDDEN), ("attn_v", KV, HIDDEN), ("attn_output", HIDDEN, HIDDEN)]
        shapes += [("ffn_gate", INNER, HIDDEN), ("ffn_up", INNER, HIDDEN), ("ffn_down", HIDDEN, INNER)]
        tensors += [(f"blk.{n}.{name}.weight", kind, rows, cols) for name, rows, cols in shapes]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value for key, value in metadata.items())
    at = 0
    for name, type_, rows, cols in tensors:
        number_, weights, size = TYPES[type_]
        shape = [cols] if rows == 1 else [cols, rows]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number_, at)
        at += -(-(rows * cols // weights * size) // 32) * 32
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for _, type_, rows, cols in tensors:
            written = file.write(data(type_, rows, cols).tobytes())
            file.write(bytes(-written % 32))


def llama(path):
    """Tokens per second of llama.cpp, by its C interface, as JSON: runs in a process of its own."""
    import ctypes

    import llama_cpp as l

    l.llama_backend_init()
    # Kept alive: the library would forget its callback otherwise.
    global quiet
    quiet = l.llama_log_callback(lambda level, message, data: None)
    l.llama_log_set(quiet, ctypes.c_void_p(0))
    model = l.llama_model_load_from_file(path.encode(), l.llama_model_default_params())
    params = l.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, PREFILL, PREFILL
    params.n_threads = params.n_threads_batch = args.threads
    context = l.llama_init_from_model(model, params)
    ids = [int(i) for i in random.integers(0, VOCAB, PREFILL)]

    def feed(tokens):
        array = (l.llama_token * len(tokens))(*tokens)
        if l.llama_decode(context, l.llama_batch_get_one(array, len(tokens))) != 0:
            sys.exit("llama_decode failed")
        l.llama_synchronize(context)

    def timed(before, then):
        l.llama_memory_clear(l.llama_get_memory(context), True)
        if before:
            feed(before)
        started = time.perf_counter()
        for tokens in then:
            feed(tokens)
        return sum(map(len, then)) / (time.perf_counter() - started)

    prefill = lambda: timed([], [ids])
    decode = lambda: timed(ids[:DEPTH], [[i] for i in ids[:DECODE]])
    prefill(), decode()
    print(json.dumps({"prefill": [prefill() for _ in range(args.repeats)], "decode": [decode() for _ in range(args.repeats)]}))


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.strip())


def measure(program, path):
    """Best and median rate of the repeats of one process, by phase."""
    options = ["--threads", str(args.threads), "--repeats", str(args.repeats)]
    if program == "llama.cpp":
        found = run([sys.executable, __file__, "--child", str(path), *options])
        return {phase: (max(rates), statistics.median(rates)) for phase, rates in found.items()}
    lengths = ["--prefill", str(PREFILL), "--decode", str(DECODE), "--depth", str(DEPTH)]
    found = run([args.setun, "bench", str(path), *lengths, *options, "--json"])
    return {r["phase"]: (r["tokens_per_s"], r["tokens_per_s_median"]) for r in found["results"]}


def main():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types.split(","):
            path = Path(folder) / f"{kind}.gguf"
            write(path, kind)
            found = {"llama.cpp": [], "setun": []}
            for program in ("llama.cpp", "setun", "setun", "llama.cpp"):
                found[program].append(measure(program, path))
            for phase in ("decode", "prefill"):
                row = {"type": kind, "phase": phase}
                for program, runs in found.items():
                    best, medians = zip(*(rates[phase] for rates in runs))
                    row[program] = {"best": max(best), "median": statistics.mean(medians)}
                row["ratio_of_best"] = row["setun"]["best"] / row["llama.cpp"]["best"]
                rows.append(row)
            path.unlink()
    print("type   phase    llama.cpp best (median)   setun best (median)   ratio of best")
    for r in rows:
        theirs, ours = r["llama.cpp"], r["setun"]
        print(
            f"{r['type']:6} {r['phase']:8} {theirs['best']:12.1f} ({theirs['median']:.1f})"
            f" {ours['best']:14.1f} ({ours['median']:.1f}) {r['ratio_of_best']:14.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "layers": args.layers, "rows": rows}, indent=1) + "\n")


if args.child:
    llama(args.child)
else:
    main()

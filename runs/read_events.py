#!/usr/bin/env python3
"""Reads a run's event files with TensorBoard's own reader and compares them with its metrics.jsonl.

    python3 runs/read_events.py out/smoke

Needs the Python package `tensorboard`; without it, says so and checks nothing (exit code 0).
"""
import json
import struct
import sys
from pathlib import Path

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    print("SKIPPED: the Python package `tensorboard` is not installed, so nothing was checked")
    sys.exit(0)

TRAIN = ["loss", "lr", "grad_norm", "tokens_per_s", "peak_share", "flip_rate", "zero_fraction", "scale", "dead_rows"]


def single(x):
    """x as a 32-bit float, which is what event files hold."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def main(run):
    expected = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(line)
        for key, value in line.items():
            if value is None:
                continue
            if key in TRAIN:
                expected.setdefault(f"train/{key}", []).append((line["step"], single(value)))
            for measure in ("loss", "bits_per_byte"):
                if key.startswith("eval_") and key.endswith("_" + measure):
                    tag = f"eval/{key[5:-len(measure) - 1]}/{measure}"
                    expected.setdefault(tag, []).append((line["step"], single(value)))
    reader = EventAccumulator(str(run), size_guidance={"scalars": 0})
    reader.Reload()
    found = {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    if not expected:
        sys.exit(f"{run}/metrics.jsonl holds nothing to compare")
    for tag in sorted(expected.keys() | found.keys()):
        if expected.get(tag) != found.get(tag):
            sys.exit(f"{tag} differs: {expected.get(tag, [])[:3]} in the metrics, {found.get(tag, [])[:3]} in the events")
        print(f"{tag}: {len(found[tag])} values, the last {found[tag][-1][1]:.6g} at step {found[tag][-1][0]}")
    print(f"{len(found)} tags agree with {run}/metrics.jsonl")


if len(sys.argv) != 2:
    sys.exit(__doc__)
main(Path(sys.argv[1]))

#!/usr/bin/env python3
"""Decoding beside busy processes, as a share of what the scheduler leaves.

    runs/under_load.py [--busy 8] [--shape 2b4t] [--setun target/release/setun]

Measures `setun bench` alone, beside N processes that never rest, and alone again. With T threads on C cores and N others, the
scheduler leaves a share of C / (T + N) of the speed (for T = C).
"""

import argparse
import json
import subprocess
import sys
import time


def bench(setun, shape, threads):
    command = [setun, "bench", "--shape", shape, "--prefill", "0", "--decode", "32", "--repeats", "5", "--json"]
    done = subprocess.run(command + ["--threads", str(threads)], capture_output=True, text=True, check=True)
    (result,) = json.loads(done.stdout)["results"]
    return result["tokens_per_s_median"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=8)
    parser.add_argument("--shape", default="2b4t")
    parser.add_argument("--setun", default="target/release/setun")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    alone = bench(args.setun, args.shape, args.threads)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        time.sleep(1)
        beside = bench(args.setun, args.shape, args.threads)
    finally:
        for other in others:
            other.kill()
            other.wait()
    again = bench(args.setun, args.shape, args.threads)
    quiet = max(alone, again)
    left = args.threads / (args.threads + args.busy)
    print(f"alone {alone:.2f} and {again:.2f} tok/s, beside {args.busy} busy processes {beside:.2f} tok/s")
    print(f"the scheduler leaves {left:.0%}; reached {beside / quiet:.1%}, which is {beside / quiet / left:.0%} of it")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes the default model's stories of seeds 1-20, unselected, as Markdown for its card.

usage: stories.py SETUN MODEL > stories.md

Words of the list in blocked.tsv (kept as hashes) are masked, not replaced: the story stays.
"""
import csv
import hashlib
import pathlib
import re
import subprocess
import sys

setun, model = sys.argv[1:]
blocked = set()
with open(pathlib.Path(__file__).with_name("blocked.tsv")) as table:
    for row in csv.reader((line for line in table if not line.startswith("#")), delimiter="\t"):
        blocked.add(row[1])


def mask(word):
    digest = hashlib.sha256(word.group().lower().encode()).hexdigest()[:16]
    return "*" * len(word.group()) if digest in blocked else word.group()


for seed in range(1, 21):
    command = [setun, "run", model, "-p", "Once upon a time", "-n", "400", "--seed", str(seed)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"[A-Za-z']+", mask, "Once upon a time" + text.rstrip())
    quoted = "\n".join("> " + line if line else ">" for line in text.split("\n"))
    print(f"**Seed {seed}**\n\n{quoted}\n")

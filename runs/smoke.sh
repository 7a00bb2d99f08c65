#!/usr/bin/env bash
# From text to a talking ternary model in under a minute: data -> train -> export -> convert -> eval -> run.
# Exits non-zero at the first thing that fails. Files go to out/smoke.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet
setun=${CARGO_TARGET_DIR:-target}/release/setun
started=$SECONDS
rm -rf out/smoke

"$setun" train runs/smoke.toml
test -s out/smoke/metrics.jsonl && test -s out/smoke/layers.jsonl && test -s out/smoke/loss.svg
python3 runs/read_events.py out/smoke # Skips, aloud, without the package `tensorboard`.

"$setun" convert out/smoke/model out/smoke/model.gguf --to gguf --type i2_s --verify
"$setun" info out/smoke/model.gguf

# A model that learned nothing gives each of 512 tokens the same chance: perplexity 512.
"$setun" eval ppl --model out/smoke/model.gguf --file runs/smoke/valid.txt --json | tee out/smoke/ppl.json
python3 - out/smoke/ppl.json <<'PY'
import json, sys
found = json.load(open(sys.argv[1]))
assert 1 < found["perplexity"] < 150, found
PY

# The packed file and the folder it came from are the same model: the same text from the same seed.
for model in out/smoke/model out/smoke/model.gguf; do
    "$setun" run "$model" -p "Once upon a time" -n 40 --seed 1 > "out/smoke/$(basename "$model").txt"
done
cmp out/smoke/model.txt out/smoke/model.gguf.txt
test -s out/smoke/model.txt
cat out/smoke/model.txt
echo "smoke: everything works, $((SECONDS - started)) s" >&2

#!/usr/bin/env bash
# Runs every fuzz target for MINUTES each and prints the executions; exits 1 at the first finding.
#   fuzz/run.sh [MINUTES] [TARGET…]      nightly Rust and cargo-fuzz needed
set -euo pipefail
cd "$(dirname "$0")"
minutes=${1:-10}
targets=("${@:2}")
((${#targets[@]})) || targets=(gguf safetensors tokenizer_json chat_template)
# Where a library panics inside a catch, writing a backtrace would take seconds.
export RUST_BACKTRACE=0
# Inputs are written to files and opened; in memory that is faster.
if [[ -d /dev/shm && -z ${TMPDIR:-} ]]; then export TMPDIR=/dev/shm; fi

python3 corpus.py
for target in "${targets[@]}"; do
    cargo +nightly fuzz build "$target"
done
for target in "${targets[@]}"; do
    log=$(mktemp)
    # Memory that the C library keeps for the end of a thread looks like a leak.
    options=(-detect_leaks=0 -max_total_time=$((minutes * 60)) -timeout=5 -report_slow_units=2 -rss_limit_mb=4096 -print_final_stats=1)
    [[ -f $target.dict ]] && options+=(-dict="$target.dict")
    case $target in
        gguf | safetensors) options+=(-max_len=200000) ;;
        tokenizer_json) options+=(-max_len=100000) ;;
        chat_template) options+=(-max_len=20000) ;;
    esac
    status=0
    cargo +nightly fuzz run "$target" -- "${options[@]}" >"$log" 2>&1 || status=$?
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    slowest=$(sed -n 's/^stat::slowest_unit_time_sec: *//p' "$log")
    echo "$target: ${executions:-0} executions in $minutes minutes, slowest ${slowest:-?} s, exit $status"
    if ((status)); then
        tail -n 60 "$log"
        exit 1
    fi
    rm "$log"
done

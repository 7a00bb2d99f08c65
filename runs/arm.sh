#!/usr/bin/env bash
# 64-bit ARM without an ARM machine: cross-built, then run by qemu-user as CPUs with and without dot products and 8-bit matrix products.
# The kernels' tests demand equal bits of every set that such a CPU has; the default model must tell what it tells on this machine.
#
#   runs/arm.sh             all of it; host's program: ${CARGO_TARGET_DIR:-target}/release/setun, built first
#
# Debian 12: dpkg --add-architecture arm64 && apt-get update
#            apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user rustc-web libstd-rust-web-dev:arm64
# (the last two are not needed after `rustup target add aarch64-unknown-linux-gnu`).
set -euo pipefail
cd "$(dirname "$0")/.."
triple=aarch64-unknown-linux-gnu

skip() {
    [[ ${SETUN_REQUIRE_EXTERNAL:-} != 1 ]] || { echo "arm: $1" >&2; exit 1; }
    echo "skipped: 64-bit ARM: $1" >&2
    exit 0
}

for program in qemu-aarch64 aarch64-linux-gnu-gcc; do
    command -v "$program" >/dev/null || skip "there is no $program"
done
for rustc in rustc /usr/bin/rustc; do
    found=$("$rustc" --print target-libdir --target "$triple" 2>/dev/null) && compgen -G "$found/libstd-*.rlib" >/dev/null && break
    rustc=
done
[[ $rustc ]] || skip "no Rust compiler here has the standard library of $triple"

cargo build --release --quiet
host=${CARGO_TARGET_DIR:-target}/release/setun

# Files of its own: two compilers in one folder would rebuild each other's.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/arm RUSTC=$rustc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
cross=(--target "$triple" --profile cross)
# The loader of libc6:arm64, where it is installed, since it finds that package's libraries wherever it comes from itself.
qemu=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
[[ ! -e /lib/ld-linux-aarch64.so.1 ]] || qemu=(qemu-aarch64)
emulate() { # CPU PROGRAM...
    "${qemu[@]}" -cpu "$@"
}
kernels_tests() { # CPU ARGUMENTS...
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="${qemu[*]} -cpu $1" \
        cargo test --quiet -p setun-kernels "${cross[@]}" --lib --test exactness -- "${@:2}"
}

cargo check --quiet -p setun-kernels --no-default-features "${cross[@]}"
cargo build --quiet -p setun-cli "${cross[@]}"
setun=$CARGO_TARGET_DIR/$triple/cross/setun

# Everything where all sets are present; where some are not, that no instruction of theirs is used: integer products, since the
# float loops have one set for all three.
kernels_tests max
for cpu in cortex-a76 cortex-a72; do
    kernels_tests "$cpu" --skip finite_positive_peak --skip threads:: --skip attention:: --skip delta:: --skip dense:: --skip float::
done

# The second prompt is long enough for its weights to be unpacked.
text() { # COMMAND...
    for prompt in "Once upon a time" "One day, a little girl named Lily found a big, red apple in the park and wanted to share it with her friend Tom." "Tom said:"; do
        "$@" run -p "$prompt" -n 60 --temperature 0 --seed 1 --kernel "$kernel"
        echo
    done
}
kernel=scalar
expected=$(text "$host" 2>/dev/null)
[[ ${#expected} -gt 300 ]] || { echo "arm: the default model says too little to compare: $expected" >&2; exit 1; }
for case in max:neoni8mm cortex-a76:neondot cortex-a72:neon cortex-a72:scalar; do
    cpu=${case%:*} kernel=${case#*:}
    [[ $(text emulate "$cpu" "$setun" 2>/dev/null) == "$expected" ]] || {
        echo "arm: with kernel $kernel on $cpu the default model says something else than on this machine" >&2
        exit 1
    }
done
for case in cortex-a76:neoni8mm cortex-a72:neondot; do
    ! emulate "${case%:*}" "$setun" run -n 1 --kernel "${case#*:}" >/dev/null 2>&1 || {
        echo "arm: kernel ${case#*:} is offered on a ${case%:*}, which lacks its instructions" >&2
        exit 1
    }
done
echo "arm: equal bits and the same text on every kernel set, $SECONDS s" >&2

#!/bin/sh
# Builds target/release/gpt-cat with a profile of itself at work (profile-guided optimization): an instrumented build, one
# round of the load bench through it, and a build that uses what was seen. Figures: ARCHITECTURE.md, "CPU against nginx".
# Takes three release builds. Needs what the load bench needs (nginx, taskset), and rustup for LLVM's tools.
set -eu
cd "$(dirname "$0")/.."
work=$PWD/target/pgo
rustup component add llvm-tools
profdata=$(rustc --print target-libdir)/../bin/llvm-profdata

rm -rf "$work/seen"
RUSTFLAGS="${RUSTFLAGS-} -Cprofile-generate=$work/seen" cargo build --locked --release --bin gpt-cat --target-dir "$work/build"
cp "$work/build/release/gpt-cat" "$work/instrumented"
rm -rf "$work/seen" # of build scripts and macros
cargo bench --locked --bench load -- cpu --rounds 1 --gateway "$work/instrumented"
"$profdata" merge -o "$work/gpt-cat.profdata" "$work"/seen/*.profraw
RUSTFLAGS="${RUSTFLAGS-} -Cprofile-use=$work/gpt-cat.profdata" cargo build --locked --release --bin gpt-cat --target-dir "$work/build"
mkdir -p target/release
cp "$work/build/release/gpt-cat" target/release/gpt-cat

#!/usr/bin/env bash
# Configures, builds and runs the native tests of one preset: tools/native_test.sh dev|asan|tsan|coverage
set -euo pipefail
cd "$(dirname "$0")/.."

preset="$1"
mkdir -p build
exec 9>"build/.$preset.lock"
flock 9

# Configuring says much on every run and nothing new: keep it for a failure.
if ! cmake --preset "$preset" >"build/$preset.configure.log" 2>&1; then
  cat "build/$preset.configure.log" >&2
  exit 1
fi
cmake --build --preset "$preset"
exec ctest --preset "$preset" 9>&-

#!/usr/bin/env bash
# Brings .venv up to date, doing only what is stale:
#
#   1. the environment itself, when it is missing or its interpreter is gone;
#   2. the tools and libraries of pyproject.toml, when that file changed;
#   3. the native extension and the editable install, when a native source changed.
#
# What was done is recorded inside .venv, so that removing .venv forgets it too. A lock makes two
# `make` runs in one checkout wait for each other instead of building into the same directory.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly venv=.venv
readonly python="$venv/bin/python"
readonly stamps="$venv/.stamps"

mkdir -p build
exec 9>build/.setup.lock
if ! flock -n 9; then
  echo "waiting for another setup of this checkout ..."
  flock 9
fi

pip() {
  "$python" -m pip --disable-pip-version-check --quiet "$@"
}

# Hashes the content of the files named on standard input, and their names.
digest() {
  xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# Runs the given command unless it succeeded before with the same digest.
once_per() {
  local name="$1" wanted="$2"
  shift 2
  if [[ "$(cat "$stamps/$name" 2>/dev/null || true)" == "$wanted" ]]; then
    return
  fi
  echo "setup: $name"
  "$@"
  echo "$wanted" >"$stamps/$name"
}

install_dependencies() {
  # --group needs pip 25.1; Debian 12 makes environments with an older one.
  pip install --upgrade 'pip>=25.1'
  pip install --group dev
}

install_editable() {
  # No build isolation: the build directory survives and ninja rebuilds only what changed.
  pip install --no-build-isolation --editable .
}

if ! "$python" -c 'import pip' 2>/dev/null; then
  echo "setup: virtual environment"
  "$(tools/find_python.sh)" -m venv --clear "$venv"
fi
mkdir -p "$stamps"

packaging="$(printf '%s\0' pyproject.toml tools/setup_venv.sh | digest)"
native="$(
  {
    printf '%s\0' pyproject.toml CMakeLists.txt
    find native proto -type f -not -path 'native/tests/*' -not -path 'native/bench/*' -print0 | sort -z
  } | digest
)"
once_per dependencies "$packaging" install_dependencies
once_per extension "$native" install_editable

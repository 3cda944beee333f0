#!/usr/bin/env bash
# Prints the Python that makes the virtual environment: $PYTHON when given, else the first that is
# 3.10 or newer and brings venv and its C headers. The system's comes first, because on Debian
# system-packages.txt guarantees those for it alone.
set -euo pipefail

usable() {
  command -v "$1" >/dev/null && "$1" - <<'PY' 2>/dev/null
import ensurepip, os, sys, sysconfig, venv
header = os.path.join(sysconfig.get_path("include"), "Python.h")
raise SystemExit(sys.version_info < (3, 10) or not os.path.exists(header))
PY
}

candidates=("${PYTHON:-}")
if [[ -z "${PYTHON:-}" ]]; then
  candidates=(/usr/bin/python3 python3 python3.13 python3.12 python3.11 python3.10)
fi
for candidate in "${candidates[@]}"; do
  if usable "$candidate"; then
    command -v "$candidate"
    exit 0
  fi
done
echo "no usable Python: 3.10 or newer with venv and C headers (tried: ${candidates[*]})." >&2
echo "Install one, or name it: make PYTHON=/path/to/python3 ..." >&2
exit 1

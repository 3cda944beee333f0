#!/usr/bin/env bash
# Makes sure that the system packages of system-packages.txt are there.
#
#   tools/system_packages.sh          install what is missing (Debian and its relatives: with apt)
#   tools/system_packages.sh --check  only say what is missing; exit 1 when something is
#
# Other distributions get a list of what is needed. FC_SKIP_SYSTEM_PACKAGES=1 skips all of this.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly list=system-packages.txt
mode="${1:-install}"

if [[ "${FC_SKIP_SYSTEM_PACKAGES:-}" == 1 ]]; then
  exit 0
fi

# Prints "package|probe|purpose" without blanks around the bars, one package a line.
rows() {
  sed -e 's/[[:space:]]*#.*//' -e '/^[[:space:]]*$/d' -e 's/[[:space:]]*|[[:space:]]*/|/g' "$list"
}

has_apt() {
  command -v apt-get >/dev/null && command -v dpkg-query >/dev/null
}

# Answers whether the thing that a package brings is there, whoever installed it.
probe() {
  local kind="${1%%:*}" what="${1#*:}"
  case "$kind" in
    command) command -v "$what" >/dev/null ;;
    pkgconfig) command -v pkg-config >/dev/null && pkg-config --exists "$what" ;;
    file) [[ -e "$what" ]] ;;
    library) [[ "$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p)" == *"$what"* ]] ;;
    python)
      local python
      python="$(tools/find_python.sh 2>/dev/null)" || return 1
      case "$what" in
        venv) "$python" -c 'import ensurepip, venv' 2>/dev/null ;;
        headers)
          "$python" -c 'import os, sysconfig
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
          ;;
        *) return 1 ;;
      esac
      ;;
    *)
      echo "$list: unknown probe '$1'" >&2
      exit 2
      ;;
  esac
}

missing=()
if has_apt; then
  # One dpkg-query for all: a second `make` spends milliseconds here.
  mapfile -t wanted < <(rows | cut -d'|' -f1)
  installed="$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${wanted[@]}" 2>/dev/null || true)"
  for package in "${wanted[@]}"; do
    grep -qxF "installed $package" <<<"$installed" || missing+=("$package")
  done
else
  while IFS='|' read -r package test purpose; do
    probe "$test" || missing+=("$package")
  done < <(rows)
fi

if ((${#missing[@]} == 0)); then
  exit 0
fi

if [[ "$mode" == --check ]]; then
  printf 'missing: %s\n' "${missing[*]}" >&2
  exit 1
fi

if ! has_apt; then
  {
    echo "This system has no apt. Please install the following with its own package manager"
    echo "(the names are Debian's) and run the same command again:"
    echo
    while IFS='|' read -r package test purpose; do
      for name in "${missing[@]}"; do
        [[ "$name" == "$package" ]] && printf '  %-24s %s  [looked for %s]\n' "$package" "$purpose" "$test"
      done
    done < <(rows)
    echo
    echo "If all of it is there and only our probe fails: FC_SKIP_SYSTEM_PACKAGES=1 make ..."
  } >&2
  exit 1
fi

as_root=()
if [[ "$(id -u)" != 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "Not root and no sudo. Please run as root, then the same make command again:" >&2
    echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "installing system packages: ${missing[*]}"
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
"${apt[@]}" update
"${apt[@]}" install -y --no-install-recommends "${missing[@]}"

#!/usr/bin/env bash
# What depends on how the interpreter was built and linked, again with the system's own Python where the tests before ran with
# another one. Debian's is not position-independent: the C library's functions have addresses inside the program itself.
# The copy of the checkout that this tests is in build/system-python, with an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
system=${SYSTEM_PYTHON:-/usr/bin/python3}
where=build/system-python
# The engine's start, the C library's functions it stands in for, signals, threads and processes; then a bit of each area.
tests=(backends built_files guest_memfd gmem_file interpose probe_child fork signals_at_fork fault_signals ctrl_c soft_files
    run_contract host_memory userfaultfd smp memory cli_exec cli_info)

skip() {
    echo "NOT TESTED: $system: $*"
    exit 0
}

[ -x "$system" ] || skip "there is none"
of() { "$1" -c 'import os, sys; print(os.path.realpath(sys._base_executable))'; }
if [ "$(of "$system")" = "$(of "$bin/python")" ]; then
    echo "$system is what all tests ran with"
    exit 0
fi
"$system" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || skip "it is older than 3.11"
"$system" -c 'import ensurepip, venv' 2>/dev/null || skip "its package python3-venv is not installed"
[ -e "$("$system" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || skip "its package python3-dev is not installed"

mkdir -p "$where"
find "$where" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
if git rev-parse --git-dir >/dev/null 2>&1; then
    # Files that git knows and that are there: one that was deleted and not committed yet is not.
    git ls-files -z | while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done | xargs -0 cp --parents -t "$where"
else
    cp -r Makefile README.md docs examples bench pyproject.toml setup.py LICENSE src tests tools "$where"
    find "$where/src" -name '*.so' -delete
fi
PYTHON=$system VENV=.venv "$where/tools/setup.sh" >"$where/setup.out" 2>&1 || { cat "$where/setup.out"; exit 1; }
cd "$where"
files=("${tests[@]/#/tests/test_}")
.venv/bin/python -m pytest "${files[@]/%/.py}"

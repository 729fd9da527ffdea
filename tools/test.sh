#!/usr/bin/env bash
# Lint, types, tests; one line each while they pass.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
export BIN=$bin
failed=()
step() {
    local name=$1
    shift
    printf '== %s\n' "$name"
    "$@" || failed+=("$name")
}
step "lint (ruff)" "$bin/ruff" check -q .
step "format (ruff)" "$bin/ruff" format -q --check .
step "types (mypy --strict)" "$bin/mypy" --no-error-summary
step "generated tables" "$bin/python" tools/gen_abi.py --check
step "doctests" "$bin/python" -m pytest -q --doctest-modules src/anykvm/api src/anykvm/abi src/anykvm/backends src/anykvm/host src/anykvm/layers src/anykvm/vmm src/anykvm/explorer src/anykvm/cli src/anykvm/testing src/anykvm/conformance \
    --ignore=src/anykvm/backends/soft/run.py --ignore=src/anykvm/backends/soft/native.py
step "the contract's branch coverage" "$bin/python" tools/contract_coverage.py
step "tests" tools/test_in_two.sh
step "tests with the system's Python" tools/test_system_python.sh
if [ ${#failed[@]} -gt 0 ]; then
    echo "make test: FAILED: ${failed[*]}"
    exit 1
fi
echo "make test: all passed"

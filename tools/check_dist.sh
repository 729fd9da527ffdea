#!/usr/bin/env bash
# Build sdist and wheel as a release would (the wheel from the sdist), install the wheel elsewhere, and use it from there: once
# with the newest versions of what it is built with and depends on, once with the lowest that pyproject.toml declares. Then
# lint, types and some tests with the lowest versions of the developers' tools. One line a step.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
python=$("$bin/python" -c 'import sys; print(sys._base_executable)')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log

run() {
    "$@" >"$log" 2>&1 || { tail -30 "$log"; echo "check_dist: failed: $*"; exit 1; }
}

# From a clean copy of what git has: a build in place would pick up what an earlier build left.
mkdir "$work/checkout"
git ls-files -z | xargs -0 cp --parents -t "$work/checkout" 2>/dev/null || true
run "$bin/python" -m build --outdir "$work/dist" "$work/checkout"
sdist=$(ls "$work"/dist/*.tar.gz)
wheel=$(ls "$work"/dist/*.whl)

tar tzf "$sdist" | sed 's,^[^/]*/,,' | grep -v '/$\|^$' | sort >"$work/has"
git ls-files | sort >"$work/should"
if ! diff <(grep -vx 'PKG-INFO\|setup.cfg\|src/anykvm.egg-info/.*' "$work/has") "$work/should" >"$work/differs"; then
    cat "$work/differs"
    echo "check_dist: the sdist ('<') is not the checkout ('>')"
    exit 1
fi
if "$bin/python" -m zipfile -l "$wheel" | grep -E '\.(c|h|pxd|pyx)\b'; then
    echo "check_dist: the wheel has sources that nobody runs"
    exit 1
fi

use() {
    local versions=$1
    shift
    run "$python" -m venv "$work/$versions"
    run "$work/$versions/bin/pip" install -q --disable-pip-version-check "$@" "$wheel"
    (
        cd "$work"
        a=$work/$versions/bin/anykvm
        head -c 300000 /dev/urandom >demo.bin
        printf '\xb0\x2a\xe6\xe9\xf4' >guest.bin # mov al, 42; out 0xe9, al; hlt
        run "$a" --help
        for command in postcopy exec explain doctor caps conformance oracle; do
            run "$a" "$command" --help
        done
        run "$a" postcopy demo.bin --backend soft --html page.html
        run "$a" exec guest.bin --backend soft
        "$a" explain guest.bin --backend soft >"$log" 2>&1 || true # nothing failed: there is nothing to explain
        ! grep Traceback "$log" || { cat "$log"; exit 1; }
        run "$a" doctor
        run "$a" caps
        run "$a" conformance list
        test -s page.html
    )
}

use newest

for what in build run dev; do
    "$bin/python" tools/lower_bounds.py "$what" >"$work/lowest-$what.txt"
done
# A wheel of its own: what an old Cython makes of run.py is seen only when it runs.
tar xzf "$sdist" -C "$work"
PIP_CONSTRAINT=$work/lowest-build.txt run "$bin/python" -m build --wheel --outdir "$work/lowest-dist" "$work/$(basename "$sdist" .tar.gz)"
wheel=$(ls "$work"/lowest-dist/*.whl)
use lowest -c "$work/lowest-run.txt"
echo "sdist and wheel: built, installed, used; also with $(cat "$work"/lowest-{build,run}.txt | tr '\n' ' ')"

run "$python" -m venv "$work/tools"
run "$work/tools/bin/pip" install -q --disable-pip-version-check -c "$work/lowest-dev.txt" "$wheel[dev]"
(
    cd "$work/checkout"
    run "$work/tools/bin/ruff" check -q .
    run "$work/tools/bin/ruff" format -q --check .
    run "$work/tools/bin/mypy" --no-error-summary
    run "$work/tools/bin/python" -m pytest tests/test_abi.py tests/test_memory.py tests/test_run_contract.py tests/test_state_machine.py
)
echo "lint, types and some tests: pass with $(tr '\n' ' ' <"$work/lowest-dev.txt")"

#!/usr/bin/env bash
# All tests, in two processes of pytest, each with its own half of the files. Plain processes: what the tests do with signals
# is for a process whose main thread runs them. The first half is shown as it goes, the second when it is done.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
mapfile -t files < <(cd tests && ls test_*.py | sed 's,^,tests/,')
halves=([0]="" [1]="")
for index in "${!files[@]}"; do
    halves[index % 2]+=" ${files[index]}"
done
# shellcheck disable=SC2086 # file names without blanks
"$bin/python" -m pytest ${halves[1]} >"$log" 2>&1 &
other=$!
# shellcheck disable=SC2086
"$bin/python" -m pytest ${halves[0]}
first=$?
wait "$other"
second=$?
cat "$log"
[ "$first" = 0 ] && [ "$second" = 0 ]

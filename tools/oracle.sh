#!/usr/bin/env bash
# Record all scenarios on real kernels, and compare: each with its records in this package, then the soft backend with
# each. The new records are left in build/oracle, from where they may be copied to src/anykvm/conformance/records.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=build/oracle
mkdir -p "$out"
changed=0
for kernel in 7.3 6.12; do
    file=$out/linux-$kernel.jsonl
    rm -f "$file"
    "$bin/anykvm" oracle --kernel "$kernel" --smp 2 --timeout 1200 --output "$out" -- \
        "$bin/python" -m anykvm.conformance.record --backend device --intrusive --output "$file"
    "$bin/anykvm" conformance compare "linux-$kernel" "$file" --verbose || changed=1
done
# The annotate layer explains a real kernel's bare EFAULTs, whose causes a userfaultfd has told before.
"$bin/anykvm" oracle --kernel 7.3 --smp 2 --timeout 1200 -- "$bin/python" tests/annotate_real.py 700 || changed=1
ANYKVM_ORACLE=1 "$bin/python" -m pytest tests/test_oracle.py tests/test_records.py
# What soft does otherwise, and why, is in src/anykvm/conformance/differences.
"$bin/anykvm" conformance compare linux-6.12 soft:linux-6.12 >"$out/table-6.12" || changed=1
"$bin/anykvm" conformance compare linux-7.3 linux-6.12 soft:linux-7.3 --html oracle.html >"$out/table" || changed=1
echo "make oracle: done; open oracle.html"
exit "$changed"

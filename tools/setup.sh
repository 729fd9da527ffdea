#!/usr/bin/env bash
# Make the virtual environment and install anykvm into it, built from this checkout. Quiet unless something fails.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}
log=setup.log

say() { printf '%s\n' "setup: $*"; }

missing=()
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
command -v "$python" >/dev/null || missing+=(python3)
if command -v "$python" >/dev/null; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "Python 3.11 or newer is needed; $python is older (set PYTHON=...)"; exit 1; }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [ -e "$header" ] || missing+=(python3-dev)
else
    missing+=(python3-venv python3-dev)
fi
[ -e /usr/include/linux/kvm.h ] || missing+=(linux-libc-dev)
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing Debian packages: ${missing[*]}"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 ||
            { tail -20 "$log"; say "apt-get failed; its output is in $log"; exit 1; }
    else
        say "missing Debian packages; install them with: apt-get install ${missing[*]}"
        exit 1
    fi
fi

run() {
    local what=$1
    shift
    say "$what"
    "$@" >"$log" 2>&1 || { tail -30 "$log"; say "failed: $what (all of its output: $log)"; exit 1; }
}

[ -x "$venv/bin/python" ] || run "making a virtual environment in $venv" "$python" -m venv "$venv"
run "building and installing anykvm (C engine, Cython contract; about a minute)" "$venv/bin/python" -m pip install -q --disable-pip-version-check -e '.[dev]'
say "checking the engine"
"$venv/bin/python" -c 'import anykvm; anykvm.backend("soft").open()' || { say "the engine does not start"; exit 1; }
rm -f "$log"

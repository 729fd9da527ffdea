#!/usr/bin/env bash
# The README's two commands as a new user has them: in a minimal Debian 12 with what the README names and nothing else, as an
# ordinary user. The root file system is made once and kept (ANYKVM_CACHE, default ~/.cache/anykvm). Needs root and
# mmdebstrap; where that cannot be had it says so and ends with 0, unless ANYKVM_STRICT is set.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=make,gcc,libc6-dev,python3-dev,python3-venv # the README's list; gcc's own recommendation spelled out
cache=${ANYKVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/anykvm}
commands=${*:-make demo && make test}

say() { printf '%s\n' "clean root: $*"; }
skip() {
    say "SKIPPED: $*"
    [ -z "${ANYKVM_STRICT:-}" ] || exit 1
    exit 0
}

[ "$(id -u)" = 0 ] || skip "needs root, to make and enter a root file system"
command -v unshare >/dev/null || skip "there is no unshare"
unshare --mount --pid --fork true 2>/dev/null || skip "this machine allows no mount namespaces"
if ! command -v mmdebstrap >/dev/null; then
    command -v apt-get >/dev/null || skip "there is no mmdebstrap, and no apt-get to install it"
    say "installing mmdebstrap"
    { apt-get update && apt-get install -y --no-install-recommends mmdebstrap; } >/dev/null 2>&1 || skip "mmdebstrap cannot be installed"
fi

# The mirror that this machine uses for Debian 12.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    awk '/^deb .* bookworm / { for (i = 2; i <= NF; i++) if ($i ~ /^[a-z]+:\/\//) { print $i; exit } }
         /^URIs:/ { uri = $2 } /^Suites:/ && $2 == "bookworm" { print uri; exit }
         /^Suites:/ { for (i = 2; i <= NF; i++) if ($i == "bookworm") { print uri; exit } }' | head -1) || true
[ -n "$mirror" ] || skip "no mirror of Debian 12 in /etc/apt"

mkdir -p "$cache"
image=$cache/bookworm-$(printf '%s' "$packages" | cksum | cut -d' ' -f1).tar
log=$(mktemp)
if [ ! -s "$image" ]; then
    say "making a minimal Debian 12 with $packages (once; a minute or two)"
    mmdebstrap --format=tar --variant=minbase --include="$packages" bookworm "$image.new" "$mirror" >"$log" 2>&1 ||
        { tail -5 "$log"; rm -f "$image.new"; skip "mmdebstrap failed"; }
    mv "$image.new" "$image"
fi

root=$(mktemp -d "$cache/root.XXXXXX")
trap 'rm -rf --one-file-system "$root" "$log"' EXIT
tar -xf "$image" -C "$root"

# What this machine needs to reach the package index, and nothing else of it.
for file in /etc/pip.conf /etc/xdg/pip /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt; do
    [ ! -e "$file" ] || { mkdir -p "$root$(dirname "$file")" && cp -rL "$file" "$root$file"; }
done
chroot "$root" useradd --create-home newcomer
for file in "${XDG_CONFIG_HOME:-$HOME/.config}/pip" "$HOME/.pip"; do
    [ ! -e "$file" ] || { mkdir -p "$root/home/newcomer/.config" && cp -rLT "$file" "$root/home/newcomer/.config/pip"; }
done
mkdir "$root/home/newcomer/anykvm"
# Nothing that was built here: its environment is none there.
if git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files -z
else
    find . \( -name .venv -o -name build -o -name .git -o -name __pycache__ \) -prune -o -type f ! -name '*.so' -print0
fi | while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    xargs -0 cp --parents -t "$root/home/newcomer/anykvm"
chroot "$root" chown -R newcomer: /home/newcomer
mapfile -t network < <(env | grep -E '^(PIP_|SSL_CERT_FILE=|REQUESTS_CA_BUNDLE=|https?_proxy=|HTTPS?_PROXY=)' || true)

say "as an ordinary user: $commands"
export root
unshare --mount --pid --fork bash -ec '
    mount --make-rprivate /
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=755 dev "$root/dev"
    for node in null zero full random urandom tty; do
        touch "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"
    done
    mkdir -p "$root/dev/shm" "$root/dev/pts"
    mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    for stream in stdin:0 stdout:1 stderr:2; do ln -s "/proc/self/fd/${stream#*:}" "$root/dev/${stream%:*}"; done
    exec chroot --userspec=newcomer:newcomer "$root" /usr/bin/env -i "$@"
' _ HOME=/home/newcomer PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 TERM=dumb "${network[@]}" \
    bash -c "cd ~/anykvm && $commands"
say "passed"

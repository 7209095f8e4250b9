#!/usr/bin/env bash
# The lab: a virtual machine with a working /dev/kvm and Firecracker, banger installed in it.
# It is ../shared/lab/lab.sh's machine under QEMU's emulation; here is what banger adds.
#
#   lab.sh build            make its disk, where it is not made yet
#   lab.sh up [--fresh]     build and start it; --fresh from an untouched copy of the disk
#   lab.sh install          this source tree into it, and `make install` there
#   lab.sh run CMD...       run a command in it
#   lab.sh ssh [-- CMD...]  a shell in it
#   lab.sh push SRC DST     copy into it
#   lab.sh pull SRC DST     copy out of it
#   lab.sh status | log     does it run; its console
#   lab.sh down [--discard] power it off; --discard also removes its disk, the untouched one stays
#   lab.sh dir | port       where it is kept, and the port of its sshd on 127.0.0.1
#   lab.sh pack             the source tree as tar, as a clean checkout with the agent built
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

SHARED=$ROOT/../shared/lab/lab.sh
CACHE=${BANGER_CI_CACHE:-$HOME/.cache/banger-ci}
ARTIFACTS=(images/debian-bookworm-minimal images/debian-bookworm kernels/generic-6.12)
# Beyond what `make install` brings: what it is called with, resolved for names of guests, passt.
PACKAGES=make,systemd-resolved,libnss-resolve,passt,tcpdump

[ -x "$SHARED" ] || die "there is no lab here: ../shared/lab/lab.sh is missing"
# Its kernel, Firecracker and guest depend on lab.sh only, and are kept when just our part changes.
LAB_DIR=$CACHE/lab-$(content_key "$SHARED")
export LAB_DIR
# One CPU: with two emulated ones its kernel panics ("corrupted stack end"), or a guest in it resets,
# in two whole runs of three; with one, in none yet (docs/debugging.md, 16).
export LAB_SMP=${LAB_SMP:-1}

# Of many checkouts' labs each has a port of its own, as long as it runs.
lab_port() {
    if [ ! -s "$LAB_DIR/port" ]; then
        mkdir -p "$LAB_DIR"
        "$(find_python)" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])' >"$LAB_DIR/port"
    fi
    cat "$LAB_DIR/port"
}

shared() {
    LAB_PORT=$(lab_port)
    export LAB_PORT
    PATH=$LAB_DIR/bin:$PATH "$SHARED" "$@"
}

running() { [ -s "$LAB_DIR/l1.pid" ] && grep -qzF -- "$LAB_DIR/l1.pid" "/proc/$(cat "$LAB_DIR/l1.pid")/cmdline" 2>/dev/null; }

# Print the store that has the named images and kernels, made by the product where they are missing.
artifacts() {
    "$ROOT/.venv/bin/python" - "$@" <<'PY'
import sys

from tests.support.artifacts import artifact_store, need_image, need_kernel

for artifact in sys.argv[1:]:
    kind, _, name = artifact.partition("/")
    (need_image if kind == "images" else need_kernel)(name)
print(artifact_store())
PY
}

pack() {
    # An absolute name: build-agent.sh's stamp has it in its key, and so must install.sh's call.
    "$ROOT/scripts/build-agent.sh"
    # Tracked or new, but neither ignored nor deleted; the agent, so that no Go compiler is emulated.
    {
        git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
            [ ! -e "$file" ] && [ ! -L "$file" ] || printf '%s\0' "$file"
        done
        find src/banger/guest/bin .build -maxdepth 1 \( -name 'banger-agent-*' -o -name 'agent-*' \) -print0
    } | sort -zu | tar --null --no-recursion --owner=0 --group=0 -T - -cf -
}

build() {
    local store wanted
    [ "$(id -u)" = 0 ] || die "the lab's disk needs root to be made"
    [ -x .venv/bin/python ] || "$ROOT/scripts/venv.sh"
    mkdir -p "$LAB_DIR/bin"
    sweep
    store=$(artifacts "${ARTIFACTS[@]}")
    # By content: what goes into the disk, and what fills its caches.
    wanted=$(cat scripts/lab-provision.sh scripts/packages.sh scripts/install.sh scripts/lib.sh requirements/*.txt - <<<"$PACKAGES ${ARTIFACTS[*]} $store" | sha256sum)
    [ "$(cat "$LAB_DIR/l1-base.key" 2>/dev/null)" = "$wanted" ] ||
        rm -f "$LAB_DIR"/l1-base.ext4.done "$LAB_DIR"/l1-base.key
    # lab.sh runs `mmdebstrap OPTIONS SUITE TREE`: for its machine's tree we add ours.
    cat >"$LAB_DIR/bin/mmdebstrap" <<WRAPPER
#!/bin/bash
# Written by $ROOT/scripts/lab.sh: lab.sh's mmdebstrap with our packages and our hook.
case \${!#} in
    */l1-tree) set -- --include=$PACKAGES --customize-hook='$ROOT/scripts/lab-provision.sh "\$1" $store ${ARTIFACTS[*]}' "\$@" ;;
esac
exec $(command -v mmdebstrap) "\$@"
WRAPPER
    chmod 755 "$LAB_DIR/bin/mmdebstrap"
    shared build "$@"
    printf '%s' "$wanted" >"$LAB_DIR/l1-base.key"
}

# A lab of another lab.sh is 4 GB nobody reads; one that runs is somebody's.
sweep() {
    local other
    for other in "$CACHE"/lab-*; do
        [ "$other" != "$LAB_DIR" ] && [ -d "$other" ] || continue
        [ ! -s "$other/l1.pid" ] || [ ! -d "/proc/$(cat "$other/l1.pid")" ] || continue
        rm -rf "$other"
    done
}

# The same machine as lab.sh's, less what hangs its boot on a fast host (docs/debugging.md, 17).
qemu_wrapper() {
    mkdir -p "$LAB_DIR/bin"
    cat >"$LAB_DIR/bin/qemu" <<WRAPPER
#!/bin/bash
# Written by $ROOT/scripts/lab.sh.
exec ${LAB_QEMU:-qemu-system-x86_64} "\${@/#microvm,rtc=on/microvm,rtc=on,pic=off,pit=off}"
WRAPPER
    chmod 755 "$LAB_DIR/bin/qemu"
    export LAB_QEMU=$LAB_DIR/bin/qemu
}

up() {
    qemu_wrapper
    if running; then
        shared up
        return
    fi
    build
    rm -f "$LAB_DIR/port"
    if shared up "$@"; then return; fi
    say "the lab does not start; making its disk anew"
    build --force
    shared up --fresh
}

install() {
    local start=$SECONDS
    # What .build has stays: that is what uv built, and the agent's stamp.
    # shellcheck disable=SC2016 # the lab's shell expands
    pack | shared ssh -- sh -c 'mkdir -p "$1" && cd "$1" && find . -mindepth 1 -maxdepth 1 -not -name .build -exec rm -rf {} + && tar --no-same-owner -xf -' sh "$ROOT"
    say "the source is in the lab after $((SECONDS - start)) s"
    # Offline first: what is pinned is in uv's cache, but uv asks the index again after ten minutes.
    # A running lab's cache is older than a new pin.
    shared ssh -- env UV_OFFLINE=1 make --no-print-directory -C "$ROOT" install || {
        say "what is pinned is not in the lab's cache; asking the package index"
        shared ssh -- make --no-print-directory -C "$ROOT" install
    }
    # The daemon of the version before has the same number here; VMs go on.
    shared ssh 'banger daemon stop >/dev/null 2>&1 || true'
    # root's data directory has the images and kernels as if pulled: building them here takes an hour.
    shared ssh 'mkdir -p -m 700 ~/.local/share/banger && cp -aln /var/lib/banger-artifacts/. ~/.local/share/banger/'
    say "banger is installed in the lab after $((SECONDS - start)) s"
}

down() {
    shared down
    [ "${1:-}" != --discard ] || rm -f "$LAB_DIR/l1.ext4"
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
    build | up | install | down)
        mkdir -p "$LAB_DIR"
        # Two sessions must not build one disk.
        exec 9>"$LAB_DIR/lock"
        flock 9
        "$verb" "$@" 9>&-
        ;;
    run) shared ssh -- "$@" ;;
    ssh | push | pull | status | log | hmp) shared "$verb" "$@" ;;
    dir) printf '%s\n' "$LAB_DIR" ;;
    port) lab_port ;;
    pack) pack ;;
    *)
        sed -n '2,/^source/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
        exit 2
        ;;
esac

#!/usr/bin/env bash
# What the lab's disk has beyond ../shared/lab/lab.sh's own: lab-provision.sh TREE STORE ARTIFACT...
#
# Runs as a hook of the mmdebstrap that makes the disk, on this machine's own CPU: the same packages
# take a quarter of an hour to unpack under emulation. The lab then needs no network to install banger.
source "$(dirname "$0")/lib.sh"

tree=$1 store=$2
shift 2
in_tree() { chroot "$tree" env -u BANGER_TOOLS -u UV_CACHE_DIR -u PIP_FIND_LINKS -u PIP_CONSTRAINT HOME=/root "$@"; }

# systemd-resolved's set-up has pointed the name service at a daemon that does not run in a tree.
rm -f "$tree/etc/resolv.conf"
cp /etc/resolv.conf "$tree/etc/resolv.conf"
# lab.sh writes resolv.conf once more after us; a booted lab has resolved's, as a real host does.
printf 'L+ /etc/resolv.conf - - - - ../run/systemd/resolve/stub-resolv.conf\n' >"$tree/etc/tmpfiles.d/lab-resolv.conf"
# A proxy's CA, if the host trusts one.
[ ! -s /etc/ssl/certs/ca-certificates.crt ] || install -m 644 /etc/ssl/certs/ca-certificates.crt "$tree/etc/ssl/certs/ca-certificates.crt"

# `make install` in the tree: it gets the packages and fills uv's cache. Its outcome is thrown away,
# for installing is what each run of the lab tests.
mkdir -p "$tree$ROOT"
"$ROOT/scripts/lab.sh" pack | tar -C "$tree$ROOT" --no-same-owner -xf -
in_tree BANGER_TOOLS=/var/cache/banger-tools make --no-print-directory -C "$ROOT" install PREFIX=/tmp/warm
rm -rf "${tree:?}/tmp/warm" "${tree:?}${ROOT:?}"
echo BANGER_TOOLS=/var/cache/banger-tools >>"$tree/etc/environment"

# Somebody who is not root, with subordinate ids for mmdebstrap.
in_tree useradd --create-home --shell /bin/bash dev
# Images and kernels on the lab's own file system, so that a test's data directory can hard-link them.
# The tree is on the file system of the cache: linked, not copied, where that holds.
for artifact in "$@"; do
    kept=$tree/var/lib/banger-artifacts/$artifact
    mkdir -p "${kept%/*}"
    cp -al "$store/$artifact" "$kept" 2>/dev/null || cp -a --sparse=always "$store/$artifact" "$kept"
done

#!/usr/bin/env bash
# Remove banger's programs. VMs, images, kernels and configuration stay; it says where.
source "$(dirname "$0")/lib.sh"

PREFIX=${PREFIX:-$(default_prefix)}
if [ -x "$PREFIX/bin/banger" ]; then
    "$PREFIX/bin/banger" daemon stop >/dev/null 2>&1 || say "the daemon was not stopped; VMs go on running"
fi
# The bridge outlives the daemon on purpose, but not the program; VMs on it lose their network.
helper=$PREFIX/lib/banger/venv/bin/banger-net-helper
if [ -x "$helper" ] && [ "$(id -u)" = 0 ]; then
    "$helper" bridge-down br-banger >/dev/null 2>&1 || true
fi
rm -rf "$PREFIX/lib/banger"
rm -f "$PREFIX/bin/banger" "$PREFIX/bin/bangerd"
say "removed from $PREFIX; VMs and images stay in ${XDG_DATA_HOME:-$HOME/.local/share}/banger"

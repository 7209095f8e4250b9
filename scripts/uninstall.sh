#!/usr/bin/env bash
# Remove banger's programs. VMs, images and configuration stay: say where.
source "$(dirname "$0")/lib.sh"

if [ -z "${PREFIX:-}" ]; then
    if [ "$(id -u)" = 0 ]; then PREFIX=/usr/local; else PREFIX=$HOME/.local; fi
fi
if [ -x "$PREFIX/bin/banger" ]; then
    "$PREFIX/bin/banger" daemon stop >/dev/null 2>&1 || true
fi
rm -rf "$PREFIX/lib/banger"
rm -f "$PREFIX/bin/banger" "$PREFIX/bin/bangerd"
say "removed; VMs and images stay in ${XDG_DATA_HOME:-$HOME/.local/share}/banger"

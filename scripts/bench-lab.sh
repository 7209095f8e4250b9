#!/usr/bin/env bash
# Measure Firecracker where there is KVM, which is in the lab, and keep the page it prints.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

scripts/lab.sh up
scripts/lab.sh install
page=docs/benchmarks-firecracker.md
status=0
scripts/lab.sh run "cd '$ROOT' && PATH=/usr/local/lib/banger/venv/bin:\$PATH python -m benchmarks.firecracker" >"$page.new" || status=$?
[ -s "$page.new" ] || die "nothing was measured"
mv "$page.new" "$page"
exit "$status"

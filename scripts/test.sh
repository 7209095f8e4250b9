#!/usr/bin/env bash
# Everything, on a machine that may have nothing yet: packages, agent, environment, all tests.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

"$ROOT/scripts/packages.sh" test
# What is expensive to make is kept between runs, keyed by what makes it.
export BANGER_CI_CACHE=${BANGER_CI_CACHE:-$HOME/.cache/banger-ci}
export GOCACHE=${GOCACHE:-$BANGER_CI_CACHE/go-build}
mkdir -p "$BANGER_CI_CACHE"
"$ROOT/scripts/build-agent.sh"
"$ROOT/scripts/venv.sh"
(
    go=$(find_go)
    cd agent
    CGO_ENABLED=0 GOPROXY=off GOTOOLCHAIN=local GOFLAGS=-mod=mod "$go" test ./...
)
# Its last line is pytest's own summary; its status is ours.
exec .venv/bin/pytest "$@"

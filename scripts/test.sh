#!/usr/bin/env bash
# Everything, on a machine that may have nothing yet: packages, agent, environment, all tests.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

# What is expensive to make is kept between runs, under a key of what makes it.
export BANGER_CI_CACHE=${BANGER_CI_CACHE:-$HOME/.cache/banger-ci}
export BANGER_TOOLS=${BANGER_TOOLS:-$BANGER_CI_CACHE/tools}
export GOCACHE=${GOCACHE:-$BANGER_CI_CACHE/go-build}
[ -z "${CI:-}" ] || export UV_CACHE_DIR=${UV_CACHE_DIR:-$BANGER_CI_CACHE/uv}
TOOLS=$BANGER_TOOLS
mkdir -p "$BANGER_CI_CACHE"

"$ROOT/scripts/packages.sh" test
"$ROOT/scripts/build-agent.sh"
"$ROOT/scripts/venv.sh"
BANGER_GO=$(find_go)
export BANGER_GO
# The last line is pytest's own summary, and its status is ours.
BROKE=test-results/lab/broke
rm -f "$BROKE"
.venv/bin/python -m pytest "$@" && exit || status=$?
# The lab's own kernel is emulated, and panics once in a while; every test after that fails
# (tests/lab/conftest.py). Those run once more in a new lab, if nothing else has failed.
failed=.pytest_cache/v/cache/lastfailed
if [ -e "$BROKE" ] && [ -e "$failed" ] && ! grep -qv -e '^[{}]' -e '"tests/lab/' "$failed"; then
    say "the lab broke: what failed in it runs once more, in a new one"
    # CI's plugin asks for machines that booted: the first run had them.
    PYTEST_ADDOPTS='' exec .venv/bin/python -m pytest --last-failed tests/lab
fi
exit "$status"

#!/usr/bin/env bash
# What has to hold before a commit: static checks first, then Go's, unit and contract tests.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

BANGER_GO=$(find_go)
export BANGER_GO
exec .venv/bin/python -m pytest -q -n 2 --dist loadgroup tests/static tests/unit tests/contract tests/fuzz "$@"

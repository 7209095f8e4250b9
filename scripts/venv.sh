#!/usr/bin/env bash
# The development environment: .venv with the versions pinned in requirements/dev.txt.
source "$(dirname "$0")/lib.sh"

stamp=$ROOT/.venv/.stamp
wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/requirements/dev.txt" | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
uv=$(find_uv)
say "making .venv"
python=$ROOT/.venv/bin/python
[ -x "$python" ] || "$uv" venv --quiet --clear --python "$(find_python)" "$ROOT/.venv"
"$uv" pip sync --quiet --python "$python" --require-hashes "$ROOT/requirements/dev.txt"
"$uv" pip install --quiet --python "$python" --no-deps --build-constraints "$ROOT/requirements/build.txt" --editable "$ROOT"
printf '%s' "$wanted" >"$stamp"

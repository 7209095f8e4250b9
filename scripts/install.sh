#!/usr/bin/env bash
# Install banger: host packages, the agent, then the two programs. Run again, it does what is left.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

if [ -z "${PREFIX:-}" ]; then
    if [ "$(id -u)" = 0 ]; then PREFIX=/usr/local; else PREFIX=$HOME/.local; fi
fi
"$ROOT/scripts/packages.sh" run
"$ROOT/scripts/build-agent.sh"
uv=$(find_uv)

tools=$PREFIX/lib/banger
stamp=$tools/.installed
wanted=$(find src pyproject.toml requirements.txt -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
if [ -x "$PREFIX/bin/banger" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    say "banger is installed already in $PREFIX/bin"
else
    say "installing banger to $PREFIX/bin"
    mkdir -p "$tools" "$PREFIX/bin"
    "$uv" build --quiet --wheel --out-dir "$BUILD/dist" "$ROOT"
    wheel=$(find "$BUILD/dist" -name 'banger-*.whl' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
    "$uv" venv --quiet --clear --python "$(find_python)" "$tools/venv"
    "$uv" pip install --quiet --python "$tools/venv/bin/python" --require-hashes -r requirements.txt
    "$uv" pip install --quiet --python "$tools/venv/bin/python" --no-deps --reinstall "$wheel"
    "$tools/venv/bin/python" -m compileall -q "$tools/venv/lib" || true
    ln -sfn "$tools/venv/bin/banger" "$PREFIX/bin/banger"
    ln -sfn "$tools/venv/bin/bangerd" "$PREFIX/bin/bangerd"
    printf '%s' "$wanted" >"$stamp"
fi
case ":$PATH:" in
    *":$PREFIX/bin:"*) ;;
    *) say "put it on your PATH: export PATH=$PREFIX/bin:\$PATH" ;;
esac
say "try: banger vm run --name sandbox"

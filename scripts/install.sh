#!/usr/bin/env bash
# Install banger: host packages, the agent, then the two programs. Run again, it does what is left.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

PREFIX=${PREFIX:-$(default_prefix)}
"$ROOT/scripts/packages.sh" run
"$ROOT/scripts/build-agent.sh"

tools=$PREFIX/lib/banger
python=$tools/venv/bin/python
stamp=$tools/installed
wanted=$(find src scripts/install.sh pyproject.toml requirements -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
if [ -x "$PREFIX/bin/banger" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    say "banger is up to date in $PREFIX/bin"
else
    uv=$(find_uv)
    say "installing banger into $PREFIX"
    mkdir -p "$tools" "$PREFIX/bin"
    rm -rf .build/dist
    "$uv" build --quiet --wheel --python "$(find_python)" --out-dir .build/dist \
        --build-constraints requirements/build.txt --require-hashes .
    # uv comes along: its uvx fetches npm packages for images where the host has no npm.
    # Not `uv tool install`: that resolves anew, while these are the versions we tested, by hash.
    "$python" -c '' 2>/dev/null || "$uv" venv --quiet --clear --python "$(find_python)" "$tools/venv"
    "$uv" pip sync --quiet --python "$python" --compile-bytecode --require-hashes requirements/run.txt requirements/uv.txt
    "$uv" pip install --quiet --python "$python" --compile-bytecode --no-deps .build/dist/banger-*.whl
    # It may run as root for others: isolated, whatever a sudo rule lets into its environment.
    sed -i '1s|\(bin/python[0-9.]*\)$|\1 -I|' "$tools/venv/bin/banger-net-helper"
    ln -sfn "$tools/venv/bin/banger" "$tools/venv/bin/bangerd" "$PREFIX/bin/"
    printf '%s' "$wanted" >"$stamp"
fi
case :$PATH: in
    *":$PREFIX/bin:"*) say "next: banger vm run --name sandbox" ;;
    *)
        say "$PREFIX/bin is not on your PATH; add it: export PATH=\"$PREFIX/bin:\$PATH\""
        say "next: $PREFIX/bin/banger vm run --name sandbox"
        ;;
esac

#!/usr/bin/env bash
# Pin every dependency group into requirements/, with hashes and without any index address.
# uv.lock itself records addresses, so it stays out of version control.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

uv=$(find_uv)
"$uv" lock --quiet --upgrade
export_group() {
    "$uv" export --quiet --frozen --no-header --no-annotate --no-emit-project --output-file "requirements/$1.txt" "${@:2}"
}
mkdir -p requirements
export_group run --no-default-groups
export_group dev --no-default-groups --group dev
for group in build uv go; do
    export_group "$group" --only-group "$group"
done
if grep -En '(https?|file)://|--(extra-)?index-url' requirements/*.txt; then
    die "an address got into requirements/" "write them on a machine with a plain uv"
fi

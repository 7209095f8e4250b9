#!/usr/bin/env bash
# Build the guest agent into src/banger/guest/bin. Nothing to do when its source is unchanged.
source "$(dirname "$0")/lib.sh"

ARCH=${ARCH:-amd64}
case $ARCH in
    amd64) name=x86_64 ;;
    arm64) name=aarch64 ;;
    *) die "no agent for ARCH=$ARCH" "ARCH=amd64 or ARCH=arm64" ;;
esac
output=$ROOT/src/banger/guest/bin/banger-agent-$name
stamp=$ROOT/.build/agent-$name
cd "$ROOT"
# By content: a checkout gives every file a new time; by names below ROOT: a checkout may stand anywhere.
wanted=$(find agent scripts/build-agent.sh requirements/go.txt -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)
if [ -x "$output" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
go=$(find_go)
say "building the agent ($ARCH)"
mkdir -p "$(dirname "$output")" "$ROOT/.build"
# Go 1.27's encoding/json is half a megabyte larger; the one before it serves. Older toolchains do not know the word.
if GOEXPERIMENT=nojsonv2 "$go" env GOVERSION >/dev/null 2>&1; then
    export GOEXPERIMENT=nojsonv2
fi
(cd "$ROOT/agent" && GOOS=linux GOARCH=$ARCH "$go" build -trimpath -ldflags '-s -w' -o "$output.new" .)
mv "$output.new" "$output"
printf '%s' "$wanted" >"$stamp"

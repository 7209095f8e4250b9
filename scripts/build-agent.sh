#!/usr/bin/env bash
# Build the guest agent into src/banger/guest/bin. Nothing to do when it is newer than its source.
source "$(dirname "$0")/lib.sh"

ARCH=${ARCH:-amd64}
case $ARCH in
    amd64) name=x86_64 ;;
    arm64) name=aarch64 ;;
    *) die "no agent for ARCH=$ARCH" "ARCH=amd64 or ARCH=arm64" ;;
esac
output=$ROOT/src/banger/guest/bin/banger-agent-$name
if [ -x "$output" ] && [ -z "$(find "$ROOT/agent" "$0" -newer "$output" -type f -print -quit)" ]; then
    exit 0
fi
go=$(find_go)
say "building the agent ($ARCH)"
mkdir -p "$(dirname "$output")"
cd "$ROOT/agent"
# GOFLAGS and the module proxy: the agent has the standard library only, so nothing is fetched.
CGO_ENABLED=0 GOOS=linux GOARCH=$ARCH GOFLAGS=-mod=mod GOPROXY=off GOTOOLCHAIN=local \
    GOCACHE=${GOCACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/go-build} \
    "$go" build -trimpath -ldflags '-s -w' -o "$output.new" .
mv "$output.new" "$output"

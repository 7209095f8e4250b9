#!/usr/bin/env bash
# Have the host packages banger needs: packages.sh [run|test]. Asks apt only for what is missing.
source "$(dirname "$0")/lib.sh"

purpose=${1:-run}
packages=(
    qemu-system-x86 e2fsprogs mmdebstrap openssh-client git zstd kmod uidmap
    ca-certificates debian-archive-keyring python3 python3-venv
)
if [ "$purpose" = test ]; then
    packages+=(busybox-static cpio libarchive-tools openssh-server)
fi

# shellcheck source=/dev/null
. /etc/os-release
case "${ID:-}:${VERSION_ID:-}" in
    debian:12) release=bookworm packages+=(libarchive13) ;;
    debian:13 | ubuntu:24.04) release=other ;;
    *)
        say "this is ${PRETTY_NAME:-an unknown distribution}; set-up knows Debian 12, 13 and Ubuntu 24.04"
        say "install these yourself (names as in Debian), then run \`make install\` with BANGER_SKIP_PACKAGES=1:"
        printf '  %s\n' "${packages[@]}" >&2
        say "QEMU 7.2 or newer (10 or newer without KVM), e2fsprogs 1.47.1 or newer is faster"
        [ -n "${BANGER_SKIP_PACKAGES:-}" ] || exit 1
        exit 0
        ;;
esac
[ -z "${BANGER_SKIP_PACKAGES:-}" ] || exit 0

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
version_at_least() { dpkg --compare-versions "$(dpkg-query -W -f '${Version}' "$1" 2>/dev/null)" ge "$2"; }

missing=()
for package in "${packages[@]}"; do
    installed "$package" || missing+=("$package")
done
newer=()
if [ "$release" = bookworm ]; then
    # Bookworm's QEMU 7.2 corrupts kernel 6.12 under emulation, its mke2fs reads no tar.
    version_at_least qemu-system-x86 1:10 || newer+=(qemu-system-x86)
    version_at_least e2fsprogs 1.47.1 || newer+=(e2fsprogs)
fi
[ ${#missing[@]} -gt 0 ] || [ ${#newer[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "root is needed to install: ${missing[*]} ${newer[*]}" "run as root, or install sudo"
    as_root=(sudo)
fi
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@"; }

if [ ${#newer[@]} -gt 0 ] && ! apt-cache policy | grep -q 'a=stable-backports\|n=bookworm-backports'; then
    # The mirror and the key are those the host already takes bookworm from.
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 2>/dev/null | head -n 1)
    [ -n "$uri" ] || uri=$(grep -rhoE '^(URIs: *|deb (\[[^]]*\] )?)[a-z+]+://[^ ]+' /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
        grep -oE '[a-z+]+://[^ ]+' | grep -v security | head -n 1)
    [ -n "$uri" ] || die "no apt source of bookworm was found" "add bookworm-backports to apt's sources yourself"
    say "adding bookworm-backports to apt's sources"
    printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: %s\n' \
        "$uri" /usr/share/keyrings/debian-archive-keyring.gpg |
        "${as_root[@]}" tee /etc/apt/sources.list.d/banger-backports.sources >/dev/null
fi
say "installing ${missing[*]} ${newer[*]}"
apt update
if [ ${#newer[@]} -gt 0 ]; then
    apt install -y --no-install-recommends -t bookworm-backports "${newer[@]}"
fi
still=()
for package in "${missing[@]}"; do
    installed "$package" || still+=("$package")
done
[ ${#still[@]} -eq 0 ] || apt install -y --no-install-recommends "${still[@]}"

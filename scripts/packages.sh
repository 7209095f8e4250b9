#!/usr/bin/env bash
# Have the host packages banger needs: packages.sh [run|test]. Asks apt only for what is missing.
source "$(dirname "$0")/lib.sh"

purpose=${1:-run}
packages=(
    qemu-system-x86          # the VMM
    e2fsprogs                # mke2fs, e2fsck, resize2fs, debugfs: images without mounting
    mmdebstrap               # builds images out of Debian's signed archive
    debian-archive-keyring   # what that archive is verified with
    openssh-client git ca-certificates
    uidmap                   # newuidmap: mmdebstrap without root
    passt                    # the user network, without root
    iproute2 nftables        # the bridge network: bridge, taps, rules
    python3 python3-venv
)
# busybox is the smallest guest the tests boot; cpio reads our initramfs back; dig asks our names;
# lz4, zstd, xz, bzip2 compress kernels; depmod (kmod) indexes their modules;
# umoci and skopeo make images, docker-registry serves them, htpasswd (apache2-utils) its logins.
[ "$purpose" = run ] || packages+=(busybox-static cpio bind9-dnsutils lz4 zstd xz-utils bzip2 kmod
    docker-registry skopeo umoci apache2-utils)

ID='' VERSION_ID='' PRETTY_NAME=''
# shellcheck source=/dev/null
[ ! -r /etc/os-release ] || . /etc/os-release
backports=
case $ID:$VERSION_ID in
    debian:12)
        packages+=(libarchive13) # mke2fs loads it to read a tar
        backports=bookworm-backports
        ;;
    debian:13) packages+=(libarchive13t64) ;;
    ubuntu:24.04) ;; # its mke2fs reads no tar: banger stages instead
    *)
        if [ -n "${BANGER_SKIP_PACKAGES:-}" ]; then exit 0; fi
        say "this is ${PRETTY_NAME:-an unknown system}; set-up knows Debian 12, Debian 13 and Ubuntu 24.04"
        say "install what these Debian packages hold:"
        printf '    %s\n' "${packages[@]}" >&2
        say "QEMU 10 or newer (7.2 will do with KVM); e2fsprogs 1.47.1 or newer with libarchive builds images faster"
        say "then run: make install BANGER_SKIP_PACKAGES=1"
        exit 1
        ;;
esac
if [ -n "${BANGER_SKIP_PACKAGES:-}" ]; then exit 0; fi

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
version_at_least() { installed "$1" && dpkg --compare-versions "$(dpkg-query -W -f '${Version}' "$1")" ge "$2"; }

# Bookworm's QEMU 7.2 corrupts kernel 6.12 under emulation, and its mke2fs reads no tar.
newer=()
if [ -n "$backports" ]; then
    version_at_least qemu-system-x86 1:10 || newer+=(qemu-system-x86)
    version_at_least e2fsprogs 1.47.1 || newer+=(e2fsprogs)
fi
missing=()
for package in "${packages[@]}"; do
    installed "$package" || [[ " ${newer[*]:-} " == *" $package "* ]] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ] && [ ${#newer[@]} -eq 0 ]; then exit 0; fi

as_root=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null ||
        die "root is needed to install ${newer[*]:-} ${missing[*]:-}" "run it as root, or install sudo"
    as_root=(sudo)
fi
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a \
        apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" </dev/null
}

# Prints "URI keyring" of the apt source this host takes `suite` from, once apt has read its sources.
apt_source_of() {
    local entry file uri key
    # shellcheck disable=SC2016 # the names in $() are apt's own
    entry=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI) $(SOURCESENTRY)' 'Created-By: Packages' |
        awk -v suite="$1" '$1 == suite && !seen { print; seen = 1 }')
    [ -n "$entry" ] || return 1
    read -r _ uri file <<<"$entry"
    file=${file%:*}
    key=$(grep -sohE '(^Signed-By: *|signed-by=)[^] ]+' "$file" | sed -E 's/^[^:=]*[:=] *//' | sort -u) || true
    # No key in the entry means apt's own trusted keys; two keys in one file are not told apart.
    case $key in /*) [[ $key != *$'\n'* ]] || key= ;; *) key= ;; esac
    printf '%s %s\n' "$uri" "$key"
}

wanted=("${newer[@]}" "${missing[@]}")
say "installing ${wanted[*]}"
apt update
if [ ${#newer[@]} -gt 0 ] && ! apt_source_of "$backports" >/dev/null; then
    found=$(apt_source_of "$VERSION_CODENAME") ||
        die "no apt source of $VERSION_CODENAME was found" "add $backports to apt's sources and run this again"
    read -r uri key <<<"$found"
    [ -n "$key" ] || key=/usr/share/keyrings/debian-archive-keyring.gpg
    say "adding $backports to apt's sources"
    printf '%s\n' "Types: deb" "URIs: $uri" "Suites: $backports" "Components: main" "Signed-By: $key" |
        "${as_root[@]}" tee /etc/apt/sources.list.d/banger-backports.sources >/dev/null
    apt update
fi
[ ${#newer[@]} -eq 0 ] || apt install -y --no-install-recommends -t "$backports" "${newer[@]}" >/dev/null
# The package would start a registry on port 5000 of every address, now and at each boot.
if [[ " ${missing[*]:-} " == *" docker-registry "* ]] && command -v systemctl >/dev/null; then
    "${as_root[@]}" systemctl --quiet mask docker-registry.service 2>/dev/null || true
fi
[ ${#missing[@]} -eq 0 ] || apt install -y --no-install-recommends "${missing[@]}" >/dev/null

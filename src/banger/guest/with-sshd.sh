# shellcheck shell=sh
# Has an sshd in the guest: one that is there is left alone, else the image's package manager installs one.
# The agent runs it once per boot, in the background; its output is /var/log/banger-sshd.log. BANGER_PID1 says whose
# PID 1 is: `image` (an init of its own) or `agent` (none: nobody else would start sshd).
# POSIX sh: this runs in dash, ash and bash. No word of the host is put into it.

export DEBIAN_FRONTEND=noninteractive
tries=5
mark=/var/lib/banger/installed-sshd
apt_conf=/etc/apt/apt.conf.d/00banger-lock

say() { echo "$(date -u '+%Y-%m-%dT%H:%M:%SZ' 2>/dev/null) banger: $*"; }

find_sshd() {
    for sshd in /usr/sbin/sshd /usr/bin/sshd /sbin/sshd /usr/local/sbin/sshd; do
        [ -x "$sshd" ] && return 0
    done
    return 1
}

# State 0A is LISTEN, 0016 is port 22.
listens() { cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ':0016 [0-9A-F]*:0000 0A '; }

wait_for_listener() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        listens && return 0
        sleep 1
    done
    return 1
}

wait_for_init() {
    [ "$BANGER_PID1" = image ] || return 0
    if [ -d /run/systemd/system ]; then
        # At most: a unit may take for ever.
        timeout 300 systemctl is-system-running --wait >/dev/null 2>&1
    fi
}

# Before the package's own scripts look: they would make keys of every kind otherwise.
configure() {
    mkdir -p /etc/ssh/sshd_config.d
    cat >/etc/ssh/sshd_config.d/10-banger.conf <<'CONF'
# Written by banger with the sshd that it installed.
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
CONF
}

# An sshd_config that reads no drop-ins gets ours at its head: the first word counts.
include() {
    config=/etc/ssh/sshd_config
    [ -f "$config" ] || : >"$config"
    grep -q '^[[:space:]]*Include[[:space:]].*sshd_config\.d/' "$config" && return 0
    { cat /etc/ssh/sshd_config.d/10-banger.conf "$config"; } >"$config.banger" && mv "$config.banger" "$config"
}

install_apt() {
    # Lists, archives and locks of our own, and a short time under dpkg's lock, for which another apt waits meanwhile:
    # a command of the user's may want apt at this very moment.
    own=/var/cache/banger-apt
    mkdir -p $own/lists/partial $own/archives/partial /etc/apt/apt.conf.d
    set -- -o Dir::State::lists=$own/lists -o Dir::Cache::archives=$own/archives -o Dir::Cache::pkgcache= \
        -o Dir::Cache::srcpkgcache= -o APT::Install-Recommends=false -o DPkg::Lock::Timeout=600 \
        -o Dpkg::Options::=--force-confold
    apt-get "$@" -q update &&
        apt-get "$@" -o Debug::NoLocking=true -q -y --download-only install openssh-server &&
        echo 'DPkg::Lock::Timeout "600";' >$apt_conf &&
        apt-get "$@" -q -y install openssh-server
    status=$?
    rm -rf $own $apt_conf
    return $status
}

install_sshd() {
    if command -v apt-get >/dev/null; then
        install_apt
    elif command -v apk >/dev/null; then
        apk --wait 600 add --no-cache openssh-server
    elif command -v dnf >/dev/null; then
        dnf -y --setopt=install_weak_deps=False install openssh-server
    elif command -v microdnf >/dev/null; then
        microdnf -y install openssh-server
    elif command -v yum >/dev/null; then
        yum -y install openssh-server
    elif command -v pacman >/dev/null; then
        pacman -Sy --noconfirm --needed openssh
    elif command -v zypper >/dev/null; then
        zypper --non-interactive install --no-recommends openssh-server ||
            zypper --non-interactive install --no-recommends openssh
    else
        say "no package manager that is known here (apt, apk, dnf, yum, pacman, zypper)"
        tries=0
        return 1
    fi
}

start_sshd() {
    listens && return 0
    [ -f /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
    if [ "$BANGER_PID1" = image ]; then
        for name in ssh sshd; do
            if [ -d /run/systemd/system ]; then
                systemctl enable --now $name
            elif command -v rc-service >/dev/null && [ -e /etc/init.d/$name ]; then
                rc-update add $name default
                rc-service $name start
            elif command -v runsvdir >/dev/null && [ -d /etc/sv/$name ] && [ -d /etc/service ]; then
                ln -sfn /etc/sv/$name /etc/service/$name
            elif command -v service >/dev/null && [ -e /etc/init.d/$name ]; then
                service $name start
            else
                false
            fi && wait_for_listener && return 0
        done
    fi
    mkdir -p /run/sshd /var/empty
    chmod 755 /run/sshd
    "$sshd" -t && "$sshd" && wait_for_listener
}

if find_sshd; then
    # Ours after a restart, or one that no init starts. Else it is the image's own business.
    if [ -e $mark ] || [ "$BANGER_PID1" = agent ]; then
        wait_for_init
        if start_sshd; then say "sshd listens"; else say "sshd does not start"; fi
    else
        say "the image has an sshd: nothing to do"
    fi
    exit 0
fi
if listens; then
    say "something listens on port 22: nothing to do"
    exit 0
fi
wait_for_init
nice=$(command -v renice) && $nice -n 10 -p $$ >/dev/null 2>&1
configure
try=0
while try=$((try + 1)); do
    say "installing an sshd (try $try)"
    install_sshd && find_sshd && break
    if [ $try -ge $tries ]; then
        say "no sshd: \`banger vm ssh\` and \`banger vm exec\` work without"
        exit 1
    fi
    sleep $((try * 5)) # a network that is not there yet, a mirror that is busy
done
mkdir -p /var/lib/banger && : >$mark
include
if start_sshd; then
    say "sshd listens"
else
    say "sshd is installed and does not start"
    exit 1
fi

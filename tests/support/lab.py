"""The lab: a machine with a working /dev/kvm and Firecracker, banger installed in it.

scripts/lab.sh makes and starts it; here is how tests talk to it. Everything in it is emulated
twice over, so a command costs a second where a host takes milliseconds: ask for much at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_ROOT = Path(__file__).parents[2]
_SCRIPT = _ROOT / "scripts" / "lab.sh"
_SHARED = _ROOT.parent / "shared" / "lab" / "lab.sh"
EVIDENCE = _ROOT / "test-results" / "lab"

# Cold, on two cores: 240 s for disk, images and kernel, 3 x 120 s for a start that hangs, and both
# once more where a cached disk does not boot.
_UP_S = 1500
# Measured 35 s; a busy host makes it several times that.
_INSTALL_S = 600
_DOWN_S = 120
# A handshake takes 1-3 s, and much longer while the lab is busy.
_CONNECT_S = 60

# One tar of what tells why a test failed. Files above 4 MB are disks, not logs.
_COLLECT = r"""
set +e
out=$(mktemp -d); cd "$out" || exit 1
journalctl -b --no-pager -n 3000 >journal.txt 2>&1
dmesg >dmesg.txt 2>&1
ps axwwfo pid,ppid,uid,stat,etimes,rss,args >ps.txt 2>&1
ip -d address >ip.txt 2>&1; ip route >>ip.txt 2>&1; nft list ruleset >nft.txt 2>&1
ls -lRn /run/banger /srv/jailer /root/.local/share/banger/vms >listing.txt 2>&1
df -h >df.txt 2>&1; free -m >>df.txt 2>&1
find /root/.local /home /srv/jailer /tmp -xdev -type f -size -4M \
    \( -path '*/banger/*' -o -path '/srv/jailer/*' \) \( -name '*.log*' -o -path '*/last-failed-boot/*' \) \
    -exec cp --parents -t "$out" {} + 2>/dev/null
tar -cf - . ; cd / ; rm -rf "$out"
"""


def why_no_lab() -> str | None:
    """Return why this machine can have no lab, or None."""
    if not _SHARED.exists():
        return "no lab here: ../shared/lab/lab.sh stands beside no checkout but ours"
    if os.geteuid() != 0:
        return "no lab here: its disk needs root to be made"
    if shutil.which("apt-get") is None:
        return "no lab here: its disk is made with Debian's tools"
    return None


class Lab:
    """A running lab with the product installed. Commands run as root unless `user` says otherwise."""

    def __init__(self) -> None:
        self.started = False
        # Short: the name of a socket is bounded to 108 bytes.
        self._private = Path(tempfile.mkdtemp(prefix="lab-"))
        self._control = self._private / "c"
        self._ssh: list[str] = []

    def start(self) -> None:
        """Build, start and install what is not; a lab that runs is taken as it is."""
        EVIDENCE.mkdir(parents=True, exist_ok=True)
        self.started = self._verb("status", timeout_s=_CONNECT_S, check=False) != 0
        self._verb("up", "--fresh", timeout_s=_UP_S)
        directory, port = self._output("dir"), self._output("port")
        self._ssh = ["ssh", "-p", port, "-i", f"{directory}/key"]
        for option in (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "BatchMode=yes",
            f"ConnectTimeout={_CONNECT_S}",
        ):
            self._ssh += ["-o", option]
        self._verb("install", timeout_s=_INSTALL_S)
        subprocess.run(
            [*self._ssh, "-S", str(self._control), "-M", "-N", "-f", "root@127.0.0.1"],
            # It stays in the background, and would hold a pipe open.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_CONNECT_S * 2,
            check=True,
        )

    def stop(self) -> None:
        """Power it off; the next one starts from an untouched disk, so this one's is 2.5 GB of waste."""
        self._verb("down", "--discard", timeout_s=_DOWN_S, check=False)

    def close(self) -> None:
        """Let go of it; it runs on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*self._ssh, "-S", str(self._control), "-O", "exit", "root@127.0.0.1"],
                capture_output=True,
                timeout=20,
                check=False,
            )
        shutil.rmtree(self._private, ignore_errors=True)

    def ssh_command(self) -> str:
        """Return what a developer types to get into it."""
        return shlex.join([*self._ssh, "root@127.0.0.1"])

    def command(
        self, command: str | Sequence[str], *, user: str = "root", tty: bool = False
    ) -> list[str]:
        """Return the argv, here, of a command there: an argv, or a script for bash."""
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        if user != "root":
            # The manager's run directory too, which a bare su does not make.
            words = ["runuser", "-u", user, "--", "env", f"HOME=/home/{user}", *words]
        return [
            *self._ssh,
            *("-S", str(self._control), "-o", "ControlMaster=no"),
            *(["-tt"] if tty else []),
            "root@127.0.0.1",
            shlex.join(words),
        ]

    def run(
        self,
        command: str | Sequence[str],
        *,
        check: bool = False,
        timeout_s: float = 120,
        stdin: bytes = b"",
        user: str = "root",
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end. With `check` a failure is an AssertionError with its stderr."""
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        # Ending ssh does not end what it started: `timeout`, a little later, does.
        bounded = ["timeout", "-k", "5", str(timeout_s + 5), *words]
        done = subprocess.run(
            self.command(bounded, user=user),
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        if check:
            assert done.returncode == 0, (
                f"{command}: {done.returncode}\n{_text(done.stdout)}\n{_text(done.stderr)}"
            )
        return done

    def ok(self, command: str | Sequence[str], **options: Any) -> str:
        """Run a command that must succeed and return its stdout, without the last newline."""
        return _text(self.run(command, check=True, **options).stdout).removesuffix("\n")

    def json(self, *words: str, **options: Any) -> Any:
        """Run `banger WORDS --json`, which must succeed, and return what it said."""
        return json.loads(self.ok(["banger", *words, "--json"], **options))

    def popen(
        self,
        command: str | Sequence[str],
        *,
        user: str = "root",
        tty: bool = False,
        stdin: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start a command with pipes. Closing its stdin, or `tty`, is how to end it."""
        return subprocess.Popen(
            self.command(command, user=user, tty=tty),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )

    def push(self, source: Path, destination: str) -> None:
        """Copy a file there, or what a directory holds; permissions stay, owners become root."""
        place = shlex.quote(destination)
        if source.is_dir():
            packed = subprocess.run(
                ["tar", "-C", str(source), "-cSf", "-", "."], capture_output=True, check=True
            )
            script = f"mkdir -p {place} && tar -C {place} --no-same-owner -xSf -"
            self.run(script, check=True, stdin=packed.stdout, timeout_s=300)
        else:
            script = f"mkdir -p $(dirname {place}) && cat >{place} && chmod %o {place}"
            self.run(
                script % (source.stat().st_mode & 0o777),
                check=True,
                stdin=source.read_bytes(),
                timeout_s=300,
            )

    def pull(self, source: str, destination: Path) -> None:
        """Copy a file from there, or what a directory holds."""
        place = shlex.quote(source)
        if self.run(["test", "-d", source]).returncode == 0:
            self._unpack(f"tar -C {place} -cSf - .", destination, timeout_s=300)
        else:
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_bytes(self.run(f"cat {place}", check=True, timeout_s=300).stdout)

    def link_artifacts(self, home: str, *, user: str = "root") -> None:
        """Give the user of `home` the images and kernels, by hard links, as if pulled."""
        data = shlex.quote(f"{home}/.local/share/banger")
        # -R on what is shared would give the files of all away: directories only.
        self.ok(
            f"mkdir -p -m 700 {data} && cp -aln /var/lib/banger-artifacts/. {data}/"
            f" && find {shlex.quote(home)}/.local -type d -exec chown {shlex.quote(user)}: {{}} +"
        )

    def guest_resets(self) -> int:
        """Return how often a guest has ended by itself in this lab so far."""
        logs = "/root/.local/state/banger/bangerd.log* /home/*/.local/state/banger/bangerd.log*"
        ends = "shut down by itself|ended while booting"
        return int(self.ok(f"cat {logs} 2>/dev/null | grep -cE '{ends}' || true"))

    def has_panicked(self) -> bool:
        """Tell whether the lab's own kernel has panicked."""
        console = Path(self._output("dir")) / "l1.log"
        return console.exists() and b"Kernel panic" in console.read_bytes()

    def start_stopped_vms(self) -> None:
        """Start root's VMs that do not run, and wait until each has an sshd."""
        self.ok(
            "for vm in $(banger vm list --json | jq -r '.[] | select(.state == \"stopped\").name'); do "
            "banger vm start $vm || exit; done; for vm in $(banger vm list -q); do "
            "for i in $(seq 90); do banger vm exec $vm -- test -e /run/sshd.pid && break; sleep 1; "
            "done; done",
            timeout_s=900,
        )

    def keep_evidence(self, test: str) -> None:
        """Copy journal, kernel log, consoles and daemon log to test-results/lab/TEST/."""
        kept = EVIDENCE / test.replace("/", "_")
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        console = Path(self._output("dir")) / "l1.log"
        if console.exists():
            shutil.copy(console, kept / "lab-console.log")
        # Evidence of a lab that answers no more is its console.
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self._unpack(_COLLECT, kept, timeout_s=120)

    def _unpack(self, script: str, destination: Path, *, timeout_s: float) -> None:
        packed = self.run(script, check=True, timeout_s=timeout_s).stdout
        destination.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["tar", "-C", str(destination), "--no-same-owner", "-xSf", "-"],
            input=packed,
            capture_output=True,
            check=True,
        )

    def _verb(self, *words: str, timeout_s: float, check: bool = True) -> int:
        """Run a verb of scripts/lab.sh; what it says is kept in test-results/lab/lab.log."""
        log = EVIDENCE / "lab.log"
        with open(log, "ab") as out:
            done = subprocess.run(
                [str(_SCRIPT), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=timeout_s,
                check=False,
            )
        if check and done.returncode != 0:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"scripts/lab.sh {shlex.join(words)}: {done.returncode}\n{last}")
        return done.returncode

    def _output(self, *words: str) -> str:
        done = subprocess.run(
            [str(_SCRIPT), *words], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()


def _text(data: bytes) -> str:
    return data.decode(errors="replace")

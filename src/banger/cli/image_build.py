"""`image promote` and `image build`: images of what was made in a VM."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser, add_json, add_quiet
from banger.cli.progress import Progress, follow
from banger.cli.spool import spooled
from banger.errors import Conflict, InvalidInput, NotFound, TimedOut, Unavailable

if TYPE_CHECKING:
    from banger.api.models import ImagePull, VmConnection, VmCreate, VmPromote
    from banger.guest.transport import Endpoint

_BUILDER = "debian-bookworm"
_TAG = "banger-build:latest"  # in the machine, where nothing else is
_CONTEXT = "/root/context"
_BESIDE = "/root/beside"  # a Dockerfile from outside the context
_ORIGIN = "build:"
_BUILDX_SINCE = 23
# Its start is 10 s of CPU under emulation, behind a boot of 40; a busy host takes minutes.
_DOCKER_TIMEOUT_S = 600.0
_RETRY_S = 0.3
_TAIL_BYTES = 16 << 10
_TAIL_LINES = 20


class BuildFailed(Unavailable):
    """The builder in the machine ended with an error of its own."""

    code = "build_failed"


# -- promote


def build_promote(parser: Parser) -> None:
    """Arguments of `image promote`."""
    parser.usage = "banger image promote VM --name NAME [OPTIONS]"
    parser.description = (
        "Make an image of a stopped VM: its image and its own disk as one. What makes it this\n"
        "machine is left out: its machine-id, ssh host keys, host name and banger's own key.\n"
        "Everything else stays, secrets that you left in files too; what Docker holds in\n"
        "/var/lib/docker does not come along. The VM stays as it is."
    )
    parser.add_argument("vm", metavar="VM", help="a stopped VM")
    parser.add_argument("--name", required=True, metavar="NAME", help="what the image is called")
    parser.add_argument(
        "--kernel-ref", metavar="K", help="the kernel of its VMs (default: as the VM's image says)"
    )
    parser.add_argument("--description", metavar="TEXT", help="a line for `image list`")
    parser.add_argument("-f", "--force", action="store_true", help="replace an installed image")
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger vm stop box && banger image promote box --name base", ""),
        ("banger vm run --image base", "machines with what box had"),
    )


def run_promote(context: Context, args: argparse.Namespace) -> int:
    """Promote a VM."""
    request: VmPromote = {"name": args.name, "force": args.force}
    if args.kernel_ref:
        request["kernel"] = args.kernel_ref
    if args.description:
        request["description"] = args.description
    with Progress(quiet=args.quiet) as progress:
        entry = follow(context.client, context.client.promote_vm(args.vm, request), progress)
    if context.json:
        output.write_json(entry)
    else:
        output.write_line(entry["name"])
    return 0


# -- build


def build_build(parser: Parser) -> None:
    """Arguments of `image build`."""
    parser.usage = "banger image build DIR [-t NAME] [-f DOCKERFILE] [OPTIONS]"
    parser.description = (
        "Build a Dockerfile and make an image of the result. The build runs in a machine of its\n"
        "own, with the Docker that is in there (BuildKit where it has it); this host needs none.\n"
        "DIR is copied into that machine as it is: symbolic links stay links, .dockerignore is\n"
        "Docker's to honour. The machine is deleted afterwards, and its build cache with it. An\n"
        "image of that name that was built before is replaced."
    )
    parser.add_argument("directory", metavar="DIR", help="the build context")
    parser.add_argument(
        "-t", "--tag", metavar="NAME", help="what the image is called (default: as DIR)"
    )
    parser.add_argument(
        "-f", "--file", metavar="FILE", help="the Dockerfile (default: DIR/Dockerfile)"
    )
    parser.add_argument(
        "--build-arg",
        action="append",
        default=[],
        metavar="K=V",
        help="set a build-time variable; K alone takes this environment's (repeat)",
    )
    parser.add_argument("--target", metavar="STAGE", help="build up to this stage")
    parser.add_argument("--force", action="store_true", help="replace an image made otherwise")
    group = parser.add_argument_group("the machine that builds")
    group.add_argument(
        "--builder", metavar="IMAGE", help="its image, with Docker in it (default: debian-bookworm)"
    )
    group.add_argument("--vcpu", metavar="N", help="virtual CPUs (default: from the host)")
    group.add_argument("--memory", metavar="SIZE", help="memory, such as 4G")
    group.add_argument("--disk-size", metavar="SIZE", help="its disk, such as 20G")
    group.add_argument("--keep-vm", action="store_true", help="do not delete it, to look into it")
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger image build . -t app", "./Dockerfile, as the image app"),
        ("banger image build ./src -f ./src/Dockerfile.test --target test", ""),
        ("banger vm run --image app --entrypoint", "run what it is for"),
    )


class _Plan(NamedTuple):
    """What is built: the context, the Dockerfile (inside of it, or to be copied beside it)."""

    directory: str
    name: str
    inside: str  # the Dockerfile's path in the context, or empty
    outside: str  # its path on the host otherwise


def run_build(context: Context, args: argparse.Namespace) -> int:
    """Build an image."""
    plan = _plan(args)
    build_args = _build_args(args.build_arg)
    force = _may_replace(context, plan.name, args)
    with Progress(quiet=args.quiet) as progress, spooled(context.paths) as (spool_fd, spool_path):
        with _machine(context, args, progress) as connection:
            endpoint = endpoint_of(connection)
            _send(endpoint, plan, progress)
            environment, flags = _await_docker(connection, progress)
            words = ["docker", "build", *flags, "--tag", _TAG, "--file", _dockerfile(plan)]
            words += [word for pair in build_args for word in ("--build-arg", pair)]
            words += ["--target", args.target] if args.target else []
            words += ["."]
            _build(endpoint, words, environment, args, progress)
            _save(endpoint, spool_fd, progress)
        request: ImagePull = {
            "source": f"docker-archive:{spool_path}",
            "name": plan.name,
            "force": force,
            "origin": f"{_ORIGIN}{plan.directory}",
        }
        entry = follow(context.client, context.client.pull_image(request), progress)
    if context.json:
        output.write_json(entry)
    else:
        output.write_line(entry["name"])
    return 0


def _plan(args: argparse.Namespace) -> _Plan:
    """Check what was asked for before a machine is made for it."""
    directory = os.path.abspath(args.directory)
    if not os.path.isdir(directory):
        problem = "is not a directory" if os.path.lexists(directory) else "does not exist"
        raise InvalidInput(f"{args.directory} {problem}", hint="banger image build DIR")
    if args.file is None:
        file, inside = os.path.join(directory, "Dockerfile"), "Dockerfile"
        if not os.path.lexists(file):
            raise NotFound(
                f"{args.directory} has no Dockerfile", hint="write one, or name it with -f FILE"
            )
    else:
        file = os.path.abspath(args.file)
        if not os.path.isfile(file):
            raise NotFound(f"the Dockerfile {args.file} does not exist", hint="check the path")
        inside = os.path.relpath(file, directory)
    is_outside = inside.startswith("../")
    name = _image_name(args.tag or os.path.basename(directory), is_given=args.tag is not None)
    return _Plan(directory, name, "" if is_outside else inside, file if is_outside else "")


def _image_name(text: str, *, is_given: bool) -> str:
    """Return an image's name: `app:v1` is app-v1, `latest` is left out, as `image pull` does."""
    name = text.rpartition("/")[2].removesuffix(":latest").replace(":", "-")
    if not is_given:
        name = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:63] or "image"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
        raise InvalidInput(
            f"{text!r} is not a name for an image",
            hint="use up to 63 of a-z 0-9 . _ - and begin with a letter or a digit: -t NAME",
        )
    return name


def _build_args(given: list[str]) -> list[str]:
    """Return `K=V` for each; `K` alone is this environment's, or nothing when it has none."""
    found = []
    for pair in given:
        name, separator, _ = pair.partition("=")
        if not name:
            raise InvalidInput(f"--build-arg takes K=V, not {pair!r}")
        if separator:
            found.append(pair)
        elif name in os.environ:
            found.append(f"{name}={os.environ[name]}")
    return found


def _may_replace(context: Context, name: str, args: argparse.Namespace) -> bool:
    """Tell whether an image is replaced; raise Conflict when it must not be."""
    try:
        found = context.client.get_image(name)
    except NotFound:
        return False
    if not found["installed"]:
        raise Conflict(f"{name} is the name of an image of the catalog", hint="-t NAME")
    if not args.force and not found["origin"].startswith(_ORIGIN):
        raise Conflict(
            f"image {name} is installed already, from {found['origin']}",
            hint="-t gives this one another name, --force replaces that one",
        )
    if found["used_by"]:
        raise Conflict(
            f"the image {name} cannot be replaced: used by {', '.join(found['used_by'])}",
            hint=f"-t NAME, or `banger vm delete {' '.join(found['used_by'])}` first",
        )
    return True


@contextlib.contextmanager
def _machine(
    context: Context, args: argparse.Namespace, progress: Progress
) -> Iterator[VmConnection]:
    """Yield a machine to build in, and delete it; the daemon does it when we are killed."""
    from banger.cli.vm_lifecycle import parse_bytes, parse_count

    request: VmCreate = {
        "image": args.builder or _BUILDER,
        "start": True,
        "with_sshd": args.keep_vm,
        "credentials": False,  # whose Dockerfile it is nobody knows
    }
    if not args.keep_vm:
        request["owner_pid"] = os.getpid()
    if args.vcpu:
        request["vcpu"] = parse_count(args.vcpu, "--vcpu")
    if args.memory:
        request["memory_bytes"] = parse_bytes(args.memory, "--memory")
    if args.disk_size:
        request["disk_size_bytes"] = parse_bytes(args.disk_size, "--disk-size")
    vm = follow(context.client, context.client.create_vm(request), progress)
    try:
        yield context.client.connect_vm(vm["name"])
    finally:
        if args.keep_vm:
            progress.notice(f"{vm['name']} stays: `banger vm ssh {vm['name']}` enters it")
        else:
            progress.stage("delete the machine")
            with contextlib.suppress(NotFound):
                context.client.wait(context.client.delete_vm(vm["name"]), lambda _: None)


def _send(endpoint: Endpoint, plan: _Plan, progress: Progress) -> None:
    from banger.cli.vm_cp import iter_host
    from banger.guest import agent

    progress.stage(f"copy {plan.directory} into it")
    # With the slash a directory that is itself a link counts as what it leads to.
    source = os.fsencode(plan.directory) + b"/"
    tree = iter_host(source, b"", progress.warning)
    agent.put_tar(endpoint, os.fsencode(_CONTEXT), tree, progress=progress.progress)
    if plan.outside:
        file = os.fsencode(os.path.realpath(plan.outside))
        tree = iter_host(file, b"Dockerfile", progress.warning)
        agent.put_tar(endpoint, os.fsencode(_BESIDE), tree)


def _dockerfile(plan: _Plan) -> str:
    return plan.inside or f"{_BESIDE}/Dockerfile"


def _await_docker(
    connection: VmConnection, progress: Progress
) -> tuple[dict[bytes, bytes], list[str]]:
    """Wait until the machine's Docker answers; return how its best builder is asked for."""
    from banger.guest import agent

    endpoint, vm = endpoint_of(connection), connection["vm"]

    def docker(*words: bytes) -> tuple[int, str]:
        status, said, _ = agent.capture_exec(endpoint, [b"docker", *words], timeout_s=120)
        return status.exit_code, said.decode(errors="replace")

    progress.stage("wait for the machine's Docker")
    code, version = docker(b"--version")
    if code != 0:
        raise Unavailable(
            f"the image {vm['image']} has no Docker to build with", hint=f"--builder {_BUILDER}"
        )
    deadline = time.monotonic() + _DOCKER_TIMEOUT_S
    # Its socket first: asking Docker itself costs an emulated machine a second each time.
    while agent.stat_path(endpoint, b"/run/docker.sock") is None or docker(b"info")[0] != 0:
        if time.monotonic() > deadline:
            raise TimedOut(
                f"the Docker of {vm['name']} was not up within {_DOCKER_TIMEOUT_S:.0f} s",
                hint="see it with --keep-vm, then `systemctl status docker` in it",
            )
        time.sleep(_RETRY_S)
    # Up to 22 the client speaks BuildKit by itself, from 23 on through the plug-in buildx.
    found = re.search(r"version (\d+)\.", version)
    is_old = found is not None and int(found[1]) < _BUILDX_SINCE
    if is_old or docker(b"buildx", b"version")[0] == 0:
        return {b"DOCKER_BUILDKIT": b"1"}, ["--progress=plain"]
    return {b"DOCKER_BUILDKIT": b"0"}, []


def _build(
    endpoint: Endpoint,
    words: list[str],
    environment: dict[bytes, bytes],
    args: argparse.Namespace,
    progress: Progress,
) -> None:
    """Run the build, its output on our stderr; raise BuildFailed with its last words."""
    from banger.guest import agent

    progress.stage("build")
    progress.close()
    tail = bytearray()

    def take(_: int, data: bytes) -> None:
        tail.extend(data)
        del tail[:-_TAIL_BYTES]
        if not args.quiet:
            agent.write_all(2, data)

    request = agent.ExecRequest(
        [os.fsencode(word) for word in words], env=environment, cwd=os.fsencode(_CONTEXT)
    )
    status = agent.follow_exec(endpoint, request, take)
    if status.exit_code == 0:
        return
    lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    if args.quiet:
        for line in lines[-_TAIL_LINES:]:
            sys.stderr.write(output.escape(line) + "\n")
    raise BuildFailed(
        f"the build failed: {output.escape(lines[-1].strip()) if lines else 'Docker said nothing'}",
        hint="--keep-vm keeps the machine to look into it",
    )


def _save(endpoint: Endpoint, fd: int, progress: Progress) -> None:
    """Write what `docker save` says to a file of ours."""
    from banger.guest import agent, frames

    progress.stage("take the image out")
    done = 0
    said = bytearray()

    def take(kind: int, data: bytes) -> None:
        nonlocal done
        if kind != frames.STDOUT:
            said.extend(data[: _TAIL_BYTES - len(said)])
            return
        agent.write_all(fd, data)
        done += len(data)
        progress.progress(done)

    request = agent.ExecRequest([b"docker", b"save", os.fsencode(_TAG)])
    status = agent.follow_exec(endpoint, request, take)
    if status.exit_code != 0:
        why = output.escape(said.decode(errors="replace").strip())
        raise BuildFailed(f"the built image did not come out of the machine: {why}")


VERBS = {"promote": (build_promote, run_promote), "build": (build_build, run_build)}

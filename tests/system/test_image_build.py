"""A Dockerfile becomes an image, built in a machine of its own that is gone afterwards."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.support.artifacts import need_image
from tests.support.sandbox import Sandbox

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]

BUILDER = "debian-bookworm"
MACHINE = ("--memory", "2G", "--vcpu", "2")
DOCKERFILE = """\
FROM scratch AS base
ARG WORD=none
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
COPY . /context/
RUN mkdir -p /etc /root /tmp && echo 'someone:x:1000:1000::/context:/bin/sh' > /etc/passwd
RUN echo "$WORD" > /word && chown 1000:1000 /word && chmod 4711 /word

FROM base
ENV GREETING="hello there" PATH=/bin
USER someone
WORKDIR /context
ENTRYPOINT ["/bin/sh", "-c", "echo $GREETING from $(id -u) in $PWD: $0 $@"]
CMD ["the", "command"]
"""


@pytest.fixture(scope="module")
def user(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A user with images of their own: building adds to the store, which tests share."""
    builder = need_image(BUILDER)
    made = Sandbox.with_own_images()
    (made.layout.data / "images" / BUILDER).symlink_to(builder)
    try:
        yield made
    finally:
        made.keep_evidence(request.node.name)
        made.close()


def _nothing_left(user: Sandbox) -> bool:
    incoming = user.layout.cache / "incoming"
    return not (user.json("vm", "list") or user.processes() or list(incoming.iterdir()))


def test_a_dockerfile_becomes_an_image_that_runs(user: Sandbox) -> None:
    context = user.home / "My App"
    (context / "sub").mkdir(parents=True)
    shutil.copy("/bin/busybox", context / "busybox")
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / ".dockerignore").write_text("secret\n.dockerignore\nDockerfile\n")
    (context / "secret").write_text("not for the image")
    (context / "sub" / "file").write_text("in the context")
    (context / "sub" / "link").symlink_to("/etc/shadow")
    done = user.run(
        *("image", "build", str(context), "--build-arg", "WORD=given", *MACHINE), timeout_s=900
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"my-app\n"
    assert b"--install" in done.stderr  # what the builder said
    assert _nothing_left(user)
    image = user.json("image", "show", "my-app")
    assert (image["user"], image["working_dir"]) == ("someone", "/context")
    assert image["env"] == {"GREETING": "hello there", "PATH": "/bin"}
    assert image["command"] == ["the", "command"]
    assert image["origin"] == f"build:{context}"

    machine = ("--network", "none", "--memory", "256M", "--name", "app")
    said = user.ok("vm", "run", "--image", "my-app", *machine, "--entrypoint", "--", "of", "mine")
    assert said == b"hello there from 1000 in /context: of mine\n"
    script = "cat /word; stat -c '%u %a' /word; find /context | sort; readlink /context/sub/link"
    assert user.ok("vm", "exec", "app", "--", "sh", "-c", script).decode() == (
        "given\n1000 4711\n/context\n/context/busybox\n/context/sub\n/context/sub/file\n"
        "/context/sub/link\n/etc/shadow\n"
    )
    # What a VM uses is not built anew, and no minutes pass before that is said.
    used = user.run("image", "build", str(context))
    assert used.returncode == 125
    assert b"used by app" in used.stderr
    user.ok("vm", "delete", "app")


def test_a_build_that_fails_says_why_and_leaves_no_machine(user: Sandbox) -> None:
    context = user.home / "bad"
    context.mkdir()
    shutil.copy("/bin/busybox", context / "busybox")
    (user.home / "Other").write_text(
        'FROM scratch\nCOPY busybox /sh\nRUN ["/sh", "-c", "echo the reason >&2; exit 7"]\n'
    )
    done = user.run(
        *("image", "build", "bad", "-f", "Other", "-t", "bad:v1", "--quiet", *MACHINE),
        timeout_s=900,
    )
    assert done.returncode == 125
    assert b"the reason" in done.stderr
    failed = done.stderr.splitlines()[-2]
    assert failed.startswith(b"banger: the build failed: "), done.stderr
    assert failed.endswith(b"exit code: 7")
    assert user.run("image", "show", "bad-v1").returncode == 125
    assert _nothing_left(user)


def test_ctrl_c_leaves_no_machine_and_no_file(user: Sandbox) -> None:
    (user.home / "bad").mkdir(exist_ok=True)
    (user.home / "Other").touch()
    begun = user.popen("image", "build", "bad", "-f", "Other", "-t", "stopped", *MACHINE)
    assert begun.stderr is not None
    for line in begun.stderr:
        if b"wait for the machine's Docker" in line:
            break
    assert len(user.json("vm", "list")) == 1
    begun.send_signal(signal.SIGINT)
    begun.communicate(timeout=120)
    assert begun.returncode == 130
    assert _nothing_left(user)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere",), b"does not exist"),
        (("bad", "-f", "none"), b"does not exist"),
        ((".",), b"has no Dockerfile"),
        (("bad", "-f", "Other", "-t", "B@D"), b"not a name"),
        (("bad", "-f", "Other", "-t", BUILDER), b"installed already"),
        (("bad", "-f", "Other", "--build-arg", "=x"), b"takes K=V"),
    ],
)
def test_what_cannot_be_built_is_said_at_once(
    user: Sandbox, words: tuple[str, ...], says: bytes
) -> None:
    (user.home / "bad").mkdir(exist_ok=True)
    (user.home / "Other").touch()
    done = user.run("image", "build", *words, timeout_s=60)
    assert done.returncode == 125
    assert says in done.stderr
    assert user.json("vm", "list") == []

"""The name server of `<vm>.vm`: UDP and TCP on one loopback port.

Owns sockets and bounds: packets in work, connections, sizes, times. Leaves what is answered to
`network.zone`, and which VM has which address to the `lookup` it is given. It is no resolver:
it asks nobody, and refuses every name outside `vm.`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from banger.errors import BangerError, Conflict, InvalidInput, Unavailable

_LOG = logging.getLogger(__name__)
_UDP_TASKS = 64  # packets being answered; a look-up takes less than 1 ms, so more is a flood
_CONNECTIONS = 16  # resolvers use one or two
_IDLE_S = 10.0  # RFC 7766, 6.2.3: a server of few clients may wait for seconds
_LOOKUP_S = 2.0  # a resolver asks again after 5 s, and a "no" now beats none then


@dataclass(frozen=True, slots=True)
class NameAnswer:
    """What is known of a VM's name: whether there is one, and its address while it has one."""

    exists: bool
    address: IPv4Address | None


Lookup = Callable[[str], Awaitable[NameAnswer]]


class NameServer:
    """Answers for `vm.` between `start` and `close`; both are idempotent."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._tcp: asyncio.Server | None = None
        self._udp: asyncio.DatagramTransport | None = None
        self._datagrams = _Datagrams(self._take)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._connections = 0
        self._endpoint: tuple[str, int] | None = None

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Address and port it listens on, or None."""
        return self._endpoint

    async def start(self, listen: str) -> None:
        """Listen on `listen` ("127.0.0.1:15353"); port 0 takes a free one.

        Raises Conflict when the port is taken, Unavailable when it cannot be had otherwise, and
        InvalidInput when it is no loopback address: whoever asks learns which VMs run.
        """
        if self._tcp is not None:
            return
        host, port = _parse(listen)
        # dnspython is 120 ms of imports; other requests are served meanwhile.
        await asyncio.to_thread(_import_zone)
        try:
            # Before it becomes self._tcp: a failure below leaves nothing behind.
            tcp = await asyncio.start_server(self._serve, host, port, backlog=_CONNECTIONS)
            bound: int = tcp.sockets[0].getsockname()[1]
            try:
                self._udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                    lambda: self._datagrams, local_addr=(host, bound)
                )
            except BaseException:
                tcp.close()
                await tcp.wait_closed()
                raise
        except OSError as error:
            raise _not_listening(listen, error) from error
        self._tcp = tcp
        self._endpoint = (host, bound)

    async def close(self) -> None:
        """Stop listening, and end what is being answered."""
        tcp, udp = self._tcp, self._udp
        self._tcp = self._udp = self._endpoint = None
        if tcp is not None:
            tcp.close()
        if udp is not None:
            udp.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if tcp is not None:
            await tcp.wait_closed()

    # -- UDP

    def _take(self, wire: bytes, sender: tuple[str, int]) -> None:
        if len(self._tasks) >= _UDP_TASKS + _CONNECTIONS:
            return  # who asked will ask again
        task = asyncio.create_task(self._answer_datagram(wire, sender))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_datagram(self, wire: bytes, sender: tuple[str, int]) -> None:
        answer = await self._answer(wire, tcp=False)
        udp = self._udp
        if answer is not None and udp is not None and not self._datagrams.full:
            udp.sendto(answer, sender)

    # -- TCP

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._connections += 1
        try:
            if self._connections <= _CONNECTIONS and self._tcp is not None:
                await self._converse(reader, writer)
        except (OSError, EOFError, TimeoutError):
            pass  # it went away, or said nothing for too long
        except asyncio.CancelledError:
            # Ours, by close(): the stream's callback would log a cancelled task as a failure.
            pass
        finally:
            self._connections -= 1
            self._tasks.discard(task)
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # who does not read would keep it open for ever
            else:
                writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from banger.network.zone import MESSAGE_LIMIT_BYTES

        while True:
            async with asyncio.timeout(_IDLE_S):
                length = int.from_bytes(await reader.readexactly(2))
                if length > MESSAGE_LIMIT_BYTES:
                    return
                wire = await reader.readexactly(length)
            answer = await self._answer(wire, tcp=True)
            if answer is None:
                return
            writer.write(len(answer).to_bytes(2) + answer)
            async with asyncio.timeout(_IDLE_S):
                await writer.drain()

    # -- both

    async def _answer(self, wire: bytes, *, tcp: bool) -> bytes | None:
        from banger.network import zone

        question = zone.read(wire, tcp=tcp)
        if not isinstance(question, zone.Question):
            return question
        try:
            async with asyncio.timeout(_LOOKUP_S):
                found = await self._lookup(question.vm)
            return zone.answer(question, found.exists, found.address, tcp=tcp)
        except Exception:  # noqa: BLE001 - one name's trouble is not the server's
            _LOG.exception("the name of a VM could not be looked up")
            return zone.failure(question, tcp=tcp)


class _Datagrams(asyncio.DatagramProtocol):
    """Hands packets on; errors of single packets (nobody listens there any more) are no news."""

    def __init__(self, take: Callable[[bytes, tuple[str, int]], None]) -> None:
        self._take = take
        self.full = False

    def pause_writing(self) -> None:
        """Note that the socket takes no more: answers are dropped, not hoarded."""
        self.full = True

    def resume_writing(self) -> None:
        """Note that it does again."""
        self.full = False

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        """Take a packet."""
        self._take(data, (addr[0], addr[1]))


def recipe(listen: str) -> str:
    """Return, in one line, how a host without systemd-resolved learns of `vm.`.

    dnsmasq by itself, or the one that NetworkManager runs.
    """
    host, port = _parse(listen)
    line = f"server=/vm/{host}#{port}"
    return (
        f"put the line `{line}` into /etc/dnsmasq.d/banger.conf and restart dnsmasq; with "
        "NetworkManager, into /etc/NetworkManager/dnsmasq.d/banger.conf, and `dns=dnsmasq` below "
        "`[main]` into /etc/NetworkManager/conf.d/banger.conf, and restart NetworkManager"
    )


def _import_zone() -> None:
    import banger.network.zone  # noqa: F401 - for its cost


def _parse(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    with contextlib.suppress(ValueError):
        if IPv4Address(host).is_loopback and port.isdecimal() and int(port) <= 65535:
            return host, int(port)
    raise InvalidInput(
        f"{listen!r} is not a loopback address and a port", hint="see dns_listen_addr in config"
    )


def _not_listening(listen: str, error: OSError) -> BangerError:
    hint = "set dns_listen_addr in config.toml to another port (empty: no names)"
    if error.errno == errno.EADDRINUSE:
        return Conflict(f"names of VMs: {listen} is in use by another program", hint=hint)
    reason = error.strerror or str(error)
    return Unavailable(f"names of VMs: cannot listen on {listen}: {reason}", hint=hint)

"""What every verb is handed: the paths, the client (made when first asked for), the format."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from banger.paths import Paths, find_paths

if TYPE_CHECKING:
    from banger.api.models import VmConnection
    from banger.client.api import Client
    from banger.guest.transport import Endpoint


class Context:
    """One command line's surroundings."""

    def __init__(self, *, json: bool = False, paths: Paths | None = None) -> None:
        self.json = json
        self.paths = find_paths() if paths is None else paths
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The daemon's API; the daemon is started by the first request when it is absent."""
        if self._client is None:
            from banger.cli.output import notice
            from banger.client.api import Client
            from banger.client.autostart import Daemon

            self._client = Client(Daemon(self.paths, warn=notice))
        return self._client


def endpoint_of(connection: VmConnection) -> Endpoint:
    """Return how to reach a VM's agent, from the daemon's answer."""
    from banger.guest import transport

    return transport.endpoint_from_wire(cast("dict[str, object]", connection["endpoint"]))

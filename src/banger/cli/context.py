"""What every verb is handed: the paths, the client (made when first asked for), the format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.paths import Paths, find_paths

if TYPE_CHECKING:
    from banger.client.api import Client


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

"""The one table of allowed VM state changes.

Every change goes through `check_transition`; a state ending in -ing is an intent on record,
which start-up rolls back or forward (`services.reconcile`).
"""

from __future__ import annotations

from banger.errors import Conflict

TRANSITIONS: dict[str, frozenset[str]] = {
    "creating": frozenset({"stopped", "deleting"}),
    # To stopping: its disk is read by a VMM that whoever finds it is to end (`image promote`).
    "stopped": frozenset({"starting", "stopping", "deleting"}),
    "starting": frozenset({"running", "stopped", "deleting"}),
    "running": frozenset({"stopping", "stopped", "deleting"}),
    "stopping": frozenset({"stopped", "deleting"}),
    "deleting": frozenset(),
}


def check_transition(name: str, state: str, wanted: str) -> None:
    """Raise Conflict unless a VM in `state` may become `wanted`."""
    if wanted not in TRANSITIONS[state]:
        raise Conflict(f"{name} is {state}: it cannot become {wanted}", hint="see `banger vm list`")

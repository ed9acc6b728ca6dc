"""Takeover after a death: machines whose process server is silent for too long are given to another one.

Looked at every so often, by `placement.stranded`, which says who may be moved; the rest is a move like one by hand,
with the config server itself in the audit. While no other process server is alive nothing is moved, and the machines'
agents keep what they capture.

Weak: only a process server that is silent is left. One that is heard of, but can't reach storage, keeps its machines,
and `replicar move` is for whoever knows better.
"""

from __future__ import annotations

import logging
import sqlite3
import uuid
from typing import Final

from config_server import parties, placement
from config_server.bells import Bells
from config_server.operator_routes import ring_move
from config_server.placement import Move
from config_server.registry import RegistryThread
from replicar.clock import Clock
from replicar.errors import LimitError, PermanentError

CHECK_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


class Takeover:
    """Moves stranded machines.

    Args:
        identity: the config server's own id, for the audit.
        after_seconds: of silence; 0: never.
    """

    def __init__(
        self, registry: RegistryThread, bells: Bells, clock: Clock, identity: uuid.UUID, after_seconds: float
    ) -> None:
        self._registry, self._bells, self._clock = registry, bells, clock
        self._identity = identity
        self._after_seconds = after_seconds
        self._since_ns = clock.now_ns()

    async def look(self) -> list[Move]:
        """Move whoever is stranded now; one transaction."""
        moves = await self._registry.run(self._move)
        for move in moves:
            ring_move(self._bells, move)
        return moves

    def _move(self, connection: sqlite3.Connection) -> list[Move]:
        now_ns, moves = self._clock.now_ns(), []
        self._since_ns = min(self._since_ns, now_ns)  # the clock may have been ahead then
        for machine in placement.stranded(connection, now_ns, self._since_ns, self._after_seconds):
            try:
                moves.append(placement.move(connection, machine, None, now_ns))
            except PermanentError:  # nobody is there to take it over yet: said by `replicar status` already
                break
            except LimitError as error:  # of this machine; the others are moved all the same
                _log.warning("machine %s can't be taken over: %s", machine.name, error)
                continue
            parties.audit(connection, self._identity, "takeover", f"machine {machine.name}", now_ns)
            _log.warning("machine %s: its process server is silent, another one takes it over", machine.name)
        return moves

"""Work by the clock that goes on whatever happens to it once: what failed is told, and tried again after a while.

The config server answers agents, process servers and operators; a drill that can't be begun, or one machine's jobs that
can't go on, must not take that away, least of all in the hour when somebody wants to fail over. So an error of ours
(`ReplicarError`) in a round is kept among the troubles, where `replicar status` and the metrics show it, logged when
it is news, and the round is done again: at first as always, then less and less often, up to `LONGEST_PAUSE_SECONDS`.

Two kinds of error end the server all the same, by ending its task group:

- `CorruptionError`: its registry is damaged. Whatever it would write next stands on that, and replication goes on
  without a config server; whoever restores the backup should not find newer damage in it.
- what is no `ReplicarError`: a programmer's. Nobody knows what is true then. Its transaction was rolled back, and a
  start from the registry alone is the one state that is known to be sound.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from config_server.troubles import Troubles
from replicar.clock import Clock
from replicar.errors import CorruptionError, ReplicarError

LONGEST_PAUSE_SECONDS: Final = 900.0

_log = logging.getLogger(__name__)


class Timed:
    """One kind of work, done over and over.

    Args:
        part: what troubles call it.
        every_seconds: from the end of one round to the next, while all is well.
        work: does one round.
    """

    def __init__(
        self,
        part: str,
        every_seconds: float,
        work: Callable[[], Awaitable[object]],
        troubles: Troubles,
        clock: Clock,
    ) -> None:
        self.part = part
        self._every_seconds, self._work = every_seconds, work
        self._troubles, self._clock = troubles, clock

    async def run(self) -> None:
        """Work until cancelled; see the module for what ends it besides."""
        pause = self._every_seconds
        while True:
            await self._clock.sleep(pause)
            try:
                await self._work()
            except CorruptionError:
                raise
            except ReplicarError as error:
                if self._troubles.note_own(self.part, error):
                    _log.warning("%s failed and will be tried again: %s", self.part, error)
                pause = min(2 * pause, max(LONGEST_PAUSE_SECONDS, self._every_seconds))
            else:
                if self._troubles.clear_own(self.part):
                    _log.info("%s: well again", self.part)
                pause = self._every_seconds

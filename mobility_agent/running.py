"""Running the agent until it is told to stop, and taking up changed settings when it is told to reload (SIGHUP).

A reload ends the service in good order and begins it again with the new settings, in the same process: NBD clients are
hung up on and connect again, users of files wait (see `capture.fuse.session`), and disks that are new, grown or gone
are taken up. Settings that can't be read, or with which the service does not begin, change nothing that matters: it
begins again with those it had, and says so.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

from mobility_agent.service import Service
from mobility_agent.settings import AgentSettings, load_settings
from replicar.errors import PermanentError, ReplicarError

_log = logging.getLogger(__name__)


class Running:
    """The agent of one settings file.

    Args:
        path: of the file.
        settings: what it says now.
    """

    def __init__(self, path: Path, settings: AgentSettings) -> None:
        self._path = path
        self._settings = settings
        self._next: AgentSettings | None = None
        self._stop = asyncio.Event()
        self._is_stopped = False

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            ReplicarError: it can't begin, or its disks or change log failed.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        before: AgentSettings | None = None
        while True:
            self._stop = asyncio.Event()
            if self._is_stopped:
                return
            service = Service(self._settings)
            try:
                await service.run(self._stop)
            except ReplicarError as error:
                if service.ready.is_set() or before is None:
                    raise
                _log.error("the new settings can't be used, the agent goes on with those it had: %s", error)
                self._settings, before = before, None
                continue
            if self._next is None:
                return
            self._settings, before, self._next = self._next, self._settings, None

    def reload(self) -> None:
        """Read the settings again, and begin again with them if they are sound."""
        try:
            chosen = load_settings(self._path)
            if chosen.directory != self._settings.directory:
                raise PermanentError(
                    f"the directory can't be changed from {self._settings.directory} while the agent runs",
                    hint="stop the agent, move the directory, and start it again",
                )
        except ReplicarError as error:
            _log.error("the settings are not reloaded, the agent goes on with those it has: %s", error)
            return
        _log.info("the settings are reloaded from %s", self._path)
        self._next = chosen
        self._stop.set()

    def _end(self) -> None:
        self._is_stopped, self._next = True, None
        self._stop.set()

"""A machine's console as a file that grows: waiting for a line that matches.

Weak: it is read again from its beginning at every look, bounded to MAX_BYTES from its end.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError

#: What is looked at, from the end: a guest that says more than this has scrolled its banner away.
MAX_BYTES: Final = 4 << 20
LAST_LINES: Final = 15
_POLL_SECONDS: Final = 0.1
#: Terminal control sequences (ECMA-48), which boot loaders write between the letters that a person reads.
_CONTROL: Final = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f]")


class Console:
    """What a console said, in the file that QEMU keeps of it or that was fetched."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def lines(self) -> list[str]:
        """All whole and begun lines, without control sequences."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(file.seek(0, 2) - MAX_BYTES, 0))
                data = file.read(MAX_BYTES)
        except FileNotFoundError:
            return []
        return [_CONTROL.sub(b"", line).decode(errors="replace").rstrip() for line in data.split(b"\n")]

    async def find(self, pattern: str) -> str | None:
        """The first line that matches, if there is one by now; without a pattern, an empty one.

        Raises:
            PermanentError: it is no pattern.
        """
        if not pattern:
            return ""
        try:
            wanted = re.compile(pattern)
        except re.error as error:
            raise PermanentError(f"the banner {pattern!r} is no pattern: {error}", hint="see Python's `re`") from None
        lines = await asyncio.to_thread(self.lines)
        return next((line for line in lines if wanted.search(line)), None)

    async def until(self, pattern: str, seconds: float, alive: Callable[[], bool]) -> str:
        """The first line that matches.

        Args:
            alive: whether the machine still runs; one that stopped says nothing more.

        Raises:
            PermanentError: none came in time, or the machine stopped; with its last lines. Or no pattern is this.
        """
        deadline = time.monotonic() + seconds
        while True:
            is_running = alive()  # asked first, so that its very last line is still read
            found = await self.find(pattern)
            if found is not None:
                return found
            if not is_running or time.monotonic() > deadline:
                raise self.silent(pattern, seconds, is_running=is_running)
            await asyncio.sleep(_POLL_SECONDS)

    def silent(self, pattern: str, seconds: float, *, is_running: bool) -> PermanentError:
        """The error that the line did not come, with what came last."""
        how = f"was not seen within {seconds:.0f} s" if is_running else "did not come before the machine stopped"
        last = "\n".join([line for line in self.lines() if line][-LAST_LINES:])
        return PermanentError(f"the banner {pattern!r} {how}", hint=f"its last words:\n{last}")

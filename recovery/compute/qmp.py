"""QEMU's machine protocol (QMP): one command at a time over a Unix socket, JSON by the line.

The server greets, is told `qmp_capabilities`, and then answers commands in order; events come in between and mean
nothing to us. (QEMU's documentation: "QEMU Machine Protocol Specification".)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from replicar.errors import PermanentError, TransientError

#: QEMU answers from its main loop; one that takes longer hangs.
ANSWER_SECONDS: Final = 30.0
MAX_LINE_BYTES: Final = 1 << 20
#: Events that may come before an answer.
MAX_EVENTS: Final = 10_000
_BROKEN: Final = (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError)


class Qmp:
    """A connection that has greeted; see `connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Carry out a command; what it returns.

        Raises:
            PermanentError: QEMU refuses it, with its words.
            TransientError: it does not answer, or hung up.
        """
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                self._writer.write(json.dumps(request).encode() + b"\r\n")
                await self._writer.drain()
                for _ in range(MAX_EVENTS):
                    found = await self._message()
                    if "error" in found:
                        raise PermanentError(f"QEMU refuses {command}: {found['error'].get('desc', '')}")
                    if "return" in found:
                        return found["return"]
        except _BROKEN as error:
            raise TransientError(f"QEMU does not answer {command}: {error or 'in time'}") from error
        raise TransientError(f"QEMU does not answer {command}: it only tells of events")

    async def _message(self) -> dict[str, Any]:
        found = json.loads(await self._reader.readuntil(b"\n"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found

    async def greet(self) -> None:
        """Take the greeting and begin.

        Raises:
            TransientError: nobody greets.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._message()
        except _BROKEN as error:
            raise TransientError(f"QEMU does not greet: {error or 'in time'}") from error
        await self.ask("qmp_capabilities")


@asynccontextmanager
async def connect(socket: Path) -> AsyncIterator[Qmp]:
    """A connection to the QEMU that listens there.

    Raises:
        TransientError: none does.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(socket, limit=MAX_LINE_BYTES)
    except OSError as error:
        raise TransientError(f"no QEMU listens at {socket}: {error.strerror}") from None
    try:
        qmp = Qmp(reader, writer)
        await qmp.greet()
        yield qmp
    finally:
        writer.close()

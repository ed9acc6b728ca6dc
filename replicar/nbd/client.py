"""A small NBD client: the application's side of a protected disk, and how a failback writes to one.

It speaks the newstyle handshake (NBD_OPT_GO) and simple replies over a Unix socket or TCP, keeps many requests in
flight on one connection, and says of each when it was handed to the connection and when its reply came. Those two times
are what the oracle of the tests knows; so this client shares no code with the servers that it is pointed at.

A connection that breaks leaves requests of which nobody can say whether they were done. They end with a
`TransientError`; what an application may then assume is nothing, and the oracle assumes just that.

Weak: no structured replies, one connection an object.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias

from replicar.errors import TransientError
from replicar.nbd.client_protocol import REQUEST, REQUEST_MAGIC, Command, ExportFlag, NbdConnection, Timing

Address: TypeAlias = Path | tuple[str, int]
Buffer: TypeAlias = bytes | bytearray | memoryview

#: Between connecting and the end of the handshake.
HANDSHAKE_SECONDS: Final = 10.0
#: Up to here copying a write behind its header costs less than a second system call.
_JOIN_BYTES: Final = 64 << 10
_COMMAND_FLAG_FUA: Final = 1
_COMMAND_FLAG_NO_HOLE: Final = 2


class NbdClient:
    """One connection to one export. Make it with `connect`; use it as an asynchronous context manager.

    Every request may run beside others (up to `MAX_IN_FLIGHT`), and an `on_issue` callback, if given, hears the time
    at which the request was handed over, before anything can have happened to it.
    """

    def __init__(self, transport: asyncio.Transport, protocol: NbdConnection) -> None:
        self._transport = transport
        self._protocol = protocol

    @classmethod
    async def connect(cls, address: Address, *, export: str = "", now_ns: Callable[[], int] = time.time_ns) -> Self:
        """Connect and choose the export.

        Raises:
            TransientError: nobody answers there, or breaks off.
            PermanentError: the server is no newstyle NBD server or has no such export.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                if isinstance(address, Path):
                    made = await loop.create_unix_connection(lambda: NbdConnection(export, now_ns), str(address))
                else:
                    made = await loop.create_connection(lambda: NbdConnection(export, now_ns), *address)
                transport, protocol = made
                try:
                    await asyncio.shield(protocol.ready)
                except BaseException:
                    transport.abort()
                    raise
        except (OSError, TimeoutError) as error:
            raise TransientError(
                f"no NBD server answers at {_named(address)}: {str(error) or type(error).__name__}",
                hint="is what serves the disk up?",
                address=_named(address),
            ) from error
        return cls(transport, protocol)

    @property
    def size_bytes(self) -> int:
        return self._protocol.size_bytes

    @property
    def flags(self) -> ExportFlag:
        return self._protocol.flags

    @property
    def block_bytes(self) -> tuple[int, int, int]:
        """Minimum, preferred and maximum request size, as the server said them or as the protocol presumes them."""
        return self._protocol.block_bytes

    @property
    def in_flight(self) -> int:
        return len(self._protocol.requests)

    @property
    def connected(self) -> bool:
        return self._protocol.broken is None

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`.

        Raises:
            TransientError: the connection broke.
            PermanentError: the server refused; `errno` is in the error's fields.
        """
        return (await self._request(Command.READ, offset, length))[1]

    async def write(
        self, offset: int, data: Buffer, *, fua: bool = False, on_issue: Callable[[int], None] | None = None
    ) -> Timing:
        """Write `data` at `offset`; with `fua` it is durable when this returns. Errors as for `read`."""
        flags = _COMMAND_FLAG_FUA if fua else 0
        return (await self._request(Command.WRITE, offset, len(data), flags, data, on_issue))[0]

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        on_issue: Callable[[int], None] | None = None,
    ) -> Timing:
        """Make `length` bytes from `offset` zeros. Errors as for `read`."""
        flags = (_COMMAND_FLAG_FUA if fua else 0) | (_COMMAND_FLAG_NO_HOLE if no_hole else 0)
        return (await self._request(Command.WRITE_ZEROES, offset, length, flags, on_issue=on_issue))[0]

    async def trim(self, offset: int, length: int, *, on_issue: Callable[[int], None] | None = None) -> Timing:
        """Say that `length` bytes from `offset` are not needed any more. Errors as for `read`."""
        return (await self._request(Command.TRIM, offset, length, on_issue=on_issue))[0]

    async def flush(self) -> Timing:
        """When this returns, every write acknowledged before it was called is durable. Errors as for `read`."""
        return (await self._request(Command.FLUSH, 0, 0))[0]

    async def close(self) -> None:
        """Say goodbye and hang up. Requests still in flight end with a `TransientError`."""
        if self.connected:
            self._transport.write(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0))
        self._transport.close()
        await self._protocol.closed.wait()

    def abort(self) -> None:
        """Hang up at once, as a machine that loses its power does."""
        self._transport.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _request(
        self,
        command: Command,
        offset: int,
        length: int,
        flags: int = 0,
        data: Buffer = b"",
        on_issue: Callable[[int], None] | None = None,
    ) -> tuple[Timing, bytes]:
        protocol = self._protocol
        async with protocol.slots:
            await protocol.writable.wait()
            if protocol.broken is not None:
                raise protocol.broken
            cookie, request = protocol.begin(command, offset, length)
            if on_issue is not None:
                on_issue(request.issued_ns)
            header = REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
            if len(data) <= _JOIN_BYTES:
                self._transport.write(header + data)
            else:
                self._transport.write(header)
                self._transport.write(data)
            # A cancelled caller leaves its request in flight: the server will do it, and its reply must be parsed.
            return await asyncio.shield(request.done)


def _named(address: Address) -> str:
    return str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"

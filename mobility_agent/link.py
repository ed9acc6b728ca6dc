"""One connection to a process server: TLS, the wire's messages in, frames out, and why it ended as one of our errors.

`Link` is an asyncio Protocol because that costs the least per byte (no stream buffer in between). A memoryview that is
written is encrypted at once, so the transport keeps ciphertext and never a view of the change log. What it may keep is
bounded: `WRITE_HIGH_BYTES` plus one write in the socket's buffer and as much in the TLS layer's.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Final, cast

from replicar.clock import Clock
from replicar.control.identity import Role
from replicar.control.messages import AgentAssignment
from replicar.errors import PermanentError, ReplicarError, TransientError
from replicar.formats import wire
from replicar.tls import server_name

CONNECT_SECONDS: Final = 10.0
#: Writing pauses while the TLS layer holds more than this.
WRITE_HIGH_BYTES: Final = 256 << 10
_HINT: Final = "see whether `process-server run` is up there, and whether its port is open to this machine"


class Link(asyncio.Protocol):
    """The agent's end of one connection.

    Args:
        where: `host:port`, for messages.
        receive: called with each message; a ReplicarError it raises ends the link.
    """

    def __init__(self, where: str, receive: Callable[[wire.Message], None], clock: Clock) -> None:
        loop = asyncio.get_running_loop()
        self.session = wire.AgentSession()
        self.heard = clock.monotonic()
        self._where = where
        self._receive = receive
        self._clock = clock
        self._ended: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting from it
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        self.heard = self._clock.monotonic()
        if self._ended.done():
            return
        try:
            for message in self.session.receive(data):
                self._receive(message)
        except ReplicarError as error:
            self._end(error)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        return False  # close our side too; `connection_lost` says the rest

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        if error is None:
            self._end(self._hung_up())
        else:
            self._end(connection_error(error, self._where))

    # --- the sender's side ---

    def write(self, data: bytes | memoryview) -> None:
        """Hand bytes to the transport; they are encrypted when this returns."""
        assert self._transport is not None
        self._transport.write(data)

    async def writable(self) -> None:
        """Return when the transport takes more."""
        await self._writable.wait()

    async def ended(self) -> None:
        """Raise why the link ended, when it does."""
        await asyncio.shield(self._ended)

    async def silence(self, seconds: float) -> None:
        """Raise when nothing was heard for so long."""
        while (left := self.heard + seconds - self._clock.monotonic()) > 0:
            await self._clock.sleep(left)
        raise TransientError(
            f"the process server at {self._where} has been silent for {seconds:g} s",
            hint="the network between here and there may be cut; a new connection is tried",
        )

    async def close(self) -> None:
        """Let go of the connection; what the transport still holds is dropped."""
        if self._transport is not None:
            self._transport.abort()
            await asyncio.shield(self._closed)
        self._ended.cancel()

    def _hung_up(self) -> ReplicarError:
        if self.session.state is wire.State.STREAMING:
            return TransientError(f"the process server at {self._where} hung up", hint=_HINT, address=self._where)
        # Not every TLS library says why it refuses a certificate before it hangs up.
        return TransientError(
            f"the process server at {self._where} hung up without an answer",
            hint="if this goes on, it may refuse this machine's certificate: see its log, or enrol this machine again",
            address=self._where,
        )

    def _end(self, error: ReplicarError) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # seen, even if nobody waits for it


async def connect(
    assignment: AgentAssignment, context: ssl.SSLContext, receive: Callable[[wire.Message], None], clock: Clock
) -> Link:
    """Connect to the assigned process server and verify that it is the one.

    Raises:
        TransientError: it can't be reached.
        PermanentError: what answers there is not that process server.
    """
    where = address(assignment)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, link = await loop.create_connection(
                lambda: Link(where, receive, clock),
                assignment.host,
                assignment.port,
                ssl=context,
                server_hostname=server_name(Role.PROCESS_SERVER, assignment.process_server_id),
            )
    except (OSError, TimeoutError) as error:
        raise connection_error(error, where) from error
    return link


def address(assignment: AgentAssignment) -> str:
    """`host:port` for messages."""
    host = f"[{assignment.host}]" if ":" in assignment.host else assignment.host
    return f"{host}:{assignment.port}"


def connection_error(error: Exception, where: str) -> ReplicarError:
    """What became of a connection, as an error that says what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return PermanentError(
            f"what answers at {where} is not the process server this machine is assigned to: {error.verify_message}",
            hint="see whether another server took over that address, and whether both belong to the same vault",
            address=where,
        )
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
        return PermanentError(
            f"the process server at {where} refuses this machine's certificate ({error.reason})",
            hint="enrol this machine again with the vault that the process server belongs to: `mobility-agent enrol`",
            address=where,
        )
    if isinstance(error, TimeoutError) and not error.args:
        return TransientError(
            f"the process server at {where} did not answer within {CONNECT_SECONDS:g} s", hint=_HINT, address=where
        )
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return TransientError(f"no connection to the process server at {where}: {reason}", hint=_HINT, address=where)

"""The server's handshake with one NBD client, on its connection: options, TLS where it is asked for, a limit of time.

`protocol.Handshake` knows what is said; this is who says it, the same for every server of disks. It ends in one of two
ways: the owner is told what was chosen, or the connection is over.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Final, Protocol

from replicar.errors import CorruptionError
from replicar.nbd.protocol import Chosen, Handshake

#: Answers that a client does not fetch: beyond this its requests are not carried out any more.
ANSWER_BYTES: Final = 8 << 20
#: A client that has not chosen a disk by then is hung up on: it holds one of few connections.
HANDSHAKE_SECONDS: Final = 30.0

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """The connection that greets."""

    def secured(self, transport: asyncio.Transport) -> None:
        """TLS stands: this is the transport from now on."""
        ...

    def chose(self, chosen: Chosen, rest: bytes) -> None:
        """The handshake is over; `rest` came behind it."""
        ...


class Greeting:
    """From the greeting to a chosen disk.

    Args:
        owner: also the asyncio protocol of the connection.
        tls: of the server; None where TLS is not offered.
    """

    def __init__(self, owner: Owner, handshake: Handshake, tls: ssl.SSLContext | None) -> None:
        self._owner, self._handshake, self._tls = owner, handshake, tls
        self._securing: asyncio.Task[None] | None = None
        self._early = b""  # came within TLS before the task that put it there was told that it stands
        self._deadline: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def begin(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self._too_late)
        transport.write(Handshake.greeting())

    def received(self, data: bytes) -> None:
        handshake = self._handshake
        if self._securing is not None:
            self._early += data
            return
        try:
            self._transport.write(handshake.receive(data))
        except CorruptionError as error:
            self._refuse(error.message)
            return
        if handshake.finished:
            self._transport.close()
        elif handshake.starts_tls:
            self._transport.pause_reading()  # what comes now is TLS's
            self._securing = asyncio.get_running_loop().create_task(self._secure())
        elif handshake.chosen is not None:
            self.end()
            self._owner.chose(handshake.chosen, handshake.rest)

    def end(self) -> None:
        """The handshake is over, or the connection."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._securing is not None:
            self._securing.cancel()
            self._securing = None

    async def _secure(self) -> None:
        """Put TLS under the connection; the client has to show a certificate."""
        assert self._tls is not None, "TLS is offered where it can be had"
        assert isinstance(self._owner, asyncio.BaseProtocol)
        try:
            secured = await asyncio.get_running_loop().start_tls(
                self._transport, self._owner, self._tls, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except (OSError, TimeoutError) as error:
            self._refuse(f"TLS with it failed: {error}")
            return
        assert secured is not None
        secured.set_write_buffer_limits(high=ANSWER_BYTES)
        self._transport = secured
        self._owner.secured(secured)
        self._handshake.secured()
        self._securing, early, self._early = None, self._early, b""
        if early:
            self.received(early)
        secured.resume_reading()

    def _too_late(self) -> None:
        self._refuse("it has not chosen a disk")

    def _refuse(self, why: str) -> None:
        _log.warning("an NBD client was refused: %s", why)
        self._transport.abort()

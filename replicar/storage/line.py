"""One kept connection to the storage service, for a thread: a request's head and its pages out, an answer in.

Why blocking, and in a thread: OpenSSL takes a whole segment in one call, without the interpreter's lock, encrypts it
record by record and hands each to the kernel. So for 3 MiB Python runs for a few lines, no event loop turns, nothing is
copied but by TLS itself, and all cores can be at it. The same through an event loop's TLS costs three copies more, and
keeps that loop from receiving.

One request, one answer, and nothing is ever sent again in here: after any failure but that of connecting, the outcome
is open (see `retry`). A connection that failed, or that said more than an answer, is never used again.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from contextlib import suppress
from typing import Final

from replicar.storage.reply import MAX_REPLY_BYTES, NoReplyError, Reply, read_reply
from replicar.storage.store import Pages

_READ_BYTES: Final = 16 << 10
#: A body up to here goes out in one piece with its head: a copy of it costs less than one more call of TLS does.
_JOINED_BYTES: Final = 128 << 10
#: What a service that hung up in the middle of a request may have said before; it is there, or it is not.
_LAST_WORDS_SECONDS: Final = 0.5


class Line:
    """A connection. Its methods block, and are called by one thread at a time; only `abort` may be called by another.

    Args:
        connected: a stream socket, connected already.
        trust: None for plain HTTP.
        host: whom the certificate has to name.
    """

    def __init__(self, connected: socket.socket, trust: ssl.SSLContext | None, host: str) -> None:
        connected.setblocking(True)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._trust, self._host = trust, host
        self._is_new = True
        self._is_over = False
        self.idle_since = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether the service seems to be there still. An idle connection has nothing to say but that it is over."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLHUP | select.POLLERR)
        return not poll.poll(0)

    def put(self, head: bytes, body: Pages, seconds: float) -> Reply:
        """Send a request and wait for its answer.

        Raises:
            OSError: it did not come, in time or at all; `ssl.SSLCertVerificationError` for a service not to be trusted.
        """
        until = time.monotonic() + seconds
        if self._is_new:
            self._shake_hands(until)
        try:
            self._limit(until)
            if len(body) <= _JOINED_BYTES:
                self._socket.sendall(b"".join((head, body)))
            else:
                self._socket.sendall(head)
                self._socket.sendall(body)
        except TimeoutError:
            raise
        except OSError:
            # A service that refuses may do so without listening to the end; why is worth more than that it hung up.
            said = self._last_words()
            if said is None:
                raise
            return said
        return self._answer(until)

    def abort(self) -> None:
        """End the connection under whoever is at it, who gets an error. Called by any thread."""
        self._is_over = True
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # of the socket, not of TLS: that is the other's

    def close(self) -> None:
        """Let go of it. TLS says no goodbye: after an answer there is nothing that its absence could cut short."""
        self._socket.close()

    def _shake_hands(self, until: float) -> None:
        self._limit(until)
        if self._trust is not None:
            plain = self._socket
            self._socket = self._trust.wrap_socket(plain, server_hostname=self._host, do_handshake_on_connect=False)
            if self._is_over:  # meanwhile, when there was nothing to shut down but the plain one
                raise NoReplyError("given up")
            self._limit(until)
            self._socket.do_handshake()
        self._is_new = False

    def _answer(self, until: float) -> Reply:
        data = b""
        while True:
            self._limit(until)
            more = self._socket.recv(_READ_BYTES)
            if not more:
                raise NoReplyError("the service hung up")
            data += more
            reply = read_reply(data)
            if reply is not None:
                return reply
            assert len(data) < MAX_REPLY_BYTES + _READ_BYTES

    def _last_words(self) -> Reply | None:
        with suppress(OSError, ValueError):
            reply = self._answer(time.monotonic() + _LAST_WORDS_SECONDS)
            if reply.status >= 300:
                return Reply(reply.status, reply.headers, keeps=False)
        return None

    def _limit(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

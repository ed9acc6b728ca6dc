"""Whether a client is still there, though nothing is read of it just now."""

from __future__ import annotations

import asyncio
import select
from typing import Final

#: Always told besides: errors, and both sides closed.
_LEFT: Final = select.POLLRDHUP


def has_left(transport: asyncio.BaseTransport) -> bool:
    """Whether the other end has closed its side, whether or not all that it had sent before was read.

    Weak: a host that lost power, or its way here, says nothing.
    """
    socket = transport.get_extra_info("socket")
    if socket is None or socket.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(socket.fileno(), _LEFT)
    return bool(poll.poll(0))

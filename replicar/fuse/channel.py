"""One end of /dev/fuse: requests come one to a read, answers go one to a write; neither blocks.

The kernel takes requests back (their process was killed) and unmounts under whoever reads. Both are ordinary, and both
mean that nobody waits for that answer any more; everything else that fails is raised.
"""

from __future__ import annotations

import errno
import os
from enum import Enum, auto

from replicar.fuse import protocol
from replicar.fuse.protocol import Request


class Silence(Enum):
    """Why there is no request to be had."""

    NONE_YET = auto()
    UNMOUNTED = auto()


class Channel:
    """A descriptor of /dev/fuse, and the memory that requests are read into.

    Args:
        fd: not blocking; whoever opened it closes it.
        received: at least `protocol.MAX_REQUEST_BYTES` long, the channel's alone.
    """

    def __init__(self, fd: int, received: memoryview) -> None:
        assert len(received) >= protocol.MAX_REQUEST_BYTES
        self.fd = fd
        self._received = received

    def receive(self) -> tuple[Request, memoryview] | Silence:
        """The next request and its body, which lies in `received` until the next call.

        Raises:
            CorruptionError: somebody else's file is at this number.
            OSError: the kernel has a trouble of its own.
        """
        while True:
            try:
                count = os.readv(self.fd, [self._received])
            except BlockingIOError:
                return Silence.NONE_YET
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # that request was taken back
                if error.errno == errno.ENODEV:
                    return Silence.UNMOUNTED
                raise
            data = self._received[:count]
            request = protocol.read_request(data)
            return request, data[request.body :]

    def send(self, *parts: bytes | memoryview) -> None:
        """Send the parts of one answer; no parts, or empty ones, are none."""
        if not any(parts):
            return
        try:
            os.writev(self.fd, parts)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # taken back, or unmounted: nobody waits for it
                raise

"""A disk that forgets what was not flushed: a file in memory, shown by FUSE, for a loop device with a file system.

A flush of the loop device is an fsync of the file, as it is with any loop device. Of every page that changed since the
last one, the old content is kept; `left` gives the disk as it might be found after the power went: of each such page
either the old or the new content, at random. That is what a drive with a volatile cache promises, and no more.

It is served by a thread of its own, which touches nothing but memory: whoever waits for the disk does not wait for
himself.
"""

from __future__ import annotations

import errno
import os
import random
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from replicar.fuse import mount, protocol
from replicar.fuse.channel import Channel, Silence
from replicar.fuse.protocol import FILE, Opcode, Request, Tree

_PAGE: Final = 4096
#: How much of what was not flushed had reached the medium by itself.
LUCK: Final = (0.0, 0.2, 0.8, 1.0)
_LOOK_MILLISECONDS: Final = 200
_LIMIT_SECONDS: Final = 30


class ForgetfulDisk:
    """See the module; `file` is there once `shown` gave it."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.file = file
        self.flushes = 0
        self._content = bytearray(content)
        self._before: dict[int, bytes] = {}  # by page, as the last flush left it
        self._lock = threading.Lock()
        self._tree = Tree(file.name, len(content), owner=os.geteuid(), group=os.getegid(), time_ns=0)
        self._fd = mount.mount(file.parent)
        self._ending = False
        self._thread = threading.Thread(target=self._serve, name="forgetful disk")
        self._thread.start()

    def left(self, draw: random.Random) -> bytes:
        """What a power cut at this instant leaves."""
        luck = draw.choice(LUCK)
        with self._lock:
            found = bytearray(self._content)
            for page, before in self._before.items():
                if draw.random() >= luck:
                    found[page * _PAGE : page * _PAGE + len(before)] = before
        return bytes(found)

    def read_bytes(self) -> bytes:
        """What it holds now, past all who may be frozen."""
        with self._lock:
            return bytes(self._content)

    def close(self) -> None:
        self._ending = True
        mount.unmount(self.file.parent, lazily=True)
        self._thread.join(_LIMIT_SECONDS)
        os.close(self._fd)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        channel = Channel(self._fd, memoryview(bytearray(protocol.MAX_REQUEST_BYTES)))
        while not self._ending:
            if not poll.poll(_LOOK_MILLISECONDS):
                continue
            received = channel.receive()
            if received is Silence.UNMOUNTED:
                return
            if isinstance(received, Silence):
                continue
            with self._lock:
                answer = self._answer(*received)
            channel.send(answer)

    def _answer(self, request: Request, body: memoryview) -> bytes:
        unique = request.unique
        match request.opcode:
            case Opcode.WRITE:
                offset, length, content = protocol.content_of(body)
                self._put(offset, content)
                return protocol.written(unique, length)
            case Opcode.READ:
                offset, length = protocol.range_of(body)
                return protocol.answer(unique, bytes(self._content[offset : offset + length]))
            case Opcode.FALLOCATE:
                zeroes = protocol.zeroes_of(body)
                if zeroes is None:
                    return protocol.refusal(unique, errno.EOPNOTSUPP)
                offset, length = zeroes
                self._put(offset, bytes(length))
                return protocol.answer(unique)
            case Opcode.FSYNC if request.node == FILE:
                self._before.clear()
                self.flushes += 1
                return protocol.answer(unique)
            case _:
                return self._tree.answer(request, body)

    def _put(self, offset: int, data: memoryview | bytes) -> None:
        for page in range(offset // _PAGE, -(-(offset + len(data)) // _PAGE)):
            if page not in self._before:
                self._before[page] = bytes(self._content[page * _PAGE : (page + 1) * _PAGE])
        self._content[offset : offset + len(data)] = data


@contextmanager
def forgetful(file: Path, content: bytes) -> Iterator[ForgetfulDisk]:
    """The disk, shown as `file`."""
    disk = ForgetfulDisk(file, content)
    try:
        yield disk
    finally:
        disk.close()

"""Parts of other versions beside ours.

Told is what this tree has two sides of, and nothing is made up: it writes one version of each format, reads two of
index blobs, and lets agent and process server agree on a version of the stream. So there are

    former    a worker that writes index blobs of version 1, which we read
    newer     a worker that writes index blobs of a version that we do not know (it is ours but for its number); an
              agent or process server that has another stream version besides ours, and says fields that nobody knows
    foreign   an agent that offers no stream version of ours, a process server that chooses one that was not offered

A process has the version that its place had when it started. What a newer worker wrote nobody else can read, until
everybody is upgraded (`upgrade`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import xxhash

from recovery import blobwriter
from replicar.formats import indexblob, wire
from replicar.formats.indexblob import IndexHeader, IndexName
from simulator.world.processes import Process, current
from simulator.world.replaced import replaced

#: A version of the stream that this tree does not know.
_STREAM: Final = wire.VERSION + 1


@dataclass(frozen=True, slots=True)
class Version:
    """What a part writes and says; the default is ours."""

    index: int = indexblob.VERSION
    streams: tuple[int, ...] = (wire.VERSION,)
    says_more: bool = False  # fields that nobody knows


OURS: Final = Version()
FORMER: Final = Version(index=1)
NEWER: Final = Version(streams=(_STREAM, wire.VERSION), says_more=True)
FOREIGN: Final = Version(streams=(_STREAM,), says_more=True)


class Versions:
    """Which version each place has, "machine/program", and what the others know of it."""

    def __init__(self) -> None:
        self.of: dict[str, Version] = {}
        self.known = indexblob.VERSION  # of index blobs, the latest that everybody reads
        self._running: dict[int, Version] = {}

    def started(self, process: Process) -> None:
        """It has this version until it ends, whatever becomes of its place."""
        version = self.of.get(repr(process), OURS)
        if version is not OURS:
            self._running[id(process)] = version

    def newer(self) -> Version:
        """A worker that writes what nobody else reads."""
        return replace(NEWER, index=self.known + 1)

    def upgrade(self, version: Version) -> None:
        """Everybody reads from now on what that one writes."""
        self.known = max(self.known, version.index)

    def present(self) -> Version:
        """Of whoever runs just now."""
        return self._running.get(id(current()), OURS) if self._running else OURS

    def names(self) -> tuple[tuple[Any, str, Any], ...]:
        """What stands for the product's names while the story is told."""
        return (
            (indexblob, "read_header", self._reading(indexblob.read_header)),
            (blobwriter, "IndexHeader", self._header),
            (wire, "pack_message", self._saying(wire.pack_message)),
        )

    def _header(self, *args: Any, **options: Any) -> IndexHeader:
        return IndexHeader(*args, **{"version": self.present().index, **options})

    def _reading(self, read_header: Callable[..., IndexHeader | None]) -> Callable[..., IndexHeader | None]:
        def read(data: Any, name: IndexName) -> IndexHeader | None:
            (found,) = struct.unpack_from("<I", data, len(indexblob.MAGIC))
            known = found if current() is None else max(self.known, self.present().index)
            if not indexblob.VERSION < found <= known:
                return read_header(data, name)
            with replaced((indexblob, "VERSION", found)):
                return read_header(data, name)

        return read

    def _saying(self, pack: Callable[[wire.Message], bytes]) -> Callable[[wire.Message], bytes]:
        def say(message: wire.Message) -> bytes:
            version = self.present()
            if version is OURS or not isinstance(message, wire.Hello | wire.Welcome):
                return pack(message)
            if isinstance(message, wire.Hello):
                message = replace(message, versions=version.streams)
            elif wire.VERSION not in version.streams:
                message = replace(message, version=version.streams[0])
            return _with_more(pack(message)) if version.says_more else pack(message)

        return say


def _with_more(packed: bytes) -> bytes:
    """The same message with a field that nobody knows."""
    head, body = packed[: wire.HEADER_BYTES], packed[wire.HEADER_BYTES :]
    said = json.loads(body)
    body = json.dumps({**said, "news": {"of": [1, 2, 3]}}).encode()
    magic, version, kind, flags, _, _ = wire._HEADER.unpack(head)
    head = wire._HEADER.pack(magic, version, kind, flags, len(body), 0)[:-8]
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + body)) + body

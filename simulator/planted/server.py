"""Bugs of the process server."""

from __future__ import annotations

from typing import Any

from process_server import intake, machine
from process_server.logwriter import LogWriter, Place
from process_server.sealer import Sealer
from process_server.stream import Segment, Slot, Stream
from replicar.formats.frame import FrameHeader
from replicar.formats.wire import Hello, Welcome
from simulator.world.blobs import BlobClient

Names = tuple[tuple[Any, str, Any], ...]


def stored_out_of_order() -> Names:
    """A segment that is uploaded counts as stored, whether or not all before it are."""
    stored = Stream.stored

    def eager(self: Stream, each: Segment) -> list[Slot]:
        changed = stored(self, each)
        self.stored_sequence = max(self.stored_sequence, each.last_sequence)
        return changed

    return ((Stream, "stored", eager),)


def lease_is_forgotten() -> Names:
    """Blobs are written without a lease, so nobody is ever fenced."""

    async def acquire(self: BlobClient, name: str, *, proposed_id: str | None = None) -> str | None:
        return None

    async def release(self: BlobClient, name: str, lease_id: str) -> None:
        """There is none."""

    return ((BlobClient, "acquire_lease", acquire), (BlobClient, "release_lease", release))


def frames_lost_at_takeover() -> Names:
    """A server that takes a machine over begins with what the agent captures next."""

    def admit(hello: Hello, next_sequence: int, stored_sequence: int) -> Welcome:
        return Welcome(max(next_sequence, hello.next_sequence - 1), stored_sequence)

    def may_jump(header: FrameHeader, table: Any, next_sequence: int) -> bool:
        return header.first_sequence > next_sequence

    return ((machine, "admit", admit), (intake, "may_jump", may_jump))


def fenced_by_nobody() -> Names:
    """A lease that somebody broke by hand ends replication, as if there were a newer writer. (It did so once.)"""
    return ((machine, "lease_lost", lambda error: error),)


def salt_is_used_again() -> Names:
    """Every segment is sealed with the same salt, so keys and nonces repeat."""
    init = Sealer.__init__

    def salted(self: Sealer, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._salt = lambda: bytes(32)

    return ((Sealer, "__init__", salted),)


def place_is_used_again() -> Names:
    """A segment gets the place of the one before it, now and then."""
    place = LogWriter.place

    async def careless(self: LogWriter, length: int) -> Place:
        found = await place(self, length)
        if self.tail.number and found.offset > 4096:
            self._stripes[0].offset -= length
        return found

    return ((LogWriter, "place", careless),)

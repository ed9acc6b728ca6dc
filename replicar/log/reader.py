"""Walks a machine's sealed log in storage from its first segment to its last, opening tables and checking the chain.

Only headers and tables are read, in windows of 64 KiB: about one request a segment for big segments, fewer for small
ones. Payload chunks are fetched by whoever wants them, through `read_chunk`.

The log ends at the first number that is missing or not (yet) sound in the newest run: a writer that died there, or one
that is just writing. A reader can't tell these from damage by itself, so it takes `stored_number`, the number that was
once reported as stored; ending before it is a CorruptionError, and so is anything missing or unsound where a newer run
says that it was there. With `stored_digest` it also finds a history that was put back, an older run's segments instead
of those that replaced them. What no dying writer leaves behind is an error in any case: a segment of another machine or
run, a broken chain, a sequence that goes back or jumps without saying so, a hole with many segments behind it, a log of
which nothing can be opened (a wrong key must not look like an empty log, or somebody would begin it anew).

A half-written stripe does not hide what lies in the others, since segments are written several at a time.

A walk begins at the first segment, or at a `Start`: what a checkpoint says of the log up to it (`start`), which spares
reading what lies before, and is the only way into a log whose beginning was folded away.

Weak: of the newest run's last segments only the tables are known to be sound; whoever builds on the end takes it from
`tail.sound_tail`.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from replicar.errors import CorruptionError, PermanentError, TransientError
from replicar.formats import frame, logblob, segment
from replicar.formats.logblob import BlobHeader, BlobName
from replicar.formats.segment import SegmentHeader, SegmentTable
from replicar.log.stripe import GoneError, Stripe, read_listed
from replicar.storage.store import PageBlobStore

#: How often blobs are listed anew when a listed one is gone: a writer whose start was refused takes its own back.
LISTINGS: Final = 5


@dataclass(frozen=True, slots=True)
class Run:
    """One writer's blobs: the header of stripe 0, and name and size of every stripe."""

    header: BlobHeader
    stripes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """An opened table and where its segment lies."""

    table: SegmentTable
    blob: str
    offset: int

    @property
    def number(self) -> int:
        return self.table.header.position.number


@dataclass(frozen=True, slots=True)
class Tail:
    """Where a log ends: the last segment's number (0: none), its last sequence, its digest, and why it ends there.

    `damaged` says that something unsound lies where the next segment would: half-written, or altered.
    """

    number: int = 0
    sequence: int = 0
    digest: bytes = segment.FIRST_DIGEST
    reason: str = "nothing was written yet"
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Where a walk may begin: behind `tail`, which writer `run` (epoch, run) put there.

    `offsets`: for each stripe of that run that was met so far, where what comes next lies in it.
    """

    tail: Tail = Tail()
    run: tuple[int, int] = (0, 0)
    offsets: Mapping[str, int] = field(default_factory=dict)


class LogReader:
    """Reads one machine's log.

    Args:
        store: the container it lies in.
        keys: the machine's data keys by key id.
    """

    def __init__(self, store: PageBlobStore, machine_id: uuid.UUID, keys: Mapping[int, bytes]) -> None:
        self.store = store
        self.machine_id = machine_id
        self.keys = keys
        self.tail = Tail()
        self.newest_first = 1  # the number that the newest run begins with, as of the last walk
        self._run = (0, 0)
        self._offsets: dict[str, int] = {}

    @property
    def place(self) -> Start:
        """Where the walk is: what a later one may begin with."""
        return Start(self.tail, self._run, dict(self._offsets))

    async def runs(self, *, since: tuple[int, int] = (0, 0)) -> list[Run]:
        """All runs from (epoch, run) `since` on, in reading order; those that were never written are left out.

        Raises:
            CorruptionError: a blob whose header does not belong to its name.
            TransientError: blobs went away while they were read, again and again.
        """
        for _ in range(LISTINGS):
            try:
                return await self._list_runs(since)
            except GoneError:
                continue
        raise self._unsteady()

    async def _list_runs(self, since: tuple[int, int]) -> list[Run]:
        by_run: dict[tuple[int, int], list[tuple[BlobName, int]]] = {}
        for info in await self.store.list(logblob.log_prefix(self.machine_id)):
            name = logblob.read_name(info.name)
            if name is not None and (name.epoch, name.run) >= since:
                by_run.setdefault((name.epoch, name.run), []).append((name, info.size_bytes))
        runs = []
        for _, blobs in sorted(by_run.items()):
            blobs.sort()
            first = blobs[0][0]
            header = logblob.read_header(await read_listed(self.store, str(first), 0, logblob.HEADER_BYTES))
            if header is None:
                continue
            if header.name != first or first.stripe != 0:
                raise CorruptionError(f"log blob {first} holds the header of {header.name}", blob=str(first))
            runs.append(Run(header, tuple((str(name), size) for name, size in blobs)))
        return runs

    async def segments(
        self, *, after: Start | None = None, stored_number: int = 0, stored_digest: bytes | None = None
    ) -> AsyncIterator[Segment]:
        """Every segment behind `after`, in order; `tail` says where the log ended once this is exhausted.

        Args:
            stored_number: the segment last reported as stored, 0 if nobody knows; `stored_digest` is its digest.

        Raises:
            CorruptionError: the chain is broken, or the log ends before `stored_number`, or had another segment there.
            TransientError: blobs went away while they were read, again and again.
        """
        start = after or Start()
        self.tail, self._run, self._offsets = start.tail, start.run, dict(start.offsets)
        for _ in range(LISTINGS):
            try:
                async for found in self._walk():
                    if found.number == stored_number and stored_digest not in (None, found.table.digest):
                        raise replaced(found.number, found.blob)
                    yield found
            except GoneError:
                continue  # from where the walk is, over what is there now
            break
        else:
            raise self._unsteady()
        if self.tail.number < stored_number:
            raise self._missing(f"segment {stored_number} was reported as stored")

    async def _walk(self) -> AsyncIterator[Segment]:
        runs = await self._list_runs(self._run)
        starts = [run.header.first_number for run in runs]
        self.newest_first = starts[-1] if starts else 1
        for index, run in enumerate(runs):
            until = min(starts[index + 1 :], default=None)
            if until is not None and until <= self.tail.number + 1:
                continue
            if starts[index] > self.tail.number + 1:
                raise self._missing(f"the log's run {run.header.name} begins at segment {starts[index]}")
            async for found in self._run_segments(run, until):
                yield found
            if until is not None and self.tail.number + 1 < until:
                raise self._missing(f"a newer run says that segment {until - 1} was there")

    async def read_chunk(self, found: Segment, index: int) -> bytes:
        """Fetch, decrypt, verify and decompress one chunk of a segment's run of frames."""
        start, end = (int(edge) for edge in found.table.chunk_offsets[index : index + 2])
        sealed = await self.store.read(found.blob, found.offset + start, end - start)
        return segment.open_chunk(found.table, index, sealed, self._key(found.table.header.key_id))

    async def read_run(self, found: Segment) -> bytes:
        """A segment's whole run of frames, in one request, every chunk verified."""
        return self.open_run(found, await self.read_sealed(found))

    async def read_sealed(self, found: Segment) -> bytes:
        """A segment's bytes before its table, as they are."""
        return await self.store.read(found.blob, found.offset, found.table.header.table_offset)

    def open_run(self, found: Segment, data: bytes) -> bytes:
        """The run of frames in what `read_sealed` gave, every chunk verified; no I/O."""
        header, sealed = found.table.header, memoryview(data)
        edges = [int(edge) for edge in found.table.chunk_offsets]
        key = self._key(header.key_id)
        chunks = range(header.chunk_count)
        return b"".join(segment.open_chunk(found.table, i, sealed[edges[i] : edges[i + 1]], key) for i in chunks)

    async def _run_segments(self, run: Run, until: int | None) -> AsyncIterator[Segment]:
        where = (run.header.name.epoch, run.header.name.run)
        if where != self._run:
            self._run, self._offsets = where, {}
        stripes = [Stripe(self.store, name, size, self._offsets.get(name)) for name, size in run.stripes]
        reason, damaged = "a newer run goes on from there", False
        while until is None or self.tail.number + 1 < until:
            found = await self._next(run, stripes)
            if not isinstance(found, Segment):
                damaged = found is not None
                reason = found.message if found is not None else f"segment {self.tail.number + 1} is not there"
                await self._check_end(stripes, found)
                break
            header = found.table.header
            if header.previous != self.tail.digest:
                raise CorruptionError(
                    f"segment {found.number} does not follow the one before it: the chain of digests is broken",
                    hint="a segment was swapped or altered in storage; recover to a point before it",
                    number=found.number,
                    blob=found.blob,
                    offset=found.offset,
                )
            self._check_sequence(found)
            last = header.position.last_sequence
            self.tail = Tail(found.number, last, found.table.digest, "the newest segment so far")
            self._offsets[found.blob] = found.offset + header.total_bytes
            yield found
        self.tail = Tail(self.tail.number, self.tail.sequence, self.tail.digest, reason, damaged)

    async def _next(self, run: Run, stripes: Sequence[Stripe]) -> Segment | CorruptionError | None:
        """The wanted segment from whichever stripe has it; None if none has, or what is wrong with what is there.

        Raises:
            CorruptionError: it is one that no writer of this run can have put there, dead or alive.
        """
        wanted = self.tail.number + 1
        unsound: CorruptionError | None = None
        for stripe in stripes:
            try:
                header = await stripe.seek(wanted)
            except CorruptionError as error:
                unsound = unsound or error
                continue
            if header is None:
                continue
            self._check_place(run, header, stripe)
            try:
                sealed = await stripe.read(stripe.offset + header.table_offset, header.table_bytes)
                table = segment.open_table(header, sealed, self._key(header.key_id))
            except CorruptionError as error:
                unsound = unsound or error
                continue
            return Segment(table, stripe.name, stripe.offset)
        return unsound

    async def _check_end(self, stripes: Sequence[Stripe], unsound: CorruptionError | None) -> None:
        if unsound is not None and self.tail.number == 0:
            raise unsound
        limit = self.tail.number + 1 + logblob.MAX_UNDER_WAY
        for stripe in stripes:
            highest = await stripe.highest(limit)
            if highest >= limit:
                why = f": {unsound.message}" if unsound is not None else ""
                raise CorruptionError(
                    f"segment {self.tail.number + 1} is missing or damaged, but {highest} is there{why}",
                    hint=f"points up to sequence {self.tail.sequence} can still be recovered",
                    number=self.tail.number + 1,
                    blob=stripe.name,
                )

    def _check_place(self, run: Run, header: SegmentHeader, stripe: Stripe) -> None:
        position, name = header.position, run.header.name
        if position.machine_id != self.machine_id or (position.epoch, position.run) != (name.epoch, name.run):
            raise CorruptionError(
                f"segment {position.number} in {stripe.name} is run {position.epoch:08x}-{position.run:08x} of machine "
                f"{position.machine_id}",
                hint="a segment was moved in storage; recover to a point before it",
                number=position.number,
                blob=stripe.name,
                offset=stripe.offset,
            )

    def _check_sequence(self, found: Segment) -> None:
        first, wanted = found.table.header.position.first_sequence, self.tail.sequence + 1
        if first == wanted or (first > wanted and (wanted == 1 or frame.begins_anew(found.table.descriptors))):
            return
        raise CorruptionError(
            f"segment {found.number} begins with sequence {first} where {wanted} should follow",
            hint=f"points up to sequence {self.tail.sequence} can still be recovered",
            number=found.number,
            blob=found.blob,
        )

    def _key(self, key_id: int) -> bytes:
        try:
            return self.keys[key_id]
        except KeyError:
            raise PermanentError(
                f"machine {self.machine_id} has data under key {key_id}, which is not at hand",
                hint="fetch the machine's keys from the config server again",
                key_id=key_id,
            ) from None

    def _unsteady(self) -> TransientError:
        return TransientError(
            f"blobs of the log of machine {self.machine_id} come and go while it is read ({LISTINGS} tries)",
            hint="process servers fight for this machine; try again when it is settled who serves it",
            machine_id=str(self.machine_id),
        )

    def _missing(self, why: str) -> CorruptionError:
        number = self.tail.number + 1
        if number == 1:
            return CorruptionError(
                f"nothing of machine {self.machine_id} can be recovered from this container: the beginning of its log "
                f"is not in it, but {why}",
                hint="check that it is the right container; if it was deleted, bring it back (soft delete); if the "
                "machine was enrolled again to begin anew, wait until initial replication is complete",
                number=number,
                last_sequence=0,
            )
        return CorruptionError(
            f"the log of machine {self.machine_id} ends before segment {number} ({self.tail.reason}), but {why}",
            hint=f"points up to sequence {self.tail.sequence} can still be recovered",
            number=number,
            last_sequence=self.tail.sequence,
        )


def replaced(number: int, blob: str) -> CorruptionError:
    """The log holds another segment than the one that was stored there."""
    return CorruptionError(
        f"segment {number} is not the one that was reported as stored",
        hint="an older state of the log was put back; recover to a point before it",
        number=number,
        blob=blob,
    )

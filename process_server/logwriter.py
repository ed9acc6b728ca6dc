"""Writes a machine's log into page blobs: takes it over from whoever wrote before, then places segments for good.

Taking over, in this order, so that of two writers at most one goes on and nothing that was acknowledged is overlooked:

    1  create stripe 0 of our run (If-None-Match: only one can) and take its lease
    2  list: a blob of a later epoch or run -> FencedError. Break every other lease
    3  read the log to its end; verify in full what may have been under way there when its writer died
    4  write our run's header: from here on this run replaces what older ones hold beyond that end

Whoever adds a blob to its run (another stripe, another run) also creates, leases and *then* lists. So if the older
writer made a blob before the newer one's list, the newer one breaks its lease before it reads the log; if after, the
older one sees the newer run and stops. A write under a broken lease is refused by the store itself.

A creation may land late, when whoever asked for it is dead: an empty blob of our epoch that nobody ever leases. So of
our own epoch a newer run counts when somebody holds a blob of it, or has written its header; else we go on, and take a
number above it when we begin a run. That costs no safety: should its maker live after all, it lists only when it has
its lease, which is after we looked, and so it sees our blobs and breaks our leases. A later *epoch* counts in any case,
empty blobs too: those are made to shut writers out.

Positions are written once: a failed or timed-out write is repeated with the same bytes at the same place. Whoever has
to write something else (after a restart, say) begins a new run.

Weak: the log is read from its beginning at every start, about one request a segment; and writing a run's header, a
second writer of a still later run may begin: it has broken our lease by then, so the write fails.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from replicar.clock import Clock
from replicar.errors import ConflictError, FencedError, PermanentError, ReplicarError, TransientError
from replicar.formats import logblob, segment
from replicar.formats.logblob import BlobHeader, BlobName
from replicar.log.reader import LogReader, Tail
from replicar.log.tail import Stored, sound_tail
from replicar.storage.store import PageBlobStore, is_gone

#: Enough for a few segments, so that a run is worth its name.
MIN_BLOB_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes whose log: what the assignment says."""

    machine_id: uuid.UUID
    epoch: int
    key_id: int
    data_key: bytes = field(repr=False)
    wrapped_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class LogLimits:
    """How a run lies in blobs: up to `stripes` of `blob_bytes` each. Retention frees nothing of a run under way."""

    stripes: int = 8
    blob_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class Place:
    """Where a segment goes."""

    blob: str
    offset: int
    lease_id: str


@dataclass(slots=True)
class Claim:
    """The last run of an epoch that a writer began or tried to: one behind it is somebody else's, and newer."""

    epoch: int
    run: int = 0


@dataclass(slots=True)
class _Stripe:
    name: BlobName
    lease_id: str
    offset: int = logblob.HEADER_BYTES
    blob: str = field(init=False)  # the name as storage knows it

    def __post_init__(self) -> None:
        self.blob = str(self.name)

    def room(self, blob_bytes: int) -> int:
        """How many segments of whatever size certainly fit."""
        return (blob_bytes - self.offset) // segment.MAX_SEGMENT_BYTES


class LogWriter:
    """One writer's hold of a machine's log; `open` takes it. `tail` is where the log ended when this run began."""

    def __init__(
        self, store: PageBlobStore, writer: Writer, limits: LogLimits, clock: Clock, claim: Claim | None = None
    ) -> None:
        self.tail = Tail()
        self._claim = claim if claim is not None and claim.epoch == writer.epoch else Claim(writer.epoch)
        self._store = store
        self._writer = writer
        self._limits = limits
        self._clock = clock
        self._stripes: list[_Stripe] = []
        self._reserved = 0

    @classmethod
    async def open(
        cls,
        store: PageBlobStore,
        writer: Writer,
        limits: LogLimits,
        clock: Clock,
        *,
        keys: Mapping[int, bytes],
        stored: Stored = Stored(),  # noqa: B008 - a value that nobody can change
        accept: Callable[[Tail], None] = lambda _: None,
        claim: Claim | None = None,
    ) -> LogWriter:
        """Take the log over.

        Args:
            keys: all data keys of the machine, for reading what is there.
            claim: what this very writer claimed before, should it open the log again.
            stored: what is known to be in storage.
            accept: told where the log ends; raises when that can't be. Nothing is replaced then: a blob that is missing
                today may be brought back tomorrow.

        Raises:
            FencedError: a newer writer has it.
            CorruptionError: what is there contradicts itself before its end, or what is known to be stored is damaged.
            PermanentError, TransientError: storage.
        """
        log = cls(store, writer, limits, clock, claim)
        blobs = await log._blobs()
        await log._refuse_newer(blobs)
        log.run = 1 + max((name.run for name, _ in blobs if name.epoch == writer.epoch), default=0)
        try:
            await log._add_stripe(fence=True)
            reader = LogReader(store, writer.machine_id, keys)
            log.tail = await sound_tail(reader, stored)
            accept(log.tail)
            await log._write_header(log._stripes[0])
        except ReplicarError:
            await log._discard()
            raise
        return log

    @property
    def run(self) -> int:
        """The last run of the epoch that this writer began, or tried to."""
        return self._claim.run

    @run.setter
    def run(self, number: int) -> None:
        self._claim.run = number

    def reserve(self) -> bool:
        """Count on room for one more segment in this run; False when it is full and `roll` is due."""
        room = sum(stripe.room(self._limits.blob_bytes) for stripe in self._stripes)
        room += (self._limits.stripes - len(self._stripes)) * self._empty_room()
        if room <= self._reserved:
            return False
        self._reserved += 1
        return True

    async def place(self, length: int) -> Place:
        """Give a reserved segment its place. Called in the order of segment numbers, one at a time.

        Takes the first stripe that need not wait for Azure's limits; makes another one when all would; else takes the
        one that waits least.
        """
        candidates = [stripe for stripe in self._stripes if stripe.room(self._limits.blob_bytes)]
        waits = [self._store.budget_wait_seconds(stripe.blob, length) for stripe in candidates]
        chosen = next((stripe for stripe, wait in zip(candidates, waits, strict=True) if not wait), None)
        if chosen is None and len(self._stripes) < self._limits.stripes:
            chosen = await self._add_stripe()
            await self._write_header(chosen)
        if chosen is None:
            chosen = candidates[waits.index(min(waits))]
        self._reserved -= 1
        place = Place(chosen.blob, chosen.offset, chosen.lease_id)
        chosen.offset += length
        return place

    async def write(self, place: Place, data: memoryview) -> None:
        """Store a segment; the same bytes to the same place may be repeated at will.

        Raises:
            FencedError: somebody newer broke our lease.
        """
        await self._store.put_pages(place.blob, place.offset, data, lease_id=place.lease_id)

    async def roll(self, tail: Tail) -> None:
        """Begin a new run, since this one's blobs are full. Everything up to `tail` is stored, and nothing else."""
        assert not self._reserved, "a run ends when everything in it is stored"
        full, self._stripes = self._stripes, []
        self.run += 1
        self.tail = tail
        await self._add_stripe()
        await self._write_header(self._stripes[0])
        await self._release(full)

    async def close(self) -> None:
        """Give the leases back; whatever stands in the way, the next writer breaks them."""
        stripes, self._stripes = self._stripes, []
        await self._release(stripes)

    async def _discard(self) -> None:
        """Remove the blob of a run that never began, so that tries leave nothing behind."""
        for stripe in self._stripes:
            with suppress(ReplicarError):
                await self._store.delete(str(stripe.name), lease_id=stripe.lease_id)

    async def _release(self, stripes: list[_Stripe]) -> None:
        async def release(stripe: _Stripe) -> None:
            with suppress(ReplicarError):
                await self._store.release_lease(str(stripe.name), stripe.lease_id)

        await asyncio.gather(*(release(stripe) for stripe in stripes))

    async def _add_stripe(self, *, fence: bool = False) -> _Stripe:
        """Create, lease, then look: see the module for why in this order."""
        name = BlobName(self._writer.machine_id, self._writer.epoch, self.run, len(self._stripes))
        token = uuid.uuid4().hex  # so that a retried creation knows its own blob from another writer's
        try:
            await self._store.create(str(name), self._limits.blob_bytes, metadata={"writer": token})
        except ConflictError as error:
            if await self._is_alive(self.run, await self._blobs()):
                raise self._fenced(f"another process server made {name} at the same time") from error
            self.run -= 1  # it was not we who began it: should it be held by then, the next try is to see it
            raise TransientError(
                f"{name} was made at the same time, and nobody has taken it",
                hint="nothing to do: a late request of a process server that died is passed over by the next try",
                machine_id=str(name.machine_id),
            ) from error
        stripe = _Stripe(name, await self._store.acquire_lease(str(name)))
        self._stripes.append(stripe)
        blobs = await self._blobs()
        await self._refuse_newer(blobs)
        if fence:
            for other, leased in blobs:
                if leased and other != name:
                    await self._break(other)
        return stripe

    async def _break(self, other: BlobName) -> None:
        try:
            await self._store.break_lease(str(other))
        except PermanentError as error:
            if not is_gone(error):  # else its writer was refused and took it back meanwhile
                raise

    async def _write_header(self, stripe: _Stripe) -> None:
        header = BlobHeader(
            name=stripe.name,
            first_number=self.tail.number + 1,
            first_sequence=self.tail.sequence + 1,
            previous=self.tail.digest,
            key_id=self._writer.key_id,
            wrapped_key=self._writer.wrapped_key,
            created_ns=self._clock.now_ns(),
        )
        await self._store.put_pages(str(stripe.name), 0, header.pack(), lease_id=stripe.lease_id)

    async def _blobs(self) -> list[tuple[BlobName, bool]]:
        """The log's blobs and whether somebody holds them."""
        infos = await self._store.list(logblob.log_prefix(self._writer.machine_id))
        named = ((logblob.read_name(info.name), info.leased) for info in infos)
        return [(name, leased) for name, leased in named if name is not None]

    async def _refuse_newer(self, blobs: list[tuple[BlobName, bool]]) -> None:
        epoch = self._writer.epoch
        latest = max((name.epoch for name, _ in blobs), default=epoch)
        if latest > epoch:
            raise self._fenced(f"storage holds epoch {latest}; ours is epoch {epoch}")
        later = sorted({name.run for name, _ in blobs if name.epoch == epoch and name.run > self.run})
        for run in later if self.run else ():
            if await self._is_alive(run, blobs):
                raise self._fenced(f"storage holds run {run} of epoch {epoch}; ours is run {self.run}")

    async def _is_alive(self, run: int, blobs: list[tuple[BlobName, bool]]) -> bool:
        """Whether somebody has ever had that run of our epoch: it holds a blob, or a header is written."""
        if any(leased for name, leased in blobs if (name.epoch, name.run) == (self._writer.epoch, run)):
            return True
        first = str(BlobName(self._writer.machine_id, self._writer.epoch, run, 0))
        try:
            return any(await self._store.read(first, 0, logblob.HEADER_BYTES))
        except PermanentError as error:
            if not is_gone(error):
                raise
            return False  # removed again, by whoever did not begin it after all

    def _fenced(self, why: str) -> FencedError:
        return FencedError(
            f"somebody newer writes the log of machine {self._writer.machine_id}: {why}",
            hint="nothing to do if the machine was moved on purpose; `replicar machines` shows which server has it",
            machine_id=str(self._writer.machine_id),
            epoch=self._writer.epoch,
        )

    def _empty_room(self) -> int:
        return (self._limits.blob_bytes - logblob.HEADER_BYTES) // segment.MAX_SEGMENT_BYTES


def lease_lost(error: FencedError) -> ReplicarError:
    """What the log's writer was fenced by: a newer writer was seen (`error` itself), or storage refuses our lease. That
    may mean a newer one too, or somebody who broke leases by hand: opening the log again tells."""
    if "code" not in error.fields:
        return error
    return TransientError(
        f"{error.message}; the log is opened again, unless somebody newer has it",
        hint="nothing to do if this passes by itself",
        **error.fields,
    )

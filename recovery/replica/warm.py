"""Brings a machine's warm replica on: one round writes what changed between the point it holds and the latest.

A round finds the latest point, gathers from the tables behind the one before it which ranges were written since, joins
those that lie close together, and writes what the latest point has there: however often a page was written meanwhile,
once. It needs to be right about nothing but that no changed range is missing, so a round may always be done again, by
anybody, up to the same point or a later one; that is what the journal is for.

Where the ranges can't be had (the log was folded meanwhile, its disks changed, or the stream began anew) the blobs are
made anew and written in full: to one point, which is pinned meanwhile, part by part, and the journal says how far that
is. So a fill that was cut off goes on with the same point, and what came since is brought on behind it.

Earlier points are snapshots of the blobs (`points`), if they are asked for: `keep_points`, behind a round. They are
gone when the blobs are made anew, since a snapshot can't be without its blob; the log has what retention keeps.

Weak: what became zeros is written as pages of zeros. While the blobs are made anew there is no replica. Its blobs are
not sealed: they are what Azure imports.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from recovery.chunks import ChunkSource, MachineLog
from recovery.extents import ExtentMap, Ints
from recovery.index import State, painted
from recovery.layers import DiskMap
from recovery.pins import holding, pinned_sequences
from recovery.plan import HOLE_BYTES
from recovery.points import AtSequence, Latest, Request, base_of, locate
from recovery.replica.fenced import FencedBlob
from recovery.replica.journal import BLOB_BYTES, SLOT_BYTES, Phase, ReplicaRecord, newest, pack_record
from recovery.replica.points import ReplicaPoint, plan_points, points_of, read_snapshot_info, snapshot_metadata
from recovery.replica.ranges import between, joined
from recovery.retention import Policy
from recovery.view import Piece, View
from replicar.clock import Clock
from replicar.errors import ConflictError, CorruptionError, PermanentError, TransientError
from replicar.formats import vhd
from replicar.formats.frame import Kind
from replicar.formats.record import Disk
from replicar.log.index import open_index
from replicar.log.reader import LogReader, Start
from replicar.storage.store import PageBlobStore, is_gone

#: What is written of zeros in one request.
ZERO_BYTES: Final = 4 << 20
#: Of a disk that is written in full, what is written before the journal says so: all that a death costs.
FILL_BYTES: Final = 1 << 30
#: Ranges that are looked up, and written, together.
RANGES_AT_ONCE: Final = 1024
SUFFIX: Final = ".vhd"
#: (offset, length) by disk.
Ranges: TypeAlias = dict[int, list[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Round:
    """What a round did: the point that is held now, and what was written for it; `full`: everything, anew."""

    sequence: int
    time_ns: int
    written_bytes: int
    full: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """Whether the point that is held was kept as snapshots, and how many snapshots were removed."""

    taken: bool
    removed: int


class WarmReplica:
    """One machine's replica, while it is entered: then nobody else writes to it.

    Args:
        log: the machine's log.
        store: where the blobs go, under `replicas/`.
        fill_bytes: see FILL_BYTES.
    """

    def __init__(
        self,
        log: MachineLog,
        store: PageBlobStore,
        *,
        clock: Clock,
        random: Callable[[int], bytes],
        fill_bytes: int = FILL_BYTES,
    ) -> None:
        self._log, self._store, self._clock, self._random = log, store, clock, random
        self._fill_bytes = fill_bytes
        self._prefix = prefix(log)
        self._blobs: dict[int, FencedBlob] = {}
        self._journal: FencedBlob
        self._number = 0
        self.record: ReplicaRecord | None = None

    def blob_name(self, disk: Disk) -> str:
        """The VHD of a disk."""
        return f"{self._prefix}{disk.index}{SUFFIX}"

    async def __aenter__(self) -> WarmReplica:
        name = journal_name(self._log)
        await self._create(name, BLOB_BYTES)
        self._journal = await FencedBlob.take(self._store, name)
        self._number, self.record = newest(await self._store.read(name, 0, BLOB_BYTES))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            for blob in [*self._blobs.values(), self._journal]:
                await blob.release()

    async def advance(
        self,
        request: Request = Latest(),  # noqa: B008 - a value that nobody can change
        *,
        stored_number: int = 0,
        stored_digest: bytes | None = None,
    ) -> Round:
        """One round, up to the latest point, or to another one that is no older than what the replica holds.

        Args:
            stored_number, stored_digest: as of `locate`: how far the log has to reach, at least.

        Raises:
            PermanentError: there is no such point.
            ConflictError: the replica is further than that.
            FencedError: somebody else has taken the replica over.
        """
        source = ChunkSource(self._log)
        state = await locate(
            self._log, request, source=source, stored_number=stored_number, stored_digest=stored_digest
        )
        resumed = await self._resumed(state, source)
        before, place = self.record, state.place
        if before is not None and place.sequence < before.sequence:
            raise self._too_far(before, state)
        if before is not None and before.phase is Phase.APPLIED and before.sequence == place.sequence:
            return Round(place.sequence, place.time_ns, resumed, full=resumed > 0)
        base, start = 0, Start()
        if before is not None and before.disks == state.disks and await self._take_disks(state.disks):
            base, start = before.base if before.phase is Phase.APPLYING else before.sequence, before.start
        ranges, following = await self._changed(start, base, state)
        applying = ReplicaRecord(
            *(Phase.APPLYING, base if ranges is not None else 0, place.sequence, place.time_ns, start, state.disks)
        )
        await self._say(applying)
        if ranges is None:
            await self._make_anew(state.disks, applying)
            # From here on a death costs no more than one part: where the log goes on is kept for the end.
            filling = dataclasses.replace(applying, start=following, filled={disk.index: 0 for disk in state.disks})
            await self._say(filling)
            return Round(place.sequence, place.time_ns, await self._fill(state, source, filling), full=True)
        written = 0
        for disk in state.disks:
            count = await self._write_ranges(state, source, disk, ranges.get(disk.index, []))
            written += count
        await self._say(dataclasses.replace(applying, phase=Phase.APPLIED, base=0, start=following))
        return Round(place.sequence, place.time_ns, resumed + written, full=resumed > 0)

    async def keep_points(self, policy: Policy, every_seconds: float) -> Kept:
        """Keep the point that the blobs hold, if one is due, and give up earlier ones as the policy says.

        It does nothing while the blobs hold none. Whoever dies in it leaves no point that is not whole, and the next
        round puts it right. Raises FencedError: somebody else has taken the replica over.
        """
        record = self.record
        if record is None or record.phase is not Phase.APPLIED:
            return Kept(taken=False, removed=0)
        there = [read_snapshot_info(info) for info in await self._store.snapshots(self._prefix)]
        plan = plan_points(
            [each for each in there if each is not None],
            policy,
            sequence=record.sequence,
            time_ns=record.time_ns,
            now_ns=self._clock.now_ns(),
            every_ns=int(every_seconds * 1e9),
            read=await pinned_sequences(self._log, self._clock),
        )
        for each in plan.remove:
            await self._store.delete_snapshot(each.blob, each.snapshot)
        taken = plan.take and await self.keep_held()
        return Kept(taken, len(plan.remove))

    async def keep_held(self) -> bool:
        """Keep the point that the blobs hold, due or not; whether they hold one. Raises as `keep_points`."""
        record = self.record
        if record is None or record.phase is not Phase.APPLIED or not await self._take_disks(record.disks):
            return False
        # Who had replaced us before the blobs were ours again may have written to them; that one has the journal.
        await self._say(record)
        for disk in record.disks:
            said = snapshot_metadata(record.sequence, record.time_ns, disk.index, len(record.disks))
            await self._blobs[disk.index].snapshot(said)
        return True

    async def _resumed(self, wanted: State, source: ChunkSource) -> int:
        """Finish a fill that was cut off, if there is one that can be finished; what was written for it."""
        record = self.record
        if record is None or record.phase is not Phase.APPLYING or record.filled is None:
            return 0
        if record.sequence > wanted.place.sequence:
            return 0  # refused by whoever asked
        try:
            state = await locate(self._log, AtSequence(record.sequence), source=source)
        except PermanentError:
            return 0  # given up by retention meanwhile; it is begun anew
        if state.disks != record.disks or not await self._take_disks(state.disks):
            return 0
        # As in `keep_held`: whoever had replaced us before may have finished it, and gone on.
        await self._say(record)
        return await self._fill(state, source, record)

    async def _fill(self, state: State, source: ChunkSource, record: ReplicaRecord) -> int:
        """Write all of a point, from where the journal says that it is written to."""
        filled, written = dict(record.filled or {}), 0
        async with holding(self._log, state, clock=self._clock, random=self._random):
            for disk in state.disks:
                for at in range(filled[disk.index], disk.size_bytes, self._fill_bytes):
                    part = await self._part(state, disk, at, self._fill_bytes)
                    count = await self._write(View(self._log, part, source=source), disk)
                    written += count
                    filled[disk.index] = min(at + self._fill_bytes, disk.size_bytes)
                    if count:
                        await self._say(dataclasses.replace(record, filled=dict(filled)))
        await self._say(dataclasses.replace(record, phase=Phase.APPLIED, filled=None))
        return written

    async def _part(self, state: State, disk: Disk, offset: int, length: int) -> State:
        """A state of which one disk holds nothing but what it has in a range."""
        there = await state.maps[disk.index].lookup(offset, length)
        return dataclasses.replace(state, maps={**state.maps, disk.index: DiskMap.of(there, disk.size_bytes)})

    def _too_far(self, held: ReplicaRecord, wanted: State) -> ConflictError:
        return ConflictError(
            f"the replica of machine {self._log.machine_id} is at sequence {held.sequence} already, "
            f"behind sequence {wanted.place.sequence}",
            hint="recover that point by itself; if it is the log's latest, an older state of the log was put back, and "
            "the replica's blobs have to be deleted to begin anew",
            ours=held.sequence,
            theirs=wanted.place.sequence,
        )

    async def _changed(self, start: Start, base: int, state: State) -> tuple[Ranges | None, Start]:
        """Ranges that may have changed since `base`, by disk (None: nobody knows), and where the log goes on behind the
        last segment that the state has all of."""
        if base:
            try:
                ranges, following = await self._walked(start, base, state)
                if ranges is not None:
                    return ranges, following
            except CorruptionError:
                pass  # what was there then was folded meanwhile; if it is damage, it is met below as well
        known = await open_index(self._log.store, self._log.machine_id, self._log.keys)
        checkpoint = await base_of(known, AtSequence(state.place.sequence))
        nearest = checkpoint.start if checkpoint is not None else None
        _, following = await self._walked(nearest or Start(), 0, state)
        return None, following

    async def _walked(self, start: Start, base: int, state: State) -> tuple[Ranges | None, Start]:
        parts: dict[int, list[tuple[Ints, Ints]]] = {}
        is_known, following = base > 0, start
        reader = LogReader(self._log.store, self._log.machine_id, self._log.keys)
        async for found in reader.segments(after=start):
            position, table = found.table.header.position, found.table.descriptors
            if position.first_sequence > state.place.sequence:
                break
            if position.last_sequence <= state.place.sequence:
                following = reader.place
            if position.last_sequence <= base:
                continue
            is_known = is_known and not bool(np.any(table["kind"] == Kind.DISK))
            for disk, (begin, end, *_) in painted(found, found.table.payload_places(), 0, len(table)):
                parts.setdefault(disk, []).append((begin, end))
        # A sweep leaves zeros where segments were, which look like the end of a log that is being written.
        is_known = is_known and reader.tail.sequence >= state.place.sequence
        return ({disk: joined(of_disk) for disk, of_disk in parts.items()} if is_known else None), following

    async def _take_disks(self, disks: Sequence[Disk]) -> bool:
        """Become the only writer of every disk's blob; False if one is not there."""
        try:
            for disk in disks:
                if disk.index not in self._blobs:
                    self._blobs[disk.index] = await FencedBlob.take(self._store, self.blob_name(disk))
        except PermanentError as error:
            if is_gone(error):
                return False
            raise
        return True

    async def _make_anew(self, disks: Sequence[Disk], applying: ReplicaRecord) -> None:
        """Blank blobs with footers, of the disks' sizes, instead of whatever there is. `applying` is what was said."""
        if read := {each.sequence for each in await points_kept(self._log, self._store)} & await pinned_sequences(
            self._log, self._clock
        ):
            raise TransientError(
                f"the replica's point at sequence {min(read)} is being read, and its blobs have to be made anew",
                hint="it goes on when that recovery has ended",
            )
        self._blobs.clear()
        old = [info.name for info in await self._store.list(self._prefix) if info.name.endswith(SUFFIX)]
        taken = [await FencedBlob.take(self._store, name) for name in old]
        await self._say(applying)  # as in `keep_held`: before anything of somebody newer is removed
        for blob in taken:
            await blob.delete()
        for disk in disks:
            size = vhd.virtual_bytes(disk.size_bytes)
            await self._create(self.blob_name(disk), size + vhd.FOOTER_BYTES)
            self._blobs[disk.index] = blob = await FencedBlob.take(self._store, self.blob_name(disk))
            vhd_id = uuid.uuid5(self._log.machine_id, f"{disk.index} {disk.name}")
            await blob.put(size, vhd.pack_footer(size, vhd_id, self._clock.now_ns() // 10**9))

    async def _write(self, view: View, disk: Disk, *, hole_bytes: int = HOLE_BYTES) -> int:
        """All that the view has of a disk, but for what is zeros."""
        blob, written = self._blobs[disk.index], 0

        async def sink(batch: Sequence[Piece]) -> None:
            nonlocal written
            for offset, data in batch:
                await blob.put(offset, data)
                written += len(data)

        await view.copy(disk, sink, hole_bytes=hole_bytes)
        return written

    async def _write_ranges(self, state: State, source: ChunkSource, disk: Disk, ranges: list[tuple[int, int]]) -> int:
        """What a point has in some ranges of a disk, zeros included."""
        blob, whole, written = self._blobs[disk.index], state.maps[disk.index], 0
        for at in range(0, len(ranges), RANGES_AT_ONCE):
            parts = [await whole.lookup(*each) for each in ranges[at : at + RANGES_AT_ONCE]]
            data = [part.data() for part in parts]
            columns = zip(*((part.start, part.end, part.segment, part.place) for part in data), strict=True)
            there = ExtentMap(*(np.concatenate(column) for column in columns))
            only = dataclasses.replace(state, maps={**state.maps, disk.index: DiskMap.of(there, disk.size_bytes)})
            written += await self._write(View(self._log, only, source=source), disk, hole_bytes=0)
            for (offset, length), part in zip(ranges[at : at + RANGES_AT_ONCE], data, strict=True):
                for start, end in between(part, offset, length):
                    for place in range(start, end, ZERO_BYTES):
                        await blob.put(place, bytes(min(ZERO_BYTES, end - place)))
                    written += end - start
        return written

    async def _say(self, record: ReplicaRecord) -> None:
        data = pack_record(record, self._number + 1)
        await self._journal.put((self._number + 1) % 2 * SLOT_BYTES, data)
        self._number, self.record = self._number + 1, record

    async def _create(self, name: str, size_bytes: int) -> None:
        """Make a blob unless it is there."""
        try:
            await self._store.create(name, size_bytes, metadata={"replicar_replica": str(self._log.machine_id)})
        except ConflictError as error:
            there = await self._store.properties(name)
            if there.size_bytes != size_bytes:
                raise error from None


def prefix(log: MachineLog) -> str:
    """Where a machine's replica is."""
    return f"replicas/{log.machine_id}/"


def journal_name(log: MachineLog) -> str:
    return f"{prefix(log)}journal"


async def read_journal(log: MachineLog, store: PageBlobStore) -> ReplicaRecord | None:
    """What a machine's replica holds, for whoever only looks; None if there is none yet."""
    try:
        return newest(await store.read(journal_name(log), 0, BLOB_BYTES))[1]
    except PermanentError as error:
        if is_gone(error):
            return None
        raise


async def points_kept(log: MachineLog, store: PageBlobStore) -> list[ReplicaPoint]:
    """The points that a machine's replica has as snapshots, ascending."""
    found = [read_snapshot_info(info) for info in await store.snapshots(prefix(log))]
    return points_of(each for each in found if each is not None)[0]

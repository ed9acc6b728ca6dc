"""Judging a story: whether everything came to rest, and whether every point that is offered is what it says.

What is offered is taken from the real recovery code and from the config server's catalogue, and held against a reading
of the stream of its own (`stream_of`): frames out of the log, with the gaps and marks that they say themselves.

- every mark outside gaps is offered, recovers, and each of its disks can be the disk after that sequence;
- no mark inside a gap is offered;
- whatever the catalogue calls stored and offered recovers too;
- some sequences in between, drawn, likewise;
- the latest state is the disks as they are, byte for byte, but for zeros where the agent's map has free space left out;
- no audit in the stream says other bytes than the stream gives there, unless the change log was damaged.

Where the log was folded, the stream is read from the copy that storage's inside has of it, and what is offered is what
retention left (`retained`).
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import xxhash

from recovery.chunks import MachineLog
from recovery.points import AtSequence, Latest, Named, Request, locate, survey
from recovery.view import View
from replicar.control.client import ControlClient
from replicar.control.messages import PointList
from replicar.errors import PermanentError, ReplicarError
from replicar.formats import frame, record
from replicar.formats.frame import Flag, Kind
from replicar.log.reader import LogReader
from replicar.storage.store import PageBlobStore
from simulator import registered, retained
from simulator.retained import Left
from simulator.shortcuts import REGION_BYTES
from simulator.stage import Stage
from simulator.story import DiskPlan

#: Virtual seconds within which everything has to be at rest once all is mended.
SETTLE_SECONDS: Final = 240.0
#: After so long the operator starts the agent anew, if something was damaged that only a start looks at.
OPERATOR_SECONDS: Final = 60.0
#: Marks, and sequences that nobody marked, recovered for each story; of the others only what is offered is looked at.
MARKS: Final = 2
SEQUENCES: Final = 1
#: States that a fold kept, likewise.
KEPT: Final = 2


@dataclass(slots=True)
class Stream:
    """What the log says, read by itself: marks by name, sequences of the changes that lie in no gap."""

    marks: dict[str, tuple[int, bool]] = field(default_factory=dict)  # sequence, inside a gap
    sequences: list[int] = field(default_factory=list)
    mark_times: dict[int, int] = field(default_factory=dict)  # of marks outside gaps, by sequence
    latest_ns: int = 0
    last: int = 0
    problems: list[str] = field(default_factory=list)
    contradicted: list[str] = field(default_factory=list)  # audits that say other bytes than the stream


async def settle(stage: Stage) -> None:
    """Wait until everything captured is stored and order is whole; say what is not, if it does not come to that."""
    clock = stage.world.loop.time
    began, helped, enrolled = clock(), False, False
    while clock() - began < SETTLE_SECONDS:
        await asyncio.sleep(0.5)
        if _at_rest(stage):
            await asyncio.sleep(0.5)  # a heartbeat, an acknowledgement: it has to stay so
            if _at_rest(stage):
                return
        late = clock() - began > OPERATOR_SECONDS
        if late and not helped:
            helped = True
            stage.stop_agent()
        if late and not enrolled and clock() - began > 2 * OPERATOR_SECONDS and _may_need_enrolment(stage):
            enrolled = True
            stage.enrol_again()
            stage.stop_agent()
    stage.violated(f"it does not come to rest: {_unrest(stage)}")


def _at_rest(stage: Stage) -> bool:
    if stage.neighbour is not None and not stage.neighbour.at_rest():
        return False
    core = stage.core
    if core is None or stage.agent is None or not stage.agent.process.alive:
        return False
    log = core.log
    # Audits go on for ever, and one of them may always be under way.
    return not core.ladder.in_gap and core.ladder.is_clean and log.ordered and log.oldest_unstored_time_ns() is None


def _may_need_enrolment(stage: Stage) -> bool:
    kinds = {fault.kind for fault in stage.story.faults}
    return bool(kinds & {"log_damaged", "sync_errors"})


def _unrest(stage: Stage) -> str:
    core, process = stage.core, stage.agent_process
    if core is None:
        return f"no agent runs ({process.error if process is not None else None})"
    log = core.log
    what = f"stored {log.stored_sequence} of {log.next_sequence - 1}, in a gap: {core.ladder.in_gap}"
    what += f", dirty bytes {core.ladder.dirty_bytes}, ordered: {log.ordered}"
    status = stage.status()
    sender = status.get("sender", {})
    return f"{what}; the sender is {sender.get('state')}: {(sender.get('error') or {}).get('message')}"


class _Replicas:
    """What the stream gives the disks, frame by frame, for what it says of itself."""

    def __init__(self, disks: Sequence[DiskPlan]) -> None:
        self._disks = disks
        self._images = [bytearray(disk.size_bytes) for disk in disks]

    def apply(self, disk: int, offset: int, content: bytes) -> None:
        self._images[disk][offset : offset + len(content)] = content

    def is_so(self, disk: int, offset: int, length: int, digest: bytes) -> bool:
        return xxhash.xxh3_128_digest(self._images[disk][offset : offset + length]) == digest

    def may_be_copied(self, disk: int, offset: int, length: int) -> bool:
        """Outside of gaps: the region of a page of free space that was written in part."""
        begin, end = offset // REGION_BYTES * REGION_BYTES, -(-(offset + length) // REGION_BYTES) * REGION_BYTES
        return any(first < end and begin < last for first, last in self._disks[disk].free)


async def stream_of(
    store: PageBlobStore, machine_id: uuid.UUID, keys: dict[int, bytes], disks: Sequence[DiskPlan]
) -> Stream:
    """Read the log frame by frame."""
    found, in_gap, following = Stream(), True, 1
    replicas = _Replicas(disks)
    reader = LogReader(store, machine_id, keys)
    async for segment in reader.segments():
        run = await reader.read_run(segment)
        for _, item in frame.frames_in(run):
            first = item.header.first_sequence
            if first != following:
                if first < following or not (frame.may_begin_anew(first) and frame.begins_anew(item.table)):
                    found.problems.append(f"the stream goes on at {first} where {following} is due")
                in_gap = True
            following = item.header.next_sequence
            found.latest_ns = max(found.latest_ns, int(item.table["time_ns"].max(initial=0)))
            for row, (offset, length, _, place, disk, kind, flags) in enumerate(item.table.tolist()):
                sequence = first + row
                if kind == Kind.WRITE:
                    replicas.apply(disk, offset, bytes(item.payload[place : place + length]))
                elif kind == Kind.ZERO:
                    replicas.apply(disk, offset, bytes(length))
                if kind == Kind.AUDIT:
                    digest = bytes(item.payload[place : place + frame.AUDIT_DIGEST_BYTES])
                    if not in_gap and not replicas.is_so(disk, offset, length, digest):
                        found.contradicted.append(f"the audit at sequence {sequence}: {length} bytes at {offset}")
                if kind == Kind.GAP:
                    in_gap = not flags & Flag.GAP_END
                elif kind == Kind.MARK:
                    mark = record.read_mark(bytes(item.payload[place : place + length]))
                    found.marks.setdefault(mark.name, (sequence, in_gap))
                    if not in_gap:
                        found.mark_times[sequence] = int(item.table["time_ns"][row])
                elif not in_gap:
                    if flags & Flag.SEED and not replicas.may_be_copied(disk, offset, length):
                        found.problems.append(f"sequence {sequence} is a background copy outside of gaps")
                    found.sequences.append(sequence)
    found.last = following - 1
    return found


async def judge(stage: Stage) -> int:
    """Hold everything that is offered against the truth; how many points that were."""
    store, machine_id = stage.world.blobs.inner, stage.machine_id
    keys = registered.machine_keys(stage.world, stage.machine)
    if keys is None:
        return 0
    log = MachineLog(store, machine_id, keys)
    try:
        stream = await stream_of(stage.ledger.copy or store, machine_id, keys, stage.story.disks)
        left = Left.of(await stage.upkeep.fold()) if stage.upkeep is not None else Left()
    except ReplicarError as error:
        stage.violated(f"the log can't be read: {error}")
        return 0
    for problem in [
        *stream.problems,
        *retained.problems(stage.story.upkeep, left, stream.mark_times, stream.latest_ns),
    ]:
        stage.violated(problem)
    for audit in stream.contradicted if not stage.damaged_log else ():
        stage.violated(f"the source held other bytes than the stream gives: {audit}")
    draw = random.Random(f"{stage.story.seed} judgement")
    tried = 0
    history = await survey(log)
    offered = {mark.name: (mark.place.sequence, mark.in_gap) for mark in reversed(history.marks)}
    offered = {name: place for name, place in offered.items() if left.has(place[0])}
    wanted = {name: place for name, place in stream.marks.items() if left.has(place[0])}
    if offered != wanted:
        stage.violated(f"recovery has the marks {offered}, and the log says {wanted}")
    marks = sorted(stream.marks.items())
    for name, (sequence, in_gap) in draw.sample(marks, min(MARKS if not left.kept else 2 * MARKS, len(marks))):
        offer = not in_gap and left.has(sequence)
        tried += await _try(stage, log, Named(name), f"point {name}", sequence, offered=offer)
    sequences = draw.sample(stream.sequences, min(SEQUENCES, len(stream.sequences)))
    for sequence in sorted({*sequences, *draw.sample(left.kept, min(KEPT, len(left.kept)))}):
        offer = left.has(sequence)
        tried += await _try(stage, log, AtSequence(sequence), f"sequence {sequence}", sequence, offered=offer)
    await _judge_catalogue(stage, stream, left)
    await _judge_latest(stage, log)
    return tried + 1


async def _try(stage: Stage, log: MachineLog, request: Request, what: str, sequence: int, *, offered: bool) -> int:
    try:
        state = await locate(log, request)
    except PermanentError as error:
        if offered:
            stage.violated(f"{what} is not offered: {error}")
        return 0
    except ReplicarError as error:
        stage.violated(f"{what} can't be recovered: {error}")
        return 0
    if not offered:
        stage.violated(f"{what} lies in a gap, or was thinned, and is offered")
    try:
        await _compare(stage, View(log, state, memory_bytes=16 << 20), what, sequence)
    except ReplicarError as error:
        stage.violated(f"{what} can't be read: {error}")
    return 1


async def _compare(stage: Stage, view: View, what: str, sequence: int) -> None:
    for disk in view.disks:
        truth = stage.truths.get(disk.name)
        if truth is None:
            stage.violated(f"{what} has a disk {disk.name}")
            continue
        for wrong in truth.differences(await view.read(disk, 0, disk.size_bytes), sequence, is_replica=True):
            stage.violated(f"{what} (sequence {sequence}), disk {disk.name}: {wrong}")
    if {disk.name for disk in view.disks} != set(stage.truths):
        stage.violated(f"{what} has the disks {sorted(disk.name for disk in view.disks)}")


async def _judge_latest(stage: Stage, log: MachineLog) -> None:
    try:
        view = View(log, await locate(log, Latest()), memory_bytes=16 << 20)
        images = {disk.name: await view.read(disk, 0, disk.size_bytes) for disk in view.disks}
    except ReplicarError as error:
        stage.violated(f"the latest state can't be recovered: {error}")
        return
    for name, image in images.items():
        truth, replica = stage.truths[name], stage.replica(name)
        if image != replica:
            got, wanted = truth.numbers(image), truth.numbers(replica)
            places = [int(place) for place in (got != wanted).nonzero()[0][:3]]
            stage.violated(
                f"the latest state of disk {name} is not the disk: sectors {places} hold writes "
                f"{[int(got[place]) for place in places]} for {[int(wanted[place]) for place in places]}"
            )
        for wrong in truth.differences(image, is_replica=True):  # the agent's map says much, and may be wrong
            stage.violated(f"the latest state of disk {name}: {wrong}")
        for wrong in truth.differences(stage.image(name)):
            stage.violated(f"disk {name} itself: {wrong}")


async def _judge_catalogue(stage: Stage, stream: Stream, left: Left) -> None:
    """What the config server offers as stored is offered by the log."""
    found: list[PointList] = []

    async def ask(client: ControlClient) -> None:
        found.append(await client.points(stage.machine))

    process = stage.operate("points", ask)
    for _ in range(200):
        if not process.alive:
            break
        await asyncio.sleep(0.2)
    if not found:
        stage.violated(f"the catalogue does not answer: {process.error}")
        return
    for point in found[0].points:
        if not point.stored or point.sequence > stream.last:  # made since the log was read
            continue
        sequence, in_gap = stream.marks.get(point.name, (0, True))
        if sequence != point.sequence:
            stage.violated(f"the catalogue has {point.name} at {point.sequence}, the log at {sequence}")
        elif in_gap:
            stage.violated(f"the catalogue offers {point.name}, which lies in a gap")
        elif not left.has(sequence):
            stage.violated(f"the catalogue offers {point.name}, which retention gave up")

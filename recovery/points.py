"""Finds the state that is asked for, from the nearest checkpoint on; see `requests` for what may be asked.

`locate` reads the log just as far as the request needs, so a point in front of some damage is recovered in spite of it,
and begins at the newest checkpoint that the point is not in front of. Only when a request is refused is the rest of the
log read, to say what could have been asked for instead.

The end of the log may be torn: a process server died in the middle of an upload, and nobody has taken its log over yet.
What may have been under way then is verified in full before it is believed (see `replicar.log.tail`), and the log ends
before the first segment that is unsound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from recovery.checkpoint import Checkpoint, read_checkpoint
from recovery.chunks import ChunkSource, MachineLog
from recovery.history import History, Place
from recovery.index import Index, State
from recovery.records import read_records
from recovery.requests import AtSequence, Instant, Latest, Named, Request, thinned
from recovery.tiers import Pages
from replicar.errors import CorruptionError, PermanentError, ReplicarError
from replicar.log.index import LogIndex, floor_missing, open_index
from replicar.log.reader import LogReader, Segment, Start, Tail, replaced
from replicar.log.tail import Stored, sound_tail

__all__ = ["AtSequence", "Instant", "Latest", "Named", "Reached", "Request", "base_of", "index_at", "locate", "survey"]

#: Called with the number of segments and the sequence that were reached.
Reached = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `locate` was given, but for the request itself, and what it opened."""

    log: MachineLog
    known: LogIndex
    source: ChunkSource
    pages: Pages
    stored_number: int
    stored_digest: bytes | None
    quiet: tuple[int, int] | None
    reached: Reached | None


async def locate(
    log: MachineLog,
    request: Request,
    *,
    stored_number: int = 0,
    stored_digest: bytes | None = None,
    quiet: tuple[int, int] | None = None,
    source: ChunkSource | None = None,
    reached: Reached | None = None,
) -> State:
    """The machine's state at the point that is asked for.

    Args:
        stored_number: the segment that was reported as stored last; a log that ends before it is damaged.
        stored_digest: that segment's digest; a log that holds another one there is an older state put back.
        quiet: a sequence, and a time up to which the machine captured nothing behind it, as it reported itself.
        reached: told about progress after every segment.

    Raises:
        PermanentError: no such point, or one that is not offered (any more); the hint names what is.
        CorruptionError: the log is damaged before the point.
    """
    known = await open_index(log.store, log.machine_id, log.keys)
    asked = _Asked(log, known, source or ChunkSource(log), Pages(log), stored_number, stored_digest, quiet, reached)
    return (await _find(asked, request)).state()


async def index_at(log: MachineLog, known: LogIndex, sequence: int, pages: Pages | None = None) -> Index:
    """The index at a sequence. Raises as `locate`."""
    asked = _Asked(log, known, ChunkSource(log), pages or Pages(log), 0, None, None, None)
    return await _find(asked, AtSequence(sequence))


async def survey(log: MachineLog, source: ChunkSource | None = None) -> History:
    """The history of the whole log, as far as it is sound."""
    source = source or ChunkSource(log)
    known = await open_index(log.store, log.machine_id, log.keys)
    base = await base_of(known, Latest())
    history, reader = _history(known, base), LogReader(log.store, log.machine_id, log.keys)
    try:
        async for found in reader.segments(after=base.start if base is not None else None):
            history.follow(found, await read_records(source, found))
    except CorruptionError:
        # Only for telling what is offered in front of the damage; whoever asks for something behind it is told.
        if history.last is None:
            raise
    return history


async def base_of(known: LogIndex, request: Request, *, until: int | None = None) -> Checkpoint | None:
    """The newest sound checkpoint that the request's state is not in front of; None: begin with the log itself.

    Args:
        until: the last segment that a checkpoint may know, if it is not the floor.

    Raises:
        CorruptionError: only a damaged checkpoint leads to it.
    """
    floor = known.fold.floor_sequence
    for name in known.offered():
        exact = request.is_at(name)
        if not exact and (name.first < floor or not request.begins(name)):
            continue
        try:
            root = await known.root(name)
            found = read_checkpoint(root) if root is not None else None
        except CorruptionError:
            if name.first <= floor:
                raise
            continue  # an older one does as well
        if found is None or (found.start is None and not exact):
            continue
        if found.start is not None and not await known.stands(found.start):
            continue
        if until is not None and found.number > until and not exact and name != known.fold.floor:
            continue
        return found
    return None


async def _find(asked: _Asked, request: Request) -> Index:
    # The segment that was reported as stored is to be met on the way, and compared with what was reported.
    until = asked.stored_number if asked.stored_digest is not None and asked.stored_number else None
    base = await base_of(asked.known, request, until=until)
    if base is None and asked.known.fold.floor is not None:
        raise await _below_the_floor(asked, request)
    if base is not None and isinstance(request, Named):
        for mark in base.history.marks:
            if mark.name == request.name and not mark.in_gap:
                return await _find(asked, AtSequence(mark.place.sequence))
    index = Index(asked.log, pages=asked.pages)
    if base is not None:
        index = await Index.on(asked.log, base, pages=asked.pages)
        index.history = _history(asked.known, base)
        _check_stored(asked, base)
        before_floor = base.place.sequence < asked.known.fold.floor_sequence
        if before_floor or (isinstance(request, AtSequence) and request.is_at(base.name)):
            if index.history.open_gap is not None:
                raise request.refusal(await survey(asked.log, asked.source))
            return index
    return await _walk(asked, request, index, base.start if base is not None else None)


async def _walk(asked: _Asked, request: Request, index: Index, start: Start | None) -> Index:
    log, history = asked.log, index.history
    reader, sound = LogReader(log.store, log.machine_id, log.keys), _Sound(asked)
    end = reader.tail
    async for found in reader.segments(
        after=start, stored_number=asked.stored_number, stored_digest=asked.stored_digest
    ):
        if await sound.ends_before(found, reader.newest_first):
            end = sound.tail
            break
        records = await read_records(asked.source, found)
        cut = request.cut(history, found, records)
        if cut is None or cut >= found.table.header.position.first_sequence:
            index.apply(found, records, cut)
            offered = history.open_gap is None
        else:
            offered = _is_between(request, history, found) and history.open_gap is None
        if asked.reached is not None:
            asked.reached(found.number, found.table.header.position.last_sequence)
        if cut is not None:
            if not offered:
                raise request.refusal(await survey(log, asked.source))
            return index
        end = reader.tail
    else:
        end = reader.tail
    if history.last is None:
        raise _nothing(log, end)
    if asked.quiet is not None and history.last.sequence >= asked.quiet[0]:
        history.quiet_until_ns = asked.quiet[1]
    gap = history.open_gap
    if request.is_end(history) and gap is None:
        return index
    if isinstance(request, Latest) and gap is not None and gap.before is not None:
        return await _find(asked, AtSequence(gap.before.sequence))
    raise _with_end(request.refusal(history), end)


class _Sound:
    """Whether a segment at the log's end may be believed. Asks storage only once, and only if there is doubt."""

    def __init__(self, asked: _Asked) -> None:
        self.tail = Tail()
        self._asked = asked
        self._known: int | None = None  # the last segment that is known to be sound

    async def ends_before(self, found: Segment, newest_first: int) -> bool:
        asked = self._asked
        if found.number < newest_first or found.number <= asked.stored_number:
            return False
        if self._known is None:
            start = await asked.known.start()  # whoever makes a checkpoint has verified all before it
            self._known = start.tail.number
        if found.number <= self._known:
            return False
        if not self.tail.number:
            reader = LogReader(asked.log.store, asked.log.machine_id, asked.log.keys)
            try:
                self.tail = await sound_tail(reader, Stored(asked.stored_number, 0, asked.stored_digest or b""))
            except CorruptionError:
                # What is known to be stored is damaged: that is met, and said, where it is needed.
                self._known = found.number + (1 << 62)
                return False
        return found.number > self.tail.number


def _check_stored(asked: _Asked, base: Checkpoint) -> None:
    """The checkpoint ends with the segment that was reported as stored: is it that one?"""
    if base.start is None or base.number != asked.stored_number or asked.stored_digest is None:
        return
    if base.start.tail.digest != asked.stored_digest:
        raise replaced(asked.stored_number, str(base.name))


def _history(known: LogIndex, base: Checkpoint | None) -> History:
    history = base.history if base is not None else History()
    floor = known.fold.floor
    history.floor = Place(floor.first, floor.last) if floor is not None else None
    return history


async def _below_the_floor(asked: _Asked, request: Request) -> ReplicarError:
    fold = asked.known.fold
    if isinstance(request, Named | Latest):
        return floor_missing(asked.log.machine_id, fold)
    return thinned(request, fold, await survey(asked.log, asked.source))


def _is_between(request: Request, history: History, found: Segment) -> bool:
    """Whether a request that fell in front of `found` means the state after the last sequence before it."""
    if history.last is None or not isinstance(request, Instant):
        return False
    return history.follows(found) or request.time_ns == history.last.time_ns


def _with_end(error: PermanentError, tail: Tail) -> PermanentError:
    """The refusal, saying where and why the log ends if that is not just where it was written to."""
    if not tail.damaged:
        return error
    where = f"the log can be read up to segment {tail.number}, sequence {tail.sequence}, only: {tail.reason}"
    return PermanentError(error.message, hint=f"{error.hint}; {where}", **error.fields, tail=where)


def _nothing(log: MachineLog, tail: Tail) -> ReplicarError:
    if not tail.damaged:
        return PermanentError(
            f"there is nothing in storage of machine {log.machine_id}",
            hint="check container and machine; if protection was just enabled, wait for the first segment",
            machine_id=str(log.machine_id),
        )
    return CorruptionError(
        f"nothing of the log of machine {log.machine_id} can be read: {tail.reason}",
        hint="check that the key is this machine's, then run `replicar verify`",
        machine_id=str(log.machine_id),
    )

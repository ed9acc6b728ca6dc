"""Walks a log's stripes byte by byte, past whatever is damaged, and gives segments in the order of their numbers.

Every stripe is read once, from its beginning, in windows of WINDOW_BYTES. Where no segment begins, the next one is
looked for within SEARCH_BYTES (one segment can't be longer); zeros with nothing behind them are the stripe's end.
The stripes of a run are merged by number, the runs follow each other as for any reader: an older one counts up to where
a newer one begins. A log whose beginning was folded away is walked from its floor on.

What is missing behind the last segment that was reported as stored is no problem but the end: somebody may be writing
there right now, several segments at a time.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from replicar.errors import CorruptionError
from replicar.formats import cipher, logblob, segment
from replicar.formats.logblob import BlobName
from replicar.formats.segment import SegmentHeader
from replicar.log.reader import Start
from replicar.storage.store import PageBlobStore

WINDOW_BYTES: Final = segment.MAX_SEGMENT_BYTES
SEARCH_BYTES: Final = segment.MAX_SEGMENT_BYTES


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in the log: what, and where as far as that is known."""

    text: str
    number: int | None = None
    blob: str | None = None
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A segment's bytes where they were found; only its header was looked at."""

    header: SegmentHeader
    blob: str
    offset: int
    data: memoryview

    @property
    def digest(self) -> bytes:
        """What the next segment's header has to name; needs no key."""
        end = self.header.table_offset + self.header.table_bytes
        return cipher.digest(bytes(self.data[: segment.HEADER_BYTES]), self.data[end - segment.TAG_BYTES : end])

    def problem(self, text: str, *, at: int = 0) -> Problem:
        """Something wrong with this segment, `at` bytes from its start."""
        return Problem(text, self.header.position.number, self.blob, self.offset + at)


@dataclass(frozen=True, slots=True)
class _Damage:
    """Bytes of a stripe that are no segment. `before`: the number of the next one there, None where nothing follows."""

    problem: Problem
    before: int | None


class LogScan:
    """One walk over a machine's log.

    After `walk` is exhausted, `blobs` counts the log blobs there were and `note` says how the log ends.
    """

    def __init__(
        self,
        store: PageBlobStore,
        machine_id: uuid.UUID,
        *,
        stored_number: int = 0,
        start: Start = Start(),  # noqa: B008 - a value that nobody can change
    ) -> None:
        self.blobs = 0
        self.note = ""
        self._store = store
        self._machine_id = machine_id
        self._stored_number = stored_number
        self._start = start
        self._next = start.tail.number + 1
        self._digest: bytes | None = start.tail.digest  # of the segment before the next; None: it is not there

    async def walk(self) -> AsyncIterator[Found | Problem]:
        """Segments in order, with the problems between them."""
        runs: list[_Run] = []
        for (epoch, run), stripes in (await self._stripes()).items():
            opened = _Run(epoch, run, stripes)
            for problem in await opened.begin():
                yield problem
            if opened.first_number is not None:
                runs.append(opened)
        for index, opened in enumerate(runs):
            until = min((later.first_number or 0 for later in runs[index + 1 :]), default=None)
            async for item in self._walk_run(opened, until):
                yield item
        if self._next <= self._stored_number:
            text = f"the log ends at segment {self._next - 1}, but segment {self._stored_number} was reported as stored"
            yield Problem(text, self._next)

    async def _stripes(self) -> dict[tuple[int, int], list[_Stripe]]:
        by_run: dict[tuple[int, int], list[_Stripe]] = {}
        for info in await self._store.list(logblob.log_prefix(self._machine_id)):
            name = logblob.read_name(info.name)
            if name is not None:
                self.blobs += 1
                if (name.epoch, name.run) >= self._start.run:
                    offset = self._start.offsets.get(info.name, logblob.HEADER_BYTES)
                    stripe = _Stripe(self._store, name, info.size_bytes, offset)
                    by_run.setdefault((name.epoch, name.run), []).append(stripe)
        return dict(sorted(by_run.items()))

    async def _walk_run(self, run: _Run, until: int | None) -> AsyncIterator[Found | Problem]:
        if until is not None and until <= self._next:
            return
        # Up to here everything must be there; behind it, unsound bytes may be a write under way, or one that never was.
        limit = until - 1 if until is not None else (self._stored_number or None)
        damages: list[_Damage] = []
        complete = True
        async for item in run.walk():
            if isinstance(item, _Damage):
                damages.append(item)
                continue
            number = item.header.position.number
            if until is not None and number > until - 1:
                break
            if number > self._next and until is None and limit is not None and self._next > limit:
                self.note = f"segment {self._next} is not there yet, though later ones are"
                break
            complete = complete and number <= self._next
            for problem in self._judge(item):
                yield problem
            if number >= self._next:
                yield item
                self._next, self._digest = number + 1, item.digest
        for damage in damages:
            if (
                limit is None
                or not complete
                or self._next <= limit
                or (damage.before is not None and damage.before <= limit)
            ):
                yield damage.problem
            elif until is None:
                self.note = self.note or f"behind segment {self._next - 1}: {damage.problem.text}"
        if until is not None and self._next < until:
            yield self._missing(until)
            self._next, self._digest = until, None

    def _judge(self, item: Found) -> list[Problem]:
        position = item.header.position
        if position.number < self._next:
            return [item.problem(f"segment {position.number} lies where segment {self._next} belongs")]
        problems = []
        if position.number > self._next:
            problems.append(self._missing(position.number))
            self._digest = None
        name = logblob.read_name(item.blob)
        assert name is not None
        if (position.machine_id, position.epoch, position.run) != (self._machine_id, name.epoch, name.run):
            problems.append(item.problem(f"segment {position.number} was written for another log or run"))
        if self._digest is not None and item.header.previous != self._digest:
            text = f"segment {position.number} does not follow the one before it: the chain of digests is broken"
            problems.append(item.problem(text))
        return problems

    def _missing(self, before: int) -> Problem:
        which = f"segment {self._next} is" if before == self._next + 1 else f"segments {self._next} to {before - 1} are"
        return Problem(f"{which} missing", self._next)


class _Run:
    """One writer's stripes, merged by segment number."""

    def __init__(self, epoch: int, run: int, stripes: list[_Stripe]) -> None:
        self.epoch, self.run = epoch, run
        self.first_number: int | None = None  # None: made and never written
        self._stripes = sorted(stripes, key=lambda stripe: stripe.name)

    async def begin(self) -> list[Problem]:
        """Read the blobs' headers; returns what is wrong with them."""
        problems = []
        for stripe in self._stripes:
            try:
                header = logblob.read_header(await stripe.read(0, logblob.HEADER_BYTES))
                if header is not None and header.name != stripe.name:
                    raise CorruptionError(f"it holds the header of {header.name}")
            except CorruptionError as error:
                problems.append(Problem(f"log blob {stripe.name}: {error.message}", None, str(stripe.name), 0))
                continue
            if header is not None and stripe.name.stripe == 0:
                self.first_number = header.first_number
        if problems and self.first_number is None:
            heads = [await stripe.head() for stripe in self._stripes]
            self.first_number = min((h.header.position.number for h in heads if isinstance(h, Found)), default=None)
        return problems

    async def walk(self) -> AsyncIterator[Found | _Damage]:
        """Segments as their numbers rise, a stripe's damage when it is met."""
        stripes = list(self._stripes)
        while stripes:
            best: tuple[int, _Stripe] | None = None
            for stripe in list(stripes):
                head = await stripe.head()
                while isinstance(head, _Damage):
                    yield head
                    stripe.take()
                    head = await stripe.head()
                if head is None:
                    stripes.remove(stripe)
                elif best is None or head.header.position.number < best[0]:
                    best = (head.header.position.number, stripe)
            if best is not None:
                yield best[1].take()


class _Stripe:
    """A place in a log blob, what lies there, and the window of the blob that was read last."""

    def __init__(self, store: PageBlobStore, name: BlobName, size_bytes: int, offset: int) -> None:
        self.name = name
        self._store, self._size = store, size_bytes
        self._offset = offset
        self._head: Found | _Damage | None = None
        self._ended = False
        self._window, self._window_offset = b"", 0

    async def head(self) -> Found | _Damage | None:
        """What comes next: a segment, damage, or None at the end. It stays until it is taken."""
        if self._head is None and not self._ended:
            self._head = await self._look()
            self._ended = self._head is None
        return self._head

    def take(self) -> Found | _Damage:
        """What `head` returned last, which must not have been None."""
        item, self._head = self._head, None
        assert item is not None
        return item

    async def read(self, offset: int, length: int) -> memoryview:
        """`length` bytes at `offset`, fewer at the blob's end."""
        length = max(min(length, self._size - offset), 0)
        start = offset - self._window_offset
        if start < 0 or start + length > len(self._window):
            kept = self._window[start:] if start >= 0 else b""
            wanted = min(max(length, WINDOW_BYTES), self._size - offset) - len(kept)
            fresh = await self._store.read(str(self.name), offset + len(kept), wanted)
            self._window, self._window_offset, start = kept + fresh, offset, 0
        return memoryview(self._window)[start : start + length]

    async def _look(self) -> Found | _Damage | None:
        offset = self._offset
        found = await self._segment_at(offset)
        if isinstance(found, Found):
            self._offset += found.header.total_bytes
            return found
        behind = await self._search(offset + segment.ALIGNMENT)
        self._offset = behind.offset if behind is not None else self._size
        if behind is not None:
            text = (
                found.message if found is not None else "nothing is written here, though there is something behind it"
            )
            text = f"{text} ({behind.offset - offset} bytes are skipped)"
            return _Damage(Problem(text, None, str(self.name), offset), behind.header.position.number)
        if found is None:
            return None
        return _Damage(Problem(f"{found.message}, and nothing sound is behind it", None, str(self.name), offset), None)

    async def _segment_at(self, offset: int) -> Found | CorruptionError | None:
        raw = await self.read(offset, segment.HEADER_BYTES)
        if len(raw) < segment.HEADER_BYTES:
            return None
        try:
            header = segment.read_header(raw)
        except CorruptionError as error:
            return error
        if header is None:
            return None
        data = await self.read(offset, header.total_bytes)
        if len(data) < header.total_bytes:
            return CorruptionError(f"segment {header.position.number} reaches beyond the blob's end")
        return Found(header, str(self.name), offset, data)

    async def _search(self, offset: int) -> Found | None:
        """The next segment within reach."""
        data = bytes(await self.read(offset, SEARCH_BYTES))
        place = data.find(segment.MAGIC)
        while place >= 0:
            if place % segment.ALIGNMENT == 0:
                found = await self._segment_at(offset + place)
                if isinstance(found, Found):
                    return found
            place = data.find(segment.MAGIC, place + 1)
        return None

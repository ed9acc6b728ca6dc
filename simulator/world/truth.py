"""What a disk must hold at every place of its machine's stream, known from the application's side.

Of each change the stream's next sequence is noted when it is issued and when it is acknowledged. From these follows,
for the state after any sequence S, without any clock:

    acknowledged when next was at most S + 1      its descriptor is not behind S: it must be there
    issued when next was above S                  its descriptor is behind S: it must not be there
    between                                       it may be there or not, but whole
    never acknowledged (somebody died)            from its issue on: there or not, sector by sector

Since nobody has two changes in flight at one place, a sector's changes have an order, and what it may hold is the last
one that must be there or any that may be behind it.

Free space that is left out of the first copy was garbage to begin with, and nobody reads it: until it is written a
replica may have zeros there.

A power cut begins another *era*: what the disk really held afterwards, read from the disk itself, is the new beginning,
for the sequences from where the stream goes on. Of what had been flushed nothing may be missing there.

Every sector says which write made it, so what is found is named: an older write, one from the future, another place's,
or damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from simulator import content
from simulator.content import SECTOR_BYTES, Stamp

#: Behind every sequence there is.
EVER: Final = 1 << 63
#: What a sector is found to be that no write of the application made, or a damaged or misplaced one.
FOREIGN, DAMAGED, MISPLACED = -1, -2, -3
Numbers: TypeAlias = npt.NDArray[np.int64]
#: Places that a comparison describes.
MAX_DESCRIBED: Final = 5


@dataclass(slots=True, eq=False)
class Change:
    """One write (`number` above 0) or zeroing (0) of sectors [first, end)."""

    first: int
    end: int
    number: int
    issued: int
    acknowledged: int | None = None
    issued_at: float = 0.0  # the world's time, which only what compares two machines may look at
    acknowledged_at: float | None = None
    lost: bool = False
    flushed: bool = False
    unsure: bool = False  # a flush of it failed: the kernel may have dropped it, whatever later flushes say


@dataclass(slots=True)
class Era:
    """From one power cut to the next: what the disk held at its beginning, and what was done to it."""

    floor: int
    base: Numbers
    changes: list[Change] = field(default_factory=list)


class Truth:
    """Knows one disk.

    Args:
        seed: of the application's stamps.
        image: what the disk holds at first.
        now: the world's time.
        free: bytes (begin, end) that are left out of the first copy.
    """

    def __init__(
        self,
        seed: int,
        image: bytes,
        now: Callable[[], float] = lambda: 0.0,
        free: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.seed = seed
        self._now = now
        self.sectors = len(image) // SECTOR_BYTES
        self.eras = [Era(0, self.numbers(image))]
        self._free = np.zeros(self.sectors, bool)
        for begin, end in free:
            self._free[begin // SECTOR_BYTES : end // SECTOR_BYTES] = True
        self._in_flight: list[Change] = []

    @property
    def changes(self) -> int:
        return sum(len(era.changes) for era in self.eras)

    # --- what the application tells ---

    def busy(self, first: int, end: int) -> bool:
        """Whether a change in flight touches these sectors."""
        return any(each.first < end and first < each.end for each in self._in_flight)

    def issue(self, first: int, end: int, number: int, next_sequence: int) -> Change:
        change = Change(first, end, number, next_sequence, issued_at=self._now())
        self.eras[-1].changes.append(change)
        self._in_flight.append(change)
        return change

    def acknowledge(self, change: Change, next_sequence: int) -> None:
        change.acknowledged, change.acknowledged_at = next_sequence, self._now()
        if change in self._in_flight:
            self._in_flight.remove(change)

    def lose(self, change: Change) -> None:
        """Nobody will ever say what became of it."""
        change.lost = True
        if change in self._in_flight:
            self._in_flight.remove(change)

    def acknowledged(self) -> list[Change]:
        """What a flush that is asked for now must make durable."""
        return [
            each
            for each in self.eras[-1].changes
            if each.acknowledged is not None and not each.flushed and not each.unsure
        ]

    # --- what the world tells ---

    def power_cut(self, image: bytes) -> list[str]:
        """The disk came back as this; what is wrong with it, in words."""
        for change in list(self._in_flight):
            self.lose(change)
        found = self.numbers(image)
        wrong = list(self._missing_flushed(found))
        self.eras.append(Era(EVER, found))
        return wrong

    def stream_goes_on(self, next_sequence: int) -> None:
        """After a power cut: the sequences of the new era begin here."""
        if self.eras[-1].floor == EVER:
            self.eras[-1].floor = next_sequence

    # --- judging ---

    def numbers(self, image: bytes) -> Numbers:
        """Which write made each sector; 0 for zeros (shape (sectors,))."""
        words = np.frombuffer(image, np.uint64).reshape(-1, SECTOR_BYTES // 8)
        found = words[:, 2].astype(np.int64)
        ours = (words[:, 0] == content.MAGIC) & (words[:, 5] == self.seed)
        sound = content._checksums(words) == words[:, 1]
        placed = words[:, 3] == np.arange(len(words), dtype=np.uint64) * SECTOR_BYTES
        zeros = np.bitwise_or.reduce(words, axis=1) == 0
        found[ours & ~placed] = MISPLACED
        found[ours & ~sound] = DAMAGED
        found[~ours] = FOREIGN
        found[zeros] = 0
        return found

    def differences(self, image: bytes, sequence: int = EVER - 1, *, is_replica: bool = False) -> list[str]:
        """Where an image can't be the disk after `sequence`, or a replica of it, in words; empty when it can be."""
        found = self.numbers(image)
        era = next(each for each in reversed(self.eras) if each.floor <= sequence)
        if is_replica and self._free.any():
            garbage = self._free & (era.base == self.eras[0].base) & (found == 0)
            era = Era(era.floor, np.where(garbage, 0, era.base), era.changes)
        return list(self._judge(found, era, sequence))

    def _judge(self, found: Numbers, era: Era, sequence: int) -> Iterator[str]:
        expected = era.base.copy()
        open_changes: list[Change] = []
        for change in era.changes:
            if change.issued > sequence:
                continue
            done = change.acknowledged is not None and change.acknowledged <= sequence + 1
            if done:
                expected[change.first : change.end] = change.number
            open_changes.append(change)
        wrong = np.flatnonzero(found != expected)
        if not wrong.size:
            return
        allowed = self._allowed(era, sequence, {int(place) for place in wrong})
        described = 0
        for place in wrong.tolist():
            if int(found[place]) in allowed[place]:
                continue
            described += 1
            if described <= MAX_DESCRIBED:
                may = " or ".join(_name(number) for number in sorted(allowed[place]))
                yield f"sector {place} holds {_name(int(found[place]))}, where there may be {may}"
        yield from self._torn(found, era, sequence)

    def _allowed(self, era: Era, sequence: int, places: set[int]) -> dict[int, set[int]]:
        allowed = {place: {int(era.base[place])} for place in places}
        for change in era.changes:
            if change.issued > sequence:
                continue
            done = change.acknowledged is not None and change.acknowledged <= sequence + 1
            for place in places.intersection(range(change.first, change.end)):
                if done:
                    allowed[place] = {change.number}
                else:
                    allowed[place].add(change.number)
        return allowed

    def _torn(self, found: Numbers, era: Era, sequence: int) -> Iterator[str]:
        """Writes of which a part is there and a part is not, though nothing overwrote that."""
        later: list[tuple[int, int]] = []
        for change in reversed(era.changes):
            if change.issued > sequence:
                continue
            undecided = change.acknowledged is None or change.acknowledged > sequence + 1
            if undecided and not change.lost and change.number:
                held = {
                    bool(found[place] == change.number)
                    for place in range(change.first, change.end)
                    if not any(first <= place < end for first, end in later)
                }
                if len(held) > 1:
                    yield f"write {change.number} is there in part"
            later.append((change.first, change.end))

    def _missing_flushed(self, found: Numbers) -> Iterator[str]:
        era = self.eras[-1]
        last = max((n for n, each in enumerate(era.changes) if each.flushed), default=-1)
        if last < 0:
            return
        allowed: dict[int, set[int]] = {}
        for change in era.changes:
            for place in range(change.first, change.end):
                if change.flushed:
                    allowed[place] = {change.number}
                elif place in allowed:
                    allowed[place].add(change.number)
        for place, numbers in sorted(allowed.items()):
            if int(found[place]) not in numbers:
                yield f"sector {place} of the disk lost a flushed write: it holds {_name(int(found[place]))}"
                return


def make(seed: int, number: int, time_ns: int, first: int, end: int) -> bytes:
    """The content of a write of sectors [first, end)."""
    return content.make(Stamp(seed, number, time_ns), first * SECTOR_BYTES, (end - first) * SECTOR_BYTES)


def _name(number: int) -> str:
    return {
        0: "zeros",
        FOREIGN: "foreign bytes",
        DAMAGED: "a damaged write",
        MISPLACED: "a write of another place",
    }.get(number, f"write {number}")

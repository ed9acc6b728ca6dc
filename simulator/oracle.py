"""The oracle: what was acknowledged to the application and when, kept apart from the product it judges.

It stands on the application's side of the disk. It holds the disk as it was at the start and an append-only list of
changes, each with the time at which it was issued and the time at which its acknowledgement came. From these follows,
for any instant T, what a recovered disk must hold:

    acknowledged before T                      must be there
    issued after T                             must not be there
    in flight at T                             may be there or not, but whole (one write is one descriptor)
    never acknowledged (the connection broke)  may be there or not, sector by sector, from when it was issued

That holds for every instant, busy or quiet, so a test need not stop the application to have a point to check. It rests
on one rule of the application's, which `begin` enforces: no two changes in flight touch the same place. (File systems
keep that rule; a disk promises nothing to those who break it.) Then the order of changes in flight does not matter, and
issue order is a right order for all.

A clock read by both the agent and the application (both on one host here) is taken for one clock.

Weak: what TRIM leaves is taken to be zeros, which NBD does not promise but Replicar does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from replicar.errors import PermanentError
from simulator import content
from simulator.content import SECTOR_BYTES, Stamp

#: An instant behind everything: what must be there is what was ever acknowledged.
LATEST_NS: Final = (1 << 63) - 1
#: Differing places that a comparison describes; it counts the others.
MAX_DIFFERENCES: Final = 10
_COMPARE_BYTES: Final = 4 << 20


class Image(Protocol):
    """Something with a disk's bytes: a raw file, a VHD in a page blob, a view."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        ...


@dataclass(slots=True)
class Change:
    """One write or zeroing. `stamp` makes its content; None stands for zeros. `acknowledged_ns` None: not (yet)."""

    offset: int
    length: int
    stamp: Stamp | None
    issued_ns: int
    acknowledged_ns: int | None = None
    lost: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def sectors(self) -> range:
        """Where its sectors begin, in bytes."""
        return range(self.offset, self.end, SECTOR_BYTES)

    def content(self) -> bytes:
        """The bytes that this change leaves."""
        return bytes(self.length) if self.stamp is None else content.make(self.stamp, self.offset, self.length)


@dataclass(frozen=True, slots=True)
class Difference:
    """A place where the image does not hold what it must, in words."""

    offset: int
    length: int
    what: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What comparing one image with what it must hold at one instant gave.

    `differing_bytes` counts sectors times 512; `differences` describes the first `MAX_DIFFERENCES` runs of them.
    """

    at_ns: int
    bytes_compared: int
    changes_required: int
    changes_undecided: int
    differing_bytes: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        return self.differing_bytes == 0

    def __str__(self) -> str:
        if self.equal:
            return f"{self.bytes_compared} bytes equal, {self.changes_required} changes included"
        places = "; ".join(f"{found.length} bytes at {found.offset}: {found.what}" for found in self.differences)
        return f"{self.differing_bytes} bytes differ: {places}"


class FileImage:
    """A raw file as an `Image`; what lies beyond its end is an error, not zeros."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size_bytes = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise PermanentError(f"{self._path} ends at {self.size_bytes}, before {offset + length}")
        return data


@dataclass(slots=True)
class _Undecided:
    """A change that may or may not be there, and which of its sectors later changes have not yet overwritten."""

    change: Change
    open: set[int] = field(default_factory=set)


class Oracle:
    """Knows one disk.

    Args:
        start: a file with the disk's first content; copied (sparsely) into `directory`, so the original may change.
        directory: where the copy and the expected images live; the caller's to remove.
    """

    def __init__(self, start: Path, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.start = directory / "start.img"
        copy_sparse(start, self.start)
        self.size_bytes = self.start.stat().st_size
        self.changes: list[Change] = []
        self._directory = directory
        self._in_flight: dict[int, Change] = {}

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def bytes_acknowledged(self) -> int:
        return sum(change.length for change in self.changes if change.acknowledged_ns is not None)

    @property
    def last_acknowledged_ns(self) -> int:
        """When the newest acknowledgement came; 0 before the first."""
        return max((change.acknowledged_ns or 0 for change in self.changes), default=0)

    def begin(self, offset: int, length: int, stamp: Stamp | None, issued_ns: int) -> Change:
        """A change is handed to the disk. Call it before the disk can have seen any of it.

        Raises:
            ValueError: it is no whole sectors of this disk, or overlaps a change in flight: the application's mistake.
        """
        if offset % SECTOR_BYTES or length % SECTOR_BYTES or not 0 < length <= self.size_bytes - offset or offset < 0:
            raise ValueError(f"{length} bytes at {offset} are no whole sectors of a disk of {self.size_bytes}")
        if self.busy(offset, length):
            raise ValueError(f"{length} bytes at {offset} overlap a change in flight")
        if self.changes and issued_ns < self.changes[-1].issued_ns:
            raise ValueError("changes must be begun in the order of their issue")
        change = Change(offset, length, stamp, issued_ns)
        self.changes.append(change)
        self._in_flight[id(change)] = change
        return change

    def acknowledge(self, change: Change, acknowledged_ns: int) -> None:
        """The disk said that the change is done."""
        change.acknowledged_ns = acknowledged_ns
        del self._in_flight[id(change)]

    def lose(self, change: Change) -> None:
        """The server died: nobody will ever say whether the change was done. It can't land any more, though."""
        change.lost = True
        del self._in_flight[id(change)]

    def busy(self, offset: int, length: int) -> bool:
        """Whether a change in flight touches that place."""
        return any(other.offset < offset + length and offset < other.end for other in self._in_flight.values())

    def expected_path(self, name: str) -> Path:
        """Where the expected image of that name is made."""
        return self._directory / f"{name}.expected.img"

    def expected(self, name: str, at_ns: int = LATEST_NS) -> Path:
        """The disk at an instant as a raw file, of the changes that must be there only."""
        path = self.expected_path(name)
        copy_sparse(self.start, path)
        descriptor = os.open(path, os.O_RDWR)
        try:
            for change in self._required(at_ns):
                os.pwrite(descriptor, change.content(), change.offset)
        finally:
            os.close(descriptor)
        return path

    def compare(self, image: Image, name: str, at_ns: int = LATEST_NS, *, keep: bool = False) -> Comparison:
        """Hold an image of the disk against what it must be at an instant.

        Changes that were undecided then are looked for in the image and adopted where they are found.

        Args:
            name: of the expected image (`expected_path`), which is made on the way and removed when all is equal.
            keep: leave the expected image where it is even then.
        """
        required = sum(1 for _ in self._required(at_ns))
        path = self.expected(name, at_ns)
        undecided = self._undecided(at_ns)
        torn = self._adopt(image, path, undecided)
        differing, found = self._differences(image, FileImage(path))
        differing += sum(difference.length for difference in torn)
        differences = tuple([*torn, *found][:MAX_DIFFERENCES])
        if not differing and not keep:
            path.unlink()
        return Comparison(at_ns, self.size_bytes, required, len(undecided), differing, differences)

    def _required(self, at_ns: int) -> Iterator[Change]:
        return (c for c in self.changes if c.acknowledged_ns is not None and c.acknowledged_ns <= at_ns)

    def _undecided(self, at_ns: int) -> list[_Undecided]:
        """Changes that may be there, with the sectors on which nothing that must be there was laid later."""
        found: list[_Undecided] = []
        for change in self.changes:
            if change.issued_ns > at_ns:
                break
            if change.acknowledged_ns is None or change.acknowledged_ns > at_ns:
                found.append(_Undecided(change, set(change.sectors)))
            else:
                for earlier in found:
                    earlier.open.difference_update(change.sectors)
        return [entry for entry in found if entry.open]

    def _adopt(self, image: Image, path: Path, undecided: list[_Undecided]) -> list[Difference]:
        """Lay the undecided changes that the image holds onto the expected file; tell of those that were torn."""
        torn: list[Difference] = []
        descriptor = os.open(path, os.O_RDWR)
        try:
            for entry in undecided:
                change, data = entry.change, entry.change.content()
                there, distinct = 0, 0
                for offset in sorted(entry.open):
                    wanted = data[offset - change.offset :][:SECTOR_BYTES]
                    distinct += wanted != os.pread(descriptor, SECTOR_BYTES, offset)
                    if image.read(offset, SECTOR_BYTES) == wanted:
                        there += wanted != os.pread(descriptor, SECTOR_BYTES, offset)
                        os.pwrite(descriptor, wanted, offset)
                if not change.lost and 0 < there < distinct:
                    torn.append(Difference(change.offset, change.length, f"torn: {there} of {distinct} sectors of it"))
        finally:
            os.close(descriptor)
        return torn

    def _differences(self, image: Image, expected: Image) -> tuple[int, list[Difference]]:
        differing, places = 0, list[Difference]()
        for offset in range(0, self.size_bytes, _COMPARE_BYTES):
            length = min(_COMPARE_BYTES, self.size_bytes - offset)
            got, wanted = image.read(offset, length), expected.read(offset, length)
            if got == wanted:
                continue
            for start, end in _unequal_runs(got, wanted):
                differing += end - start
                if len(places) < MAX_DIFFERENCES:
                    what = _describe(got[start:][:SECTOR_BYTES], wanted[start:][:SECTOR_BYTES])
                    places.append(Difference(offset + start, end - start, what))
        return differing, places


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, leaving holes where it has zeros."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(1 << 20):
            if block.count(0) == len(block):
                writer.seek(len(block), os.SEEK_CUR)
            else:
                writer.write(block)
        writer.truncate(source.stat().st_size)
    shutil.copymode(source, target)


def _unequal_runs(got: bytes, wanted: bytes) -> list[tuple[int, int]]:
    """Runs of sectors (start, end in bytes) in which two equally long pieces differ."""
    left = np.frombuffer(got, np.uint64).reshape(-1, SECTOR_BYTES // 8)
    right = np.frombuffer(wanted, np.uint64).reshape(-1, SECTOR_BYTES // 8)
    unequal = np.concatenate(([False], np.any(left != right, axis=1), [False]))
    edges = np.flatnonzero(unequal[1:] != unequal[:-1]) * SECTOR_BYTES
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _describe(got: bytes, wanted: bytes) -> str:
    return f"expected {_name(wanted)}, found {_name(got)}"


def _name(sector: bytes) -> str:
    if not any(sector):
        return "zeros"
    found = content.read(sector)
    return "the disk's first content or foreign bytes" if found is None else str(found)

"""What a machine's disk has durably, and what a power cut leaves of it.

The files are real ones, in memory. Beside each lies what of it is durable: what it held when it was last synced. A cut
rebuilds the directory as a disk may be found after the power went:

- of every sector-aligned piece of 4096 bytes that changed since the last sync, the old or the new version; now and
  then a mixture of both, sector by sector;
- of a file that grew, the old or the new length;
- of the names, what a journal leaves: all changes up to some moment, and none after it. A sync of a directory, or of a
  file that is new or changed its length, writes the journal out, as ext4 and XFS do.

A file that is written by calls keeps a list of what is dirty; one that is written through a mapping is compared as a
whole, which is cheap since only what is not a hole is looked at. When a sync fails, what was dirty is dropped: it can
be read, is taken for clean, and is never written until somebody stores there again (`stored`, for mappings; through
their buffers, where bytes differ).

Weak: two names of one file, symbolic links and modes are not played.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Final, TypeAlias

PAGE: Final = 4096
SECTOR: Final = 512
#: The operating system's own functions, whatever stands in their place now.
REAL: Final = SimpleNamespace(
    **{
        name: getattr(os, name)
        for name in (
            *("open", "close", "dup", "fdopen", "pread", "preadv", "pwrite", "pwritev", "fsync", "fdatasync"),
            *("ftruncate", "posix_fallocate", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fstat"),
            *("lseek", "stat", "scandir", "urandom"),
        )
    }
)

#: Pieces of a file by their numbers; what is missing is zeros.
Pages: TypeAlias = dict[int, bytes]
#: The parts of a file that are no holes, each with where it begins.
Stretches: TypeAlias = list[tuple[int, bytes]]


@dataclass(eq=False)
class Node:
    """One file. `content` is set when no name leads to it any more: what it held then."""

    number: int
    pages: Pages = field(default_factory=dict)
    durable_bytes: int = 0
    is_fresh: bool = True  # its name or its length is not in the journal yet
    by_calls: bool = False
    dirty: set[int] = field(default_factory=set)  # pages, of a file that is written by calls
    lost: Pages = field(default_factory=dict)  # what a failed sync dropped: durable only when written again
    is_directory: bool = False
    content: tuple[int, Pages] | None = None
    _synced: Stretches | None = None

    @property
    def durable(self) -> Pages:
        """What it held when it was last synced. Cut into pages only when somebody asks: few syncs see a power cut."""
        if self._synced is not None:
            self.pages, self._synced = _pages_of(self._synced), None
        return self.pages

    def is_now(self, found: Stretches) -> None:
        """It was synced while it held this."""
        self._synced = found


class FileSystem:
    """The files of one machine, below `root`.

    Args:
        randomness: what a cut leaves.
    """

    def __init__(self, root: Path, randomness: random.Random) -> None:
        self.root = root
        self._randomness = randomness
        self._nodes: dict[int, Node] = {}  # by inode
        self._names: dict[str, Node] = {}
        self._durable_names: dict[str, Node] = {}
        self._journal: list[tuple[str, Node | None]] = []
        root.mkdir(parents=True, exist_ok=True)

    # --- what the calls tell ---

    def opened(self, path: str, descriptor: int) -> Node:
        """A file or directory of that name was opened, and perhaps made."""
        inode = REAL.fstat(descriptor).st_ino
        node = self._names.get(path)
        if node is None or node.number != inode:
            node = self._nodes[inode] = Node(inode)
            self._name(path, node)
        return node

    def made_directory(self, path: str) -> None:
        node = Node(REAL.stat(path).st_ino, is_directory=True)
        self._name(path, node)

    def renamed(self, source: str, target: str) -> None:
        """After it was done; what `target` named before is gone."""
        node = self._names.get(source)
        if node is None:
            return
        self._name(source, None)
        self._name(target, node)

    def removed(self, path: str) -> None:
        if path in self._names:
            self._name(path, None)

    def going(self, path: str) -> None:
        """Before a name is taken from a file: keep what it holds, since a cut may bring it back."""
        node = self._names.get(path)
        if node is not None and not node.is_directory and os.path.exists(path):
            node.content = _read_path(path)

    def wrote(self, node: Node, offset: int, length: int) -> None:
        """By a call."""
        if not node.by_calls:
            node.by_calls = True
        first, last = offset // PAGE, (offset + max(length, 1) - 1) // PAGE
        node.dirty.update(range(first, last + 1))
        for page in range(first, last + 1):
            node.lost.pop(page, None)

    def stored(self, node: Node, places: Sequence[int]) -> None:
        """Through a mapping, byte by byte: what a failed sync dropped there is dirty again, whatever it holds."""
        if places:
            for page in range(min(places[0], places[-1]) // PAGE, max(places[0], places[-1]) // PAGE + 1):
                node.lost.pop(page, None)

    def synced(self, node: Node, descriptor: int) -> None:
        """It is durable as it is now."""
        if node.is_directory:
            self._commit()
            return
        size = REAL.fstat(descriptor).st_size
        if node.is_fresh or size != node.durable_bytes:
            self._commit()
            node.is_fresh = False
        node.durable_bytes = size
        if node.by_calls:
            for page in node.dirty:
                node.durable[page] = REAL.pread(descriptor, PAGE, page * PAGE)
            node.dirty.clear()
            return
        _, stretches = _read_stretches(f"/proc/self/fd/{descriptor}")  # it may be open for writing alone
        if not node.lost:
            node.is_now(stretches)
            return
        found, before = _pages_of(stretches), node.durable
        for page, dropped in node.lost.items():
            if found.get(page) == dropped:  # not written since: nobody will write it out
                found[page] = before.get(page, b"")
        node.pages = found

    def sync_failed(self, node: Node, descriptor: int) -> None:
        """A sync failed: the kernel takes what was dirty for clean, and never writes it."""
        if node.is_directory:
            return
        if node.by_calls:
            node.dirty.clear()
            return
        _, now = _read_path(f"/proc/self/fd/{descriptor}")
        node.lost.update({page: data for page, data in now.items() if node.durable.get(page) != data})

    # --- power ---

    def cut(self) -> None:
        """Leave what a disk may hold after the power went."""
        draw = self._randomness
        kept = draw.randint(0, len(self._journal)) if self._journal else 0
        names = dict(self._durable_names)
        for path, node in self._journal[:kept]:
            if node is None:
                names.pop(path, None)
            else:
                names[path] = node
        contents = {path: self._left_of(path, node) for path, node in sorted(names.items()) if not node.is_directory}
        shutil.rmtree(self.root)
        self.root.mkdir()
        self._nodes, self._names, self._durable_names, self._journal = {}, {}, {}, []
        for path, node in sorted(names.items()):
            if node.is_directory:
                Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, (size, pages) in contents.items():
            self.put(Path(path), size, pages)
        for path, node in names.items():
            if node.is_directory and os.path.isdir(path):
                fresh = Node(REAL.stat(path).st_ino, is_directory=True, is_fresh=False)
                self._names[path] = self._durable_names[path] = fresh

    def put(self, path: Path, size: int, pages: Pages) -> None:
        """Have a file there, durably, as if it had always been."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = REAL.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            REAL.ftruncate(descriptor, size)
            for at, data in _runs_of(pages):
                if at < size:
                    REAL.pwrite(descriptor, data[: size - at], at)
            inode = REAL.fstat(descriptor).st_ino
        finally:
            REAL.close(descriptor)
        node = Node(inode, dict(pages), size, is_fresh=False)
        self._nodes[inode] = node
        self._names[str(path)] = self._durable_names[str(path)] = node

    def adopt(self) -> None:
        """What lies below the root now is durable."""
        for path in sorted(self.root.rglob("*")):
            if path.is_dir():
                node = Node(REAL.stat(path).st_ino, is_directory=True, is_fresh=False)
                self._names[str(path)] = self._durable_names[str(path)] = node
            elif path.is_file():
                size, pages = _read_path(str(path))
                node = Node(REAL.stat(path).st_ino, pages, size, is_fresh=False)
                self._nodes[node.number] = node
                self._names[str(path)] = self._durable_names[str(path)] = node

    def _left_of(self, path: str, node: Node) -> tuple[int, Pages]:
        now_bytes, now = self._now(path, node)
        draw = self._randomness
        size = now_bytes
        if now_bytes != node.durable_bytes:
            size = draw.choice((now_bytes, node.durable_bytes))
        luck = draw.choice((0.0, 0.2, 0.8, 1.0))  # how much the kernel had written by itself
        left: Pages = {}
        for page in sorted(now.keys() | node.durable.keys()):
            old, new = node.durable.get(page, b"").ljust(PAGE, b"\0"), now.get(page, b"").ljust(PAGE, b"\0")
            if old == new or draw.random() >= luck or page in node.lost:
                left[page] = old
            elif draw.random() < 0.1:
                left[page] = _torn(old, new, draw)
            else:
                left[page] = new
        return size, left

    def _now(self, path: str, node: Node) -> tuple[int, Pages]:
        for name, named in self._names.items():
            if named is node and os.path.exists(name):
                return _read_path(name)
        return node.content if node.content is not None else (node.durable_bytes, node.durable)

    def _name(self, path: str, node: Node | None) -> None:
        if node is None:
            self._names.pop(path, None)
        else:
            self._names[path] = node
        self._journal.append((path, node))

    def _commit(self) -> None:
        for path, node in self._journal:
            if node is None:
                self._durable_names.pop(path, None)
            else:
                self._durable_names[path] = node
        self._journal.clear()


def _torn(old: bytes, new: bytes, draw: random.Random) -> bytes:
    sectors = [(new if draw.random() < 0.5 else old)[at : at + SECTOR] for at in range(0, PAGE, SECTOR)]
    return b"".join(sectors)


def _read_path(path: str) -> tuple[int, Pages]:
    size, stretches = _read_stretches(path)
    return size, _pages_of(stretches)


def _read_stretches(path: str) -> tuple[int, Stretches]:
    descriptor = REAL.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = REAL.fstat(descriptor).st_size
        return size, [(start, REAL.pread(descriptor, end - start, start)) for start, end in _edges(descriptor, size)]
    finally:
        REAL.close(descriptor)


def _pages_of(stretches: Stretches) -> Pages:
    return {(start + at) // PAGE: data[at : at + PAGE] for start, data in stretches for at in range(0, len(data), PAGE)}


def _runs_of(pages: Pages) -> Stretches:
    """The pages that are not zeros, joined where they follow each other."""
    runs: list[tuple[int, list[bytes]]] = []
    following = -1
    for page in sorted(pages):
        data = pages[page]
        if data.count(0) == len(data):
            continue
        if page != following:
            runs.append((page * PAGE, []))
        runs[-1][1].append(data.ljust(PAGE, b"\0"))
        following = page + 1
    return [(at, b"".join(parts)) for at, parts in runs]


def _edges(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the parts of a file that are no holes begin and end, in whole pages."""
    at = 0
    while at < size:
        try:
            start = REAL.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        at = REAL.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, at

"""The files of an ext4 image, read out of it without mounting and without writing any of them down.

`debugfs` walks the image's own directories and inodes, so what is found is what a kernel would find; the bytes are then
read where the inodes say. Comparing a whole image's files with a directory's takes a second that way, which extracting
them would not.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicar.errors import CorruptionError, PermanentError
from simulator.e2fsprogs import BLOCK_BYTES, TOOL_SECONDS, tool

#: `ls -p` prints /inode/mode/uid/gid/name/size/.
_ENTRY: Final = re.compile(r"^/(\d+)/(\d+)/\d+/\d+/(.*)/(\d*)/$")
#: `stat` prints, below EXTENTS:, (ETB0):33794, (0-3):1234-1237, (4[u]):99 ...
_EXTENT: Final = re.compile(r"\((\d+)(?:-(\d+))?(\[u\])?\):(\d+)")
_SIZE: Final = re.compile(r"\bSize: (\d+)")
#: debugfs echoes each command of a file behind this.
_PROMPT: Final = "debugfs: "
_MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks of a file that lie together: bytes from the file's start, bytes from the disk's, and how many."""

    inside: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Inode:
    """A plain file: its size and where its bytes lie. What no piece covers, or an unwritten one does, is zeros."""

    size: int
    pieces: tuple[Piece, ...]

    def content(self, descriptor: int) -> bytes:
        """The file's bytes, from an open image."""
        data = bytearray(self.size)
        for piece in self.pieces:
            count = min(piece.length, self.size - piece.inside)
            if count > 0:
                data[piece.inside : piece.inside + count] = os.pread(descriptor, count, piece.offset)
        return bytes(data)


def files_below(image: Path, directory: str) -> dict[str, Inode]:
    """All plain files below a directory of the image, by their path from its root (without a leading slash).

    Raises:
        CorruptionError: the directory is not there, or what lies in it makes no sense.
    """
    found: dict[str, int] = {}
    level = [directory]
    for _ in range(_MAX_DEPTH):
        if not level:
            break
        deeper: list[str] = []
        for parent, lines in zip(level, _ask(image, [f'ls -p "/{name}"' for name in level]), strict=True):
            for number, mode, name in _entries(image, parent, lines):
                if stat.S_ISDIR(mode):
                    deeper.append(f"{parent}/{name}")
                elif stat.S_ISREG(mode):
                    found[f"{parent}/{name}"] = number
        level = deeper
    answers = _ask(image, [f"stat <{number}>" for number in found.values()])
    return {name: _inode(image, name, lines) for name, lines in zip(found, answers, strict=True)}


def differing_files(image: Path, source: Path, directory: str) -> tuple[int, list[str]]:
    """Compare an image's files below a directory with those of `source`.

    Returns:
        How many files there are, and the sorted paths of those that differ or are in one place only.
    """
    theirs = files_below(image, directory)
    ours = {str(path.relative_to(source)): path for path in (source / directory).rglob("*") if path.is_file()}
    unequal = set(ours) ^ set(theirs)
    descriptor = os.open(image, os.O_RDONLY)
    try:
        for name in set(ours) & set(theirs):
            if ours[name].read_bytes() != theirs[name].content(descriptor):
                unequal.add(name)
    finally:
        os.close(descriptor)
    return len(theirs), sorted(unequal)


def _entries(image: Path, parent: str, lines: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Inode, mode and name of what is in a directory."""
    entries = [match for match in map(_ENTRY.match, lines) if match is not None]
    if not entries:
        raise CorruptionError(f"{image} has no directory {parent}: {' '.join(lines)[:200]}", path=parent)
    for entry in entries:
        if entry[3] not in (".", ".."):
            yield int(entry[1]), int(entry[2], 8), entry[3]


def _inode(image: Path, name: str, lines: Sequence[str]) -> Inode:
    text = "\n".join(lines)
    size = _SIZE.search(text)
    if size is None:
        raise CorruptionError(f"{image} has no inode for {name}: {text[:200]}", path=name)
    pieces = []
    for first, last, unwritten, block in _EXTENT.findall(text.partition("EXTENTS:")[2]):
        if not unwritten:
            count = int(last or first) - int(first) + 1
            pieces.append(Piece(int(first) * BLOCK_BYTES, int(block) * BLOCK_BYTES, count * BLOCK_BYTES))
    return Inode(int(size[1]), tuple(pieces))


def _ask(image: Path, commands: Sequence[str]) -> list[list[str]]:
    """Have one debugfs carry out commands; the lines that each printed."""
    ran = subprocess.run(
        [tool("debugfs"), "-f", "-", str(image)],
        input="".join(f"{command}\n" for command in commands),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TOOL_SECONDS,
        check=False,
    )
    answers: list[list[str]] = []
    for line in ran.stdout.splitlines():
        if line.startswith(_PROMPT):
            answers.append([])
        elif answers:
            answers[-1].append(line)
    if len(answers) != len(commands):
        raise PermanentError(f"debugfs did not answer on {image}: {ran.stderr.strip()[-500:]}", path=str(image))
    return answers

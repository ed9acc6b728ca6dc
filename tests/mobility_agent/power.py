"""A layer under the agent's files that forgets what was not flushed, for power cuts.

While it is entered, every fsync and fdatasync of a regular file keeps a copy of what the file held when the call began:
that much is durable. `cut` then makes a directory as a disk might be found after the power went: of every page that
changed since, either the old or the new version, at random.

What it does not play: names. Files that were made, renamed or removed are so durably (the agent syncs its directories).
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

_PAGE = 4096


class Power:
    """See the module. `directory` and everything below it is what loses its memory."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._durable: dict[int, bytes] = {}  # by inode
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._keeping(getattr(os, name)))

    def cut(self, target: Path, draw: random.Random) -> None:
        """Make `target` what is left of the directory."""
        for path in sorted(self._directory.rglob("*")):
            copy = target / path.relative_to(self._directory)
            if path.is_dir():
                copy.mkdir(parents=True, exist_ok=True)
            elif path.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                now = path.read_bytes()
                copy.write_bytes(self._left_of(now, self._durable.get(path.stat().st_ino, b""), draw))

    def _left_of(self, now: bytes, durable: bytes, draw: random.Random) -> bytes:
        durable = durable[: len(now)].ljust(len(now), b"\0")
        if now == durable:
            return now
        luck = draw.choice((0.0, 0.2, 0.8, 1.0))  # how much of what was not flushed the kernel had written by itself
        left = bytearray(durable)
        for start in range(0, len(now), _PAGE):
            page = now[start : start + _PAGE]
            if page != durable[start : start + _PAGE] and draw.random() < luck:
                left[start : start + _PAGE] = page
        return bytes(left)

    def _keeping(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def keep(fd: int) -> None:
            status = os.fstat(fd)
            content = os.pread(fd, status.st_size, 0) if stat.S_ISREG(status.st_mode) else None
            sync(fd)
            if content is not None:
                self._durable[status.st_ino] = content

        return keep

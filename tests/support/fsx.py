"""A file under everything that programs do to one, checked against a model all the while.

After the idea of Apple's `fsx`: writes, truncations, mapped writes, holes, zeroed ranges, flushes and reopenings at
random places; every read, plain or mapped, has to give what the model has. It ends at SIGTERM after a last look at the
whole file: status 0 if the file was right every time, 1 with what was wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

MOST_BYTES: Final = 4 << 20
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class WrongError(Exception):
    """The file is not what was written to it."""


class Exercise:
    """One file, its model, and what is done to both."""

    def __init__(self, path: Path, draw: random.Random) -> None:
        self._path, self._draw = path, draw
        self._model = bytearray()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._count = 0

    def step(self) -> None:
        """Do one thing, most often a write or a read."""
        self._count += 1
        what = self._draw.choices(
            (self._write, self._look, self._map, self._truncate, self._punch, self._flush, self._reopen),
            (30, 20, 15, 10, 10, 5, 5),
        )[0]
        what()

    def look_at_all(self) -> None:
        self._expect(0, len(self._model))
        if os.fstat(self._fd).st_size != len(self._model):
            raise WrongError(
                f"after {self._count} steps its size is {os.fstat(self._fd).st_size}, not {len(self._model)}"
            )

    def _range(self, most: int) -> tuple[int, int]:
        offset = self._draw.randrange(most)
        return offset, self._draw.randrange(1, min(256 << 10, most - offset) + 1)

    def _write(self) -> None:
        offset, length = self._range(MOST_BYTES)
        data = self._draw.randbytes(length)
        self._model.extend(bytes(max(offset + length - len(self._model), 0)))
        self._model[offset : offset + length] = data
        while data:
            done = os.pwrite(self._fd, data, offset)
            data, offset = data[done:], offset + done

    def _look(self) -> None:
        if self._model:
            self._expect(*self._range(len(self._model)))

    def _map(self) -> None:
        if not self._model:
            return
        offset, length = self._range(len(self._model))
        with mmap.mmap(self._fd, len(self._model)) as mapped:
            if mapped[offset : offset + length] != self._model[offset : offset + length]:
                raise WrongError(
                    f"after {self._count} steps {length} mapped bytes at {offset} are not what was written"
                )
            data = self._draw.randbytes(length)
            mapped[offset : offset + length] = self._model[offset : offset + length] = data
            if self._draw.random() < 0.3:
                mapped.flush()

    def _truncate(self) -> None:
        size = self._draw.randrange(MOST_BYTES)
        os.ftruncate(self._fd, size)
        del self._model[size:]
        self._model.extend(bytes(size - len(self._model)))

    def _punch(self) -> None:
        if not self._model:
            return
        offset, length = self._range(len(self._model))
        mode = _KEEP_SIZE | self._draw.choice((_PUNCH_HOLE, _ZERO_RANGE))
        if _libc.fallocate(self._fd, mode, offset, length) != 0:
            raise WrongError(f"a hole can't be made: {os.strerror(ctypes.get_errno())}")
        self._model[offset : offset + length] = bytes(length)

    def _flush(self) -> None:
        os.fsync(self._fd)

    def _reopen(self) -> None:
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR)

    def _expect(self, offset: int, length: int) -> None:
        if os.pread(self._fd, length, offset) != self._model[offset : offset + length]:
            raise WrongError(f"after {self._count} steps {length} bytes at {offset} are not what was written")


@contextmanager
def exercised(path: Path, seed: int) -> Iterator[None]:
    """The exercise at work on `path`, in a process of its own, while the block runs; in the end it was right all the
    time."""
    command = [sys.executable, __file__, str(path), str(seed)]
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield
        assert process.poll() is None, process.communicate()[0]
        process.terminate()
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="exercise a file, and check it")
    parser.add_argument("path", type=Path)
    parser.add_argument("seed", type=int)
    given = parser.parse_args()
    stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    exercise = Exercise(given.path, random.Random(given.seed))
    try:
        while not stopping:
            exercise.step()
        exercise.look_at_all()
    except WrongError as wrong:
        print(wrong)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

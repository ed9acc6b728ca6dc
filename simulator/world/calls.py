"""The operating system's calls as the processes of the world see them.

While `installed`, the functions of `os`, `mmap` and `random` by which the product reaches files and entropy stand for
the simulator's: each first lets the process die if it is to, then the machine's disk fail if it is to, then does what
was asked for on real files in memory, and tells the machine's `FileSystem`. Code that runs in no process (the
simulator's own, other threads) gets the operating system itself.

What differs from a real machine: O_DIRECT is left away, preallocated space is a hole (so that only what is used takes
memory, and can be seen to), and `os.urandom` follows from the seed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mobility_agent.capture import disk as capture_disk
from simulator.world.files import REAL, FileSystem, Node
from simulator.world.processes import Process, current
from simulator.world.replaced import replaced


class Device:
    """How a machine's disk behaves; a fault's place to stand. The default does nothing.

    `before` may raise what a call fails with; `after_write` sees what was written where.
    """

    def before(self, call: str, path: str, offset: int, length: int) -> None:
        """A call is about to be done on a file."""

    def moved(self, path: str, offset: int) -> int:
        """Where a write really goes."""
        return offset


class _File:
    __slots__ = ("node", "path", "process")

    def __init__(self, node: Node, path: str, process: Process) -> None:
        self.node, self.path, self.process = node, path, process


class Calls:
    """The table of open files, and the functions that stand for the operating system's.

    Args:
        randomness: what `urandom` gives.
    """

    def __init__(self, randomness: random.Random) -> None:
        self.devices: dict[str, Device] = {}  # by machine
        self._randomness = randomness
        self._files: dict[int, _File] = {}
        self.count = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand for the operating system until the block ends."""
        names = (
            *("open", "close", "dup", "fdopen", "pread", "preadv", "pwrite", "pwritev", "fsync", "fdatasync"),
            *("ftruncate", "posix_fallocate", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "urandom"),
        )
        with replaced(
            *((os, name, getattr(self, name)) for name in names),
            (random, "_urandom", self.urandom),
            (mmap, "mmap", _mapping(self)),
            (capture_disk, "_libc", _Libc(self)),
        ):
            yield
        self._files.clear()

    # --- opening and closing ---

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        process = current()
        name = os.fspath(path)
        if process is None or dir_fd is not None or not isinstance(name, str) or not _inside(process, name):
            if process is not None:
                process.call()
            return int(REAL.open(path, flags, mode, dir_fd=dir_fd))
        process.call()
        self._before(process, "open", name, 0, 1 if flags & os.O_CREAT and not os.path.exists(name) else 0)
        descriptor: int = REAL.open(path, flags & ~getattr(os, "O_DIRECT", 0), mode)
        node = process.machine.files.opened(name, descriptor)
        node.is_directory = bool(flags & os.O_DIRECTORY) or node.is_directory
        self._files[descriptor] = _File(node, name, process)
        process.descriptors.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        process = current()
        if process is None:
            REAL.close(descriptor)
            return
        process.call()
        self._forget(descriptor)
        REAL.close(descriptor)

    def dup(self, descriptor: int) -> int:
        process = current()
        made: int = REAL.dup(descriptor)
        file = self._files.get(descriptor)
        if process is not None and file is not None:
            self._files[made] = _File(file.node, file.path, process)
            process.descriptors.add(made)
        return made

    def fdopen(self, descriptor: int, *args: Any, **options: Any) -> Any:
        """The file object closes it; a process that dies meanwhile leaves that to the object's end."""
        process = current()
        if process is not None:
            process.call()
            process.descriptors.discard(descriptor)
        return REAL.fdopen(descriptor, *args, **options)

    # --- content ---

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        self._reach(descriptor, "read", offset, length)
        data: bytes = REAL.pread(descriptor, length, offset)
        return data

    def preadv(self, descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        self._reach(descriptor, "read", offset, sum(len(each) for each in buffers))
        return int(REAL.preadv(descriptor, buffers, offset, flags))

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        return self.pwritev(descriptor, [data], offset)

    def pwritev(self, descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        length = sum(len(each) for each in buffers)
        file = self._reach(descriptor, "write", offset, length)
        if file is None:
            return int(REAL.pwritev(descriptor, buffers, offset, flags))
        device = self.devices.get(file.process.machine.name)
        place = offset if device is None else device.moved(file.path, offset)
        done = int(REAL.pwritev(descriptor, buffers, place, flags))
        file.process.machine.files.wrote(file.node, place, done)
        _done()
        return done

    def punch(self, descriptor: int, offset: int, length: int) -> None:
        """Make a hole."""
        file = self._reach(descriptor, "write", offset, length)
        end = min(offset + length, REAL.fstat(descriptor).st_size)
        at = offset
        while at < end:
            at += REAL.pwrite(descriptor, bytes(min(1 << 20, end - at)), at)
        if file is not None:
            file.process.machine.files.wrote(file.node, offset, length)

    def ftruncate(self, descriptor: int, length: int) -> None:
        self._reach(descriptor, "allocate", 0, length)
        REAL.ftruncate(descriptor, length)

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        file = self._reach(descriptor, "allocate", offset, length)
        if file is None:
            REAL.posix_fallocate(descriptor, offset, length)
        elif REAL.fstat(descriptor).st_size < offset + length:
            REAL.ftruncate(descriptor, offset + length)

    def fsync(self, descriptor: int) -> None:
        self._sync(descriptor)

    def fdatasync(self, descriptor: int) -> None:
        self._sync(descriptor)

    # --- names ---

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        files = self._named("rename", source)
        if files is None:
            REAL.replace(source, target, **options)
            return
        files.going(os.fspath(target))
        REAL.replace(source, target, **options)
        files.renamed(os.fspath(source), os.fspath(target))
        _done()

    def rename(self, source: Any, target: Any, **options: Any) -> None:
        self.replace(source, target, **options)

    def unlink(self, path: Any, **options: Any) -> None:
        files = None if options.get("dir_fd") is not None else self._named("unlink", path)
        if files is None:
            REAL.unlink(path, **options)
            return
        files.going(os.fspath(path))
        REAL.unlink(path)
        files.removed(os.fspath(path))

    def remove(self, path: Any, **options: Any) -> None:
        self.unlink(path, **options)

    def mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        files = self._named("mkdir", path)
        REAL.mkdir(path, mode, **options)
        if files is not None:
            files.made_directory(os.fspath(path))

    def rmdir(self, path: Any, **options: Any) -> None:
        files = self._named("rmdir", path)
        REAL.rmdir(path, **options)
        if files is not None:
            files.removed(os.fspath(path))

    def urandom(self, count: int) -> bytes:
        return self._randomness.randbytes(count) if current() is not None else REAL.urandom(count)

    # --- below ---

    def sync_mapped(self, file: _File) -> None:
        """A mapping is flushed, as `fsync` does it; of a file without a name nothing would be left anyway."""
        if not os.path.exists(file.path):
            return
        descriptor = REAL.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if REAL.fstat(descriptor).st_ino == file.node.number:
                self._sync_file(file, descriptor)
        finally:
            REAL.close(descriptor)

    def file(self, descriptor: int) -> _File | None:
        return self._files.get(descriptor)

    def _sync(self, descriptor: int) -> None:
        file = self._files.get(descriptor)
        process = current()
        if process is not None:
            process.call()
            self.count += 1
        if file is None:
            REAL.fsync(descriptor)
            return
        self._sync_file(file, descriptor)

    def _sync_file(self, file: _File, descriptor: int) -> None:
        files = file.process.machine.files
        try:
            self._before(file.process, "sync", file.path, 0, 0)
        except OSError:
            files.sync_failed(file.node, descriptor)
            raise
        files.synced(file.node, descriptor)
        _done()

    def _reach(self, descriptor: int, call: str, offset: int, length: int) -> _File | None:
        process = current()
        if process is None:
            return None
        process.call()
        self.count += 1
        file = self._files.get(descriptor)
        if file is not None:
            self._before(process, call, file.path, offset, length)
        return file

    def _named(self, call: str, path: Any) -> FileSystem | None:
        process = current()
        if process is None:
            return None
        process.call()
        self.count += 1
        name = os.fspath(path)
        if not isinstance(name, str) or not _inside(process, name):
            return None
        self._before(process, call, name, 0, 0)
        return process.machine.files

    def _before(self, process: Process, call: str, path: str, offset: int, length: int) -> None:
        device = self.devices.get(process.machine.name)
        if device is not None:
            device.before(call, path, offset, length)

    def _forget(self, descriptor: int) -> None:
        file = self._files.pop(descriptor, None)
        if file is not None:
            file.process.descriptors.discard(descriptor)


class _Libc:
    """`fallocate` for punching holes, as `mobility_agent.capture.disk` calls it."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> int:
        try:
            self._calls.punch(descriptor, offset, length)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return 0


def _mapping(calls: Calls) -> type[mmap.mmap]:
    real = mmap.mmap

    class Mapping(real):  # type: ignore[valid-type, misc]
        """A mapping whose `flush` makes durable, as msync does, and whose stores dirty pages, whatever they store.

        What is stored through a buffer of it (a memoryview, an array) shows only where bytes change.
        """

        def __new__(cls, descriptor: int, length: int, *args: Any, **options: Any) -> Any:
            made = super().__new__(cls, descriptor, length, *args, **options)
            file = calls.file(descriptor) if descriptor >= 0 else None
            if file is not None and current() is not None:
                made.of = file
                made.length = length
            return made

        def flush(self, *args: int) -> None:
            file: _File | None = getattr(self, "of", None)
            if file is None or current() is None:
                super().flush(*args)
                return
            file.process.call()
            calls.sync_mapped(file)

        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            file: _File | None = getattr(self, "of", None)
            if file is not None and file.node.lost:
                places = range(*key.indices(len(self))) if isinstance(key, slice) else (key % len(self),)
                file.process.machine.files.stored(file.node, places)

    Mapping.__name__ = "mmap"
    return Mapping


def _done() -> None:
    process = current()
    if process is not None:
        process.called()


def _inside(process: Process, path: str) -> bool:
    return path.startswith(f"{process.machine.directory}/")

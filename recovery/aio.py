"""Many writes to a file in one system call: Linux AIO, by io_submit(2).

A disk comes back in pieces as small as its writes once were, and a call for every piece gives the interpreter's lock
away and asks for it again: two threads that do so thousands of times a second wait for each other half of the time.
Here a batch of writes costs the lock once. For files in the page cache the kernel does the writes while they are
submitted, one after the other, so this is nothing but a loop on the other side of the system call.

Weak: the C library has no such functions, so the system calls go by number, known here for two architectures; and a
container may be refused them, or the machine's `fs.aio-max-nr` be used up. Who gets no context writes by pwrite.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np

from recovery.extents import Ints

#: Writes handed to the kernel at once.
MOST_WRITES: Final = 1024
#: io_setup, io_getevents, io_submit; by the machine.
_CALLS: Final = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}
_PWRITE: Final = 1
#: struct iocb and struct io_event of linux/aio_abi.h, as little-endian machines have them.
_BLOCK: Final = np.dtype(
    [
        *(("data", "<u8"), ("key", "<u4"), ("rw_flags", "<u4"), ("opcode", "<u2"), ("priority", "<i2")),
        *(("descriptor", "<u4"), ("address", "<u8"), ("length", "<u8"), ("offset", "<i8"), ("reserved", "<u8")),
        *(("flags", "<u4"), ("event_descriptor", "<u4")),
    ]
)
_EVENT: Final = np.dtype([("data", "<u8"), ("block", "<u8"), ("result", "<i8"), ("result2", "<i8")])
#: Calls that give the interpreter's lock away, and for those that never wait, calls that keep it.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_quick: Final[ctypes.CDLL] = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = _quick.syscall.restype = ctypes.c_long
_NO_TIME: Final = (ctypes.c_long * 2)(0, 0)  # a struct timespec
Blocks = np.ndarray[Any, Any]


#: Contexts that nobody uses now. The kernel takes 30 ms to take one back, so they are kept for the process's life.
_free: Final[list[WriteContext]] = []


@contextmanager
def write_context() -> Iterator[WriteContext | None]:
    """A context for whoever has many writes to do; None if the kernel, or this product on this machine, has none."""
    try:
        context = _context()
    except OSError:  # no such system call here, none allowed, or none left
        yield None
        return
    try:
        yield context
    finally:
        if not context.is_used:
            _free.append(context)


def _context() -> WriteContext:
    try:
        return _free.pop()
    except IndexError:
        return WriteContext()


def described(descriptor: int, address: Ints, length: Ints, offset: Ints) -> Blocks:
    """A row for every write of so many bytes of memory at `address` to `offset` of a file."""
    blocks = np.zeros(len(address), _BLOCK)
    blocks["data"] = np.arange(len(address))
    blocks["opcode"], blocks["descriptor"] = _PWRITE, descriptor
    blocks["address"], blocks["length"], blocks["offset"] = address, length, offset
    return blocks


class WriteContext:
    """A context of the kernel for up to MOST_WRITES writes at once; for one thread at a time.

    Raises:
        OSError: there is none to be had.
    """

    def __init__(self) -> None:
        calls = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
        if calls is None or ctypes.sizeof(ctypes.c_long) != _EVENT["result"].itemsize:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        setup, self._collect, self._submit = calls
        self.is_used = False  # still true after a `write`: it failed, and nobody knows what is under way
        self._events: np.ndarray[Any, Any] = np.zeros(MOST_WRITES, _EVENT)
        self._context = ctypes.c_ulong(0)
        _checked(_libc.syscall(ctypes.c_long(setup), ctypes.c_long(MOST_WRITES), ctypes.byref(self._context)))

    def write(self, blocks: Blocks) -> Ints:
        """Do some writes of those that were `described` together, at most MOST_WRITES that follow each other. Their
        memory must stay until this returns.

        Returns:
            For every row the bytes that were written, fewer than asked for being possible; or an error as a negative
            number; or 0 where the kernel did not come to it.

        Raises:
            OSError: it can't be told what became of them, of these or of some before.
        """
        if self.is_used:
            raise OSError(errno.EBUSY, "writes of before are still under way")
        results = np.zeros(len(blocks), np.int64)
        pointers = np.arange(len(blocks), dtype=np.uint64) * _BLOCK.itemsize + address_of(blocks)
        count, where = ctypes.c_long(len(blocks)), ctypes.c_void_p(address_of(pointers))
        self.is_used = True
        submitted = int(_libc.syscall(ctypes.c_long(self._submit), self._context, count, where))
        if submitted < 0:
            results[:], submitted = -ctypes.get_errno(), 0
        library, least = _quick, 0
        while submitted:
            done = self._collected(library, submitted, least)
            results[self._events["data"][:done] - blocks["data"][0]] = self._events["result"][:done]
            submitted -= done
            library, least = _libc, submitted  # what is not done yet is waited for
        self.is_used = False
        return results

    def _collected(self, library: ctypes.CDLL, most: int, least: int) -> int:
        """Collect results, waiting for so many; how many there are."""
        events = ctypes.c_void_p(address_of(self._events))
        numbers = (ctypes.c_long(least), ctypes.c_long(most))
        timeout = None if least else ctypes.byref(_NO_TIME)
        while True:
            with suppress(InterruptedError):
                return _checked(library.syscall(ctypes.c_long(self._collect), self._context, *numbers, events, timeout))


def address_of(data: memoryview | np.ndarray[Any, Any]) -> int:
    """Where it lies in memory."""
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    return int(array.__array_interface__["data"][0])


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)

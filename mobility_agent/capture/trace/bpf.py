"""eBPF from pure Python: a small assembler, and bpf(2) and perf_event_open(2) through ctypes. No compiler, no libbpf.

What is needed here is little: programs of some forty instructions on tracepoints, a hash map to choose devices by, a
ring buffer to read records from. Everything is a file descriptor of this process and nothing is pinned, so the kernel
takes it all away with the process, however that ends.

The instruction set and the calls are those of the kernel's Documentation/bpf and include/uapi/linux/bpf.h, whose names
are used here. A program that the verifier refuses raises with the end of the verifier's log.

Weak: system call numbers are known for x86-64 and ARM64 only; elsewhere `supported` is false and tracefs is used.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import struct
import threading
from contextlib import suppress
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from replicar.errors import PermanentError

_NUMBERS: Final = {"x86_64": (321, 298), "aarch64": (280, 241)}  # bpf, perf_event_open
_MAP_CREATE, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _OBJ_GET_INFO = 0, 2, 3, 5, 15
_MAP_HASH, _MAP_ARRAY, _MAP_RINGBUF = 1, 2, 27
_MMAPABLE: Final = 1 << 10
_PROG_TRACEPOINT: Final = 5
_ATTR_BYTES: Final = 144
_PERF_ATTR_BYTES: Final = 112
_PERF_TYPE_TRACEPOINT: Final = 2
_PERF_FLAG_CLOEXEC: Final = 8
_PERF_IOC_ENABLE, _PERF_IOC_SET_BPF = 0x2400, 0x40042408
_LOG_BYTES: Final = 1 << 20
_MAX_RECURSION_OFFSET: Final = 208  # of recursion_misses in struct bpf_prog_info (Linux 5.12)
#: A program's name as the kernel's lists show it: this, then the number of the process that loaded it.
NAME: Final = "replicar"
_NAME_BYTES: Final = 16  # BPF_OBJ_NAME_LEN, the final zero counted
#: A record's header in a ring: length with a busy bit on top, page offset.
RING_HEADER_BYTES: Final = 8
_BUSY: Final = 1 << 31

HELPER_LOOKUP, HELPER_KTIME, HELPER_RESERVE, HELPER_SUBMIT = 1, 5, 131, 132
NO_WAKEUP: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    """Whether the system calls' numbers are known for this machine."""
    return platform.machine() in _NUMBERS


class Assembler:
    """Instructions of one program; jumps name labels, which may come later.

    Registers are numbers 0 to 10 (10: the frame pointer), sizes are bytes (1, 2, 4, 8).
    """

    _LOAD: Final = {1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}
    _STORE: Final = {1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}

    def __init__(self) -> None:
        self._code: list[bytes] = []
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, int, int, int, str]] = []

    def load(self, size: int, target: int, source: int, offset: int) -> None:
        """target = *(source + offset)"""
        self._add(self._LOAD[size], target, source, offset)

    def store(self, size: int, target: int, offset: int, source: int) -> None:
        """*(target + offset) = source"""
        self._add(self._STORE[size], target, source, offset)

    def store_number(self, size: int, target: int, offset: int, number: int) -> None:
        self._add(self._STORE[size] - 1, target, 0, offset, number)

    def copy(self, target: int, source: int) -> None:
        self._add(0xBF, target, source)

    def number(self, target: int, number: int) -> None:
        self._add(0xB7, target, 0, 0, number)

    def add_number(self, target: int, number: int) -> None:
        self._add(0x07, target, 0, 0, number)

    def add_atomically(self, target: int, source: int) -> None:
        """*(u64 *)target += source"""
        self._add(0xDB, target, source)

    def map(self, target: int, descriptor: int) -> None:
        self._add(0x18, target, 1, 0, descriptor)
        self._add(0)

    def call(self, helper: int) -> None:
        self._add(0x85, 0, 0, 0, helper)

    def jump(self, label: str) -> None:
        self._jump(0x05, 0, 0, label)

    def jump_if_equal(self, register: int, number: int, label: str) -> None:
        self._jump(0x15, register, number, label)

    def jump_unless_equal(self, register: int, number: int, label: str) -> None:
        self._jump(0x55, register, number, label)

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def exit(self) -> None:
        self._add(0x95)

    def code(self) -> bytes:
        for place, code, register, number, label in self._jumps:
            self._code[place] = _instruction(code, register, 0, self._labels[label] - place - 1, number)
        return b"".join(self._code)

    def _add(self, code: int, target: int = 0, source: int = 0, offset: int = 0, number: int = 0) -> None:
        self._code.append(_instruction(code, target, source, offset, number))

    def _jump(self, code: int, register: int, number: int, label: str) -> None:
        self._jumps.append((len(self._code), code, register, number, label))
        self._code.append(b"")


class Descriptor:
    """A kernel object of this process; `close` gives it back."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class NumberSet(Descriptor):
    """A set of 32-bit numbers that programs look up (a hash map), changed while they run."""

    def __init__(self, capacity: int) -> None:
        super().__init__(_create_map(_MAP_HASH, 4, 4, capacity))

    def add(self, number: int) -> None:
        key, value = ctypes.c_uint32(number), ctypes.c_uint32(1)
        _bpf(_MAP_UPDATE, struct.pack("<IxxxxQQQ", self.fd, ctypes.addressof(key), ctypes.addressof(value), 0))

    def remove(self, number: int) -> None:
        key = ctypes.c_uint32(number)
        with suppress(FileNotFoundError):
            _bpf(_MAP_DELETE, struct.pack("<IxxxxQ", self.fd, ctypes.addressof(key)))


class Counter(Descriptor):
    """One 64-bit number that programs add to and this process reads without a system call."""

    def __init__(self) -> None:
        super().__init__(_create_map(_MAP_ARRAY, 4, 8, 1, _MMAPABLE))
        self._page = mmap.mmap(self.fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)

    @property
    def value(self) -> int:
        return int(struct.unpack_from("<Q", self._page)[0])

    def close(self) -> None:
        self._page.close()
        super().close()


class Ring(Descriptor):
    """A ring buffer of records of one size, in the order in which programs reserved them.

    Args:
        size_bytes: a power of two, and whole pages.
        record: a numpy type whose first eight bytes are the kernel's header.
    """

    def __init__(self, size_bytes: int, record: np.dtype[Any]) -> None:
        super().__init__(_create_map(_MAP_RINGBUF, 0, 0, size_bytes))
        self.size_bytes = size_bytes
        self._record = record
        page = mmap.PAGESIZE
        self._own = mmap.mmap(self.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The data follows the producer's page, twice in a row, so that a run of records is never split.
        self._data = mmap.mmap(self.fd, page + 2 * size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumed = ctypes.c_uint64.from_buffer(self._own)
        self._fence = threading.Lock()

    def take(self) -> npt.NDArray[Any]:
        """Every record that is finished, up to the first that is not; they are copied and the room is given back."""
        consumed = self._consumed.value
        waiting = int(struct.unpack_from("<Q", self._data)[0]) - consumed
        if not waiting:
            return np.empty(0, self._record)
        size = self._record.itemsize
        begin = mmap.PAGESIZE + consumed % self.size_bytes
        heads = np.frombuffer(self._data, np.uint32, waiting // 4, begin)[:: size // 4].copy()
        with self._fence:  # what is read below must not be older than the heads (matters where loads are reordered)
            busy = np.flatnonzero(heads & _BUSY)
        count = int(busy[0]) if busy.size else len(heads)
        taken = np.frombuffer(self._data, self._record, count, begin).copy()
        self._consumed.value = consumed + count * size
        return taken

    def close(self) -> None:
        del self._consumed
        self._own.close()
        self._data.close()
        super().close()


class Probe:
    """A program that runs whenever a tracepoint is passed.

    Args:
        tracepoint: its number (`id` in tracefs).
        code: of an `Assembler`.

    Raises:
        PermanentError: the kernel refuses it; with the verifier's words.
        OSError: bpf(2) or perf_event_open(2) is not allowed here.
    """

    def __init__(self, tracepoint: int, code: bytes) -> None:
        self._program = Descriptor(_load(code))
        try:
            self._event = Descriptor(_open_tracepoint(tracepoint))
        except BaseException:
            self._program.close()
            raise
        try:
            fcntl.ioctl(self._event.fd, _PERF_IOC_SET_BPF, self._program.fd)
            fcntl.ioctl(self._event.fd, _PERF_IOC_ENABLE, 0)
        except BaseException:
            self.close()
            raise

    @property
    def missed(self) -> int:
        """How often the kernel did not run the program because another one was running on that processor."""
        info = ctypes.create_string_buffer(256)
        request = struct.pack("<IIQ", self._program.fd, len(info), ctypes.addressof(info))
        answer = _bpf(_OBJ_GET_INFO, request)
        if struct.unpack_from("<I", answer, 4)[0] < _MAX_RECURSION_OFFSET + 8:
            return 0  # a kernel that does not count them
        return int(struct.unpack_from("<Q", info, _MAX_RECURSION_OFFSET)[0])

    def close(self) -> None:
        self._event.close()
        self._program.close()


def _instruction(code: int, target: int, source: int, offset: int, number: int) -> bytes:
    return struct.pack("<BBhi", code, target | source << 4, offset, number)


def _bpf(command: int, attributes: bytes) -> bytes:
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    buffer = ctypes.create_string_buffer(attributes.ljust(_ATTR_BYTES, b"\0"), _ATTR_BYTES)
    result = _libc.syscall(numbers[0], command, buffer, _ATTR_BYTES)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return struct.pack("<I", result) if command in (_MAP_CREATE, _PROG_LOAD) else buffer.raw


def _create_map(kind: int, key: int, value: int, entries: int, flags: int = 0) -> int:
    attributes = struct.pack("<IIIII", kind, key, value, entries, flags)
    try:
        return int.from_bytes(_bpf(_MAP_CREATE, attributes), "little")
    except PermissionError:
        # Before Linux 5.11 maps count as locked memory, of which a process may have next to none.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return int.from_bytes(_bpf(_MAP_CREATE, attributes), "little")


def _load(code: bytes) -> int:
    instructions, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")

    def attempt(level: int, size: int, log: int) -> int:
        where = ctypes.addressof(instructions), ctypes.addressof(licence)
        name = f"{NAME}{os.getpid()}".encode()[: _NAME_BYTES - 1]
        sizes = _PROG_TRACEPOINT, len(code) // 8
        attributes = struct.pack(f"<IIQQIIQII{_NAME_BYTES}s", *sizes, *where, level, size, log, 0, 0, name)
        return int.from_bytes(_bpf(_PROG_LOAD, attributes), "little")

    try:
        return attempt(0, 0, 0)
    except OSError as error:
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return attempt(1, _LOG_BYTES, ctypes.addressof(log))
        except OSError:
            words = log.value.decode(errors="replace").strip()
        if not words:
            raise  # not the verifier: not allowed, or no memory
        raise PermanentError(
            f"the kernel's verifier refuses the capture program: {words[-1500:]}",
            hint="set the capture method to tracefs, and report this with the kernel's version",
            errno=error.errno,
        ) from None


def _open_tracepoint(tracepoint: int) -> int:
    attributes = struct.pack("<IIQQQ", _PERF_TYPE_TRACEPOINT, _PERF_ATTR_BYTES, tracepoint, 1, 0)
    buffer = ctypes.create_string_buffer(attributes.ljust(_PERF_ATTR_BYTES, b"\0"))
    # A program on a tracepoint runs on every processor, whichever one its event is opened on.
    fd = _libc.syscall(_NUMBERS[platform.machine()][1], buffer, -1, 0, -1, _PERF_FLAG_CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(fd)

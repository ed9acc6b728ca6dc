"""The block layer's events of chosen devices, as records: by eBPF, in the kernel's own order.

Four tracepoints, because each alone tells a part:

=============== ====== =================================================================================================
block_rq_issue    +    a request goes to the driver: from now on its bytes may change. Nothing changes without one
block_rq_requeue  -    the driver had no room; it will be issued again, so this issue does not count
block_rq_complete      its bytes are what they will be. One in some thousands goes missing where it interrupts another
                       program on its processor, which the kernel then does not start; so never relied on alone
block_bio_queue        discards only, and only where the device merges discards of separate places into one request:
                       that request's event names the first place alone
=============== ====== =================================================================================================

Sectors are of 512 bytes, and of the whole disk. Reads and empty flushes are left out in the kernel. A record that finds
the ring full is counted there (`lost`), and so is a program that could not run; both mean that the disk is compared in
full. That every record is there is checked against the kernel's own counters as well: see `counters`.

Weak: commands sent past the block layer (SG_IO, NVMe passthrough) are not seen by the kernel's events either.
"""

from __future__ import annotations

from contextlib import ExitStack
from enum import IntEnum
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from mobility_agent.capture.trace import bpf
from mobility_agent.capture.trace.bpf import Assembler
from mobility_agent.capture.trace.tracing import Tracepoint, tracepoint

#: 200,000 records: with issue and completion, a second of 100,000 writes/s in which nobody reads.
RING_BYTES: Final = 8 << 20
#: Whole disks and, where discards are followed, their partitions.
MAX_DEVICES: Final = 1024
#: The kernel's own form of a device number, which is not that of `os.makedev`.
_MINOR_BITS: Final = 20

Events: TypeAlias = npt.NDArray[Any]  # of EVENT

EVENT: Final = np.dtype(
    [
        ("head", "<u4"),
        ("page", "<u4"),
        ("sector", "<u8"),
        ("time_ns", "<u8"),  # CLOCK_MONOTONIC
        ("sectors", "<u4"),
        ("device", "<u4"),  # see `device_number`
        ("rwbs", "S6"),
        ("what", "u1"),  # What
        ("spare", "u1"),
    ]
)
_RECORD_BYTES: Final = EVENT.itemsize - bpf.RING_HEADER_BYTES


class What(IntEnum):
    """Which tracepoint a record is from."""

    ISSUE = 1
    COMPLETE = 2
    REQUEUE = 3
    QUEUE = 4


TRACEPOINTS: Final = {
    What.ISSUE: "block_rq_issue",
    What.COMPLETE: "block_rq_complete",
    What.REQUEUE: "block_rq_requeue",
    What.QUEUE: "block_bio_queue",
}


def device_number(major: int, minor: int) -> int:
    return major << _MINOR_BITS | minor


class EventSource(Protocol):
    """Where events come from. All methods are called from one thread at a time."""

    #: "bpf" or "tracefs".
    name: str

    def watch(self, device: int) -> None:
        """From the return of this on, every event of the device is recorded."""
        ...

    def unwatch(self, device: int) -> None: ...

    def drain(self) -> Events:
        """What happened since the last call: at least everything that had happened before this one began, up to a
        bounded batch. Empty: nothing is left."""
        ...

    def lost(self) -> int:
        """How many records were lost so far; it never falls."""
        ...

    def close(self) -> None: ...


class BpfEvents:
    """An `EventSource` by eBPF.

    Args:
        ring_bytes: a power of two.
        discard_ranges: follow discards by bio, which devices that merge them need.

    Raises:
        PermanentError: the kernel refuses the programs.
        OSError: this process may not load any.
    """

    name = "bpf"

    def __init__(self, *, ring_bytes: int = RING_BYTES, discard_ranges: bool = False) -> None:
        with ExitStack() as closing:
            self._devices = bpf.NumberSet(MAX_DEVICES)
            closing.callback(self._devices.close)
            self._ring = bpf.Ring(ring_bytes, EVENT)
            closing.callback(self._ring.close)
            self._lost = bpf.Counter()
            closing.callback(self._lost.close)
            self._probes: dict[What, bpf.Probe] = {}
            for what in What:
                if what is not What.QUEUE or discard_ranges:
                    point = tracepoint(TRACEPOINTS[what])
                    self._probes[what] = bpf.Probe(point.number, self._program(what, point))
                    closing.callback(self._probes[what].close)
            self._closing = closing.pop_all()

    def watch(self, device: int) -> None:
        self._devices.add(device)

    def unwatch(self, device: int) -> None:
        self._devices.remove(device)

    def drain(self) -> Events:
        return self._ring.take()

    def lost(self) -> int:
        # A completion that is missed delays a copy to the next point, no more.
        missed = sum(probe.missed for what, probe in self._probes.items() if what is not What.COMPLETE)
        return self._lost.value + missed

    def close(self) -> None:
        self._closing.close()

    def _program(self, what: What, point: Tracepoint) -> bytes:
        code, context, record = Assembler(), 6, 9
        code.copy(context, 1)
        code.load(4, 2, context, point.offset("dev"))
        code.store(4, 10, -8, 2)
        code.map(1, self._devices.fd)
        code.copy(2, 10)
        code.add_number(2, -8)
        code.call(bpf.HELPER_LOOKUP)
        code.jump_if_equal(0, 0, "out")
        letters = point.offset("rwbs")
        code.load(1, 2, context, letters)
        if what is What.QUEUE:
            code.jump_if_equal(2, ord("D"), "wanted")
            code.jump_unless_equal(2, ord("F"), "out")  # a flush may go before it
            code.load(1, 2, context, letters + 1)
            code.jump_unless_equal(2, ord("D"), "out")
            code.label("wanted")
        else:
            code.jump_if_equal(2, ord("R"), "out")
        code.load(4, 8, context, point.offset("nr_sector"))
        code.jump_if_equal(8, 0, "out")  # an empty flush
        code.load(8, 7, context, point.offset("sector"))
        code.map(1, self._ring.fd)
        code.number(2, _RECORD_BYTES)
        code.number(3, 0)
        code.call(bpf.HELPER_RESERVE)
        code.jump_unless_equal(0, 0, "room")
        self._count_lost(code)
        code.label("room")
        code.copy(record, 0)
        code.store(8, record, 0, 7)
        code.call(bpf.HELPER_KTIME)
        code.store(8, record, 8, 0)
        code.store(4, record, 16, 8)
        code.load(4, 2, 10, -8)
        code.store(4, record, 20, 2)
        for index in range(6):
            code.load(1, 2, context, letters + index)
            code.store(1, record, 24 + index, 2)
        code.store_number(1, record, 30, what)
        code.store_number(1, record, 31, 0)
        code.copy(1, record)
        code.number(2, bpf.NO_WAKEUP)  # the reader comes by itself, in batches
        code.call(bpf.HELPER_SUBMIT)
        code.label("out")
        code.number(0, 0)
        code.exit()
        return code.code()

    def _count_lost(self, code: Assembler) -> None:
        code.store_number(4, 10, -4, 0)
        code.map(1, self._lost.fd)
        code.copy(2, 10)
        code.add_number(2, -4)
        code.call(bpf.HELPER_LOOKUP)
        code.jump_if_equal(0, 0, "out")
        code.number(1, 1)
        code.add_atomically(0, 1)
        code.jump("out")

"""The block layer's events by the kernel's tracing file system, for machines where eBPF is refused.

A private instance has a buffer of its own, so nobody else's tracing is disturbed or disturbs. Its text is read without
waiting and parsed by one regular expression for a whole batch. A full buffer keeps what it has and counts what it drops
(`overwrite` off), per processor, in `per_cpu/*/stats`; the pipe itself says nothing of it.

The instance is removed by `close`; when the process was killed, by the guard (see `guard`), or by the next agent.

Weak: formatting text costs the writing processes about a third of their speed at 100,000 writes/s. Times are those of
reading. Processors' buffers are merged at reading, so a completion may come before its issue.
"""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

from mobility_agent.capture.trace.events import EVENT, TRACEPOINTS, Events, What, device_number
from mobility_agent.capture.trace.tracing import root, tracepoint
from replicar.errors import LimitError, PermanentError

PREFIX: Final = "replicar-"
#: Per processor; at some 100 bytes an event, 80,000 events.
BUFFER_BYTES: Final = 8 << 20
#: A filter is one line of at most a page.
MAX_FILTER_BYTES: Final = 4000
_BATCH_BYTES: Final = 4 << 20
_LOST: Final = re.compile(r"^(?:overrun|commit overrun|dropped events): (\d+)", re.MULTILINE)
_EVENT: Final = re.compile(
    rb"block_(rq_issue|rq_complete|rq_requeue|bio_queue): (\d+),(\d+) (\w+) (?:\d+ )?(?:\(.*?\) )?(\d+) \+ (\d+)"
)
_WHAT: Final = {name.removeprefix("block_").encode(): what for what, name in TRACEPOINTS.items()}


class TracefsEvents:
    """An `EventSource` by text. See `events` for the interface.

    Args:
        buffer_bytes: per processor.
        discard_ranges: follow discards by bio, which devices that merge them need.

    Raises:
        PermanentError: there is no tracing file system, or an instance can't be made in it.
    """

    name = "tracefs"

    def __init__(self, *, buffer_bytes: int = BUFFER_BYTES, discard_ranges: bool = False) -> None:
        remove_stale()
        self.instance = _make_instance()
        self._devices: set[int] = set()
        self._events = [what for what in What if what is not What.QUEUE or discard_ranges]
        self._rest = b""
        self._pipe = -1
        try:
            for option, value in (("overwrite", "0"), ("context-info", "0")):
                self._set(f"options/{option}", value)
            self._set("buffer_size_kb", str(max(buffer_bytes >> 10, 1)))
            for what in self._events:
                tracepoint(TRACEPOINTS[what])  # says so if this kernel has none
            self._pipe = os.open(self.instance / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise

    def watch(self, device: int) -> None:
        self._choose(self._devices | {device})

    def unwatch(self, device: int) -> None:
        self._choose(self._devices - {device})

    def drain(self) -> Events:
        taken, text = 0, bytearray(self._rest)
        while taken < _BATCH_BYTES:
            try:
                data = os.read(self._pipe, 1 << 16)
            except BlockingIOError:
                break
            if not data:
                break
            taken += len(data)
            text += data
        end = text.rfind(b"\n") + 1
        self._rest = bytes(text[end:])
        return _parse(bytes(text[:end]))

    def lost(self) -> int:
        total = 0
        for stats in self.instance.glob("per_cpu/cpu*/stats"):
            total += sum(int(number) for number in _LOST.findall(stats.read_text()))
        return total

    def close(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        with suppress(FileNotFoundError):
            os.rmdir(self.instance)

    def _choose(self, devices: set[int]) -> None:
        chosen = " || ".join(f"dev == {device}" for device in sorted(devices))
        if len(chosen) + 100 > MAX_FILTER_BYTES:
            raise LimitError(
                f"{len(devices)} devices are more than one filter of the tracing file system can name",
                hint="protect fewer disks by trace capture, or let the agent use BPF",
            )
        for what in self._events:
            event = f"events/block/{TRACEPOINTS[what]}"
            if not devices:
                self._set(f"{event}/enable", "0")
                continue
            letters = '(rwbs ~ "D*" || rwbs ~ "FD*")' if what is What.QUEUE else '!(rwbs ~ "R*")'
            self._set(f"{event}/filter", f"({chosen}) && {letters} && nr_sector > 0")
            self._set(f"{event}/enable", "1")
        self._devices = devices

    def _set(self, name: str, value: str) -> None:
        try:
            fd = os.open(self.instance / name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise PermanentError(
                f"the tracing instance {self.instance.name} does not take {value!r} for {name}: {error.strerror}",
                hint="see error_log in the tracing file system",
            ) from None


def remove_stale() -> None:
    """Remove instances whose agents are gone."""
    instances = root() / "instances"
    for name in os.listdir(instances):
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with suppress(OSError):
                os.rmdir(instances / name)


def _make_instance() -> Path:
    instances = root() / "instances"
    number = 0
    while True:
        path = instances / f"{PREFIX}{os.getpid()}-{number}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise PermanentError(
                f"no tracing instance can be made: {error.strerror}",
                hint="the kernel needs ftrace with instances, and the agent root",
                errno=errno.errorcode.get(error.errno or 0, ""),
            ) from None


def _parse(text: bytes) -> Events:
    found = _EVENT.findall(text)
    events = np.zeros(len(found), EVENT)
    if found:
        what, major, minor, rwbs, sector, sectors = zip(*found, strict=True)
        events["what"] = [_WHAT[name] for name in what]
        events["device"] = [device_number(int(a), int(b)) for a, b in zip(major, minor, strict=True)]
        events["rwbs"] = rwbs
        events["sector"] = np.array(sector, "S20").astype(np.uint64)
        events["sectors"] = np.array(sectors, "S10").astype(np.uint32)
        events["time_ns"] = time.monotonic_ns()
    return events

"""The kernel's tracing file system: where it is, and what its events look like.

Where nobody mounted it, it is mounted *detached*: reachable through a descriptor of this process only, so that nothing
appears in the machine's tree and nothing is left when the process ends.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError

_USUAL: Final = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
#: fsopen, fsconfig, fsmount: the same on every architecture (Linux 5.2).
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CREATE: Final = 6
_CLOEXEC: Final = 1
_FIELD: Final = re.compile(r"field:[^;]*?(\w+)(?:\[(\d*)\])?;\s+offset:(\d+);\s+size:(\d+);")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """One event: its number, and where each field lies in its record (offset and size in bytes)."""

    number: int
    fields: dict[str, tuple[int, int]]

    def offset(self, name: str) -> int:
        return self.fields[name][0]


@cache
def root() -> Path:
    """The tracing file system's root.

    Raises:
        PermanentError: there is none, or it may not be read here.
    """
    for path in _USUAL:
        if os.access(path / "events" / "block", os.R_OK | os.X_OK):
            return path
    try:
        return Path(f"/proc/self/fd/{_mount_detached()}")
    except OSError as error:
        raise PermanentError(
            f"the kernel's tracing file system can't be reached: {error.strerror}",
            hint="run the agent as root; `mount -t tracefs none /sys/kernel/tracing` must succeed",
        ) from None


def tracepoint(name: str) -> Tracepoint:
    """The block layer's event `name`.

    Raises:
        PermanentError: this kernel has no such event, or it has not the fields that are needed.
    """
    path = root() / "events" / "block" / name / "format"
    try:
        text = path.read_text()
    except OSError as error:
        raise PermanentError(
            f"the kernel has no event block:{name} ({error.strerror})",
            hint="trace capture needs a kernel with CONFIG_BLK_DEV_IO_TRACE; use inline capture on this machine",
        ) from None
    number = re.search(r"^ID: (\d+)", text, re.MULTILINE)
    fields = {found[1]: (int(found[3]), int(found[4])) for found in _FIELD.finditer(text)}
    if number is None or not {"dev", "sector", "nr_sector", "rwbs"} <= fields.keys():
        raise PermanentError(f"the kernel's event block:{name} has another shape than is known here", fields=[*fields])
    return Tracepoint(int(number[1]), fields)


def _mount_detached() -> int:
    """A descriptor of a mount that is nowhere in the tree; it is kept open for good."""
    context = _call(_FSOPEN, b"tracefs", _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _FSCONFIG_CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result

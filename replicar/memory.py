"""Allocator and garbage collector told to leave alone what they need not touch, for processes that move much data.

glibc gives memory of 128 KiB and more back to the kernel as soon as it is free, and has it faulted in, page by page and
zeroed, the next time. Compressed chunks and request bodies are of that size: for a process server that is about 0.1 cpu
seconds a GB.

The collector looks for cycles among everything that is alive, and all modules are. What moves data makes none: its
objects go when nobody holds them. So what the start made is never looked at again, and the rest more rarely.

Weak: glibc only; elsewhere nothing is changed, and said so.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEEP_BYTES: Final = 64 << 20
#: New containers that outlive their makers before the youngest are looked at; Python's own number is 700.
_COLLECT_AFTER: Final = 20_000


def keep_memory() -> bool:
    """Have this process keep freed memory. Whether the allocator can be told."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # glibc caps the mmap threshold at 32 MiB and refuses more.
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))


def collect_rarely() -> None:
    """To be called once, when everything is imported: from here on the collector passes over what is there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 20)

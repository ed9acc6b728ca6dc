"""The allocator told to keep what it has, for processes that move much data through libraries.

glibc gives memory of 128 KiB and more back to the kernel as soon as it is free, and has it faulted in, page by page and
zeroed, the next time. Compressed chunks and request bodies are of that size: for a process server that is about 0.1 cpu
seconds a GB.

Weak: glibc only; elsewhere nothing is changed, and said so.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEEP_BYTES: Final = 64 << 20


def keep_memory() -> bool:
    """Have this process keep freed memory. Whether the allocator can be told."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # glibc caps the mmap threshold at 32 MiB and refuses more.
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))

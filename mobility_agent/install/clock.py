"""Whether this machine's clock is kept right, as far as can be told: by the kernel, and by the config server's time.

Recovery points carry the machine's time. The kernel knows whether anything (chrony, ntpd, systemd-timesyncd)
disciplines its clock: adjtimex(2) without a change answers TIME_ERROR or sets STA_UNSYNC when nothing does.
"""

from __future__ import annotations

import ctypes
from typing import Final

_STATUS_OFFSET: Final = 40  # of `status` in struct timex on 64-bit Linux (include/uapi/linux/timex.h)
_TIMEX_BYTES: Final = 208
_STA_UNSYNC: Final = 0x0040
_TIME_ERROR: Final = 5


def is_synchronised() -> bool | None:
    """Whether the kernel's clock is disciplined; None where the kernel does not say."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: nothing is changed
    state = adjtimex(buffer)
    if state < 0:
        return None
    status = int.from_bytes(buffer.raw[_STATUS_OFFSET : _STATUS_OFFSET + 4], "little")
    return state != _TIME_ERROR and not status & _STA_UNSYNC

"""Who uses a served disk now: clients of its NBD address, loop devices on its file, as the kernel's own tables show.

An agent that stops takes the disk away from whoever uses it, so the operator is told before, not after.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mobility_agent.settings import NbdAddress

_CONNECTED: Final = "03"  # SS_CONNECTED, in /proc/net/unix
_ESTABLISHED: Final = "01"  # TCP_ESTABLISHED, in /proc/net/tcp*


def count(address: NbdAddress, *, tables: Path = Path("/proc/net")) -> int:
    """How many connections there are to `address` on this machine."""
    if address.path is not None:
        return unix_connections(_lines(tables / "unix"), str(address.path))
    return sum(tcp_connections(_lines(tables / name), address.port) for name in ("tcp", "tcp6"))


def loop_devices(file: Path, *, devices: Path = Path("/sys/block")) -> int:
    """How many loop devices are on `file`; it is not touched itself, since its agent may be gone."""
    backings = (_text(backing) for backing in devices.glob("loop*/loop/backing_file"))
    return sum(1 for backing in backings if backing == str(file))


def unix_connections(lines: Iterable[str], path: str) -> int:
    """Of the lines of /proc/net/unix, those that are the server's end of a connection to `path`."""
    found = (line.split(None, 7) for line in lines)
    return sum(1 for fields in found if len(fields) == 8 and fields[5] == _CONNECTED and fields[7].strip() == path)


def tcp_connections(lines: Iterable[str], port: int) -> int:
    """Of the lines of /proc/net/tcp, the established ones whose own end is `port`."""
    ending = f":{port:04X}"
    found = (line.split(None, 4) for line in lines)
    return sum(1 for fields in found if len(fields) == 5 and fields[1].endswith(ending) and fields[3] == _ESTABLISHED)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""  # it went away meanwhile


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[1:]
    except OSError:
        return []

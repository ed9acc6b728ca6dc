"""What the fronts of inline capture (NBD connections, FUSE files) and the server around them say to each other."""

from __future__ import annotations

from typing import Protocol

from mobility_agent.capture.disk import Disk
from mobility_agent.ladder import Ladder


class Client(Protocol):
    """Whoever has requests that wait for something durable."""

    def answer(self, handle: int, error: int) -> None:
        """The flush that `handle` asked for is done, or failed with this error number."""
        ...

    def recorded(self, error: OSError | None) -> None:
        """The region that a request waited for is recorded as touched, or can't be."""
        ...


class Host(Protocol):
    """What a client needs of the server it belongs to."""

    ladder: Ladder

    def flush_soon(self, client: Client, disk: Disk, handle: int) -> None:
        """Answer `handle` once log and disk are durable."""
        ...

    def record_soon(self, client: Client, disk: Disk, offset: int, length: int) -> None:
        """Have a range recorded as touched, then let `client` go on."""
        ...

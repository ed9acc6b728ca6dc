"""The guard: a tiny process beside the agent that thaws what the agent froze, should the agent not do it in time.

A frozen file system stops every program that writes to it, for ever if nobody thaws it, and a process that is killed
thaws nothing. So no freeze begins before the guard has acknowledged what will be frozen and until when. After that
moment it thaws by itself, again and again until it is told that all is thawed; and at once when the agent is gone.

Weak: whoever kills both at the same instant (`kill -9` of a whole control group) leaves things frozen; so the service's
unit should run `mobility-agent thaw` when it stops.
"""

from __future__ import annotations

import pkgutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from replicar.errors import TransientError

#: How long to wait for the guard's answer; it does nothing but answer.
ANSWER_SECONDS: Final = 2.0
_END_SECONDS: Final = 5.0


class Guard:
    """The agent's end. Methods block for a moment (a round trip to the guard's process) and are called by one thread
    at a time. `start` once, `close` at the end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._remembered: tuple[int, str] | None = None

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._socket is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process, or a new one in its place."""
        self.close()
        source = pkgutil.get_data(__package__, "undo.py")  # as text, since the agent may run from an archive
        assert source is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(ANSWER_SECONDS)
        with theirs:
            command = [sys.executable, "-I", "-S", "-c", source.decode(), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/")
        self._socket = ours
        if self._remembered is not None:
            self.remember(*self._remembered)

    def arm(self, descriptors: Sequence[int], deadline: float) -> None:
        """What will be frozen, and when it has to be thawed (`time.monotonic`).

        Raises:
            TransientError: the guard does not answer; nothing may be frozen.
        """
        self._ask(b"F" + struct.pack("<d", deadline), descriptors)

    def disarm(self) -> None:
        """All is thawed."""
        self._ask(b"T")

    def remember(self, directory: int, name: str) -> None:
        """Should the agent die, remove the (empty, or kernel's) directory `name` in the open one."""
        self._remembered = directory, name
        self._ask(b"R" + name.encode(), [directory])

    def forget(self) -> None:
        """There is nothing to remove any more."""
        self._remembered = None
        self._ask(b"K")

    def close(self) -> None:
        """End the process; what is armed is thawed first."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _ask(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        try:
            if self._socket is None:
                raise OSError("it was not started")
            socket.send_fds(self._socket, [message], descriptors)
            if not self._socket.recv(1):
                raise OSError("it is gone")
        except OSError as error:
            raise TransientError(
                f"the guard that thaws file systems does not answer: {error}",
                hint="nothing was frozen; it is started again for the next recovery point",
            ) from None

"""The keeper: a tiny process that holds a FUSE connection, so that the agent may die, or be replaced, under its users.

A FUSE file system ends with the last descriptor of its connection. The keeper has one from before the file can be seen;
the agent that is started next asks it for that over a Unix socket (of the agent's own user, in its state directory),
and tells the kernel to ask again whatever the dead one left unanswered. Until then whoever uses the file waits.

Weak: the kernel can be told so since Linux 6.9; before, the users of a file whose agent died get errors. A keeper that
is killed leaves the agent as it is, but its file goes with it.
"""

from __future__ import annotations

import os
import pkgutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError

ANSWER_SECONDS: Final = 5.0
END_SECONDS: Final = 5.0
_NOTE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Kept:
    """A connection that a keeper held. `directory`: where it is mounted."""

    fd: int
    directory: Path


class Keeper:
    """The agent's end of one keeper's socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, fd: int, directory: Path) -> None:
        """Have a new process hold `fd`, which is mounted at `directory`."""
        source = pkgutil.get_data(__package__, "keep.py")  # as text, since the agent may run from an archive
        assert source is not None
        self.path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self.path))
            os.chmod(self.path, 0o600)
            listener.listen(1)
            given = (fd, listener.fileno())
            command = [
                sys.executable,
                "-I",
                "-S",
                "-c",
                source.decode(),
                *map(str, given),
                str(self.path),
                str(directory),
            ]
            self._process = subprocess.Popen(
                command,
                pass_fds=given,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # a signal to the agent's group is not meant for it
            )

    def ask(self) -> Kept | None:
        """The connection that is held, if any is.

        Raises:
            PermanentError: the keeper is there and does not answer.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(ANSWER_SECONDS)
            try:
                asking.connect(str(self.path))
            except FileNotFoundError:
                return None
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)  # its keeper went with the machine
                return None
            try:
                note, descriptors, _, _ = socket.recv_fds(asking, _NOTE_BYTES, 1)
            except OSError as error:
                note, descriptors, reason = b"", [], str(error)
            else:
                reason = "it says nothing"
        if not descriptors:
            raise PermanentError(
                f"the keeper at {self.path} does not give its file system back: {reason}",
                hint="whoever uses that file waits: stop them, unmount it, and kill the process that listens there",
                path=str(self.path),
            )
        os.set_inheritable(descriptors[0], False)
        return Kept(descriptors[0], Path(os.fsdecode(note)))

    def ended(self) -> None:
        """The file system is unmounted, at which the process ends: wait for that if it is this agent's child."""
        if self._process is not None:
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self.path.unlink(missing_ok=True)

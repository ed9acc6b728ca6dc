"""A child process: one part of the product run by its real command, its output in a log file, gone when we are.

A part's death is news: `watch`, run beside the work, ends with an error that shows the child's last log lines as soon
as one dies that was not told to. The parent's own death, even by SIGKILL, takes the children along by a parent-death
signal, which a few lines of Python set before they become the command. (Popen could have it set between fork and exec,
but not safely in a process that has threads.)

Weak: the signal follows the thread that started the child, so children are to be started from the main thread.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError

#: From the polite request to end until the other one.
STOP_SECONDS: Final = 20.0
POLL_SECONDS: Final = 0.02
_LAST_LINES: Final = 15
_LOG_TAIL_BYTES: Final = 64 << 10
#: The parent may have died before the signal was set; then nobody wants the command any more. 1: PR_SET_PDEATHSIG.
_LAUNCH: Final = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)
_LAUNCHER: Final = (sys.executable, "-I", "-S", "-c", _LAUNCH)


class Child:
    """One command, which may be started again after it ended; its log is appended to.

    Args:
        name: what to call it in errors.
        command: the program and its arguments.
        log: file for standard output and error.
        environment: variables besides those of this process.
    """

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self.starts = 0
        self._command = [str(word) for word in command]
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._log_start = 0

    @property
    def process_id(self) -> int | None:
        """The running process; None when there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def status(self) -> int | None:
        """What it ended with (minus the signal's number for a signal); None while it runs or before it was started."""
        return self._process.poll() if self._process is not None else None

    @property
    def died(self) -> bool:
        """Whether it ended though nobody asked it to."""
        return self._wanted and self.status is not None

    def start(self) -> None:
        """Start it; returns at once."""
        if self.process_id is not None:
            raise ValueError(f"{self.name} is running already")
        self.starts += 1
        with self.log.open("ab") as log:
            log.write(f"--- start {self.starts}: {' '.join(self._command)}\n".encode())
            log.flush()
            self._log_start = log.tell()
            # A session of its own: a Ctrl-C at the terminal is the owner's to pass on.
            self._process = subprocess.Popen(
                [*_LAUNCHER, str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        self._wanted = True

    def kill(self) -> None:
        """SIGKILL, as a power failure would; waits for its end."""
        self._wanted = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def stop(self) -> int:
        """SIGTERM and wait; SIGKILL when that takes too long. Its exit status."""
        self._wanted = False
        process = self._process
        if process is None:
            return 0
        if process.poll() is None:
            process.terminate()
        try:
            return await self.ended(STOP_SECONDS)
        except TimeoutError:
            process.kill()
            return await asyncio.to_thread(process.wait)

    async def ended(self, seconds: float) -> int:
        """Wait for its end, whoever causes it; its exit status.

        Raises:
            TimeoutError: it still runs.
        """
        self._wanted = False
        async with asyncio.timeout(seconds):
            while (status := self.status) is None:
                await asyncio.sleep(POLL_SECONDS)
        return status

    async def until(self, what: str, held: Callable[[], bool], seconds: float) -> None:
        """Wait until something about a running child holds.

        Raises:
            PermanentError: it died, or did not get there in time; with its last log lines.
        """
        deadline = time.monotonic() + seconds
        while not held():
            if self.process_id is None:
                raise self.failure(f"ended with status {self.status} before {what}")
            if time.monotonic() > deadline:
                raise self.failure(f"runs, but {what} did not come about within {seconds:.0f} s")
            await asyncio.sleep(POLL_SECONDS)

    def said(self) -> str:
        """What it printed since its last start."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read(_LOG_TAIL_BYTES).decode(errors="replace")

    def last_lines(self, count: int = _LAST_LINES) -> str:
        """The end of its log."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-count:])

    def failure(self, what: str) -> PermanentError:
        """An error that says what became of it and shows the end of its log."""
        return PermanentError(
            f"{self.name} {what}",
            hint=f"its log {self.log} ends with:\n{self.last_lines()}",
            part=self.name,
            status=self.status,
            log=str(self.log),
        )


async def watch(children: Sequence[Child]) -> None:
    """Wait, for ever if all goes well, for a child that dies unasked.

    Raises:
        PermanentError: one did; with its last log lines.
    """
    while True:
        for child in children:
            if child.died:
                raise child.failure(f"died with status {child.status}")
        await asyncio.sleep(POLL_SECONDS * 5)

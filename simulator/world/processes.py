"""Machines and the processes on them, which may die at any call to the operating system, or between any two.

A process is whatever runs in a context of its own: its tasks, their callbacks and timers, the files it has open, its
ends of connections. `kill` takes all of that away at once, as SIGKILL does: no `finally` is run while the story goes
on, nothing is flushed, nothing is said. What it had put into files and mappings is there for the next one.

In the middle of a call (`dies_in` calls from now) death is an exception that no `except Exception` catches; what runs
on the way out finds every call refused, and changes nothing that outlives it.

Weak: `finally` blocks that such an exception passes do run, and may store into a mapping, which a killed process can't.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from simulator.world.files import REAL, FileSystem
from simulator.world.loop import VirtualLoop

_current: Final[contextvars.ContextVar[Process | None]] = contextvars.ContextVar("process", default=None)


class Killed(BaseException):
    """The process that made this call is dead."""


class Ends(Protocol):
    """Something of a process that lives outside it and learns of its death."""

    def process_died(self) -> None: ...


def current() -> Process | None:
    """The process whose code runs just now; None in the simulator's own."""
    return _current.get()


class Machine:
    """A host: a name that is its address too, files, a clock of its own, and its present run.

    `boot` counts its restarts.
    """

    def __init__(self, name: str, directory: Path, files: FileSystem) -> None:
        self.name = name
        self.directory = directory
        self.files = files
        self.boot = 1
        self.is_up = True
        self.processes: list[Process] = []

    @property
    def boot_id(self) -> bytes:
        return f"{self.name} boot {self.boot}".encode()[-16:].ljust(16, b"\0")


class Process:
    """One run of a program on a machine. `ended` is set when its main coroutine returns or it dies."""

    def __init__(self, machine: Machine, name: str, loop: VirtualLoop) -> None:
        self.machine = machine
        self.name = name
        self.loop = loop
        self.alive = True
        self.identity: Any = None  # who it is on the network: what TLS would have shown
        self.descriptors: set[int] = set()
        self.ends: dict[Ends, None] = {}
        self.dies_in = 0  # calls; 0: not by itself
        self.dies_behind = False  # when that call was done, instead of before
        self.on_death: Callable[[], None] = lambda: None
        self.error: BaseException | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self.context = contextvars.copy_context()
        self.context.run(_current.set, self)
        self.task: asyncio.Task[None] | None = None
        machine.processes.append(self)

    def __repr__(self) -> str:
        return f"{self.machine.name}/{self.name}"

    def start(self, main: Coroutine[Any, Any, None]) -> None:
        """Run `main` as this process."""
        self.task = self.loop.create_task(self._run(main), context=self.context)

    async def _run(self, main: Coroutine[Any, Any, None]) -> None:
        try:
            await main
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.error = error
        if self.alive:
            self._end()

    def call(self) -> None:
        """It makes a call to the operating system.

        Raises:
            Killed: it is dead, or dies with this call.
        """
        if not self.alive:
            raise Killed
        if self.dies_in:
            self.dies_in -= 1
            if not self.dies_in and not self.dies_behind:
                self.kill()
                raise Killed

    def called(self) -> None:
        """The call was done.

        Raises:
            Killed: it dies with that.
        """
        if self.dies_behind and not self.dies_in:
            self.dies_behind = False
            self.kill()
            raise Killed

    def kill(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.loop.forget(lambda context: context.get(_current) is self)
        for task in self.loop.tasks:
            if not task.done() and task.context.get(_current) is self:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                self._tasks.append(task)
        self._end()

    def _end(self) -> None:
        self.alive = False
        self.dies_in = 0
        for descriptor in sorted(self.descriptors):
            with suppress(OSError):
                REAL.close(descriptor)
        self.descriptors.clear()
        ends, self.ends = list(self.ends), {}
        for end in ends:
            end.process_died()
        if self in self.machine.processes:
            self.machine.processes.remove(self)
        self.on_death()

    def bury(self) -> None:
        """After the story: let its coroutines go, in a context in which every call is refused."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            coroutine = task.get_coro()
            with suppress(BaseException):
                self.context.copy().run(coroutine.close)


def described(error: BaseException) -> str:
    """An error with the place that it comes from."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    if isinstance(error, BaseExceptionGroup):
        with suppress(IndexError):
            return described(error.exceptions[0])
    return f"{type(error).__name__}: {error} ({place})"

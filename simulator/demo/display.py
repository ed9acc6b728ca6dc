"""Progress for people: a line per step, with a bar where there is something to count; on standard error.

On a terminal the lines live; anywhere else (a log, a pipe) each finished step is printed once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Step:
    """One step under way."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self.note = ""

    def advance_to(self, done: float, total: float) -> None:
        """How much of it is done."""
        self._progress.update(self._task, completed=done, total=total or None)

    def say(self, note: str) -> None:
        """What is going on, or what came of it."""
        self.note = note
        self._progress.update(self._task, note=note)


class Display:
    """The list of steps; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            disable=not self._live,
        )

    @contextmanager
    def step(self, description: str) -> Iterator[Step]:
        """Show a step while its block runs."""
        began = time.monotonic()
        task = self._progress.add_task(description, total=None, note="")
        step = Step(self._progress, task)
        try:
            yield step
        except BaseException:
            self._progress.update(task, description=f"[red]{description}")
            self._progress.stop_task(task)
            raise
        self._progress.update(task, completed=1, total=1)
        if not self._live:
            seconds = time.monotonic() - began
            note = f": {step.note}" if step.note else ""
            self.console.print(f"{description} ({seconds:.1f} s){note}", highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

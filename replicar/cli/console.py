"""How a sub-command speaks: results on standard output, progress and errors on standard error.

With `--json` the result is one JSON object on standard output, and so is an error: a program reads one place and the
exit status. People get tables, a message, and the next step. A `ReplicarError` never shows a traceback; anything else
is a programmer's error and does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import uvloop
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from replicar.cli.settings import SETTINGS_VARIABLE
from replicar.errors import ReplicarError

SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        envvar=SETTINGS_VARIABLE,
        help="TOML settings file.  \\[default: ~/.config/replicar/replicar.toml]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result (or the error) as one JSON object.")]
Machine = Annotated[str, typer.Argument(help="The machine's name, as `replicar machines` shows it.")]

#: Called with what is done and what there is to do.
Advance = Callable[[int, int], None]


@dataclass
class Telling:
    """Where a sub-command's words go."""

    as_json: bool
    out: Console = field(default_factory=lambda: Console(highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def result(self, data: dict[str, Any], show: Callable[[Console], None]) -> None:
        """Print `data` as JSON, or have `show` print it for people."""
        if self.as_json:
            typer.echo(json.dumps(data))
        else:
            show(self.out)

    def failure(self, error: ReplicarError) -> None:
        if self.as_json:
            typer.echo(json.dumps(error.as_dict(), default=str))
            return
        self.err.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            self.err.print(f"next step: {escape(error.hint)}", soft_wrap=True)

    @contextmanager
    def progress(self, what: str) -> Iterator[Advance]:
        """Show bytes done of bytes to do, where somebody is watching."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as bar:
            task = bar.add_task(escape(what), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)

    @contextmanager
    def counting(self, what: str) -> Iterator[Advance]:
        """Show how many of how many (0: nobody knows) are done, where somebody is watching."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}"))
        with Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as bar:
            task = bar.add_task(escape(what), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)


def run(as_json: bool, work: Callable[[Telling], Coroutine[Any, Any, int | None]]) -> None:
    """Run a sub-command's work to its end; its result is the exit status (None: 0), a ReplicarError its own.

    Raises:
        typer.Exit: with a status other than 0.
    """
    telling = Telling(as_json)
    try:
        status = uvloop.run(work(telling))
    except ReplicarError as error:
        telling.failure(error)
        status = error.exit_status
    if status:
        raise typer.Exit(status)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; columns whose name begins with > are aligned right, those with ~ may be wrapped.

    All others are never broken, since half a number is none: a table of them has to fit 80 columns by what it holds.
    """
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        justify: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        wraps = name.startswith("~")
        made.add_column(name.lstrip(">~"), justify=justify, overflow="fold", no_wrap=not wraps)
    return made


def row(into: Table, *cells: object) -> None:
    """A row of plain text: what a machine is called is not markup."""
    into.add_row(*(escape(str(cell)) for cell in cells))


def size(count: int) -> str:
    """Bytes in binary units, three digits or so."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """An interval as a person would say it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

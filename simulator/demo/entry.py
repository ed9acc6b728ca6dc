"""The demo from its outside: a directory that goes away, signals that end everything, and an exit status.

    0           every check was true
    1           a check was not, or something did not work at all (then the error's own status)
    130, 143    ended by SIGINT or SIGTERM

Whatever happens, no process stays and, unless asked to keep it, no file.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from replicar.errors import PermanentError, ReplicarError
from simulator.application import first_error
from simulator.demo.display import Display
from simulator.demo.plan import MIB, Plan
from simulator.demo.report import Report
from simulator.demo.story import Story

INTERRUPTED: Final = 130
TERMINATED: Final = 143
_PLAIN_WIDTH: Final = 120
#: What the demo's directory takes, beside what the disk's size makes it take.
_SPACE_FACTOR: Final = 8


def run(
    json_output: bool = False, directory: Path | None = None, keep: bool = False, *, plan: Plan | None = None
) -> int:
    """Run the demo; the exit status.

    Args:
        json_output: print the report as one JSON object on standard output instead of tables; progress is on standard
            error in any case.
        directory: where to make the demo's own directory; the system's place for temporary files unless told.
        keep: leave that directory, with its logs, and say where it is.
        plan: how large and how long.
    """
    plan = plan or Plan()
    errors = Console(stderr=True)
    place: Path | None = None
    try:
        place = _make_place(directory, plan)
        report = asyncio.run(_tell(plan, place))
    except KeyboardInterrupt:
        errors.print("interrupted; every process was ended")
        return INTERRUPTED
    except asyncio.CancelledError:
        errors.print("told to end; every process was ended")
        return TERMINATED
    except ReplicarError as error:
        _print_error(error, json_output, errors)
        return error.exit_status
    finally:
        if place is not None and keep:
            errors.print(f"kept: {place}", highlight=False, soft_wrap=True)
        elif place is not None:
            shutil.rmtree(place, ignore_errors=True)
    _print_report(report, json_output)
    return 0 if report.holds else 1


async def _tell(plan: Plan, place: Path) -> Report:
    telling = asyncio.current_task()
    assert telling is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, telling.cancel)
    try:
        with Display() as display:
            return await Story(plan, place, display).tell()
    except BaseExceptionGroup as group:
        ours, others = group.split(ReplicarError)
        # A programmer's error goes out as it is.
        if ours is None or others is not None:
            raise
        raise first_error(ours) from None


def _make_place(directory: Path | None, plan: Plan) -> Path:
    parent = directory or Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        needed = _SPACE_FACTOR * plan.disk_bytes
        if free < needed:
            raise PermanentError(
                f"{parent} has {free // MIB} MiB free; the demo wants {needed // MIB}",
                hint="name a directory with more space: --directory",
                path=str(parent),
            )
        return Path(tempfile.mkdtemp(prefix="replicar-demo-", dir=parent))
    except OSError as error:
        raise PermanentError(
            f"can't make a directory in {parent}: {error.strerror}", hint="name another: --directory", path=str(parent)
        ) from None


def _print_error(error: ReplicarError, json_output: bool, errors: Console) -> None:
    if json_output:
        failure: dict[str, Any] = {"ok": False, **error.as_dict()}
        Console(soft_wrap=True).print(json.dumps(failure), markup=False, highlight=False)
        return
    errors.print(f"[red]{escape(error.message)}[/red]", highlight=False, soft_wrap=True)
    if error.hint:
        errors.print(f"next step: {escape(error.hint)}", highlight=False, soft_wrap=True)


def _print_report(report: Report, json_output: bool) -> None:
    if json_output:
        print(json.dumps(report.as_dict()))
    else:
        console = Console()
        # A pipe or a log has no width of its own; 80 columns would break the table.
        report.print(console if console.is_terminal else Console(width=_PLAIN_WIDTH))

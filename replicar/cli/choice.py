"""How a sub-command is told which point of a machine, and which of its disks; the same words for all of them."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from recovery.chunks import ChunkSource
from recovery.index import State
from recovery.points import AtSequence, Instant, Latest, Named, Request, locate
from recovery.view import View
from replicar.cli.access import Access
from replicar.cli.console import Telling
from replicar.errors import PermanentError, TransientError
from replicar.formats.record import Disk
from replicar.moments import parse_moment

#: Stands for the disk's name in the name of a target, an overlay, a directory.
DISK_MARK = "{disk}"

PointName = Annotated[str | None, typer.Option("--point", help="A named point.", show_default=False)]
At = Annotated[
    str | None,
    typer.Option(
        "--at", help="An instant: 2026-11-22T10:00:00.123456Z, or nanoseconds since 1970.", show_default=False
    ),
]
Sequence = Annotated[int | None, typer.Option("--sequence", help="A sequence number.", min=1, show_default=False)]
Newest = Annotated[bool, typer.Option("--latest", help="All that is stored.")]
DiskNames = Annotated[
    list[str] | None,
    typer.Option("--disk", help="A disk's name; may be given several times.", show_default=False),
]
Every = Annotated[bool, typer.Option("--all", help="All disks that the machine had then.")]


def chosen_point(point: str | None, at: str | None, sequence: int | None, latest: bool) -> Request:
    """The one point that was asked for.

    Raises:
        PermanentError: none was, or more than one.
    """
    chosen: list[Request] = []
    if point is not None:
        chosen.append(Named(point))
    if at is not None:
        chosen.append(Instant(parse_moment(at)))
    if sequence is not None:
        chosen.append(AtSequence(sequence))
    if latest:
        chosen.append(Latest())
    if len(chosen) != 1:
        raise PermanentError(
            "say which point to recover to" if not chosen else "more than one point was asked for",
            hint="give exactly one of --point NAME, --at TIME, --sequence NUMBER, --latest; "
            "`replicar points MACHINE` lists what there is",
        )
    return chosen[0]


async def located(telling: Telling, access: Access, request: Request, source: ChunkSource) -> State:
    """The machine's state at a point, while somebody watches; errors as of `locate`."""
    with telling.counting("reading the log's tables") as advance:
        try:
            return await locate(
                access.log,
                request,
                stored_number=access.stored_number,
                stored_digest=access.stored_digest,
                quiet=access.quiet,
                source=source,
                reached=lambda number, _: advance(number, access.stored_number),
            )
        except PermanentError as error:
            await _check_thinned(access, request, error)
            raise


async def _check_thinned(access: Access, request: Request, error: PermanentError) -> None:
    """A log forgets the names that retention gave up; the config server does not.

    Raises:
        PermanentError: the point was there, and was given up.
    """
    if not isinstance(request, Named) or access.points is None:
        return
    with suppress(TransientError):  # then it is only not known why
        found = await access.points()
        for point in found.thinned:
            if point.name == request.name and found.retention is not None:
                raise PermanentError(
                    f"the point {point.name!r} was thinned: retention gave it up",
                    hint=found.retention.nearest(sequence=point.sequence),
                    point=point.name,
                ) from error


def chosen_disks(view: View, names: list[str], every: bool) -> list[Disk]:
    """The disks that were asked for; without a word, the only one.

    Raises:
        PermanentError: a disk that is not there at this point, or a choice that nobody made.
    """
    if every and names:
        raise PermanentError("--all and --disk were both given", hint="give one of them")
    if names:
        return [view.disk(name) for name in dict.fromkeys(names)]
    if not view.disks:
        raise PermanentError("the machine has no disk at this point", hint="choose another point")
    if not every and len(view.disks) > 1:
        there = ", ".join(disk.name for disk in view.disks)
        raise PermanentError("say which disk is meant", hint=f"give --all, or --disk with one of: {there}")
    return list(view.disks)


def disk_names(disks: list[Disk], target: str) -> list[str]:
    """A target's name for each disk.

    Raises:
        PermanentError: several disks would have the same.
    """
    if len(disks) > 1 and DISK_MARK not in target:
        raise PermanentError(
            f"{len(disks)} disks can't all be written to {target}", hint=f"put {DISK_MARK} where their names should go"
        )
    return [target.replace(DISK_MARK, disk.name.replace("/", "_")) for disk in disks]

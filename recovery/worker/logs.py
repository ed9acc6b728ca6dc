"""A machine's log as a worker reads it: keys from the config server, a view of one point."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

from recovery.chunks import ChunkSource, MachineLog
from recovery.pins import holding
from recovery.points import AtSequence, Instant, Latest, Named, Request, locate
from recovery.view import View
from replicar.clock import SystemClock
from replicar.control.client import ControlClient
from replicar.control.keys import data_keys
from replicar.control.messages import PointChoice, PointKind
from replicar.errors import PermanentError
from replicar.formats.record import Consistency
from replicar.storage.store import PageBlobStore


async def open_view(
    control: ControlClient,
    store: PageBlobStore,
    machine: str,
    request: Request,
    *,
    pinned: AsyncExitStack | None = None,
) -> View:
    """A view of the point that is asked for.

    Args:
        pinned: until it ends, retention leaves the point alone.

    Raises:
        PermanentError: no such point, or one that is not offered; no such machine.
        CorruptionError: the log is damaged before it, or ends before what is known to be stored.
        TransientError: config server or storage are away.
    """
    key = await control.key(machine)
    log = MachineLog(store, key.machine_id, data_keys(key))
    source = ChunkSource(log)
    state = await locate(
        log,
        request,
        stored_number=key.stored_segment or 0,
        stored_digest=bytes.fromhex(key.stored_digest) or None,
        quiet=key.quiet,
        source=source,
    )
    if pinned is not None:
        await pinned.enter_async_context(holding(log, state, clock=SystemClock(), random=os.urandom))
    return View(log, state, source=source)


async def as_request(control: ControlClient, machine: str, choice: PointChoice | None) -> Request:
    """What a choice means now. `latest` and `latest-processed` both are what storage holds by now: the former is asked
    after the stream was fenced, the latter without waiting for anything.

    Raises:
        PermanentError: there is no application-consistent point, or the choice lacks its value.
    """
    kind = choice.kind if choice is not None else PointKind.LATEST_PROCESSED
    if choice is None or kind in (PointKind.LATEST, PointKind.LATEST_PROCESSED):
        return Latest()
    if kind is PointKind.NAMED:
        return Named(choice.name)
    if kind is PointKind.INSTANT and choice.time_ns is not None:
        return Instant(choice.time_ns)
    if kind is PointKind.SEQUENCE and choice.sequence is not None:
        return AtSequence(choice.sequence)
    if kind is PointKind.LATEST_APPLICATION:
        points = (await control.points(machine)).points
        for point in points:  # newest first
            if point.stored and not point.earlier and point.kind is Consistency.APPLICATION:
                return Named(point.name)
        raise PermanentError(
            f"machine {machine} has no application-consistent point in storage",
            hint="make one (`replicar tag NAME --application`), or choose another point",
        )
    raise PermanentError(f"the choice of a point {kind} lacks its value", hint="ask for the job again, with it")

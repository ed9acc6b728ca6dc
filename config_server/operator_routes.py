"""What operators call: status, machines, protection, points, marks and keys. Whatever changes or reveals is audited."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import Iterable
from importlib import metadata
from typing import Final

from config_server import data_keys, groups, machines, overview, parties, placement, points
from config_server.api import Call, Context, Route, hold
from config_server.bells import Bells, Topic
from config_server.jobs import opening
from config_server.placement import Move
from config_server.rights import KEYS, OPERATORS, PEOPLE, READERS
from replicar.control.identity import Role
from replicar.control.messages import (
    DestroyRequest,
    GroupPoint,
    GroupRequest,
    MachineKey,
    MachineList,
    MachineSummary,
    MarkRequest,
    MoveRequest,
    Point,
    PointList,
    PolicyAssignment,
    VaultStatus,
)
from replicar.errors import PermanentError, TransientError


async def get_status(context: Context, call: Call) -> VaultStatus:
    """The vault at a glance: process servers, machines, what is in their way."""
    now_ns = context.clock.now_ns()

    def read(connection: sqlite3.Connection) -> VaultStatus:
        return VaultStatus(
            vault=context.vault.name,
            vault_id=context.vault.id,
            software=software(),
            time_ns=now_ns,
            authority_expires_ns=context.vault.authority.expires_ns,
            machines=overview.summaries(connection, now_ns, context.troubles),
            process_servers=overview.process_servers(connection, now_ns, context.troubles),
            errors=context.troubles.own,
        )

    return await context.registry.run(read)


async def get_machines(context: Context, call: Call) -> MachineList:
    """All machines that were not removed."""
    now_ns = context.clock.now_ns()
    found = await context.registry.run(lambda c: overview.summaries(c, now_ns, context.troubles))
    return MachineList(machines=found)


async def get_machine(context: Context, call: Call) -> MachineSummary:
    """One machine, with all its figures."""
    name, now_ns = call.names["name"], context.clock.now_ns()
    return await context.registry.run(
        lambda c: overview.summary(c, parties.machine_named(c, name).id, now_ns, context.troubles)
    )


async def post_protect(context: Context, call: Call) -> MachineSummary:
    """Protect a machine, by a policy if one is named; one that is protected stays where it is."""
    name, now_ns = call.names["name"], context.clock.now_ns()
    policy = PolicyAssignment.from_json(call.body).policy if call.body else None

    def change(connection: sqlite3.Connection) -> tuple[uuid.UUID | None, MachineSummary]:
        machine = parties.machine_named(connection, name)
        opening.protect(connection, context.vault, machine, call.asking().name, now_ns, policy=policy)
        parties.audit(connection, call.asking().id, "protect", f"machine {name}", now_ns)
        summary = overview.summary(connection, machine.id, now_ns, context.troubles)
        return machines.server_of(connection, machine.id), summary

    server_id, summary = await context.registry.run(change)
    # the process server first: an agent that comes before its process server knows of it is only sent away again
    if server_id is not None:
        context.bells.ring(Topic.INSTRUCTIONS, server_id)
    context.bells.ring(Topic.INSTRUCTIONS, summary.id)
    return summary


async def post_move(context: Context, call: Call) -> MachineSummary:
    """Give a machine to another process server; raises its epoch."""
    name, request, now_ns = call.names["name"], MoveRequest.from_json(call.body), context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> tuple[Move, MachineSummary]:
        move = placement.move(connection, parties.machine_named(connection, name), request.process_server, now_ns)
        if move.server != move.former:
            parties.audit(connection, call.asking().id, "move", f"machine {name}", now_ns)
        return move, overview.summary(connection, move.machine_id, now_ns, context.troubles)

    move, summary = await context.registry.run(change)
    ring_move(context.bells, move)
    return summary


def ring_move(bells: Bells, move: Move) -> None:
    """Tell all three of a move; the process server that takes over first, so that the agent finds it prepared."""
    for party_id in (move.server, move.former, move.machine_id):
        bells.ring(Topic.INSTRUCTIONS, party_id)


async def post_remove(context: Context, call: Call) -> MachineSummary:
    """End a machine's protection and refuse its certificate; what is stored stays, and its key."""
    name, now_ns = call.names["name"], context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> tuple[uuid.UUID | None, MachineSummary]:
        machine = parties.machine_named(connection, name)
        server_id = machines.server_of(connection, machine.id)
        opening.remove(connection, machine, now_ns)
        parties.audit(connection, call.asking().id, "remove", f"machine {name}", now_ns)
        return server_id, overview.summary(connection, machine.id, now_ns, context.troubles)

    server_id, summary = await context.registry.run(change)
    if server_id is not None:
        context.bells.ring(Topic.INSTRUCTIONS, server_id)
    context.bells.ring(Topic.INSTRUCTIONS, summary.id)
    return summary


async def post_destroy_keys(context: Context, call: Call) -> MachineSummary:
    """Destroy the keys of a removed machine, for good; who asks has to name it twice."""
    name, request, now_ns = call.names["name"], DestroyRequest.from_json(call.body), context.clock.now_ns()
    if request.confirm != name:
        raise PermanentError(
            f"the keys of machine {name} are not destroyed: {request.confirm!r} is another name",
            hint="confirm with the machine's own name",
            status=400,
            machine=name,
        )

    def change(connection: sqlite3.Connection) -> MachineSummary:
        machine = parties.machine_named(connection, name)
        data_keys.destroy(connection, machine, now_ns)
        parties.audit(connection, call.asking().id, "destroy-keys", f"machine {name}", now_ns)
        return overview.summary(connection, machine.id, now_ns, context.troubles)

    summary = await context.registry.run(change)
    await context.registry.checkpoint()
    return summary


async def post_rotate_key(context: Context, call: Call) -> MachineSummary:
    """Seal what a machine sends from here on by a new key."""
    name, now_ns = call.names["name"], context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> tuple[uuid.UUID | None, MachineSummary]:
        machine = parties.machine_named(connection, name)
        data_keys.rotate(connection, context.vault, machine, now_ns)
        parties.audit(connection, call.asking().id, "rotate-key", f"machine {name}", now_ns)
        summary = overview.summary(connection, machine.id, now_ns, context.troubles)
        return machines.server_of(connection, machine.id), summary

    server_id, summary = await context.registry.run(change)
    if server_id is not None:
        context.bells.ring(Topic.INSTRUCTIONS, server_id)
    return summary


async def get_points(context: Context, call: Call) -> PointList:
    """What a machine can be recovered to."""
    name, now_ns = call.names["name"], context.clock.now_ns()
    return await context.registry.run(
        lambda c: overview.machine_points(c, parties.machine_named(c, name), now_ns, context.troubles)
    )


async def get_key(context: Context, call: Call) -> MachineKey:
    """A machine's data key, and how far its log must reach; who asked is audited."""
    call.needs_certificate()
    name, now_ns = call.names["name"], context.clock.now_ns()

    def reveal(connection: sqlite3.Connection) -> MachineKey:
        machine = parties.machine_named(connection, name)
        key = machines.machine_key(connection, context.vault, machine)
        key = key.model_copy(update={"quiet": overview.quiet(connection, machine)})
        parties.audit(connection, call.asking().id, "key", f"machine {name}", now_ns)
        return key

    return await context.registry.run(reveal)


async def post_mark(context: Context, call: Call) -> Point:
    """Ask for a mark and wait until the agent reports it (or, with `?wait=stored`, until storage has it)."""
    name, request, now_ns = call.names["name"], MarkRequest.from_json(call.body), context.clock.now_ns()
    wait = call.query.get("wait", "")
    if wait not in ("", "stored"):
        raise PermanentError(f"can't wait for {wait!r}", hint="wait=stored, or nothing", status=400)

    def ask(connection: sqlite3.Connection) -> tuple[uuid.UUID, uuid.UUID]:
        machine = parties.machine_named(connection, name)
        server_id = machines.server_of(connection, machine.id)
        if server_id is None:
            raise machines.never_protected(name)
        points.ask_for_mark(connection, machine.id, name, request, now_ns)
        parties.audit(connection, call.asking().id, "mark", f"machine {name}", now_ns)
        return machine.id, server_id

    machine_id, server_id = await context.registry.run(ask)
    context.bells.ring(Topic.INSTRUCTIONS, machine_id)
    with context.bells.hurry(machine_id, server_id), context.bells.listen(Topic.PROGRESS, machine_id) as bell:
        point = await _made(context, machine_id, request, bell, stored=wait == "stored")
    if point is not None and (point.stored or wait != "stored"):
        return point
    made = "made, but storage does not hold" if point is not None else "not made"
    raise TransientError(
        f"machine {name} has {made} the mark {request.name!r} within {request.wait_seconds:.0f} s",
        hint="it will be, when agent and process server are up (`replicar status`); ask again to go on waiting",
        status=504,
        machine=name,
        command_id=request.command_id,
    )


async def post_group(context: Context, call: Call) -> GroupPoint:
    """Have a point made over several machines, as of one instant."""
    request, now_ns = GroupRequest.from_json(call.body), context.clock.now_ns()

    def ask(connection: sqlite3.Connection) -> GroupPoint | dict[uuid.UUID, str]:
        if (point := groups.known(connection, request.group)) is not None:
            return point
        members: dict[uuid.UUID, str] = {}
        for name in request.machines:
            machine = parties.machine_named(connection, name)
            if machines.server_of(connection, machine.id) is None:
                raise machines.never_protected(name)
            members[machine.id] = name
        if len(members) < len(request.machines):
            raise PermanentError("a machine is named twice", hint="name each machine of the group once", status=400)
        parties.audit(connection, call.asking().id, "group", f"machines {', '.join(request.machines)}", now_ns)
        return members

    members = await context.registry.run(ask)
    if isinstance(members, GroupPoint):
        return members
    group = context.groups.begin(request, members)
    try:
        _ring(context, members)
        await groups.held(group)
        _ring(context, members)
        point = await groups.settled(group)
    finally:
        context.groups.end(group)
        _ring(context, members)
    await context.registry.run(lambda connection: groups.record(connection, point, now_ns))
    return point


def _ring(context: Context, machine_ids: Iterable[uuid.UUID]) -> None:
    for machine_id in machine_ids:
        context.bells.ring(Topic.INSTRUCTIONS, machine_id)


async def _made(
    context: Context, machine_id: uuid.UUID, request: MarkRequest, bell: asyncio.Event, *, stored: bool
) -> Point | None:
    loop = asyncio.get_running_loop()
    end = loop.time() + request.wait_seconds
    while True:
        point = await context.registry.run(lambda c: points.commanded(c, machine_id, request.command_id))
        if point is not None and (point.stored or not stored):
            return point
        left = end - loop.time()
        if left <= 0 or context.bells.closed or not await hold(bell, left):
            return point


def software() -> str:
    """The version that runs."""
    try:
        return metadata.version("replicar")
    except metadata.PackageNotFoundError:
        return "unknown"


ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/status", get_status, PEOPLE),
    Route("GET", "/machines", get_machines, READERS),
    Route("GET", "/machines/{name}", get_machine, READERS),
    Route("POST", "/machines/{name}/protect", post_protect, OPERATORS, PolicyAssignment),
    Route("POST", "/machines/{name}/move", post_move, OPERATORS, MoveRequest),
    Route("POST", "/machines/{name}/remove", post_remove, OPERATORS),
    Route("POST", "/machines/{name}/destroy-keys", post_destroy_keys, OPERATORS, DestroyRequest),
    Route("POST", "/machines/{name}/rotate-key", post_rotate_key, OPERATORS),
    Route("GET", "/machines/{name}/points", get_points, READERS),
    Route("GET", "/machines/{name}/key", get_key, KEYS),
    Route("POST", "/machines/{name}/marks", post_mark, OPERATORS | {Role.RECOVERY}, MarkRequest, query=("wait",)),
    Route("POST", "/groups", post_group, OPERATORS, GroupRequest),
)

"""What machines and process servers call: the vault, enrolment, renewal, and heartbeats, which are long polls."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Final, TypeVar

from config_server import enrolment, machines, parties
from config_server.api import Call, Context, Route, hold
from config_server.bells import Topic
from config_server.jobs import own
from config_server.parties import Party
from replicar.control.admission import EnrolReply, EnrolRequest, RenewReply, RenewRequest, VaultInfo
from replicar.control.identity import Role
from replicar.control.messages import (
    AgentHeartbeat,
    AgentInstructions,
    ProcessServerHeartbeat,
    ProcessServerInstructions,
)
from replicar.errors import PermanentError

_Instructions = TypeVar("_Instructions", AgentInstructions, ProcessServerInstructions)


async def get_vault(context: Context, call: Call) -> VaultInfo:
    """The vault's public facts, and the server's time."""
    return VaultInfo(id=context.vault.id, name=context.vault.name, time_ns=context.clock.now_ns())


async def post_enrol(context: Context, call: Call) -> EnrolReply:
    """Let a machine, process server or recovery worker in, by proofs of what it knows."""
    request = EnrolRequest.from_json(call.body)
    now = context.clock.monotonic()
    context.attempts.check(call.address, now)
    now_ns = context.clock.now_ns()
    try:
        enrolment.check_passphrase(context.vault.enrolment_key, request)
    except PermanentError:
        context.attempts.note_wrong(call.address, now)
        raise
    reply = await context.registry.run(lambda connection: enrolment.enrol(connection, context.vault, request, now_ns))
    # a machine that was enrolled again has a new incarnation, which its process server must hear of
    if request.role == Role.MACHINE:
        server_id = await context.registry.run(lambda connection: machines.server_of(connection, reply.id))
        if server_id is not None:
            context.bells.ring(Topic.INSTRUCTIONS, server_id)
    return reply


async def post_certificates(context: Context, call: Call) -> RenewReply:
    """Renew the certificate of whoever asks."""
    call.needs_certificate()
    request, party, now_ns = RenewRequest.from_json(call.body), call.asking(), context.clock.now_ns()
    certificate = context.vault.authority.issue(request.csr.encode(), party.role, party.id, now_ns)

    def record(connection: sqlite3.Connection) -> None:
        parties.record_certificate(connection, party.id, certificate)
        parties.audit(connection, party.id, "renew", f"{party.role} {party.name}", now_ns)

    await context.registry.run(record)
    return RenewReply(certificate=certificate.pem.decode())


async def post_machine_heartbeat(context: Context, call: Call) -> AgentInstructions:
    """An agent's report; answered when there are other instructions, or when its patience is over."""
    heartbeat, machine, now_ns = AgentHeartbeat.from_json(call.body), call.asking(), context.clock.now_ns()
    enrolment.check_clock(f"machine {machine.name}", heartbeat.time_ns, now_ns)

    def record(connection: sqlite3.Connection) -> None:
        machines.record_agent(connection, machine.id, heartbeat, now_ns)
        own.advance(connection, machine.id, now_ns)

    await context.registry.run(record)
    context.groups.report(machine.id, heartbeat.hold)
    context.bells.ring(Topic.PROGRESS, machine.id)

    def instructions(connection: sqlite3.Connection) -> AgentInstructions:
        return machines.agent_instructions(connection, machine.id, context.heartbeat_seconds)

    return await _news(context, machine, instructions, heartbeat.known_version, heartbeat.wait_seconds)


async def post_process_server_heartbeat(context: Context, call: Call) -> ProcessServerInstructions:
    """A process server's report; answered when there are other assignments, or when its patience is over."""
    heartbeat, server, now_ns = ProcessServerHeartbeat.from_json(call.body), call.asking(), context.clock.now_ns()
    enrolment.check_clock(f"process server {server.name}", heartbeat.time_ns, now_ns)
    reported, moved = await context.registry.run(
        lambda connection: machines.record_process_server(connection, server.id, heartbeat, now_ns)
    )
    context.troubles.record(server.id, heartbeat)
    for machine_id in reported:
        context.bells.ring(Topic.PROGRESS, machine_id)
    if moved:
        for machine_id in await context.registry.run(lambda connection: machines.machines_of(connection, server.id)):
            context.bells.ring(Topic.INSTRUCTIONS, machine_id)

    def instructions(connection: sqlite3.Connection) -> ProcessServerInstructions:
        return machines.process_server_instructions(connection, context.vault, server.id, context.heartbeat_seconds)

    return await _news(context, server, instructions, heartbeat.known_version, heartbeat.wait_seconds)


async def _news(
    context: Context,
    party: Party,
    instructions: Callable[[sqlite3.Connection], _Instructions],
    known_version: str,
    wait_seconds: float,
) -> _Instructions:
    """Instructions other than those known already, or the same after `wait_seconds`."""
    begun = asyncio.get_running_loop().time()
    with context.bells.listen(Topic.INSTRUCTIONS, party.id) as bell:
        while True:
            found = await context.registry.run(instructions)
            if isinstance(found, AgentInstructions):
                found = context.groups.added(party.id, found)
            left = begun + context.bells.hold_seconds(party.id, wait_seconds) - asyncio.get_running_loop().time()
            if found.version != known_version or left <= 0 or context.bells.closed:
                return found
            if not await hold(bell, left):
                return found


_ANY: Final = frozenset(Role)

ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/vault", get_vault, None),
    Route("POST", "/enrol", post_enrol, None, EnrolRequest),
    Route("POST", "/certificates", post_certificates, _ANY, RenewRequest),
    Route("POST", "/heartbeats/machine", post_machine_heartbeat, frozenset({Role.MACHINE}), AgentHeartbeat),
    Route(
        "POST",
        "/heartbeats/process-server",
        post_process_server_heartbeat,
        frozenset({Role.PROCESS_SERVER}),
        ProcessServerHeartbeat,
    ),
)

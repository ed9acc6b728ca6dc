"""`ControlClient`: the config server's API as typed methods, over mutual TLS.

One client per part, for as long as the part lives: it keeps its connections, and remembers the `version` of the last
instructions so that heartbeats are long polls (see `messages`). It tries nothing twice: what to do about a
`TransientError` depends on who asks. Replication itself must not: agents and process servers go on with what they
were last told while the config server is away.
"""

from __future__ import annotations

import uuid
from typing import TypeVar

from replicar.clock import Clock, SystemClock
from replicar.control.access_calls import AccessCalls
from replicar.control.admission import RenewReply, RenewRequest, VaultInfo
from replicar.control.caller import machine_path
from replicar.control.event_calls import EventCalls
from replicar.control.identity import Identity, Role
from replicar.control.job_calls import JobCalls, WorkerCalls
from replicar.control.message import Message
from replicar.control.messages import (
    MAX_WAIT_SECONDS,
    AgentHeartbeat,
    AgentInstructions,
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
    ProcessServerHeartbeat,
    ProcessServerInstructions,
    VaultStatus,
)
from replicar.control.policy_calls import PolicyCalls
from replicar.control.transport import Transport
from replicar.control.upkeep_calls import UpkeepCalls
from replicar.formats.record import Consistency
from replicar.tls import client_context, reload_certificate, server_name

_Reply = TypeVar("_Reply", bound=Message)


class ControlClient(JobCalls, WorkerCalls, PolicyCalls, AccessCalls, UpkeepCalls, EventCalls):
    """Typed access to the config server; use it as an asynchronous context manager.

    Every method raises what `Transport.request` raises: `TransientError` naming host and port when the server can't be
    reached, `PermanentError` when TLS does not verify, and otherwise the error that the server answered with.

    Args:
        identity: who asks; saved, since TLS reads its files.
        address: `host:port` instead of the one in the identity.
        clock: tells when the certificate is due.
    """

    def __init__(self, identity: Identity, *, address: str | None = None, clock: Clock | None = None) -> None:
        self.identity = identity
        self._clock: Clock = clock or SystemClock()
        self._context = client_context(identity)
        self._transport = Transport(
            address or identity.config_server, self._context, server_hostname=server_name(Role.CONFIG_SERVER)
        )
        self._known_version = ""

    async def __aenter__(self) -> ControlClient:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.__aexit__()

    # --- every part ---

    async def vault(self) -> VaultInfo:
        """The vault's public facts and the server's time."""
        return await self._get("/vault", VaultInfo)

    async def renew(self) -> Identity:
        """Have the certificate renewed, keep it in the identity's directory, and use it from the next connection on.

        Returns the renewed identity (also `self.identity`); other TLS contexts need `tls.reload_certificate`.
        """
        request = RenewRequest(csr=self.identity.signing_request().decode())
        reply = await self._post("/certificates", request, RenewReply)
        self.identity = self.identity.renewed(reply.certificate.encode())
        reload_certificate(self._context, self.identity)
        return self.identity

    async def renew_if_due(self) -> Identity | None:
        """`renew`, when a third or less of the certificate's year is left; None when it is not yet due."""
        return await self.renew() if self.identity.is_due(self._clock.now_ns()) else None

    # --- mobility agent ---

    async def agent_heartbeat(self, heartbeat: AgentHeartbeat) -> AgentInstructions:
        """Report, and wait up to `heartbeat.wait_seconds` for instructions other than the last ones."""
        reply = await self._post(
            "/heartbeats/machine", self._versioned(heartbeat), AgentInstructions, wait_seconds=heartbeat.wait_seconds
        )
        self._known_version = reply.version
        return reply

    # --- process server ---

    async def process_server_heartbeat(self, heartbeat: ProcessServerHeartbeat) -> ProcessServerInstructions:
        """Report, and wait up to `heartbeat.wait_seconds` for assignments other than the last ones."""
        reply = await self._post(
            "/heartbeats/process-server",
            self._versioned(heartbeat),
            ProcessServerInstructions,
            wait_seconds=heartbeat.wait_seconds,
        )
        self._known_version = reply.version
        return reply

    # --- operator ---

    async def status(self) -> VaultStatus:
        return await self._get("/status", VaultStatus)

    async def machines(self) -> tuple[MachineSummary, ...]:
        return (await self._get("/machines", MachineList)).machines

    async def machine(self, name: str) -> MachineSummary:
        return await self._get(machine_path(name), MachineSummary)

    async def protect(self, name: str, *, policy: str | None = None) -> MachineSummary:
        """Assign the machine to the least loaded live process server; a machine that has one keeps it."""
        request = PolicyAssignment(policy=policy) if policy is not None else None
        return await self._post(f"{machine_path(name)}/protect", request, MachineSummary)

    async def move(self, name: str, process_server: str | None = None) -> MachineSummary:
        """Give the machine to another process server, the one named or the least loaded; raises its epoch."""
        return await self._post(
            f"{machine_path(name)}/move", MoveRequest(process_server=process_server), MachineSummary
        )

    async def remove(self, name: str) -> MachineSummary:
        """Stop protecting the machine and refuse its certificate; what is in storage stays, and its key too."""
        return await self._post(f"{machine_path(name)}/remove", None, MachineSummary)

    async def destroy_keys(self, name: str) -> MachineSummary:
        """Destroy the keys of a removed machine, for good: nobody can read any more what they sealed."""
        return await self._post(f"{machine_path(name)}/destroy-keys", DestroyRequest(confirm=name), MachineSummary)

    async def rotate_key(self, name: str) -> MachineSummary:
        """Give the machine a new data key for what is sealed from now on; the former ones are kept."""
        return await self._post(f"{machine_path(name)}/rotate-key", None, MachineSummary)

    async def points(self, name: str) -> PointList:
        return await self._get(f"{machine_path(name)}/points", PointList)

    async def mark(
        self,
        name: str,
        mark_name: str,
        *,
        consistency: Consistency = Consistency.CRASH,
        wait_stored: bool = False,
        wait_seconds: float = MAX_WAIT_SECONDS,
        command_id: str | None = None,
    ) -> Point:
        """Have the machine put a mark into its stream, and return it once the agent (or storage) has it.

        Args:
            wait_stored: wait until everything up to the mark is in storage, not only in the machine's change log.
            wait_seconds: at most 60; when they are over, TransientError carries `command_id`, and the mark is still
                made when the agent gets to it. Ask again with that id to go on waiting.
        """
        request = MarkRequest(
            name=mark_name,
            consistency=consistency,
            command_id=command_id or str(uuid.uuid4()),
            wait_seconds=wait_seconds,
        )
        query = {"wait": "stored"} if wait_stored else None
        return await self._post(f"{machine_path(name)}/marks", request, Point, query=query, wait_seconds=wait_seconds)

    async def group(self, request: GroupRequest) -> GroupPoint:
        """Have one point made over several machines.

        Raises:
            TransientError: not all of them could be held at one instant.
        """
        return await self._post("/groups", request, GroupPoint, wait_seconds=2 * request.hold_seconds + 10)

    async def key(self, name: str) -> MachineKey:
        """The machine's data key and where its log must reach; the config server keeps an audit of who asked."""
        return await self._get(f"{machine_path(name)}/key", MachineKey)

    # --- below ---

    def _versioned(self, heartbeat: _Reply) -> _Reply:
        if getattr(heartbeat, "known_version", "") or not self._known_version:
            return heartbeat
        return heartbeat.model_copy(update={"known_version": self._known_version})

"""What the stories of this folder need: a clock that can be set, a running config server, and enrolled parts."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from config_server.service import ConfigServer
from config_server.settings import Settings
from config_server.vault import OPERATOR_DIRECTORY, PASSPHRASE_FILE, REGISTRATION_FILE
from replicar.control.client import ControlClient
from replicar.control.enrolment import RegistrationKey, enrol, read_passphrase
from replicar.control.identity import Identity, Role
from replicar.control.messages import AgentHeartbeat, MachineProgress, MarkReport, ProcessServerHeartbeat

DAY_NS = 86_400 * 10**9


class SetClock:
    """The system's clock, moved by hand; what waits, waits for real."""

    def __init__(self, offset_seconds: float = 0.0) -> None:
        self.offset_ns = int(offset_seconds * 1e9)

    def move(self, *, days: float = 0.0, seconds: float = 0.0) -> None:
        self.offset_ns += int(days * DAY_NS + seconds * 1e9)

    def now_ns(self) -> int:
        return time.time_ns() + self.offset_ns

    def monotonic(self) -> float:
        return time.monotonic() + self.offset_ns / 1e9

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass(frozen=True)
class House:
    """A running config server and the directory of its vault."""

    directory: Path
    server: ConfigServer
    clock: SetClock

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def operator(self) -> ControlClient:
        return self.client(Identity.load(self.directory / OPERATOR_DIRECTORY))

    def client(self, identity: Identity) -> ControlClient:
        return ControlClient(identity, address=self.address, clock=self.clock)

    async def enrol(
        self, directory: Path, name: str, role: Role = Role.MACHINE, *, clock: SetClock | None = None
    ) -> Identity:
        """A part enrolled as it should be."""
        key = RegistrationKey.load(self.directory / REGISTRATION_FILE) if role is not Role.MACHINE else None
        return await enrol(
            config_server=self.address,
            role=role,
            name=name,
            passphrase=read_passphrase(self.directory / PASSPHRASE_FILE),
            directory=directory,
            registration_key=key,
            clock=clock or self.clock,
        )

    def machine_heartbeat(self, **fields: object) -> AgentHeartbeat:
        return AgentHeartbeat.model_validate({"time_ns": self.clock.now_ns(), "state": "protected", **fields})

    def server_heartbeat(self, *machines: MachineProgress, **fields: object) -> ProcessServerHeartbeat:
        return ProcessServerHeartbeat.model_validate(
            {"time_ns": self.clock.now_ns(), "host": "127.0.0.1", "port": 9443, "machines": machines, **fields}
        )


@dataclass(frozen=True)
class Cast:
    """One of each, connected."""

    house: House
    operator: ControlClient
    machine: ControlClient
    server: ControlClient

    @property
    def machine_id(self) -> uuid.UUID:
        return self.machine.identity.id

    async def protect(self) -> None:
        await self.server.process_server_heartbeat(self.house.server_heartbeat())
        await self.operator.protect("db1")

    async def make_marks(self, sequence: int, *, count: int = 1) -> None:
        """What an agent does: poll, make each mark it is asked for once, report it."""
        made: list[MarkReport] = []
        while len(made) < count:
            heartbeat = self.house.machine_heartbeat(marks=made, wait_seconds=0.5)
            for command in (await self.machine.agent_heartbeat(heartbeat)).commands:
                if command.id not in {mark.command_id for mark in made}:
                    at, now_ns = sequence + len(made), self.house.clock.now_ns()
                    kind = command.consistency
                    made.append(
                        MarkReport(name=command.name, kind=kind, sequence=at, time_ns=now_ns, command_id=command.id)
                    )
        await self.machine.agent_heartbeat(self.house.machine_heartbeat(marks=made))

    async def report_stored(self, sequence: int, **fields: object) -> None:
        progress = MachineProgress.model_validate(
            {"machine_id": self.machine_id, "stored_sequence": sequence, **fields}
        )
        await self.server.process_server_heartbeat(self.house.server_heartbeat(progress))


@asynccontextmanager
async def running(directory: Path, clock: SetClock) -> AsyncIterator[House]:
    """A config server on the vault in `directory`, on a free port of the loopback."""
    settings = Settings(directory=directory, listen="127.0.0.1", port=0, heartbeat_seconds=5)
    async with ConfigServer(settings, clock) as server:
        yield House(directory, server, clock)

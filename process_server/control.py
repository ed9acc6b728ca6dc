"""Keeps in touch with the config server: heartbeats out, assignments in; goes on alone while it is away.

A heartbeat is a long poll, so a new assignment arrives at once. What went wrong is kept as `error` for the status and
tried again after a pause; replication itself never waits for any of this.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final

from process_server import assignments
from process_server.health import ServerHealth
from process_server.machine import MachineState
from replicar.clock import Clock
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    MAX_ERRORS,
    MAX_SIGNALS,
    MAX_TROUBLED_MACHINES,
    HealthSignal,
    MachineProgress,
    MachineTrouble,
    ProcessServerAssignment,
    ProcessServerHeartbeat,
)
from replicar.errors import ReplicarError

RETRY_SECONDS: Final = 1.0
LONGEST_RETRY_SECONDS: Final = 30.0

#: They don't know how far they are; the config server keeps what it was told last.
_WITHOUT_PROGRESS: Final = (MachineState.OPENING, MachineState.REFUSING, MachineState.FENCED)

Apply = Callable[[tuple[ProcessServerAssignment, ...]], Awaitable[None]]


class Control:
    """The conversation with the config server.

    Args:
        health: says how things are.
        apply: carries out assignments; the service's.
        renewed: told of a renewed certificate.
    """

    def __init__(
        self,
        client: ControlClient,
        directory: Path,
        *,
        health: Callable[[], ServerHealth],
        apply: Apply,
        renewed: Callable[[Identity], None],
        heartbeat_seconds: float,
        clock: Clock,
    ) -> None:
        self.error: ReplicarError | None = None
        self._client = client
        self._directory = directory
        self._health, self._apply, self._renewed = health, apply, renewed
        self._heartbeat_seconds = heartbeat_seconds
        self._clock = clock

    async def run(self) -> None:
        """Report and obey until cancelled."""
        pause = RETRY_SECONDS
        wait_seconds = 0.0  # the first one is to be answered at once
        while True:
            try:
                renewed = await self._client.renew_if_due()
                if renewed is not None:
                    self._renewed(renewed)
                instructions = await self._client.process_server_heartbeat(_heartbeat(self._health(), wait_seconds))
                try:
                    assignments.save(self._directory, instructions)
                finally:  # a full disk is an error to be shown, and no reason to serve nobody
                    await self._apply(instructions.assignments)
            except ReplicarError as error:
                self.error = error
                await self._clock.sleep(pause * random.uniform(0.5, 1.0))
                pause, wait_seconds = min(2 * pause, LONGEST_RETRY_SECONDS), 0.0
                continue
            self.error, pause = None, RETRY_SECONDS
            wait_seconds = min(self._heartbeat_seconds, instructions.heartbeat_seconds)


def _heartbeat(health: ServerHealth, wait_seconds: float) -> ProcessServerHeartbeat:
    return ProcessServerHeartbeat(
        time_ns=health.time_ns,
        host=health.host,
        port=health.port,
        cache_bytes=health.cache_bytes,
        cache_bytes_free=health.cache_bytes_free,
        machines=tuple(
            MachineProgress(
                machine_id=machine.machine_id,
                received_sequence=machine.received_sequence,
                stored_sequence=machine.stored_sequence,
                stored_segment=machine.stored_segment or None,
                stored_digest=machine.stored_digest,
                counted_since=machine.counters.since,
                pending_bytes=machine.pending_bytes,
                rpo_seconds=machine.rpo_seconds,
                bytes_received=machine.counters.bytes_received,
                bytes_stored=machine.counters.bytes_uploaded,
            )
            for machine in health.machines
            if machine.state not in _WITHOUT_PROGRESS
        ),
        errors=tuple(ErrorReport.of(part, error) for part, error in health.errors.items())[:MAX_ERRORS],
        signals=tuple(HealthSignal.model_validate(asdict(signal)) for signal in health.signals)[:MAX_SIGNALS],
        troubles=tuple(
            MachineTrouble(machine_id=each.machine_id, state=each.state, error=ErrorReport.of("", each.error))
            for each in health.machines
            if each.error is not None
        )[:MAX_TROUBLED_MACHINES],
        wait_seconds=wait_seconds,
    )

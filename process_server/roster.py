"""The machines this server serves just now, each in a task of its own; changes as assignments do."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace

from process_server.cache import SlotHeader
from process_server.machine import Assignment, Machine, MachineState, Workshop
from replicar.log.tail import Stored


class Roster:
    """Starts, changes and stops machines.

    Args:
        group: where their tasks run; a programmer's error in one ends the server.
        leftovers: slots of an earlier life by machine; taken by whoever is assigned.
        stored: machine and incarnation to what is known to be stored.
    """

    def __init__(
        self,
        workshop: Workshop,
        group: asyncio.TaskGroup,
        leftovers: dict[uuid.UUID, list[tuple[int, SlotHeader]]],
        stored: Mapping[tuple[uuid.UUID, int], Stored],
    ) -> None:
        self._workshop = workshop
        self._group = group
        self._leftovers = leftovers
        self._stored = stored
        self._machines: dict[uuid.UUID, Machine] = {}
        self._tasks: dict[uuid.UUID, asyncio.Task[None]] = {}

    def find(self, machine_id: uuid.UUID) -> Machine | None:
        return self._machines.get(machine_id)

    def machines(self) -> list[Machine]:
        return list(self._machines.values())

    async def apply(self, assignments: Iterable[Assignment], *, final: bool = True) -> None:
        """Serve exactly these machines.

        Args:
            final: false for assignments that may be outdated; cache slots of machines that are not among them are kept.
        """
        wanted = {each.machine_id: each for each in assignments}
        for machine_id in [known for known in self._machines if known not in wanted]:
            await self._stop(machine_id)
        for machine_id, each in wanted.items():
            machine = self._machines.get(machine_id)
            if machine is not None and machine.assignment != each:
                if _goes_on(machine, each):
                    machine.reassign(replace(each))
                else:
                    await self._stop(machine_id)
            elif machine is not None and not machine.learn(each.stored):
                await self._stop(machine_id)  # the log was opened before this was known
            if machine_id not in self._machines:
                self._start(each)
        if final:
            for machine_id in [known for known in self._leftovers if known not in wanted]:
                for index, _ in self._leftovers.pop(machine_id):
                    self._workshop.slots.release_index(index)

    async def drain(self) -> None:
        """Store what was received, all machines at once."""
        await asyncio.gather(*(machine.drain() for machine in self.machines()))

    async def close(self) -> None:
        """Stop all machines."""
        await asyncio.gather(*(self._stop(machine_id) for machine_id in list(self._machines)))

    def _start(self, assignment: Assignment) -> None:
        machine_id = assignment.machine_id
        machine = Machine(
            assignment,
            self._workshop,
            self._leftovers.pop(machine_id, None),
            stored=self._stored.get((machine_id, assignment.incarnation), Stored()),
        )
        self._machines[machine_id] = machine
        self._tasks[machine_id] = self._group.create_task(machine.run(), name=f"machine {assignment.name}")

    async def _stop(self, machine_id: uuid.UUID) -> None:
        machine, task = self._machines.pop(machine_id), self._tasks.pop(machine_id)
        task.cancel()
        await asyncio.wait([task])
        await machine.close()


def _goes_on(machine: Machine, assignment: Assignment) -> bool:
    """Whether a machine's stream goes on under a changed assignment: another name, or another incarnation while all is
    well. A machine that was enrolled again while its log could not be opened begins anew, for that is what it was done
    for: what was stored of its earlier incarnation may be lost for good."""
    if machine.assignment.writer != assignment.writer or machine.state is MachineState.REFUSING:
        return False
    return machine.state is MachineState.RUNNING or machine.assignment.incarnation == assignment.incarnation

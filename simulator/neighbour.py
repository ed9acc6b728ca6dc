"""A second protected machine, and points that it and the first have together.

The operator asks the config server for a point of both (`replicar group`'s request); the real agents hold their
writers, hear the verdict, and put marks into their streams, with faults between. When everything is at rest each group
that the config server calls a point is held against both machines' truth:

- it is in both logs, at the sequences that were told and outside of gaps, and both recover to what their disks may have
  held then;
- it is one instant: no machine's point has a write that was issued after one was acknowledged that the other's lacks.

Times are the world's, which no machine knows.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mobility_agent.core import Core
from recovery.chunks import MachineLog
from recovery.points import Named, locate
from recovery.view import View
from replicar.control.client import ControlClient
from replicar.control.messages import GroupPoint, GroupRequest
from replicar.errors import ReplicarError
from simulator import registered
from simulator.workloads import Kind, Workload
from simulator.world import cast, parts
from simulator.world.application import Application, Numbers
from simulator.world.files import PAGE
from simulator.world.processes import Process
from simulator.world.truth import Truth

if TYPE_CHECKING:
    from simulator.stage import Stage

_DISK: Final = "data"


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """When points of both machines are asked for, for how long writers may be held, and what the neighbour does."""

    marks: tuple[float, ...] = (20.0, 40.0)
    hold_seconds: float = 2.0
    rate: float = 2.0
    size_bytes: int = 256 << 10


class Neighbour:
    """The second machine: its agent, its application on one disk, and the truth about it."""

    def __init__(self, stage: Stage) -> None:
        assert stage.story.group is not None
        self.plan = stage.story.group
        self.machine, self._stage = cast.MACHINES[1], stage
        self.machine_id: uuid.UUID = cast.who(self.machine).id
        self.core: Core | None = None
        self.agent: parts.RunningAgent | None = None
        self.asked: dict[str, str] = {}  # what became of each request, by its point's name
        self._next_sequence = 0
        self._draw = stage.world.draw("neighbour")
        self._application: Application | None = None
        stage.world.add(self.machine)
        content = bytes(self.plan.size_bytes)
        path = stage.world.machines[self.machine].directory / f"{_DISK}.img"
        pages = {at // PAGE: content[at : at + PAGE] for at in range(0, len(content), PAGE)}
        stage.world.machines[self.machine].files.put(path, len(content), pages)
        self.truth = Truth(stage.story.seed + 1, content, stage.world.loop.time)

    # --- its parts ---

    def start(self) -> None:
        """Its agent; and an operator who protects it."""
        self._start_agent()
        self._stage.operate("protect the neighbour", lambda client: self._stage.protect(client, self.machine))

    def start_application(self) -> None:
        """Unless the story has come to rest."""
        if not self._stage.is_writing:
            return
        for change in list(self.truth._in_flight):
            self.truth.lose(change)

        async def main(process: Process) -> None:
            application = self._application = Application(
                _DISK,
                0,
                self.truth,
                Workload(Kind.UNIFORM, rate=self.plan.rate),
                Numbers(),
                self._stage.world.clocks[self.machine],
                self.next_sequence,
                self._stage.world.draw(f"neighbour's workload at {self._stage.world.loop.time():.3f}"),
            )
            await application.run()

        process = self._stage.world.start(self.machine, "application", main)
        self._stage.supervise(process, self.start_application)

    def next_sequence(self) -> int:
        """Of its stream, now or when it was last seen."""
        if self.core is not None:
            self._next_sequence = self.core.log.next_sequence
        return self._next_sequence

    def opened(self, core: Core) -> None:
        """Its agent has started."""
        self.core = core

    async def ask(self, name: str) -> None:
        """Ask for a point of both, once."""
        self.asked[name] = "asked for"
        draw = random.Random(f"{self._stage.story.seed} {name}")
        group = str(uuid.UUID(int=draw.getrandbits(128), version=4))

        async def ask(client: ControlClient) -> None:
            machines = (self._stage.machine, self.machine)
            request = GroupRequest(group=group, name=name, machines=machines, hold_seconds=self.plan.hold_seconds)
            try:
                await client.group(request)
            except ReplicarError as error:
                self.asked[name] = f"{type(error).__name__}: {error.message}"
            else:
                self.asked[name] = "a point"
            self._stage.world.note(f"group {name}: {self.asked[name]}")

        self._stage.operate(f"group {name}", ask)

    def _start_agent(self) -> None:
        seed = self._draw.getrandbits(32)

        async def main(process: Process) -> None:
            running = self.agent = parts.RunningAgent(process)
            plan = parts.AgentPlan(disks=(_DISK,), audit_bytes_per_second=0)
            await parts.run_agent(running, plan, self._stage.world.clocks[self.machine], seed)

        process = self._stage.world.start(self.machine, "agent", main)
        self._stage.supervise(process, self._start_agent)
        ended = process.on_death

        def died() -> None:
            self.next_sequence()
            self.core = None
            ended()

        process.on_death = died

    # --- the end ---

    def stop_writing(self) -> bool:
        """Have its application come to rest; whether it has."""
        if self._application is not None:
            self._application.is_writing = False
        return not self.truth._in_flight

    def at_rest(self) -> bool:
        """Whether all it captured is stored, in order."""
        log = self.core.log if self.core is not None else None
        return log is not None and log.ordered and log.oldest_unstored_time_ns() is None

    async def judge(self) -> int:
        """Hold the groups that are points against the truth; how many there were."""
        stage, points = self._stage, registered.group_points(self._stage.world)
        truths = {stage.machine: stage.truths, self.machine: {_DISK: self.truth}}
        names = {name for name, became in self.asked.items() if became == "a point"}
        for name in sorted(names - {point.name for point in points}):
            stage.violated(f"the group {name} was said to be a point, and is not written down")
        for point in points:
            sequences = {member.machine: member.sequence for member in point.members}
            for machine, sequence in sequences.items():
                await self._recover(point, machine, sequence, truths[machine])
            for wrong in inconsistencies(sequences, truths):
                stage.violated(f"the group {point.name} is not one instant: {wrong}")
        return len(points)

    async def _recover(self, point: GroupPoint, machine: str, sequence: int, truths: Mapping[str, Truth]) -> None:
        stage, what = self._stage, f"the group {point.name} on {machine}"
        keys = registered.machine_keys(stage.world, machine)
        assert keys is not None
        log = MachineLog(stage.world.blobs.inner, cast.who(machine).id, keys)
        try:
            state = await locate(log, Named(point.name))
            view = View(log, state, memory_bytes=16 << 20)
            if state.place.sequence != sequence:
                stage.violated(f"{what} lies at {state.place.sequence}, and was told to at {sequence}")
            for disk in view.disks:
                image = await view.read(disk, 0, disk.size_bytes)
                for wrong in truths[disk.name].differences(image, state.place.sequence, is_replica=True):
                    stage.violated(f"{what}, disk {disk.name}: {wrong}")
        except ReplicarError as error:
            # A change log that was damaged before it was sent has lost what lay in it, marks too.
            if not (stage.damaged_log and machine == stage.machine and "no point named" in error.message):
                stage.violated(f"{what} can't be recovered: {error}")


def inconsistencies(sequences: Mapping[str, int], truths: Mapping[str, Mapping[str, Truth]]) -> Iterator[str]:
    """Where one machine's part of a point is later than another's, in words; pure.

    Args:
        sequences: where each machine's part lies in its stream.
        truths: by machine and disk.
    """
    changes = {
        machine: [change for truth in disks.values() for era in truth.eras for change in era.changes]
        for machine, disks in truths.items()
    }
    for one, missing_from in changes.items():
        lacks = [
            change.acknowledged_at
            for change in missing_from
            if change.issued > sequences[one] and change.acknowledged_at is not None
        ]
        for other, present_in in changes.items():
            has = [
                change.issued_at
                for change in present_in
                if change.acknowledged is not None and change.acknowledged <= sequences[other] + 1
            ]
            if other != one and lacks and has and max(has) > min(lacks):
                yield (
                    f"{other} has a write that was issued at {max(has):.3f} s, and {one} lacks one that was "
                    f"acknowledged at {min(lacks):.3f} s"
                )

"""The stage: a story's parts in a world, started again when they die, with an operator who does what hints say.

It has no secrets of the product's but one: it looks at the agent's change log, for the sequence that comes next, which
is how the truth knows what belongs before a point and what behind it.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import random
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final

from config_server.bells import Topic
from mobility_agent import service
from mobility_agent.allocation import asking
from mobility_agent.core import Core, open_core
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.errors import ReplicarError
from simulator import free_space, registered
from simulator.faults.catalogue import CATALOGUE, Fault
from simulator.neighbour import Neighbour
from simulator.story import DiskPlan, Story
from simulator.upkeep import Upkeep
from simulator.workload import SECTOR_BYTES
from simulator.world import cast, folder, parts
from simulator.world.application import Application, Numbers
from simulator.world.blobs import STORAGE, Weather
from simulator.world.calls import Device
from simulator.world.control import ControlService
from simulator.world.files import PAGE
from simulator.world.ledger import Ledger, WatchedStore
from simulator.world.processes import Process, current, described
from simulator.world.replaced import replaced
from simulator.world.truth import Truth, make
from simulator.world.world import World

#: A supervisor starts what ended again after so long.
RESTART_SECONDS: Final = (0.3, 3.0)
#: How long the operator waits for a point to be stored: while somebody waits, every part reports four times a second.
MARK_SECONDS: Final = 8.0
_NOBODY: Final = contextvars.Context()


class Stage:
    """One story's parts. `violations` are the promises that were seen broken, in words."""

    def __init__(self, world: World, story: Story) -> None:
        self.world = world
        self.story = story
        self.machine = cast.MACHINES[0]
        self.servers_by_name = list(cast.SERVERS)
        self.machine_id: uuid.UUID = cast.who(self.machine).id
        self.violations: list[str] = []
        self.ledger = Ledger()
        self.truths: dict[str, Truth] = {}
        self.applications: dict[str, Application] = {}
        self.core: Core | None = None
        self.agent: parts.RunningAgent | None = None
        self.agent_process: Process | None = None
        self.config_process: Process | None = None
        self.config: ControlService | None = None
        self.damaged_log = self.broke_leases = False
        self.jumped: dict[str, float] = {}
        self.faults_injected = 0
        self.is_writing = True
        self.marks: dict[str, str] = {}  # by name: what became of the request
        self._servers: dict[str, tuple[Process, asyncio.Event]] = {}
        self._application_process: Process | None = None
        self._next_sequence = 0
        self._numbers = Numbers()
        self._supervision = world.draw("supervision")
        world.blobs.inner = WatchedStore("logs", clock=world.blobs.inner._clock, ledger=self.ledger)
        for disk in story.disks:
            self._make_disk(disk)
        self.upkeep = Upkeep(self) if story.upkeep is not None else None
        self.neighbour = Neighbour(self) if story.group is not None else None

    # --- what the truth asks ---

    def next_sequence(self) -> int:
        """Of the stream, now or when it was last seen."""
        if self.core is not None:
            self._next_sequence = self.core.log.next_sequence
        return self._next_sequence

    def image(self, disk: str) -> bytes:
        """What a protected disk holds now."""
        return (self.world.machines[self.machine].directory / f"{disk}.img").read_bytes()

    def replica(self, disk: str) -> bytes:
        """What a replica of it holds once everything is stored: zeros where the agent's map has free space left out."""
        image = bytearray(self.image(disk))
        if self.core is not None:
            for index, skipped in self.core.ladder.skipped.items():
                if self.core.ladder.disks[index].name == disk:
                    skipped.blank(0, memoryview(image))
        return bytes(image)

    def status(self) -> dict[str, Any]:
        """What the agent says of itself; empty when it says nothing."""
        path = self.world.machines[self.machine].directory / "state" / "status.json"
        with suppress(OSError, ValueError):
            found = json.loads(path.read_bytes())
            return found if isinstance(found, dict) else {}
        return {}

    def violated(self, what: str) -> None:
        if what not in self.violations:
            self.world.note(f"VIOLATION {what}")
            self.violations.append(what)

    # --- starting and stopping ---

    def start(self) -> None:
        """Everybody but the application."""
        self._start_config()
        for name in self.servers_by_name:
            self._start_server(name)
        self._start_agent()
        if self.upkeep is not None:
            self.upkeep.start()
        if self.neighbour is not None:
            self.neighbour.start()

    def server_process(self, name: str) -> Process | None:
        found = self._servers.get(name)
        return found[0] if found is not None else None

    def stop_agent(self) -> None:
        if self.agent is not None:
            self.world.note("the agent is asked to stop")
            self.agent.stop.set()

    def stop_server(self, name: str) -> None:
        found = self._servers.get(name)
        if found is not None:
            self.world.note(f"the server of {name} is asked to stop")
            found[1].set()

    def kill_application(self) -> None:
        if self._application_process is not None:
            self.world.kill(self._application_process)

    def start_application(self) -> None:
        if not self.is_writing:
            return
        for truth in self.truths.values():
            for change in list(truth._in_flight):
                truth.lose(change)

        async def main(process: Process) -> None:
            async with asyncio.TaskGroup() as group:
                for number, disk in enumerate(self.story.disks):
                    application = self.applications[disk.name] = Application(
                        disk.name,
                        number,
                        self.truths[disk.name],
                        disk.workload,
                        self._numbers,
                        self.world.clocks[self.machine],
                        self.next_sequence,
                        self.world.draw(f"workload of {disk.name} at {self.world.loop.time():.3f}"),
                    )
                    group.create_task(application.run())

        process = self._application_process = self.world.start(self.machine, "application", main)
        self.supervise(process, self.start_application)

    async def lose_power(self, name: str, seconds: float) -> None:
        """A machine is off for a while."""
        host = self.world.machines[name]
        if not host.is_up:
            return
        self.world.power_off(name)
        if name == self.machine:
            self.core = None
            for disk, truth in self.truths.items():
                for wrong in truth.power_cut(self.image(disk)):
                    self.violated(f"after a power cut {wrong}")
        await asyncio.sleep(seconds)
        self.world.power_on(name)
        if name == self.machine:
            self._start_agent()
            self.start_application()
        else:
            self._start_server(name)

    def enrol_again(self) -> None:
        """The operator enrols the machine again under its name, as a hint says."""
        world, vault = self.world, self.world.machines[cast.CONFIG_SERVER].directory / "vault"
        place = world.machines[self.machine].directory / "state" / "identity"
        world.note(f"{self.machine} is enrolled again")
        self._who = cast.enrol_again(vault, self.machine, place, world.clocks[cast.CONFIG_SERVER])
        world.machines[self.machine].files.adopt()
        server = registered.server_of(world, self.machine_id)
        if self.config is not None and server is not None:
            self.config.context.bells.ring(Topic.INSTRUCTIONS, server)

    # --- the operator ---

    def operate(self, name: str, work: Callable[[ControlClient], Any]) -> Process:
        """Have an operator do something with the config server."""

        async def main(process: Process) -> None:
            process.identity = cast.who(cast.OPERATOR)
            identity = Identity.load(cast.template() / cast.OPERATOR)
            async with ControlClient(identity, clock=self.world.clocks[cast.CONFIG_SERVER]) as client:
                await work(client)

        return self.world.start(cast.CONFIG_SERVER, name, main)

    async def protect(self, client: ControlClient, machine: str = cast.MACHINES[0]) -> None:
        """Protect a machine; as often as it takes."""
        while True:
            try:
                await client.protect(machine)
            except ReplicarError:
                await asyncio.sleep(0.5)
            else:
                return

    def move(self, server: str | None) -> None:
        """`replicar move`: give the machine to that process server, or to whichever the config server chooses."""

        async def ask(client: ControlClient) -> None:
            found = await client.move(self.machine, server)
            self.world.note(f"{self.machine} is with {found.process_server} now")

        self.operate(f"move to {server}", ask)

    async def ask_for_mark(self, name: str) -> None:
        """Ask for a point, once; what became of it is in `marks`."""
        self.marks[name] = "asked for"

        async def ask(client: ControlClient) -> None:
            try:
                await client.mark(self.machine, name, wait_stored=True, wait_seconds=MARK_SECONDS)
            except ReplicarError as error:
                self.marks[name] = type(error).__name__
            else:
                self.marks[name] = "stored"

        self.operate(f"mark {name}", ask)

    # --- faults ---

    async def inject(self, fault: Fault) -> None:
        self.faults_injected += 1
        self.world.note(f"fault: {fault.kind}{f' for {fault.seconds:g} s' if fault.seconds else ''}")
        draw = random.Random(f"{self.story.seed} fault {fault.number}")
        await CATALOGUE[fault.kind].inject(self, draw, fault.seconds)

    def heal(self) -> None:
        """Mend whatever is broken between and below the parts."""
        world = self.world
        world.note("everything is mended")
        for one in [*world.machines, STORAGE]:
            for other in [*world.machines, STORAGE]:
                if one != other:
                    world.network.reopen(one, other)
        for name in world.calls.devices:
            world.calls.devices[name] = Device()
        world.blobs.weather = Weather()
        world.blobs.restore_container()
        draw = world.draw("threads again")
        world.loop.delays = lambda: draw.expovariate(1 / 0.0005)
        for name, seconds in self.jumped.items():
            world.clocks[name].jump(-seconds)
        self.jumped.clear()

    # --- inside ---

    def _start_config(self) -> None:
        def listening(found: ControlService) -> None:
            self.config = found

        async def main(process: Process) -> None:
            await parts.run_config(process, self.world.clocks[cast.CONFIG_SERVER], self.world.services, listening)

        self.config_process = self.world.start(cast.CONFIG_SERVER, "config-server", main)
        self.supervise(self.config_process, self._start_config)

    def _start_server(self, name: str) -> None:
        stop = asyncio.Event()
        seed = self._supervision.getrandbits(32)

        async def main(process: Process) -> None:
            await parts.run_server(process, self.story.server, self.world.clocks[name], self.world.blobs, stop, seed)

        process = self.world.start(name, "process-server", main)
        self._servers[name] = (process, stop)
        self.supervise(process, lambda: self._start_server(name))

    def _start_agent(self) -> None:
        seed = self._supervision.getrandbits(32)

        async def main(process: Process) -> None:
            running = self.agent = parts.RunningAgent(process)
            await parts.run_agent(running, self.story.agent, self.world.clocks[self.machine], seed)

        self.agent_process = self.world.start(self.machine, "agent", main)
        self.agent_process.identity = getattr(self, "_who", self.agent_process.identity)
        self.supervise(self.agent_process, self._start_agent)

    def supervise(self, process: Process, start: Callable[[], None]) -> None:
        """Have a process started again when it ends; an end that is no declared error breaks a promise.

        What a power cut ends is started by the next boot, and not by the supervisor of an earlier one as well.
        """
        boot = process.machine.boot

        def ended() -> None:
            if process is self.agent_process:
                self.next_sequence()
                self.core = None
            error = process.error
            if error is not None:
                self.world.note(f"{process} ended: {type(error).__name__}: {error}")
                if not isinstance(error, ReplicarError):
                    self.violated(f"{process} failed with {described(error)}")
            if process.machine.is_up:
                delay = self._supervision.uniform(*RESTART_SECONDS)
                self.world.loop.call_later(delay, again, context=_NOBODY)

        def again() -> None:
            if process.machine.is_up and process.machine.boot == boot:
                start()

        process.on_death = ended

    def _make_disk(self, disk: DiskPlan) -> None:
        draw = self.world.draw(f"content of {disk.name}")
        image = bytearray(disk.size_bytes)
        sectors = disk.size_bytes // SECTOR_BYTES
        filled = int(sectors * disk.filled_share)
        while filled > 0:
            first = draw.randrange(sectors)
            end = min(first + draw.randint(8, 512), sectors)
            image[first * SECTOR_BYTES : end * SECTOR_BYTES] = make(
                self.story.seed, self._numbers.next(), 0, first, end
            )
            filled -= end - first
        for begin, end in disk.free:
            garbage = make(self.story.seed, self._numbers.next(), 0, begin // SECTOR_BYTES, end // SECTOR_BYTES)
            image[begin:end] = garbage
        content = bytes(image)
        path = self.world.machines[self.machine].directory / f"{disk.name}.img"
        self.world.machines[self.machine].files.put(
            path, disk.size_bytes, {at // PAGE: content[at : at + PAGE] for at in range(0, len(content), PAGE)}
        )
        self.truths[disk.name] = Truth(self.story.seed, content, self.world.loop.time, disk.free)

    @asynccontextmanager
    async def observed(self, *args: Any, **options: Any) -> AsyncIterator[Core]:
        """`open_core`, with the stage looking on."""
        async with open_core(*args, **options) as opened:
            if self.neighbour is not None and (process := current()) and process.machine.name == self.neighbour.machine:
                self.neighbour.opened(opened)
            else:
                self._opened(opened)
            yield opened

    def _opened(self, opened: Core) -> None:
        self.core = opened
        began = opened.log.next_sequence if opened.log.survived else opened.log.state.anew_sequence
        for disk, truth in self.truths.items():
            truth.stream_goes_on(began)
            for wrong in truth.differences(self.image(disk)):
                self.violated(f"when the agent has started, on disk {disk} {wrong}")
        trim = opened.log.trim

        def watched(stored_sequence: int) -> None:
            reached = self.ledger.stored_until(self.machine_id)
            if stored_sequence > reached:
                self.violated(f"the agent trims up to {stored_sequence}, and storage has {reached}")
            trim(stored_sequence)

        opened.log.trim = watched  # type: ignore[method-assign]

    @contextmanager
    def standing(self) -> Iterator[None]:
        """While the story is told."""
        asked = (asking, "free_space", free_space.said_by(self.story))
        with replaced((service, "open_core", self.observed), asked, *folder.SPANS):
            yield

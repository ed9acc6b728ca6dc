"""The world put together: five machines, their processes, and one loop that all of them share.

    db1                a protected machine: its agent, and the application that writes to its disks
    ps1, ps2           process servers
    config             the config server
    storage            page blobs

A story may add machines (`add`): a worker's, another protected one.

Everything that is drawn comes from streams of one seed, one for each thing, so that drawing more often here changes
nothing there. `note` keeps the trace: a line for everything that happened, with its virtual time, from which `digest`
follows; two runs of one seed have the same.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from mobility_agent import core
from mobility_agent.capture import connection
from replicar.control import client
from simulator.world import cast
from simulator.world.blobs import STORAGE, BlobService
from simulator.world.calls import Calls, Device
from simulator.world.clocks import MachineClock
from simulator.world.control import ControlService, ControlTransport
from simulator.world.files import FileSystem
from simulator.world.loop import VirtualLoop
from simulator.world.network import VirtualNetwork
from simulator.world.processes import Killed, Machine, Process, current
from simulator.world.replaced import replaced
from simulator.world.versions import Versions

#: The longest trace that is kept line by line; the digest is of all lines.
TRACE_LINES: Final = 20_000


class World:
    """See the module; `standing` makes one and takes it down."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.seed = seed
        self.directory = directory
        self.loop = VirtualLoop(self.draw("threads"))
        self.calls = Calls(self.draw("entropy"))
        self.machines: dict[str, Machine] = {}
        self.clocks: dict[str, MachineClock] = {}
        self.services: dict[str, ControlService] = {}
        self.versions = Versions()
        self.trace: list[str] = []
        self._digest = hashlib.sha256()
        self._processes: list[Process] = []
        self.network = VirtualNetwork(self.loop, self.draw("network"), self.note)
        self.loop.network = self.network
        self.blobs = BlobService(self.loop, self.draw("storage"), self.note, self.count)
        self.blobs.is_open = lambda machine: (
            self.network.is_open(machine, STORAGE) and self.network.is_open(STORAGE, machine)
        )
        for name in (*cast.MACHINES[:1], *cast.SERVERS, cast.CONFIG_SERVER):
            self.add(name)

    def draw(self, name: str) -> random.Random:
        """A stream of randomness of that name."""
        return random.Random(f"{self.seed} {name}")

    def note(self, what: str) -> None:
        """It happened now."""
        line = f"{self.loop.time():11.6f}  {what}".replace(str(self.directory), "")
        self._digest.update(line.encode())
        if len(self.trace) < TRACE_LINES:
            self.trace.append(line)

    def count(self, what: str) -> None:
        """It happened now, and is too small for the trace: it goes into the digest."""
        self._digest.update(f"{self.loop.time():.9f} {what}".encode())

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    # --- machines and processes ---

    def add(self, name: str) -> None:
        """Another machine, before anything happens."""
        place = self.directory / name
        files = FileSystem(place, self.draw(f"disk of {name}"))
        self.machines[name] = self.network.machines[name] = Machine(name, place, files)
        draw = self.draw(f"clock of {name}")
        self.clocks[name] = MachineClock(
            self.loop, drift=draw.uniform(-200e-6, 200e-6), offset_seconds=draw.uniform(-0.5, 0.5)
        )
        self.calls.devices[name] = Device()
        if name == cast.CONFIG_SERVER:
            cast.copy("vault", place / "vault")
        elif name in cast.SERVERS:
            cast.copy(name, place / "state")
        elif name in cast.MACHINES:
            cast.copy(name, place / "state" / "identity")
        files.adopt()

    def start(self, machine: str, name: str, main: Callable[[Process], Coroutine[Any, Any, None]]) -> Process:
        """Start a program on a machine."""
        process = Process(self.machines[machine], name, self.loop)
        self._processes.append(process)
        self.versions.started(process)
        process.identity = cast.who(machine) if machine in (*cast.MACHINES, *cast.SERVERS) else None
        self.note(f"{process} starts")
        process.start(main(process))
        return process

    def kill(self, process: Process) -> None:
        """SIGKILL."""
        if process.alive:
            self.note(f"{process} is killed")
            process.kill()

    def power_off(self, machine: str) -> None:
        """A machine loses its power: all of its processes, and what its disk had not."""
        host = self.machines[machine]
        self.note(f"{machine} loses power")
        host.is_up = False
        for process in list(host.processes):
            process.kill()
        host.files.cut()

    def power_on(self, machine: str) -> None:
        host = self.machines[machine]
        host.boot += 1
        host.is_up = True
        self.note(f"{machine} is up again")

    def shut(self, one: str, other: str) -> None:
        """Nothing passes between two machines."""
        self.network.shut(one, other)
        self.network.shut(other, one)

    def reopen(self, one: str, other: str) -> None:
        self.network.reopen(one, other)
        self.network.reopen(other, one)

    # --- its end ---

    def take_down(self) -> None:
        """Nobody lives on, and nothing of the story is left."""
        for process in self._processes:
            if process.alive:
                process.kill()
        for process in self._processes:
            process.bury()


@contextmanager
def standing(seed: int) -> Iterator[World]:
    """A world while the block runs; afterwards nothing of it is left."""
    cast.template()
    directory = Path(tempfile.mkdtemp(prefix="replicar-world-", dir=cast.memory_directory()))
    world = World(seed, directory)
    state = random.getstate()
    random.seed(seed)
    ControlTransport.network, ControlTransport.services = world.network, world.services
    collecting = gc.isenabled()
    gc.disable()
    asyncio.set_event_loop(world.loop)
    try:
        with world.calls.installed(), replaced(*_names(world)):
            try:
                yield world
            finally:
                with suppress(Killed):
                    world.take_down()
    finally:
        random.setstate(state)
        asyncio.set_event_loop(None)
        world.loop.set_exception_handler(lambda _, context: None)
        world.loop.close()
        shutil.rmtree(directory, ignore_errors=True)
        if collecting:
            gc.enable()


def _names(world: World) -> tuple[tuple[Any, str, Any], ...]:
    return (
        (client, "Transport", ControlTransport),
        (core, "boot_id", _boot_id),
        (connection, "has_left", lambda end: end.is_left),
        *world.versions.names(),
    )


def _boot_id() -> bytes:
    process = current()
    assert process is not None, "only processes ask for the boot id"
    return process.machine.boot_id

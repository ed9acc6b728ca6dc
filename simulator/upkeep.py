"""The machine's log being kept up while a story is told, and what is left of it judged.

Storage is watched from inside (`WatchedStore` keeps its own copy of whatever a log blob was given, and takes nothing of
it back), so the truth about the stream does not depend on what was folded away. Against it is held:

- whatever is freed: the floor and every state that a fold keeps open to the last chunk afterwards, after each sweep;
- at the end, when the worker has had a last undisturbed round: every state that is kept recovers to the disk as it
  may have been at that very sequence; what was thinned is refused, and by the catalogue too;
- nothing of the policy's window is given up, and of every stretch before it the best named point is there.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from recovery.chunks import MachineLog
from recovery.keeping import check_kept
from recovery.upkeep import KeptUp
from replicar.errors import CorruptionError, ReplicarError
from replicar.log.index import Fold, open_index
from replicar.log.tail import Stored
from simulator import registered
from simulator.reader import PLACE as READER, read_for_ever
from simulator.world import cast
from simulator.world.folder import fold_once, run_by_hand, run_worker
from simulator.world.processes import Process

if TYPE_CHECKING:
    from simulator.stage import Stage

#: Virtual seconds within which the last round has to be done, once all is mended: whoever died may hold the lock.
REST_SECONDS: Final = 240.0
#: An operator folds by hand after so long, again and again.
BY_HAND_SECONDS: Final = (2.0, 10.0)
LOOK_SECONDS: Final = 0.5
_WORKER: Final = "recovery-worker"
_BY_HAND: Final = "fold by hand"


class Upkeep:
    """The worker of one story, and the operator and the reader beside it if there are any."""

    def __init__(self, stage: Stage) -> None:
        assert stage.story.upkeep is not None
        self.plan = stage.story.upkeep
        self.worker = f"{cast.WORKER}/{_WORKER}"  # its place
        self._stage = stage
        self._draw = stage.world.draw("upkeep")
        self._processes: dict[str, Process] = {}
        self._busy: set[Process] = set()
        self._resting = self._rested = False
        self._freed = 0  # of what the ledger saw, up to the last look
        stage.world.add(cast.WORKER)
        stage.ledger.keep_copy()

    def start(self) -> None:
        """All of them."""
        self._start_worker()
        if self.plan.by_hand:
            self._start_by_hand()
        if self.plan.reader:
            self._start_reader()

    def folders(self) -> list[Process]:
        """Who folds and is alive."""
        return [process for name, process in self._processes.items() if process.alive and name != READER]

    def reader(self) -> Process | None:
        """Who reads."""
        return self._processes.get(READER)

    def restart_worker(self) -> None:
        """SIGTERM, which a worker knows no end of its own for; it is started again."""
        self._stage.world.kill(self._processes[_WORKER])

    async def fold(self) -> Fold:
        """The one that is in force."""
        log = self._log()
        return (await open_index(log.store, log.machine_id, log.keys)).fold if log is not None else Fold()

    async def look(self) -> None:
        """If something was freed since the last look: whether all that is kept still opens."""
        freed = self._stage.ledger.freed
        if freed == self._freed or (log := self._log()) is None:
            return
        with suppress(ReplicarError):  # the container is away; it is looked at again
            known = await open_index(log.store, log.machine_id, log.keys)
            _, _, problems = await check_kept(log, known)
            if problems and (await self.fold()).generation == known.fold.generation:
                self._stage.violated(f"what fold {known.fold.generation} keeps was freed: {problems[0].text}")
            self._freed = freed

    async def rest(self) -> None:
        """Have a last round done, begun after all was mended and told to the config server; then nobody is at it."""
        stage, self._resting = self._stage, True
        clock = stage.world.loop.time
        began = clock()
        while not (self._rested and not self._is_busy() and await self._is_told()):
            if clock() - began > REST_SECONDS:
                stage.violated(f"folding does not come to rest: fold {(await self.fold()).generation}")
                break
            await asyncio.sleep(LOOK_SECONDS)
        await self.look()
        for process in self._processes.values():
            process.on_death = lambda: None
            stage.world.kill(process)

    def _is_busy(self) -> bool:
        return any(process.alive for process in self._busy)

    async def _is_told(self) -> bool:
        """Whether the config server knows of the fold that is in force."""
        told = registered.retention(self._stage.world, self._stage.machine_id)
        return (told.generation if told is not None else 0) == (await self.fold()).generation

    def _log(self) -> MachineLog | None:
        """As the service itself has it; None before the machine is protected, or while the container is away."""
        keys = registered.machine_keys(self._stage.world, self._stage.machine)
        store = self._stage.world.blobs.inner
        if keys is None or store._blobs is None:
            return None
        return MachineLog(store, self._stage.machine_id, keys)

    # --- who is at it ---

    async def _round(self, process: Process, log: MachineLog, stored: Stored) -> KeptUp:
        """One round, noted."""
        begun_at_rest = self._resting
        self._busy.add(process)
        try:
            kept = await fold_once(log, stored, self.plan, self._stage.world.clocks[cast.WORKER])
        except ReplicarError as error:
            self._stage.world.note(f"{process} does not fold: {type(error).__name__}: {error}")
            if isinstance(error, CorruptionError) and "version" not in error.fields:
                self._stage.violated(f"{process} finds the log damaged: {error}")
            raise
        finally:
            self._busy.discard(process)
        self._stage.world.note(f"{process}: {kept.folded}")
        self._rested |= begun_at_rest
        return kept

    def _start_worker(self) -> None:
        stage, seed = self._stage, self._draw.getrandbits(32)
        world = stage.world

        async def main(process: Process) -> None:
            async def fold(log: MachineLog, stored: Stored) -> KeptUp:
                return await self._round(process, log, stored)

            await run_worker(process, self.plan, world.clocks[cast.WORKER], world.blobs, seed, fold)

        self._started(_WORKER, world.start(cast.WORKER, _WORKER, main))

    def _start_by_hand(self) -> None:
        stage, seed, pause = self._stage, self._draw.getrandbits(32), self._draw.uniform(*BY_HAND_SECONDS)
        world = stage.world

        async def main(process: Process) -> None:
            async def fold(log: MachineLog, stored: Stored) -> KeptUp:
                return await self._round(process, log, stored)

            await asyncio.sleep(pause)
            if not self._resting:
                await run_by_hand(process, world.clocks[cast.WORKER], world.blobs, seed, fold)

        self._started(_BY_HAND, world.start(cast.WORKER, _BY_HAND, main))

    def _start_reader(self) -> None:
        async def main(process: Process) -> None:
            await read_for_ever(self._stage, process, self._draw)

        self._started(READER, self._stage.world.start(cast.WORKER, READER, main))

    def _started(self, name: str, process: Process) -> None:
        self._processes[name] = process
        starts = {_WORKER: self._start_worker, _BY_HAND: self._start_by_hand, READER: self._start_reader}
        self._stage.supervise(process, starts[name])

"""A real folding process on a real Azurite, killed by SIGKILL: run again, it ends where it should have.

Its twin is never killed: the same story in memory, folded at the same times. Both have to keep the same states.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from typing import Any, Final

import pytest

from recovery.lock import STALE_SECONDS
from recovery.upkeep import keep_up
from replicar.log.index import open_index
from replicar.log.tail import Stored
from replicar.storage import MemoryStore, PageBlobStore, StorageTarget
from tests.recovery.folding_process import WHEN
from tests.recovery.scene import NS, POLICY, Scene, copied

#: Requests of a run on these logs, roughly; a kill that comes too late is none, and then another is tried.
OPERATIONS: Final = 150


class Killed:
    """A log on Azurite that processes fold, and its twin in memory, which is folded at the same times."""

    def __init__(self, seed: int, target: StorageTarget, store: PageBlobStore) -> None:
        self._scene = Scene(seed, begin_ns=time.time_ns())
        self._target, self._store, self._random = target, store, random.Random(f"kills {seed}")

    async def begin(self) -> None:
        """Half of the log is indexed and thinned; the rest is new, and what was given up may be freed."""
        await self._scene.begin(12)
        await self._scene.fold()
        await self._scene.go_on(4)
        await copied(self._scene.store, self._store)

    async def kill_one(self) -> bool:
        """A run that dies somewhere, another one later: then the log has what the twin has. Whether it died."""
        began_ns = time.monotonic_ns()
        died = await self._fold(self._random.randrange(OPERATIONS), self._random.choice(WHEN))
        took_ns = time.monotonic_ns() - began_ns  # its clock went on meanwhile, and its hold is as young as its end
        await self._check()  # with the dead one's work half done
        self._scene.clock.ns += (STALE_SECONDS + 1) * NS + took_ns
        for _ in range(2):
            assert not await self._fold()
            await self._fold_twin()
            self._scene.pause()
        floor, kept = await self._check()
        twin = await self._scene.current()
        assert floor == twin.floor_sequence
        assert kept == [item.checkpoint.first for item in twin.kept]
        return died

    async def _fold(self, kill_at: int | None = None, when: str = "") -> bool:
        """A process folds the log; whether it was killed."""
        builder = self._scene.builder
        order: dict[str, Any] = {
            "target": _plain(self._target),
            "machine_id": str(builder.machine_id),
            "key": builder.key.hex(),
            "number": builder.number - 1,
            "digest": builder.previous.hex(),
            "offset_ns": self._scene.clock.ns - time.time_ns(),
            "kill_at": kill_at,
            "when": when,
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.recovery.folding_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate(json.dumps(order).encode())
        if process.returncode == -signal.SIGKILL:
            return True
        assert process.returncode == 0
        assert "generation" in json.loads(out)
        return False

    async def _check(self) -> tuple[int, list[int]]:
        """Every offered point is as it should be: in a copy of what is in Azurite, which is read faster. Its fold."""
        copy = MemoryStore()
        await copied(self._store, copy)
        await self._scene.check(copy)
        builder = self._scene.builder
        fold = (await open_index(copy, builder.machine_id, builder.log.keys)).fold
        return fold.floor_sequence, [item.checkpoint.first for item in fold.kept]

    async def _fold_twin(self) -> None:
        builder, clock = self._scene.builder, self._scene.clock
        stored = Stored(builder.number - 1, 0, builder.previous)
        await keep_up(builder.log, POLICY, clock=clock, random=self._scene.bytes, stored=stored, every=2)


def _plain(target: StorageTarget) -> dict[str, Any]:
    fields = target.model_dump(mode="json", exclude_none=True)
    key = target.account_key
    return {**fields, "account_key": key.get_secret_value() if key is not None else None}


async def killed_once(seed: int, target: StorageTarget, store: PageBlobStore) -> bool:
    killed = Killed(seed, target, store)
    await killed.begin()
    return await killed.kill_one()


async def test_a_folding_process_that_is_killed_on_azurite_ends_where_it_should_have(
    target: StorageTarget, azurite_store: PageBlobStore
) -> None:
    assert await killed_once(1, target, azurite_store)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(200))
async def test_folding_processes_killed_at_200_instants_end_where_they_should_have(
    target: StorageTarget, azurite_store: PageBlobStore, seed: int
) -> None:
    await killed_once(100 + seed, target, azurite_store)

"""A container that is away for a moment, deleted by mistake and restored, says nothing about its blobs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from recovery.folding import ORPHAN_SECONDS
from recovery.lock import STALE_SECONDS
from replicar.errors import PermanentError
from replicar.log.index import open_index
from replicar.storage.outcomes import missing
from tests.recovery.scene import NS, Scene


class AwayStore:
    """A store whose container is not there for one request, the `step`th that reads; `met`: whether that came."""

    def __init__(self, inner: Any, step: int) -> None:
        self._inner, self._left = inner, step
        self.met = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("read", "list", "properties", "page_ranges"):
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == -1:
                self.met = True
                raise missing(name, "logs", None)
            return await found(*arguments, **options)

        return call


@pytest.mark.parametrize("step", range(3, 150, 15))
async def test_folding_gives_nothing_up_when_the_container_is_away_for_one_answer(step: int) -> None:
    scene = await Scene(11).begin(24)
    await scene.fold()
    await scene.live(10)
    scene.clock.ns += 2 * ORPHAN_SECONDS * NS  # whatever was never finished may be removed by now
    known = await open_index(scene.store, scene.builder.machine_id, {1: scene.builder.key})
    away = AwayStore(scene.store, step)
    with suppress(PermanentError):
        await scene.folder(away).run()
        assert not away.met, "it took the container's absence for something else"
    await scene.check()
    now = await open_index(scene.store, scene.builder.machine_id, {1: scene.builder.key})
    assert {name for name in known.listing.checkpoints if now.fold.offers(name)} <= set(now.listing.checkpoints)
    scene.clock.ns += (STALE_SECONDS + 1) * NS
    await scene.fold()
    await scene.check()


async def test_of_such_a_folding_a_hundred_requests_read() -> None:
    scene = await Scene(11).begin(24)
    await scene.fold()
    await scene.live(10)
    counted = AwayStore(scene.store, 100)
    with pytest.raises(PermanentError, match="there is no container"):
        await scene.folder(counted).run()

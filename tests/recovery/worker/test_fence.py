"""A failover keeps older writers out of the log, and leaves it as readable as it was."""

from __future__ import annotations

import pytest

from recovery.fence import fence
from replicar.errors import FencedError
from tests.process_server.test_logwriter import MACHINE, a_store, numbers, opened


async def test_whoever_was_writing_is_refused_and_what_was_written_stays() -> None:
    store = await a_store()
    pen = await opened(store)
    await pen.write(3)
    await fence(store, MACHINE, 2)
    with pytest.raises(FencedError):
        await pen.write()
    assert await numbers(store) == [1, 2, 3]


async def test_a_writer_that_comes_back_under_its_old_epoch_is_refused() -> None:
    store = await a_store()
    pen = await opened(store)
    await pen.write(2)
    await fence(store, MACHINE, 2)
    with pytest.raises(FencedError):
        await opened(store)
    assert await numbers(store) == [1, 2]


async def test_fencing_again_changes_nothing_and_the_next_epoch_goes_on() -> None:
    store = await a_store()
    pen = await opened(store)
    await pen.write(2)
    for _ in range(3):
        await fence(store, MACHINE, 2)
    following = await opened(store, epoch=3)
    await following.write(2)
    assert await numbers(store) == [1, 2, 3, 4]


async def test_a_worker_that_was_away_fences_nobody_who_came_after_it() -> None:
    store = await a_store()
    pen = await opened(store, epoch=3)
    with pytest.raises(FencedError, match="a writer of epoch 3 already"):
        await fence(store, MACHINE, 2)
    await pen.write()
    assert await numbers(store) == [1]


async def test_a_log_that_nobody_wrote_yet_is_fenced_too() -> None:
    store = await a_store()
    await fence(store, MACHINE, 2)
    with pytest.raises(FencedError):
        await opened(store)

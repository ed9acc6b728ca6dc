"""A machine that is taken away at the very moment when its pipeline fails."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from process_server.machine import Tuning
from process_server.sealer import Sealer
from replicar.errors import PermanentError
from replicar.storage import MemoryStore
from replicar.storage.store import Pages
from tests.process_server.support import SMALL_BLOBS, Site, running

MIB = 1 << 20


class Refusing(MemoryStore):
    """Refuses one segment, once `is_bad`."""

    is_bad = False

    def __init__(self) -> None:
        super().__init__("refusing")
        self.refused = asyncio.Event()

    async def put_pages(self, name: str, offset: int, data: Pages, **options: Any) -> None:
        if self.is_bad and len(data) > 4096:
            self.is_bad = False
            await asyncio.sleep(0.1)
            self.refused.set()
            raise PermanentError("the service answered 403 once", reason="forbidden")
        await super().put_pages(name, offset, data, **options)


async def test_it_goes_although_it_was_failing_when_it_was_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site.make(tmp_path)
    store, seal, slow = Refusing(), Sealer.seal, 0

    def sealing(self: Sealer, *args: Any, **options: Any) -> Any:
        nonlocal slow
        slow += store.is_bad or slow > 0
        if slow > 2:
            time.sleep(0.5)  # as a segment at one of the higher levels takes
        return seal(self, *args, **options)

    monkeypatch.setattr(Sealer, "seal", sealing)
    tuning = Tuning(segment_age_seconds=0.02, log=SMALL_BLOBS, reopen_seconds=0.3)
    async with asyncio.timeout(20), running(site, store, tuning=tuning) as server:
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=agent.fill(1))
        last = agent.fill(8, size=MIB)
        store.is_bad = True
        sending = asyncio.create_task(agent.run(until_stored=last))
        await store.refused.wait()
        await asyncio.sleep(0.01)  # the pipeline waits for what is being sealed
        first = site.assignment()
        slow = 0
        await server.roster.apply([replace(first, writer=replace(first.writer, key_id=8))])
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

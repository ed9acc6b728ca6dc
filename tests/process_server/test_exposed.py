"""What a process server counts for Prometheus, while storage stands still, fails for a while, and goes on."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from process_server import pipeline
from process_server.exposed import page
from process_server.health import ServerHealth
from tests.process_server.sender import START_NS
from tests.process_server.stores import GatedStore
from tests.process_server.support import Running, Site, running

STORY_SECONDS = 60
_MACHINE = "replicar_process_server_machine"


def families(server: Running, site: Site) -> dict[str, Any]:
    health = ServerHealth(
        time_ns=time.time_ns(),
        host="127.0.0.1",
        port=server.port,
        cache_bytes=server.slots.total_bytes,
        cache_bytes_free=server.slots.free_bytes,
        machines=(server.machine(site.machine.id).health(),),
        cache_level=str(server.slots.level),
    )
    text = page(health, server.workshop, connections=1, retries={}).render()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(found: dict[str, Any], name: str, **labels: str) -> float:
    [sample] = [s for s in found[name].samples if labels.items() <= s.labels.items()]
    return float(sample.value)


def count(found: dict[str, Any], name: str) -> float:
    [number] = [s.value for s in found[name].samples if s.name.endswith("_count")]
    return float(number)


async def test_what_is_in_transit_shows_where_it_is_and_how_old_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "RETRY_SECONDS", 0.01)
    site, store = Site.make(tmp_path), GatedStore()
    async with asyncio.timeout(STORY_SECONDS), running(site, store, cache_slots=8) as server:
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=agent.fill(1))
        calm = families(server, site)
        assert value(calm, f"{_MACHINE}_rpo_seconds") == 0
        assert [s.value for s in calm[f"{_MACHINE}_transit_bytes"].samples] == [0, 0, 0]
        segments = count(calm, "replicar_process_server_upload_seconds")
        assert segments == value(calm, f"{_MACHINE}_segments") > 0

        store.gate.clear()
        store.failures = 2
        last = agent.fill(30, size=1 << 20, compressible=False)  # more than the cache lets it have
        sending = asyncio.create_task(agent.run(until_stored=last))
        machine = server.machine(site.machine.id)
        while not (machine.counters.waits and machine.health().uploading_bytes):
            await asyncio.sleep(0.01)
        stuck = families(server, site)
        assert value(stuck, f"{_MACHINE}_transit_bytes", stage="uploading") > 0
        pending = sum(sample.value for sample in stuck[f"{_MACHINE}_transit_bytes"].samples)
        assert pending == machine.health().pending_bytes
        since_capture = max(time.time_ns() - START_NS, 0) / 1e9
        assert value(stuck, f"{_MACHINE}_rpo_seconds") == pytest.approx(since_capture, abs=STORY_SECONDS)

        store.gate.set()
        await sending
        done = families(server, site)
        assert value(done, f"{_MACHINE}_rpo_seconds") == 0
        assert 1 <= value(done, f"{_MACHINE}_upload_failures") <= 2  # one that ends with another is counted with it
        assert value(done, f"{_MACHINE}_waits") >= 1
        assert value(done, f"{_MACHINE}_waited_seconds") > 0
        segments = value(done, f"{_MACHINE}_segments")
        assert count(done, "replicar_process_server_upload_seconds") == segments
        assert count(done, "replicar_process_server_capture_to_stored_seconds") == segments
        assert count(done, "replicar_process_server_cache_commit_seconds") > 0

"""The whole agent in this process, against a real config server: what an operator and an application see of it."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from config_server.foundation import found_vault
from mobility_agent.changelog import ChangeLog
from mobility_agent.control import Control
from mobility_agent.service import Service
from mobility_agent.settings import AgentSettings
from mobility_agent.state import StateDirectory
from replicar.control.identity import Role
from replicar.errors import PermanentError, TransientError
from replicar.formats import record
from replicar.formats.frame import Kind
from replicar.nbd.client import NbdClient
from tests.config_server.support import House, SetClock, running
from tests.mobility_agent.core import MIB, replay
from tests.mobility_agent.wire_server import WireServer

DISK_BYTES = 8 * MIB


class Site:
    """A machine with one disk, a config server and a process server, all real but the process server."""

    def __init__(self, directory: Path, house: House, server: WireServer, stack: AsyncExitStack) -> None:
        self.directory, self.house, self.server, self.config = directory, house, server, stack
        self.image = directory / "root.img"
        self.socket = directory / "n.sock"

    def settings(self, **fields: Any) -> AgentSettings:
        disks = [{"name": "root", "path": str(self.image), "nbd": str(self.socket)}]
        chosen: dict[str, Any] = {
            "directory": self.directory / "agent",
            "disks": disks,
            "journal_bytes": 64 * MIB,
            "journal_file_bytes": 4 * MIB,
            "heartbeat_seconds": 0.3,
            "audit_bytes_per_second": 0,  # what these stories count is what they wrote
            "mark_every_seconds": 0,
        }
        return AgentSettings.model_validate(chosen | fields)

    @asynccontextmanager
    async def agent(self, **fields: Any) -> AsyncIterator[Service]:
        """The agent, serving its disk; stopped in good order at the end."""
        service, stop = Service(self.settings(**fields)), asyncio.Event()
        task = asyncio.create_task(service.run(stop))
        ready = asyncio.create_task(service.ready.wait())
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if task.done():
            task.result()
        try:
            yield service
        finally:
            stop.set()
            await asyncio.wait_for(task, 20)

    async def protect(self) -> None:
        async with self.house.operator() as operator:
            await operator.protect("db1")

    def status(self) -> dict[str, Any]:
        """What the agent last wrote down; it is there a moment after the disks are served."""
        state = StateDirectory(self.directory / "agent")
        return state.load_status() if state.status_file.exists() else {"state": "", "sender": {}, "config_server": {}}

    async def until(self, held: Callable[[], Any], *, seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not held():
                await asyncio.sleep(0.02)

    async def replicated(self) -> None:
        """Return when the frames at the process server make the disk as it is now."""
        await self.until(lambda: replay(self.server.frames, DISK_BYTES) == self.image.read_bytes())

    def marks(self) -> list[record.Mark]:
        """The marks at the process server, in their order."""
        return [
            record.read_mark(found.payload[place : place + length])
            for found in self.server.frames
            for _, length, _, place, _, kind, _ in found.table.tolist()
            if kind == Kind.MARK
        ]


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vault") / "vault"
    found_vault(directory, "demo", address="127.0.0.1:443", listen="127.0.0.1", port=443, clock=SetClock())
    return directory


@pytest.fixture
async def site(tmp_path: Path, founded: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        config = await stack.enter_async_context(AsyncExitStack())
        shutil.copytree(founded, tmp_path / "vault")
        house = await config.enter_async_context(running(tmp_path / "vault", SetClock()))
        identity = await house.enrol(tmp_path / "ps", "ps1", Role.PROCESS_SERVER)
        server = await stack.enter_async_context(WireServer(identity).running())
        server.store_all = True
        async with house.client(identity) as client:
            await client.process_server_heartbeat(house.server_heartbeat(port=server.port))
        await house.enrol(tmp_path / "agent" / "identity", "db1")
        (tmp_path / "root.img").write_bytes(random.Random(3).randbytes(3 * MIB) + bytes(DISK_BYTES - 3 * MIB))
        yield Site(tmp_path, house, server, config)


async def test_a_disk_is_replicated_while_it_is_written_and_the_operator_can_see_it(site: Site) -> None:
    async with site.agent() as service, await NbdClient.connect(site.socket, export="root") as client:
        await client.write(4096, b"before protection" + bytes(512 - 17))
        await site.protect()
        draw = random.Random(1)
        for _ in range(200):
            await client.write(draw.randrange(0, DISK_BYTES - 4096, 512), draw.randbytes(4096))
        await client.flush()
        await site.replicated()
        await site.until(lambda: site.status()["state"] == "protected")
        await site.until(lambda: service.metrics.rpo_seconds == 0.0)
        async with site.house.operator() as operator:
            await asyncio.sleep(0.7)  # two heartbeats
            machine = await operator.machine("db1")
            points = await operator.points("db1")
        assert machine.state == "protected"
        assert machine.online
        assert machine.stored_sequence == site.server.stored
        assert machine.seed_done_bytes == machine.seed_total_bytes == DISK_BYTES
        assert machine.bytes_captured > 200 * 4096
        assert machine.bytes_sent > 200 * 4096
        (gap,) = points.gaps
        assert gap.reason == "initial replication"
        assert gap.last_sequence is not None
        assert points.ordered_from is not None
        assert points.ordered_from[0] == gap.last_sequence
        assert points.ordered_until_ns is not None
        assert points.ordered_from[1] < points.ordered_until_ns < time.time_ns()
    status = site.status()
    assert status["state"] == "stopped"
    assert status["disks"][0]["nbd"] == str(site.socket)
    async with site.house.operator() as operator:
        assert (await operator.machine("db1")).state == "stopped"


async def test_audits_and_points_by_the_clock_are_made_unless_they_are_switched_off(site: Site) -> None:
    await site.protect()
    async with site.agent():
        await site.until(lambda: site.status()["state"] == "protected")
        await asyncio.sleep(1.2)
        assert site.status()["audit"] is None
    kinds = {kind for found in site.server.frames for *_, kind, _ in found.table.tolist()}
    assert not kinds & {Kind.AUDIT, Kind.MARK}
    async with site.agent(audit_bytes_per_second=32 * MIB, mark_every_seconds=1):
        await site.until(lambda: (site.status().get("audit") or {}).get("last_ended_ns") is not None)
        await site.until(lambda: len(site.marks()) >= 2)
        await asyncio.sleep(0.7)  # two heartbeats
        async with site.house.operator() as operator:
            machine, points = await operator.machine("db1"), (await operator.points("db1")).points
    assert machine.audit is not None
    assert machine.audit.bytes_per_second == 32 * MIB
    assert machine.audit.last_ended_ns is not None
    assert machine.audit.total_bytes == DISK_BYTES
    assert len(points) >= 2
    assert all(re.fullmatch(r"auto-\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", point.name) for point in points)


async def test_a_mark_asked_for_is_in_the_stream_and_becomes_stored(site: Site) -> None:
    await site.protect()
    async with site.agent(), await NbdClient.connect(site.socket) as client:
        await site.until(lambda: site.status()["state"] == "protected")
        async with site.house.operator() as operator:
            await client.write(0, b"\1" * 512)
            point = await operator.mark("db1", "before upgrade", wait_stored=True, wait_seconds=20)
            assert point.stored
            with pytest.raises(PermanentError, match="a recovery point named 'before upgrade' already"):
                await operator.mark("db1", "before upgrade", wait_seconds=20)
            points = await operator.points("db1")
        assert [item.name for item in points.points] == ["before upgrade"]
        assert [item.name for item in site.marks()] == ["before upgrade"]
        at = next(found for found in site.server.frames if found.header.first_sequence == point.sequence)
        assert at.table["kind"].tolist() == [Kind.MARK]


async def test_replication_goes_on_and_starts_again_while_the_config_server_is_away(site: Site) -> None:
    await site.protect()
    async with site.agent(), await NbdClient.connect(site.socket) as client:
        await site.until(lambda: site.status()["state"] == "protected")
        await site.config.aclose()
        await client.write(0, b"\1" * 4096)
        await site.replicated()
    async with site.agent(), await NbdClient.connect(site.socket) as client:
        await client.write(8192, b"\2" * 4096)
        await site.replicated()
        await site.until(lambda: site.status()["config_server"].get("error"))
        error = site.status()["config_server"]["error"]
        assert error["error"] == "TransientError"
        assert "config-server run" in error["hint"]
        assert site.status()["state"] == "protected"


async def test_what_was_not_sent_before_a_stop_is_sent_after_the_next_start(site: Site) -> None:
    async with site.agent(), await NbdClient.connect(site.socket) as client:  # nobody protects it yet
        await client.write(0, b"\1" * 4096)
        await site.until(lambda: site.status()["sender"].get("state") == "unassigned")
    await site.protect()
    async with site.agent():
        await site.replicated()
    frames = [found.header for found in site.server.frames]
    assert frames[0].first_sequence == 1
    assert [item.first_sequence for item in frames[1:]] == [item.next_sequence for item in frames[:-1]]


async def test_a_conflict_is_shown_and_harms_neither_disk_nor_log(site: Site) -> None:
    site.server.wanted = 10**6
    await site.protect()
    async with site.agent(), await NbdClient.connect(site.socket) as client:
        await client.write(0, b"\1" * 4096)
        await site.until(lambda: (site.status()["sender"].get("error") or {}).get("error") == "ConflictError")
        assert site.status()["state"] == "disconnected"
        assert site.status()["sender"]["error"]["theirs"]["next_sequence"] == 10**6
        assert await client.read(0, 4096) == b"\1" * 4096
    assert site.server.frames == []


async def test_a_machine_that_was_removed_says_so_and_goes_on_serving_its_disk(site: Site) -> None:
    await site.protect()
    async with site.agent(), await NbdClient.connect(site.socket) as client:
        await site.until(lambda: site.status()["state"] == "protected")
        async with site.house.operator() as operator:
            await operator.remove("db1")
        await site.until(lambda: site.status()["config_server"].get("error"))
        assert site.status()["config_server"]["error"]["error"] == "PermanentError"
        await client.write(0, b"\1" * 4096)


async def test_enrolling_again_begins_a_stream_of_its_own_that_is_compared_in_full(site: Site) -> None:
    await site.protect()
    async with site.agent():
        await site.replicated()
    before = len(site.server.frames)
    await site.house.enrol(site.directory / "agent" / "identity", "db1")
    async with site.agent(), await NbdClient.connect(site.socket) as client:
        await client.write(0, b"\1" * 4096)
        await site.until(lambda: replay(site.server.frames[before:], DISK_BYTES) == site.image.read_bytes())
    first = site.server.frames[before]
    assert first.header.first_sequence == (1 << 48) + 1
    assert first.table["kind"].tolist()[0] == Kind.GAP
    assert replay(site.server.frames[before:], DISK_BYTES) == site.image.read_bytes()


async def test_a_second_agent_on_the_same_directory_does_not_start(site: Site) -> None:
    async with site.agent():
        with pytest.raises(PermanentError, match="another agent"):
            await Service(site.settings()).run(asyncio.Event())


async def test_a_disk_that_is_served_already_is_left_alone(site: Site, tmp_path: Path) -> None:
    await site.house.enrol(tmp_path / "other" / "identity", "db2")
    async with site.agent(), await NbdClient.connect(site.socket) as client:
        other = site.settings(directory=tmp_path / "other")
        with pytest.raises(PermanentError, match="another process serves there"):
            await Service(other).run(asyncio.Event())
        assert site.socket.is_socket()
        await client.write(0, b"\1" * 512)
        async with await NbdClient.connect(site.socket) as later:
            assert await later.read(0, 512) == b"\1" * 512


@pytest.mark.parametrize(
    ("size", "named"), [(0, "has 0 bytes"), (DISK_BYTES + 100, "no whole number of sectors"), (None, "can't be opened")]
)
async def test_a_disk_that_is_none_is_named_and_nothing_is_served(site: Site, size: int | None, named: str) -> None:
    if size is None:
        site.image.unlink()
    else:
        site.image.write_bytes(bytes(size))
    with pytest.raises(PermanentError, match=named) as caught:
        await Service(site.settings()).run(asyncio.Event())
    assert "root" in caught.value.message
    assert not site.socket.exists()


async def test_an_agent_without_an_identity_says_how_to_get_one(site: Site, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="can't read the identity") as caught:
        await Service(site.settings(directory=tmp_path / "new")).run(asyncio.Event())
    assert "enrol" in caught.value.hint


async def test_a_process_servers_identity_is_no_machines(site: Site, tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "ps").rename(tmp_path / "wrong" / "identity")
    with pytest.raises(PermanentError, match="is a process-server's"):
        await Service(site.settings(directory=tmp_path / "wrong")).run(asyncio.Event())


async def test_a_failing_part_ends_the_agent_and_closes_everything(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A programmer's mistake in one part must not leave the others running."""

    async def broken(_: Control) -> None:
        await asyncio.sleep(0.2)
        raise ZeroDivisionError

    monkeypatch.setattr(Control, "run", broken)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(Service(site.settings()).run(asyncio.Event()), 20)
    assert not site.socket.exists()
    assert not StateDirectory(site.directory / "agent").is_running()


async def test_a_state_directory_that_can_not_be_written_stops_neither_disk_nor_replication(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full file system, say: what is only remembered for convenience is tried again, and no more than that."""

    def full(path: Path, *_: object, **__: object) -> None:
        raise PermanentError(f"can't write {path}: No space left on device")

    async with site.agent(), await NbdClient.connect(site.socket) as client:
        monkeypatch.setattr("mobility_agent.gaps.write_file", full)
        monkeypatch.setattr("mobility_agent.state.write_file", full)
        monkeypatch.setattr("replicar.control.files.write_file", full)
        await site.protect()
        await client.write(0, b"\1" * 4096)
        await site.replicated()
        async with site.house.operator() as operator:
            with pytest.raises(TransientError):  # no mark without a memory of it: it could be made twice
                await operator.mark("db1", "now", wait_seconds=1)
        monkeypatch.undo()
        await site.until(lambda: [mark.name for mark in site.marks()] == ["now"])


async def test_a_log_that_fails_to_sync_delays_a_mark_and_nothing_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.protect()

    async def fails(_: ChangeLog) -> None:
        raise OSError(5, "Input/output error")

    async with site.agent(), await NbdClient.connect(site.socket) as client, site.house.operator() as operator:
        await site.until(lambda: site.status()["state"] == "protected")
        monkeypatch.setattr(ChangeLog, "sync", fails)
        with pytest.raises(TransientError):
            await operator.mark("db1", "now", wait_seconds=1)
        await client.write(0, b"\1" * 4096)
        await site.replicated()
        monkeypatch.undo()
        await site.until(lambda: site.status()["marks"] == 1)
        assert [mark.name for mark in site.marks()] == ["now"]

"""What `process-server status` says of a server that is not well, or is not at all."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from process_server.cli import app
from process_server.health import STATUS_FILE, ServerHealth
from simulator.azurite import Azurite
from tests.process_server.processes import world


def _health(time_ns: int) -> ServerHealth:
    return ServerHealth(time_ns, "ps1.example.net", 9443, cache_bytes=1 << 30, cache_bytes_free=1 << 30, machines=())


def test_a_server_that_no_longer_runs_is_not_shown_as_one_that_does(tmp_path: Path) -> None:
    _health(time.time_ns() - 60 * 10**9).save(tmp_path)
    shown = CliRunner().invoke(app, ["status", "--directory", str(tmp_path)])
    assert shown.exit_code == 1
    assert "NOT RUNNING" in shown.output
    _health(time.time_ns()).save(tmp_path)
    shown = CliRunner().invoke(app, ["status", "--directory", str(tmp_path)])
    assert shown.exit_code == 0
    assert "NOT RUNNING" not in shown.output


@pytest.mark.timeout(600)
async def test_a_status_that_cannot_be_written_does_not_stop_the_data_path(
    azurite: Azurite, container_name: str, tmp_path: Path
) -> None:
    key_file = tmp_path / "account.key"
    key_file.touch(mode=0o600)
    key_file.write_text(azurite.account_key)
    async with world(azurite, container_name, key_file, tmp_path) as here:
        agent = here.agent
        agent.begin()
        await here.run_agent(agent.fill(3))
        status = here.server.directory / STATUS_FILE
        status.unlink(missing_ok=True)
        status.mkdir()  # what is put in its place is refused, as by a full disk
        while STATUS_FILE not in here.server.log:
            await asyncio.sleep(0.1)
        last = agent.fill(3)
        await here.run_agent(last)
        assert agent.stored >= last
        status.rmdir()

"""Child processes: started, watched, killed, and gone with their parent however that ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from replicar.errors import PermanentError
from simulator.child import Child, watch

_ROOT = Path(__file__).resolve().parents[2]


def _python(tmp_path: Path, code: str) -> Child:
    return Child("part", [sys.executable, "-u", "-c", code], tmp_path / "part.log")


async def test_a_child_is_started_waited_for_and_stopped(tmp_path: Path) -> None:
    child = _python(tmp_path, "import time; print('ready'); time.sleep(60)")
    assert child.starts == 0
    child.start()
    await child.until("ready", lambda: "ready" in child.said(), 20)
    assert child.process_id is not None
    assert await child.stop() == -signal.SIGTERM
    assert not child.died
    child.start()
    assert "ready" not in child.said()
    child.kill()
    assert child.status == -signal.SIGKILL
    assert child.last_lines().count("--- start") == 2


async def test_a_child_that_dies_unasked_ends_the_watch_with_its_last_words(tmp_path: Path) -> None:
    child = _python(tmp_path, "import sys; print('the disk is on fire'); sys.exit(7)")
    child.start()
    with pytest.raises(PermanentError, match="part died with status 7") as raised:
        await asyncio.wait_for(watch([child]), 20)
    assert "the disk is on fire" in raised.value.hint


async def test_waiting_for_something_that_a_dead_child_will_never_do_ends_at_once(tmp_path: Path) -> None:
    child = _python(tmp_path, "raise SystemExit('no')")
    child.start()
    began = time.monotonic()
    with pytest.raises(PermanentError, match="ended with status 1 before listening"):
        await child.until("listening", lambda: False, 60)
    assert time.monotonic() - began < 20


async def test_waiting_has_an_end(tmp_path: Path) -> None:
    child = _python(tmp_path, "import time; time.sleep(60)")
    child.start()
    try:
        with pytest.raises(PermanentError, match="listening did not come about within 0 s"):
            await child.until("listening", lambda: False, 0.1)
    finally:
        child.kill()


def test_a_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from simulator.child import Child\n"
        "child = Child('part', [sys.executable, '-c', 'import time; time.sleep(60)'], Path(sys.argv[1]))\n"
        "child.start(); print(child.process_id, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True, cwd=_ROOT
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def _runs(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"

"""`replicar demo` with small settings: it tells the truth by its exit status, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from simulator.demo import Plan
from tests.support.tools import need

_ROOT = Path(__file__).resolve().parents[2]
_MIB = 1 << 20
SMALL = Plan(
    disk_bytes=32 * _MIB - 20480,
    files_bytes=6 * _MIB,
    database_bytes=(4 * _MIB, 2 * _MIB, 2 * _MIB),
    churn_bytes_per_second=3e6,
    phase_seconds=0.5,
    outage_seconds=0.5,
)
_CODE = (
    "import sys; from pathlib import Path; from simulator.demo import Plan, run\n"
    "sys.exit(run(json_output=sys.argv[1] == 'json', directory=Path(sys.argv[2]), plan={plan!r}))\n"
)


@contextmanager
def _demo(directory: Path, form: str = "text") -> Iterator[subprocess.Popen[str]]:
    need("mkfs.ext4")
    code = _CODE.format(plan=SMALL)
    command = [sys.executable, "-c", code, form, str(directory)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=_ROOT, preexec_fn=_hears_interrupts
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _hears_interrupts() -> None:
    """A shell has what it runs in the background ignore SIGINT, and whatever that starts in turn."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_every_point_is_recovered_in_both_forms_and_judged_equal(tmp_path: Path) -> None:
    with _demo(tmp_path, "json") as process:
        output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    report: dict[str, Any] = json.loads(output)
    assert report["ok"] is True
    assert report["points_verified"] == report["points"] == 3
    assert [proof["form"] for proof in report["proofs"]] == ["raw file", "VHD in a page blob"] * 3
    assert all(proof["verdict"]["problems"] == [] for proof in report["proofs"])
    # Each point is a different state: more and more changes are in it.
    included = [proof["verdict"]["changes_included"] for proof in report["proofs"][::2]]
    assert included == sorted(set(included))
    assert included[0] > 0
    assert report["process_server_kills"] == 1
    assert report["verify"]["sound"] is True
    assert min(report[key] for key in ("bytes_captured", "bytes_sent", "bytes_stored", "churn_mb_per_s")) > 0
    assert "kill the process server in mid-flow" in errors
    _nothing_is_left(tmp_path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_process_and_removes_every_file(tmp_path: Path, number: int, status: int) -> None:
    with _demo(tmp_path) as process:
        _wait(lambda: bool(_processes(tmp_path, "mobility-agent")), process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "every process was ended" in errors
    assert "Traceback" not in errors
    _nothing_is_left(tmp_path)


def test_a_part_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with _demo(tmp_path) as process:
        _wait(lambda: "is served at" in _log(tmp_path, "mobility-agent"), process)
        (agent,) = _processes(tmp_path, "mobility-agent")
        os.kill(agent, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "mobility-agent died with status -9" in errors, errors
    assert "disk root is served at" in errors
    assert "Traceback" not in errors
    _nothing_is_left(tmp_path)


def test_a_place_without_room_is_refused_before_anything_starts(tmp_path: Path) -> None:
    code = _CODE.format(plan=Plan(disk_bytes=1 << 50))
    ran = subprocess.run(
        [sys.executable, "-c", code, "json", str(tmp_path)], capture_output=True, text=True, cwd=_ROOT, check=False
    )
    assert ran.returncode == 1
    failure = json.loads(ran.stdout)
    assert failure["ok"] is False
    assert "MiB free; the demo wants" in failure["message"]
    assert list(tmp_path.iterdir()) == []


def _wait(held: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not held():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _processes(directory: Path, name: str = "") -> list[int]:
    """Processes whose command line names the directory, and the program if one is given."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        ours = any(word.startswith(f"{directory}/") for word in words)
        if ours and any(Path(word).name == name or not name for word in words):
            found.append(int(entry.name))
    return found


def _log(directory: Path, name: str) -> str:
    logs = list(directory.glob(f"replicar-demo-*/logs/{name}.log"))
    return logs[0].read_text() if logs else ""


def _nothing_is_left(directory: Path) -> None:
    assert list(directory.iterdir()) == []
    assert _processes(directory) == []

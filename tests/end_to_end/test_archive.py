"""The agent's archive replicates a disk on a machine that has a bare Python and nothing of ours."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from simulator.cluster import Cluster
from simulator.oracle import Oracle
from tests.end_to_end.stage import DISK, Stage, make_image

ROOT = Path(__file__).resolve().parents[2]
# The interpreter behind the virtual environment, with no packages at all, and no variable that could lead to some.
BARE = ["env", "-i", "PATH=/usr/bin:/bin"]


def make_archive(directory: Path) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("the archive is made from what git has, and this tree has no git")
    made = subprocess.run(
        [sys.executable, str(ROOT / "setup" / "agent_archive.py"), str(directory)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip())


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("archive"))


def bare(archive: Path, unpacked: Path) -> list[str]:
    python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return [*BARE, f"SHIV_ROOT={unpacked}", python, "-I", "-S", str(archive)]


def test_the_same_tree_makes_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    again = make_archive(tmp_path)
    assert again.read_bytes() == archive.read_bytes()
    said = (tmp_path / "SHA256SUMS").read_text().split()
    assert said == [hashlib.sha256(again.read_bytes()).hexdigest(), again.name]


async def test_a_machine_with_only_python_is_protected_by_the_archive(archive: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image")
    program = bare(archive, tmp_path / "unpacked")
    cluster = Cluster(tmp_path, disks={DISK: image.path}, in_memory=True, agent_program=program)
    async with cluster:
        await cluster.start()
        stage = Stage(cluster, image, Oracle(image.path, tmp_path / "oracle"))
        await stage.protect()
        async with stage.writing():
            await asyncio.sleep(2.0)
        await stage.settle()
        comparison = await stage.recover("--latest")
    assert comparison.equal, comparison
    assert comparison.changes_required > 0


def test_two_that_start_at_once_unpack_once(archive: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    running = [
        subprocess.Popen([*bare(archive, unpacked), "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0][:15] for process in running] == [b"mobility-agent "] * 2
    assert len([path for path in unpacked.iterdir() if path.is_dir()]) == 1

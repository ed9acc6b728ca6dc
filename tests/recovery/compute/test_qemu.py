"""Machines in QEMU: made, proven, found again by the next worker, and gone without a trace."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from recovery.compute.machine import Bus, DiskSource, Firmware, MachineSpec, Power, Wanted
from recovery.compute.qemu import QemuCompute, QemuSettings, command
from replicar.errors import ConflictError, PermanentError
from simulator import guest
from tests.support.tools import need

pytestmark = [pytest.mark.timeout(600)]

RECORD = r"^record 1 [0-9a-f]{64}$"


@pytest.fixture(scope="module")
def system() -> Iterator[Path]:
    """A disk that boots, made once."""
    if os.geteuid() != 0:
        pytest.skip("making the guest's disk mounts it, so it takes root")
    if words := guest.missing():
        pytest.skip(words)
    with tempfile.TemporaryDirectory(prefix="replicar-system-") as scratch:
        disk = Path(scratch) / "system.img"
        guest.make_disk(disk)
        yield disk


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="rq-") as scratch:
        yield Path(scratch)


def _spec(place: str, size: int = guest.DISK_BYTES) -> MachineSpec:
    return MachineSpec("drill-shop", (DiskSource("system", place, size),), memory_mib=256)


@asynccontextmanager
async def _cleaned(compute: QemuCompute, name: str = "drill-shop") -> AsyncIterator[None]:
    try:
        yield
    finally:
        await compute.remove(name)


def _program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.needs_root
async def test_a_machine_comes_up_is_proven_and_leaves_nothing(system: Path, root: Path, tmp_path: Path) -> None:
    disk = shutil.copy(system, tmp_path / "disk.img")
    check = _program(
        tmp_path / "check", 'grep -q "^boot 1" "$REPLICAR_CONSOLE_LOG" && echo "$REPLICAR_MACHINE is well"'
    )
    compute, spec = QemuCompute(QemuSettings(root)), _spec(str(disk))
    async with _cleaned(compute):
        assert await compute.power(spec.name) is Power.ABSENT
        await compute.create(spec)
        assert await compute.power(spec.name) is Power.RUNNING
        proof = await compute.prove(spec, Wanted(tmp_path / "evidence", banner=RECORD, check=check))
        assert proof.banner.startswith("record 1 ")
        assert proof.check_said == "drill-shop is well"
        assert proof.screenshot is not None
        assert proof.screenshot.read_bytes().startswith(b"\x89PNG")
        assert "boot 1" in proof.console.read_text()
    assert await compute.power(spec.name) is Power.ABSENT
    assert list(root.iterdir()) == []


@pytest.mark.needs_root
async def test_the_next_worker_finds_the_machine_and_makes_no_second_one(
    system: Path, root: Path, tmp_path: Path
) -> None:
    disk = shutil.copy(system, tmp_path / "disk.img")
    compute, spec = QemuCompute(QemuSettings(root)), _spec(str(disk))
    async with _cleaned(compute):
        await compute.create(spec)
        process = (root / spec.name / "pid").read_text()
        another = QemuCompute(QemuSettings(root))
        await another.create(spec)
        assert (root / spec.name / "pid").read_text() == process
        with pytest.raises(ConflictError, match="runs already"):
            await another.create(replace(spec, memory_mib=300))
        await another.prove(spec, Wanted(tmp_path / "evidence", banner=RECORD))


@pytest.mark.needs_root
async def test_a_machine_that_died_is_started_again_and_said_to_have_stopped(
    system: Path, root: Path, tmp_path: Path
) -> None:
    disk = shutil.copy(system, tmp_path / "disk.img")
    compute, spec = QemuCompute(QemuSettings(root)), _spec(str(disk))
    async with _cleaned(compute):
        await compute.create(spec)
        os.kill(int((root / spec.name / "pid").read_text()), signal.SIGKILL)
        while await compute.power(spec.name) is not Power.STOPPED:
            await asyncio.sleep(0.01)
        with pytest.raises(PermanentError, match="before the machine stopped"):
            await compute.prove(spec, Wanted(tmp_path / "evidence", banner=RECORD))
        await compute.create(spec)
        assert await compute.power(spec.name) is Power.RUNNING


@pytest.mark.needs_root
async def test_a_disk_over_nbd_boots_and_waits_for_its_server_to_come_back(
    system: Path, root: Path, tmp_path: Path
) -> None:
    disk, socket = Path(shutil.copy(system, tmp_path / "disk.img")), root / "s"
    serve = (need("nbdkit"), "-f", "--unix", str(socket), "file", str(disk))
    server = await asyncio.create_subprocess_exec(*serve)
    try:
        while not socket.exists():
            await asyncio.sleep(0.01)
        compute, spec = QemuCompute(QemuSettings(root / "m")), _spec(f"nbd+unix:///?socket={socket}")
        async with _cleaned(compute):
            await compute.create(spec)
            server.kill()
            await server.wait()
            socket.unlink(missing_ok=True)
            server = await asyncio.create_subprocess_exec(*serve)
            proof = await compute.prove(spec, Wanted(tmp_path / "evidence", banner=RECORD))
            assert proof.banner
    finally:
        server.kill()
        await server.wait()


async def test_a_check_that_finds_fault_or_hangs_says_so_and_leaves_no_process(root: Path, tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    (tmp_path / "empty.img").touch()
    os.truncate(tmp_path / "empty.img", 1 << 20)
    compute, spec = QemuCompute(QemuSettings(root)), _spec(str(tmp_path / "empty.img"), 1 << 20)
    async with _cleaned(compute):
        await compute.create(spec)
        faulty = _program(tmp_path / "faulty", "echo no database; exit 3")
        with pytest.raises(PermanentError, match="status 3") as caught:
            await compute.prove(spec, Wanted(tmp_path / "evidence", check=faulty))
        assert caught.value.hint == "no database"
        hanging = _program(tmp_path / "hanging", f"sleep 300 & echo $! > {tmp_path}/child; wait")
        with pytest.raises(PermanentError, match="did not end within"):
            await compute.prove(spec, Wanted(tmp_path / "evidence", check=hanging, check_seconds=2))
        child = int((tmp_path / "child").read_text())
        while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
            await asyncio.sleep(0.01)


async def test_what_is_missing_is_said_before_anything_is_made(root: Path) -> None:
    compute = QemuCompute(QemuSettings(root))
    spec = replace(_spec("/nowhere/disk.img"), memory_mib=1 << 24)
    found = [each.what for each in await compute.findings(spec) if each.blocking]
    assert any("of memory" in what for what in found)
    assert any("there is no /nowhere/disk.img" in what for what in found)
    with pytest.raises(PermanentError, match="can't run here"):
        await compute.create(spec)
    assert list(root.iterdir()) == []


async def test_a_directory_that_is_no_machine_is_left_alone(root: Path) -> None:
    (root / "drill-shop").mkdir()
    (root / "drill-shop" / "thesis.txt").write_text("the only copy")
    with pytest.raises(PermanentError, match="no machine of ours"):
        await QemuCompute(QemuSettings(root)).remove("drill-shop")
    assert (root / "drill-shop" / "thesis.txt").exists()


def test_a_drill_is_isolated_and_a_physical_server_finds_drivers(root: Path) -> None:
    spec = replace(_spec("/d.img"), bus=Bus.SATA, ports=(22,))
    words = command(spec, root, "tcg", [40022])
    assert "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:40022-:22" in words
    assert any(word.startswith("ide-hd,drive=disk0") for word in words)
    assert any(word.startswith("e1000,") for word in words)
    assert "user,id=net,restrict=off" in command(replace(spec, isolated=False, ports=()), root, "tcg", [])
    assert "-bios" in command(replace(spec, firmware=Firmware.UEFI), root, "tcg", [40022])


@pytest.mark.parametrize(
    ("name", "disks"),
    [("Shop", 1), ("-shop", 1), ("shop/../x", 1), ("s" * 61, 1), ("shop", 0), ("shop", 65)],
)
def test_a_spec_that_nobody_can_make_is_refused(name: str, disks: int) -> None:
    with pytest.raises(PermanentError):
        MachineSpec(name, tuple(DiskSource(f"d{number}", "/d.img", 512) for number in range(disks)))


@pytest.mark.parametrize("place", ["http://host/disk", "nbd+unix:///x", "nbd+unix:///x?socket=a&socket=b"])
def test_a_place_that_qemu_can_not_run_from_is_refused(place: str, root: Path) -> None:
    with pytest.raises(PermanentError, match="no place that QEMU can run from"):
        command(_spec(place), root, "tcg", [])

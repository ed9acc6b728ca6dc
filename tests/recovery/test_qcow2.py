"""A recovered qcow2 image is one for QEMU's own tools, holds the disk, and has no clusters for zeros."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from recovery.output import write_qcow2_file, write_raw_file
from recovery.points import Latest, locate
from recovery.view import View
from replicar.errors import PermanentError
from replicar.formats import qcow2
from replicar.storage import PageBlobStore
from tests.recovery.log_builder import LogBuilder
from tests.recovery.test_output import DISK, MIB, build, view_of
from tests.support.tools import need


def qemu_img(*arguments: str | Path) -> str:
    done = subprocess.run([need("qemu-img"), *map(str, arguments)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


async def test_it_is_checked_clean_and_compared_equal(store: PageBlobStore, tmp_path: Path) -> None:
    need("qemu-img")
    view = await view_of(await build(store))
    image, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    written = await write_qcow2_file(view, view.disks[0], image)
    await write_raw_file(view, view.disks[0], raw)
    assert written.size_bytes == DISK
    checked = json.loads(qemu_img("check", "--output=json", image))
    assert checked["check-errors"] == 0
    assert "leaks" not in checked
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", image, raw)
    assert json.loads(qemu_img("info", "--output=json", image))["virtual-size"] == DISK
    assert image.stat().st_size < 3 * MIB  # 9 MiB of disk, of which 1.1 are no zeros


async def test_a_disk_over_several_tables_written_in_any_order(store: PageBlobStore, tmp_path: Path) -> None:
    need("qemu-img")
    size = 1100 * MIB + 512  # three L2 tables
    builder = LogBuilder(store, model=False)
    builder.begin(size)
    random_, content = random.Random(4), {}
    for _ in range(80):
        offset = random_.randrange(0, size - 4096, 4096)
        content[offset] = random_.randbytes(4096)
        builder.write(0, offset, content[offset])
    builder.write(0, size - 512, b"\7" * 512)
    await builder.seal()
    view = View(builder.log, await locate(builder.log, Latest()))
    await write_qcow2_file(view, view.disks[0], tmp_path / "disk.qcow2")
    assert json.loads(qemu_img("check", "--output=json", tmp_path / "disk.qcow2"))["check-errors"] == 0
    qemu_img("convert", "-O", "raw", tmp_path / "disk.qcow2", tmp_path / "disk.raw")
    with (tmp_path / "disk.raw").open("rb") as file:
        for offset, data in content.items():
            file.seek(offset)
            assert file.read(4096) == data
        file.seek(size - 512)
        assert file.read() == b"\7" * 512


async def test_what_is_there_already_is_not_replaced_unasked(store: PageBlobStore, tmp_path: Path) -> None:
    view = await view_of(await build(store))
    (tmp_path / "disk.qcow2").write_bytes(b"mine")
    with pytest.raises(PermanentError, match="is there already"):
        await write_qcow2_file(view, view.disks[0], tmp_path / "disk.qcow2")
    assert (tmp_path / "disk.qcow2").read_bytes() == b"mine"


def test_a_cluster_has_one_place_and_neighbours_are_written_together() -> None:
    layout = qcow2.Layout(1 << 30)
    first = list(layout.pieces(512, 3 * qcow2.CLUSTER_BYTES))
    assert len(first) == 1
    place, start, end = first[0]
    assert (start, end, place % qcow2.CLUSTER_BYTES) == (0, 3 * qcow2.CLUSTER_BYTES, 512)
    assert list(layout.pieces(0, 512)) == [(place - 512, 0, 512)]
    other = next(iter(layout.pieces(1 << 29, 512)))[0]
    assert other >= place + 3 * qcow2.CLUSTER_BYTES

"""The injectors and the witness themselves: what they claim to play, they play, and what must not be, they see."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from replicar.formats.logblob import BlobName
from tests.process_server.faults import power
from tests.process_server.faults.page_record import PageRecord

PAGE = 4096
#: Writes two pages of ones and flushes, then two of twos and does not, puts a name in place likewise, and dies.
DYING = f"""
import mmap, os, sys
from pathlib import Path
from tests.process_server.faults.power import Layer
directory, step = Path(sys.argv[1]), int(sys.argv[2])
Layer(directory / "journal", step).install()
file = os.open(directory / "cache", os.O_RDWR)
page = memoryview(mmap.mmap(-1, {2 * PAGE}))
for content in (1, 2):
    page[:] = bytes([content]) * len(page)
    os.pwritev(file, [page], {PAGE})
    if content == 1:
        os.fdatasync(file)
new = os.open(directory / "new", os.O_RDWR | os.O_CREAT)
os.write(new, b"new")
os.fsync(new)
os.replace(directory / "new", directory / "status")
os.kill(os.getpid(), 9)
"""


def die(directory: Path, step: int = 0) -> None:
    (directory / "cache").write_bytes(bytes(4 * PAGE))
    (directory / "status").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", DYING, directory, str(step)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_a_power_cut_takes_back_what_was_not_flushed_sector_by_sector_and_nothing_else(tmp_path: Path) -> None:
    seen: set[int] = set()
    names: set[bytes] = set()
    for seed in range(12):
        die(tmp_path)
        power.cut(tmp_path / "journal", random.Random(seed))
        data = (tmp_path / "cache").read_bytes()
        assert data[:PAGE] == bytes(PAGE)
        assert data[3 * PAGE :] == bytes(PAGE)
        sectors = {data[at : at + 512] for at in range(PAGE, 3 * PAGE, 512)}
        assert sectors <= {b"\1" * 512, b"\2" * 512}
        seen |= {sector[0] for sector in sectors}
        names.add((tmp_path / "status").read_bytes())
    assert seen == {1, 2}
    assert names == {b"old", b"new"}


@pytest.mark.parametrize(("step", "content"), [(1, 0), (2, 1), (4, 1)])
def test_it_dies_at_the_step_that_was_chosen(tmp_path: Path, step: int, content: int) -> None:
    die(tmp_path, step)
    assert (tmp_path / "cache").read_bytes()[PAGE : 3 * PAGE] == bytes([content]) * 2 * PAGE
    if step > 2:
        assert power.cut(tmp_path / "journal", random.Random(1)) == 0


def test_the_record_sees_other_bytes_in_the_same_place_and_a_writer_that_was_replaced() -> None:
    machine, record = uuid.uuid4(), PageRecord()
    one, two = str(BlobName(machine, 1, 1, 0)), str(BlobName(machine, 1, 2, 0))
    record.wrote(one, 0, bytes(512))
    record.wrote(one, 512, b"a" * 1024)
    record.wrote(one, 512, b"a" * 1024)
    assert (record.faults, record.repeats) == ([], 1)
    record.wrote(one, 512, b"b" * 1024)
    record.wrote(one, 1024, b"a" * 512)
    assert len(record.faults) == 2
    record.wrote(two, 0, bytes(512))
    assert len(record.faults) == 2
    record.wrote(one, 2048, b"c" * 512)
    assert "though" in record.faults[2]

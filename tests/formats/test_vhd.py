"""The fixed VHD: a footer by the specification, which QEMU reads as the size that was meant."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st

from replicar.errors import CorruptionError, LimitError
from replicar.formats import vhd
from tests.golden.make_golden import flipped

ID = uuid.UUID(int=7)


@given(
    mib=st.integers(1, vhd.MAX_VIRTUAL_BYTES // vhd.MIB),
    unique=st.uuids(),
    created=st.integers(vhd.VHD_EPOCH_SECONDS, vhd.VHD_EPOCH_SECONDS + 0xFFFFFFFF),
)
@example(mib=vhd.MAX_VIRTUAL_BYTES // vhd.MIB, unique=ID, created=vhd.VHD_EPOCH_SECONDS)
def test_a_footer_comes_back(mib: int, unique: uuid.UUID, created: int) -> None:
    found = vhd.read_footer(vhd.pack_footer(mib * vhd.MIB, unique, created))
    assert (found.virtual_bytes, found.unique_id, found.created_seconds) == (mib * vhd.MIB, unique, created)
    cylinders, heads, sectors = found.geometry
    assert 0 <= cylinders <= 65535
    assert cylinders * heads * sectors * 512 <= found.virtual_bytes


def test_a_date_that_does_not_fit_is_the_nearest_that_does() -> None:
    assert vhd.read_footer(vhd.pack_footer(vhd.MIB, ID, 0)).created_seconds == vhd.VHD_EPOCH_SECONDS
    latest = vhd.read_footer(vhd.pack_footer(vhd.MIB, ID, 1 << 40)).created_seconds
    assert latest == vhd.VHD_EPOCH_SECONDS + 0xFFFFFFFF


@given(disk=st.integers(1, vhd.MAX_VIRTUAL_BYTES))
def test_a_disk_is_filled_up_to_whole_mebibytes(disk: int) -> None:
    size = vhd.virtual_bytes(disk)
    assert size % vhd.MIB == 0
    assert 0 <= size - disk < vhd.MIB


@pytest.mark.parametrize("size", [0, -1, vhd.MAX_VIRTUAL_BYTES + 1])
def test_a_disk_that_azure_cannot_hold_is_refused(size: int) -> None:
    with pytest.raises(LimitError):
        vhd.virtual_bytes(size)
    with pytest.raises(LimitError):
        vhd.pack_footer(size, ID, 0)


def test_a_size_that_is_no_whole_mebibyte_gets_no_footer() -> None:
    with pytest.raises(LimitError):
        vhd.pack_footer(vhd.MIB + 512, ID, 0)


def test_any_flipped_bit_of_a_footer_is_found() -> None:
    good = vhd.pack_footer(5 * vhd.MIB, ID, 1_764_000_000)
    for place in range(vhd.FOOTER_BYTES):
        for bit in range(8):
            with pytest.raises(CorruptionError):
                vhd.read_footer(flipped(good, place, bit))


@pytest.mark.parametrize("length", [0, 511, 513])
def test_a_footer_has_512_bytes(length: int) -> None:
    with pytest.raises(CorruptionError):
        vhd.read_footer(bytes(length))


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed (Debian: qemu-utils)")
@pytest.mark.parametrize("mib", [1, 3, 127, 131])
def test_qemu_takes_the_disk_to_be_as_large_as_it_is(tmp_path: Path, mib: int) -> None:
    size = mib * vhd.MIB
    path = tmp_path / "disk.vhd"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(vhd.pack_footer(size, ID, 1_764_000_000))
    command = ["qemu-img", "info", "--output=json", "-f", "vpc", str(path)]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=30).stdout)
    assert said["virtual-size"] == size

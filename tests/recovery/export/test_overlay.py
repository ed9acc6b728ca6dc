"""An overlay gives back what was written to it, whatever ends its process or its machine, and says what it holds."""

from __future__ import annotations

import errno
import os
import random
import uuid
from pathlib import Path

import pytest

from recovery.export.overlay import Overlay
from replicar.errors import ConflictError, CorruptionError, PermanentError
from replicar.formats import overlay as layout
from replicar.formats.overlay import Base

SECTOR = 512
SIZE = 40 * (1 << 20) + SECTOR  # three pages of the bitmap
BASE = Base(uuid.UUID(int=7), 1000, 5, 0, "root", SIZE)
BOOT, NEXT_BOOT = uuid.UUID(int=1), uuid.UUID(int=2)


def opened(path: Path, boot: uuid.UUID = BOOT) -> Overlay:
    return Overlay.kept(path, BASE, created_ns=9, boot_id=boot)


def abandoned(overlay: Overlay) -> None:
    """As the kernel does for a killed process: the descriptor is closed, and nothing else."""
    os.close(overlay._fd)


def held(overlay: Overlay) -> dict[int, bytes]:
    """The overlay's sectors by number."""
    return {
        sector: overlay.read(sector * SECTOR, SECTOR)
        for offset, length in overlay.changed()
        for sector in range(offset // SECTOR, (offset + length) // SECTOR)
    }


class Writer:
    """Writes at random, and knows what each sector held: `now`, at the last flush, and every value since then."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now: dict[int, bytes] = {}
        self.flushed: dict[int, bytes] = {}
        self.since: dict[int, list[bytes]] = {}

    def write(self, overlay: Overlay) -> None:
        length = self.random.choice((1, 3, 8, 64))
        first = self.random.choice((0, 32768 - 20, SIZE // SECTOR - 80)) + self.random.randrange(16)
        zeros = self.random.random() < 0.25
        data = bytes(length * SECTOR) if zeros else self.random.randbytes(length * SECTOR)
        if zeros:
            overlay.zero(first * SECTOR, len(data))
        else:
            overlay.write(first * SECTOR, data)
        for number in range(length):
            sector = data[number * SECTOR : (number + 1) * SECTOR]
            self.now[first + number] = sector
            self.since.setdefault(first + number, []).append(sector)

    def flush(self, overlay: Overlay) -> None:
        overlay.flush()
        self.flushed, self.since = dict(self.now), {}


@pytest.mark.parametrize("seed", range(10))
def test_a_killed_process_loses_nothing(tmp_path: Path, seed: int) -> None:
    writer = Writer(seed)
    for _ in range(3):
        overlay = opened(tmp_path / "over")
        assert held(overlay) == writer.now
        for _ in range(writer.random.randrange(1, 25)):
            writer.write(overlay)
            if writer.random.random() < 0.2:
                writer.flush(overlay)
        abandoned(overlay)


@pytest.mark.parametrize("seed", range(10))
def test_after_a_power_cut_no_sector_is_older_than_the_last_flush(tmp_path: Path, seed: int) -> None:
    """What was written since the last flush is on the medium or isn't, sector by sector, in no order."""
    writer, path = Writer(seed), tmp_path / "over"
    overlay = opened(path)
    for _ in range(20):
        writer.write(overlay)
        if writer.random.random() < 0.2:
            writer.flush(overlay)
    data = overlay._header.data_offset
    abandoned(overlay)
    with path.open("r+b") as file:  # the data that was not flushed: of some sectors an earlier state is there
        for sector, values in writer.since.items():
            older = [writer.flushed.get(sector, bytes(SECTOR)), *values]
            file.seek(data + sector * SECTOR)
            file.write(writer.random.choice(older))
    after = opened(path, NEXT_BOOT)
    found = held(after)
    for sector, content in writer.flushed.items():
        assert found[sector] in [content, *writer.since.get(sector, [])]
    assert found.keys() == writer.flushed.keys()  # a sector that was never flushed is the point's again
    after.close()


def test_after_an_orderly_end_any_boot_believes_all_of_it(tmp_path: Path) -> None:
    writer, overlay = Writer(3), opened(tmp_path / "over")
    for _ in range(20):
        writer.write(overlay)
    overlay.close()
    again = opened(tmp_path / "over", NEXT_BOOT)
    assert held(again) == writer.now
    again.close()
    reader = Overlay.to_read(tmp_path / "over", boot_id=BOOT)
    assert held(reader) == writer.now
    reader.close()


def test_it_says_what_it_holds_and_where_zeros_are(tmp_path: Path) -> None:
    overlay = opened(tmp_path / "over")
    overlay.write(4096, b"\1" * 8192)
    overlay.write(12288, b"\2" * SECTOR)
    overlay.zero(1 << 20, 1 << 20)
    overlay.write(SIZE - SECTOR, b"\3" * SECTOR)
    assert list(overlay.changed()) == [(4096, 8192 + SECTOR), (1 << 20, 1 << 20), (SIZE - SECTOR, SECTOR)]
    assert list(overlay.changed(8192, 4096)) == [(8192, 4096)]
    assert list(overlay.stretches(1 << 20, 1 << 20)) == [(1 << 20, 1 << 20, True)]
    assert list(overlay.stretches(4096, 8192)) == [(4096, 8192, False)]
    overlay.close()


def test_a_full_disk_changes_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = opened(tmp_path / "over")
    overlay.write(0, b"\1" * SECTOR)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("recovery.export.overlay.os.pwrite", full)
    with pytest.raises(OSError, match="No space"):
        overlay.write(SECTOR, b"\2" * SECTOR)
    monkeypatch.undo()
    assert held(overlay) == {0: b"\1" * SECTOR}
    overlay.close()


def test_after_a_flush_that_failed_no_flush_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = opened(tmp_path / "over")
    overlay.write(0, b"\1" * SECTOR)

    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("recovery.export.overlay.os.fdatasync", fails)
    with pytest.raises(OSError, match="Input/output"):
        overlay.flush()
    monkeypatch.undo()
    with pytest.raises(OSError, match="earlier flush"):
        overlay.close()


def test_over_another_point_it_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "over").close()
    other = Base(BASE.machine_id, 1001, 6, 0, "root", SIZE)
    with pytest.raises(ConflictError, match="after sequence 1000, not over") as caught:
        Overlay.kept(tmp_path / "over", other, created_ns=1)
    assert "--sequence 1000" in caught.value.hint


def test_what_is_no_overlay_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_bytes(b"dear diary" * 1000)
    with pytest.raises(CorruptionError, match="no overlay"):
        Overlay.kept(path, BASE, created_ns=1)
    assert path.read_bytes() == b"dear diary" * 1000
    with pytest.raises(PermanentError, match="there can be no overlay"):
        Overlay.kept(tmp_path / "nowhere" / "over", BASE, created_ns=1)


def test_a_session_that_is_torn_is_nobodys(tmp_path: Path) -> None:
    overlay = opened(tmp_path / "over")
    overlay.write(0, b"\1" * SECTOR)
    overlay.flush()
    overlay.write(SECTOR, b"\2" * SECTOR)
    abandoned(overlay)
    with (tmp_path / "over").open("r+b") as file:
        file.seek(layout.SESSION_OFFSET + 9)
        file.write(b"\xff")
    again = opened(tmp_path / "over")
    assert held(again) == {0: b"\1" * SECTOR}
    again.close()

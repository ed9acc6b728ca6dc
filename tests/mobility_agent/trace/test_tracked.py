"""What a tracked disk makes of events: counts, discards of several places, partitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from mobility_agent.capture.trace.choice import Method, choose, choose_method
from mobility_agent.capture.trace.events import EVENT, Events, What
from mobility_agent.capture.trace.tracked import TrackedDisk
from mobility_agent.ladder import Ladder
from mobility_agent.regions import DirtyRegions
from mobility_agent.state import StateDirectory, regions_path
from mobility_agent.traced import open_regions
from replicar.errors import PermanentError
from replicar.formats import record
from replicar.formats.frame import Kind
from tests.mobility_agent.core import MIB, open_log
from tests.mobility_agent.trace.rig import loop_disk, run

pytestmark = pytest.mark.needs_root


@contextmanager
def tracked(tmp_path: Path, *, discard_ranges: bool = False) -> Iterator[TrackedDisk]:
    with loop_disk(tmp_path, "a", size_bytes=64 * MIB) as loop:
        disk = TrackedDisk(0, "a", loop.device, discard_ranges=discard_ranges)
        disk.follow(DirtyRegions(tmp_path / "regions", disk.size_bytes))
        disk.watched = [disk.device.number]
        disk.regions.clear(0, disk.size_bytes)
        assert disk.missing() == ""  # counting begins
        yield disk
        disk.regions.close()
        disk.close()


def events(disk: TrackedDisk, *items: tuple[What, bytes, int, int]) -> Events:
    """(what, rwbs, sector, sectors) each."""
    made = np.zeros(len(items), EVENT)
    for event, (what, rwbs, sector, sectors) in zip(made, items, strict=True):
        event["what"], event["rwbs"], event["sector"], event["sectors"] = what, rwbs, sector, sectors
    made["device"] = disk.device.number
    return made


def taken(disk: TrackedDisk) -> list[tuple[int, int]]:
    return [*disk.extents.take(disk.size_bytes)]


def test_a_request_that_the_driver_gave_back_counts_once(tmp_path: Path) -> None:
    with tracked(tmp_path) as disk:
        disk.apply(events(disk, (What.ISSUE, b"WS", 8, 8), (What.REQUEUE, b"WS", 8, 8)))
        assert (disk.completeness.captured, disk.extents.under_way) == (0, False)
        disk.apply(events(disk, (What.ISSUE, b"WS", 8, 8)))
        assert disk.completeness.captured == 8
        assert taken(disk) == []
        disk.apply(events(disk, (What.COMPLETE, b"WS", 8, 8)))
        assert taken(disk) == [(4096, 4096)]
        assert "8 sectors" in disk.missing()  # nothing was really written


def test_a_completion_that_is_read_before_its_issue_does_no_harm(tmp_path: Path) -> None:
    with tracked(tmp_path) as disk:
        disk.apply(events(disk, (What.COMPLETE, b"W", 0, 8)))
        disk.apply(events(disk, (What.ISSUE, b"W", 0, 8)))
        assert taken(disk) == [(0, 4096)]


def test_discards_of_several_places_in_one_request_are_followed_one_by_one(tmp_path: Path) -> None:
    with tracked(tmp_path, discard_ranges=True) as disk:
        queued = [(What.QUEUE, b"DS", 2048, 2048), (What.QUEUE, b"FDS", 32768, 4096)]
        disk.apply(events(disk, *queued, (What.ISSUE, b"DS", 2048, 6144)))  # one request, named by its first place
        assert taken(disk) == []
        disk.apply(events(disk, (What.COMPLETE, b"DS", 2048, 6144)))
        assert (32768 * 512, MIB) in taken(disk)
        assert disk.completeness.captured == 6144


def test_a_discard_that_was_not_seen_queued_is_missed_at_the_next_point(tmp_path: Path) -> None:
    with tracked(tmp_path, discard_ranges=True) as disk:
        disk.apply(events(disk, (What.QUEUE, b"DS", 0, 2048)))
        disk.completeness.captured = 0
        assert "2048 sectors of discards" in disk.missing()


def test_of_the_whole_disks_events_a_partition_takes_its_own(tmp_path: Path) -> None:
    with tracked(tmp_path) as disk:
        disk.device.start_bytes = 16 * MIB  # as if it were a partition from there on
        disk.size_bytes = 8 * MIB
        inside, across = (16 * MIB + 8192) // 512, (24 * MIB - 4096) // 512
        writes = [(1000, 8), (inside, 8), (across, 16), (16 * MIB // 512 - 8, 16)]
        for what in (What.ISSUE, What.COMPLETE):
            disk.apply(events(disk, *[(what, b"W", sector, sectors) for sector, sectors in writes]))
        assert taken(disk) == [(0, 12288), (8 * MIB - 4096, 4096)]  # a small hole is read with the rest
        assert disk.completeness.captured == 48  # the counters are the whole disk's


def test_it_reads_past_the_cache_and_never_writes(tmp_path: Path) -> None:
    with tracked(tmp_path) as disk:
        (tmp_path / "content").write_bytes(b"abc" * 20000)
        run("dd", f"if={tmp_path / 'content'}", f"of={disk.path}", "bs=60000", "conv=fsync")
        assert disk.read(512, 1024) == (b"abc" * 20000)[512:1536]
        with pytest.raises(OSError, match="Bad file descriptor"):
            disk.write(0, bytes(512))


def test_the_choice_is_made_in_words(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        found = choose(loop.device, log_directory=tmp_path)
        assert found.method is Method.BPF
        assert "eBPF" in found.reason
        own = choose(loop.device, log_directory=loop.mountpoint / "agent" / "log")
        assert own.method is Method.NONE
        assert "lies on" in own.reason
        iostats = loop.block.whole / "queue" / "iostats"
        iostats.write_text("0")
        assert "iostats" in choose(loop.device).reason
        iostats.write_text("1")
    none = choose(tmp_path / "file")
    assert none.method is Method.NONE
    (tmp_path / "file").write_bytes(b"x")
    assert "is no block device" in choose(tmp_path / "file").reason
    with pytest.raises(PermanentError, match="no block device"):
        TrackedDisk(0, "x", tmp_path / "file")


def test_where_bpf_is_refused_tracefs_is_chosen_and_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobility_agent.capture.trace.bpf.platform.machine", lambda: "sparc64")
    found = choose_method()
    assert found.method is Method.TRACEFS
    assert "not prepared for this processor" in found.reason


def test_a_write_that_was_logged_inline_is_not_done_again_to_a_disk_that_is_only_followed(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log")
    log.append_record(Kind.DISK, record.Disk(0, "a", 64 * MIB))
    owner = _Owner()
    assert log.claim(owner, b"w" * 512)
    log.describe(Kind.WRITE, 0, 0, 512, log.start, log.now_ns())
    owner.parsed = log.free
    log.seal()
    log.abandon()
    log = open_log(tmp_path / "log")
    with tracked(tmp_path) as disk:
        Ladder(log, [disk], {0: disk.regions}, {}).start()
        assert disk.read(0, 512) == bytes(512)
    log.abandon()


def test_what_inline_capture_knew_of_a_disk_is_forgotten_when_it_is_traced(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", size_bytes=64 * MIB) as loop, closing(TrackedDisk(0, "a", loop.device)) as disk:
        state = StateDirectory(tmp_path / "agent")
        state.log.mkdir()
        inline = DirtyRegions(regions_path(state, 0), disk.size_bytes)
        inline.clear(0, disk.size_bytes)
        inline.close()
        regions = open_regions(state, disk)
        regions.clear(0, disk.size_bytes)
        regions.close()
        again = DirtyRegions(regions_path(state, 0), disk.size_bytes)
        assert again.dirty_bytes == disk.size_bytes
        again.close()


class _Owner:
    parsed = 0

    def release(self, unparsed: bytes) -> None:
        assert not unparsed

"""Traces of real machines: what each format's documentation has is taken, everything else is refused by its line."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from replicar.errors import LimitError, PermanentError, ReplicarError
from simulator.application import Application
from simulator.oracle import FileImage, Oracle
from simulator.traces import blktrace, fio, msr
from simulator.traces.record import MOST_CHARACTERS, Kind, Record
from simulator.traces.replay import MOST_WRITE_BYTES, PAUSE_SECONDS, Format, Replay, fitted, read
from simulator.workload import Action, Operation
from tests.nbd.nbd_servers import qemu_nbd
from tests.support.tools import need

Parse = Callable[[Iterable[str], str], Iterator[Record]]

V2 = """fio version 2 iolog
/a add
/b add
/a open
/a write 4096 8192
/a wait 1500 0
/a wait 99 0
/b read 0 512
/b wait 100 0
/a sync 0 0
/a datasync 4096 0
/a trim 65536 4096
/a close
"""
V3 = """fio version 3 iolog
21 /a add
110 /a open
112 /a write 12288 4096
2327 /a trim 0 4096
40092 /a sync 12288 0
42300 /a close
42301 /a datasync 0 0
"""
BLKPARSE = """Input file sda.blktrace.0 added
  8,0    3        1     0.000000000   697  Q  WS 223490 + 8 [kjournald]
  8,0    3        2     0.000001829   697  G   W 223490 + 8 [kjournald]
  8,0    3        0     0.000009827     0  m   N cfq18166S  /user.slice alloced
  8,0    3        3     0.000002197   697  P   N [kjournald]
  8,0    3        4     0.000002197   697  UT   N [kjournald] 1
  8,16   1        5     1.500000001   698  Q   D 4096 + 2048 [fstrim]
  8,0    3        6     2.000000000   698  Q FWFS 8 + 8 (     120) [a [b] c]
  8,0    3        7     2.100000000   698  Q FWS [kworker/3:1H]
  8,0    3        8     2.200000000   698  Q  FN [kworker/3:1H]
  8,0    3        9     2.300000000   698  Q  WB 0 + 0 [swapper]
  8,0    3       10     2.400000000   698  Q  RM 73992 + 8 [fs_mark]
  8,0    3       11     2.500000000   698  Q   R 36 (12 00 00 00 24 00 ..) [hald-addon-stor]
  8,0    3       12     2.600000000   698  C  WS 223490 + 8 [0]
259,0    0       13     3.000000000   698  A   W 9 + 8 <- (8,1) 1
259,0    0       14    10.000000007 12345  Q  WF 16 + 1 [x]

CPU0 (sda):
 Reads Queued:           1,        4KiB\t Writes Queued:           4,       16KiB
Total (sda):
Throughput (R/W): 0KiB/s / 0KiB/s
"""
MSR = """Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime
128166372003061629,hm,0,Write,7014912,4096,26
128166372016382155,hm,0,Read,1074696192,512,113
128166372003061628,prn,12,Write,0,1024,0
"""


def _records(parse: Parse, text: str) -> list[Record]:
    return list(parse(text.splitlines(keepends=True), "trace"))


def test_an_iolog_of_version_2_has_the_times_of_its_waits() -> None:
    assert _records(fio.parse, V2) == [
        Record(0, "/a", Kind.WRITE, 4096, 8192),
        Record(1_500_000, "/b", Kind.READ, 0, 512),
        Record(1_600_000, "/a", Kind.FLUSH),
        Record(1_600_000, "/a", Kind.FLUSH),
        Record(1_600_000, "/a", Kind.TRIM, 65536, 4096),
    ]


def test_an_iolog_of_version_3_has_microseconds_before_everything() -> None:
    assert _records(fio.parse, V3) == [
        Record(112_000, "/a", Kind.WRITE, 12288, 4096),
        Record(2_327_000, "/a", Kind.TRIM, 0, 4096),
        Record(40_092_000, "/a", Kind.FLUSH),
        Record(42_301_000, "/a", Kind.FLUSH),
    ]


def test_queue_events_are_taken_from_blkparse_and_everything_else_it_prints_is_passed_over() -> None:
    assert _records(blktrace.parse, BLKPARSE) == [
        Record(0, "8,0", Kind.WRITE, 223490 * 512, 4096),
        Record(1_500_000_001, "8,16", Kind.TRIM, 4096 * 512, 1 << 20),
        Record(2_000_000_000, "8,0", Kind.FLUSH),
        Record(2_000_000_000, "8,0", Kind.WRITE, 4096, 4096, fua=True),
        Record(2_100_000_000, "8,0", Kind.FLUSH),
        Record(2_200_000_000, "8,0", Kind.FLUSH),
        Record(2_300_000_000, "8,0", Kind.FLUSH),
        Record(2_400_000_000, "8,0", Kind.READ, 73992 * 512, 4096),
        Record(10_000_000_007, "259,0", Kind.WRITE, 8192, 512, fua=True),
    ]


def test_msr_cambridge_counts_ticks_of_100_ns_from_the_first_line() -> None:
    expected = [
        Record(0, "hm.0", Kind.WRITE, 7014912, 4096),
        Record(1_332_052_600, "hm.0", Kind.READ, 1074696192, 512),
        Record(-100, "prn.12", Kind.WRITE, 0, 1024),
    ]
    assert _records(msr.parse, MSR) == _records(msr.parse, MSR.partition("\n")[2]) == expected


@pytest.mark.parametrize(
    ("parse", "text", "line", "what"),
    [
        (fio.parse, "", 1, "no `fio version 2"),
        (fio.parse, "fio version 1 iolog\n", 1, "no `fio version 2"),
        (fio.parse, V2 + "/a erase 0 512\n", 14, "'erase'"),
        (fio.parse, V2 + "/a unlink\n", 14, "'unlink'"),
        (fio.parse, V2 + "/c write 0 512\n", 14, "not added"),
        (fio.parse, V2 + "/c open\n", 14, "not added"),
        (fio.parse, V2 + "/a write 0 -512\n", 14, "length is no number"),
        (fio.parse, V2 + "/a write 0\n", 14, "neither"),
        (fio.parse, V2 + "/a write ٣ 512\n", 14, "offset is no number"),
        (fio.parse, V2 + "fio version 2 iolog\n", 14, "no number|not added"),
        (fio.parse, V3 + "50000 /a wait 100 0\n", 9, "'wait' that version 3 has not"),
        (fio.parse, V3 + "/a write 0 512\n", 9, "time is no number"),
        (fio.parse, V3 + "fio version 3 iolog\n", 9, "time is no number"),
        (fio.parse, V3 + "1 /a write 18446744073709551616 1\n", 9, "64 bits"),
        (blktrace.parse, "hello\n", 1, "no event"),
        (blktrace.parse, "  8,0 3 1 0.5 697 Q W 1 + 8 [x]\n", 1, "no event"),
        (blktrace.parse, "  8,0 3 1 0.000000000 697 Z W 1 + 8 [x]\n", 1, "action 'Z'"),
        (blktrace.parse, "  8,0 3 1 0.000000000 697 Q WZ 1 + 8 [x]\n", 1, "RWBS 'WZ'"),
        (blktrace.parse, "  8,0 3 1 0.000000000 697 Q W 1 - 8 [x]\n", 1, "without sector"),
        (blktrace.parse, BLKPARSE + BLKPARSE, 23, "behind the summary"),
        (msr.parse, MSR + "1,hm,0,Write,0,512\n", 5, "6 fields"),
        (msr.parse, MSR + "1,hm,0,write,0,512,1\n", 5, "'write', neither"),
        (msr.parse, MSR + "1.5,hm,0,Write,0,512,1\n", 5, "timestamp is no number"),
        (msr.parse, MSR + "1,,0,Write,0,512,1\n", 5, "no host"),
        (msr.parse, MSR + MSR, 5, "timestamp is no number"),
    ],
)
def test_what_no_documentation_has_is_refused_with_file_and_line(parse: Parse, text: str, line: int, what: str) -> None:
    with pytest.raises(PermanentError, match=what) as caught:
        _records(parse, text)
    assert caught.value.fields == {"path": "trace", "line": line}
    assert f"trace line {line}: " in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("layout", Format)
def test_a_line_without_an_end_is_not_read_to_its_end(layout: Format, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\xff" * (MOST_CHARACTERS * 4))
    with pytest.raises(LimitError, match=f"line 1 has more than {MOST_CHARACTERS}"):
        list(read(path, layout))


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="can't be read"):
        list(read(tmp_path / "none", Format.FIO))


_PIECES = st.sampled_from(
    ["fio version 2 iolog", "fio version 3 iolog", *V2.split(), *V3.split(), *BLKPARSE.split(), *MSR.split(",")]
)
_GOOD = st.sampled_from([*V2.splitlines(), *V3.splitlines(), *BLKPARSE.splitlines(), *MSR.splitlines()])
_LINES = st.lists(
    st.one_of(
        _GOOD,
        st.builds(
            lambda line, at, text: line[:at] + text + line[at + 1 :], _GOOD, st.integers(0, 60), st.text(max_size=3)
        ),
        st.lists(_PIECES, max_size=9).map(" ".join),
        st.lists(_PIECES, max_size=9).map(",".join),
        st.text(max_size=40),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(_LINES, st.sampled_from([fio.parse, blktrace.parse, msr.parse]))
def test_any_lines_give_records_or_a_declared_error(lines: list[str], parse: Parse) -> None:
    with contextlib.suppress(ReplicarError):
        for record in parse(lines, "fuzz"):
            assert 0 <= record.length < 1 << 74
            assert record.disk


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Record,
            st.integers(-(10**10), 10**12),
            st.just("disk"),
            st.sampled_from(Kind),
            st.integers(0, 1 << 64),
            st.integers(0, 4 << 20),
            st.booleans(),
        ),
        max_size=20,
    ),
    st.integers(1, 5000),
    st.sampled_from([0.1, 1.0, 1000.0]),
)
def test_everything_is_fitted_into_the_disk_in_its_order(records: list[Record], sectors: int, speed: float) -> None:
    size = sectors * 512
    steps = list(fitted(records, size, speed))
    assert all(due <= later for (due, _), (later, _) in itertools.pairwise([(0.0, None), *steps]))
    for _, step in steps:
        assert step.offset % 512 == step.length % 512 == 0
        assert step.offset + step.length <= size
        assert (step.length == 0) == (step.action is Action.FLUSH)
    changed = [record for record in records if record.kind in (Kind.WRITE, Kind.TRIM) and record.length]
    least = sum(min(record.length, size) for record in changed)
    assert least <= sum(step.length for _, step in steps) <= least + 1022 * len(changed)


def test_a_place_beyond_the_disk_comes_around_and_a_large_write_comes_in_pieces() -> None:
    records = [
        Record(5_000_000_000, "d", Kind.WRITE, (1 << 20) + 100, 512),
        Record(5_500_000_000, "d", Kind.READ, 0, 512),
        Record(6_000_000_000, "d", Kind.WRITE, (1 << 20) - 512, MOST_WRITE_BYTES + 512, fua=True),
    ]
    assert list(fitted(records, 1 << 20, speed=2)) == [
        (0.0, Operation(Action.WRITE, 0, 1024)),
        (0.5, Operation(Action.WRITE, (1 << 20) - 512, 512, fua=True)),
        (0.5, Operation(Action.WRITE, 0, MOST_WRITE_BYTES - 512, fua=True)),
        (0.5, Operation(Action.WRITE, MOST_WRITE_BYTES - 512, 512, fua=True)),
    ]


def test_a_replay_goes_round_and_round() -> None:
    records = (Record(1_000_000_000, "d", Kind.FLUSH), Record(3_000_000_000, "d", Kind.FLUSH))
    due = [due for due, _ in itertools.islice(Replay("t", records).operations(4096, random.Random(1)), 5)]
    assert due == [1.0, 3.0, 4.0 + PAUSE_SECONDS, 6.0 + PAUSE_SECONDS, 7.0 + 2 * PAUSE_SECONDS]


@pytest.mark.parametrize("records", [(), (Record(0, "d", Kind.READ, 0, 512), Record(0, "d", Kind.WRITE, 0, 0))])
def test_a_replay_of_nothing_is_refused(records: tuple[Record, ...]) -> None:
    with pytest.raises(ValueError, match="without anything to do"):
        Replay("t", records)


async def test_what_fio_did_is_read_from_its_iolog_and_done_again_on_a_disk(tmp_path: Path) -> None:
    job = await _fio(tmp_path / "iolog", tmp_path / "file")
    records = list(read(tmp_path / "iolog", Format.FIO))
    for kind in (Kind.READ, Kind.WRITE):
        mine = [record for record in records if record.kind is kind]
        assert len(mine) == job[kind]["total_ios"] > 10
        assert sum(record.length for record in mine) == job[kind]["io_bytes"]
    assert sum(record.kind is Kind.FLUSH for record in records) == job["sync"]["total_ios"] > 0
    milliseconds = records[-1].time_ns / 1e6
    assert job["job_runtime"] / 2 < milliseconds < job["job_runtime"] * 100, "microseconds; not 1000 times as long"

    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(1).randbytes(100 << 10))  # so that places come around
    oracle = Oracle(image, tmp_path / "oracle")
    async with qemu_nbd(image) as (socket, _):
        application = Application(socket, oracle, fitted(records, 100 << 10, speed=10), seed=3)
        await application.run()
    comparison = oracle.compare(FileImage(image), "end")
    assert comparison.equal, str(comparison)
    assert application.tally.bytes_written == job["write"]["io_bytes"]
    assert application.tally.flushes == job["sync"]["total_ios"]
    assert comparison.changes_required == len(oracle.changes) >= job["write"]["total_ios"]


async def _fio(iolog: Path, file: Path) -> dict[str, Any]:
    """Let fio work for about a third of a second; gives what it reports of its one job."""
    process = await asyncio.create_subprocess_exec(
        need("fio"),
        *("--name=traced", f"--filename={file}", "--size=256k", "--bs=4k", "--rw=randrw", "--rate_iops=100"),
        *("--fsync=8", f"--write_iolog={iolog}", "--output-format=json"),
        stdout=asyncio.subprocess.PIPE,
        cwd=iolog.parent,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    job: dict[str, Any] = json.loads(output)["jobs"][0]
    return job

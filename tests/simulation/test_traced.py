"""A seed's story with its disks used as a real machine's trace says: told by the command, kept in a file, judged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from replicar.errors import LimitError, PermanentError
from simulator.seeds import main
from simulator.story import STORY_SECONDS, story_of
from simulator.traces.replay import Format, Replay
from simulator.traces.retold import MOST_STORY_RECORDS, with_trace

#: A story of two disks.
SEED = next(seed for seed in range(100) if len(story_of(seed).disks) == 2)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two disks of a machine for five seconds, its places far beyond the ends of a story's disks."""
    lines = []
    for number in range(60):
        seconds, ns = divmod(number * 83_000_000, 1_000_000_000)
        device, sector = ("8,0", 1_000_003 * number) if number % 3 else ("8,16", 64 * number)
        lines.append(f"  {device} 0 {number} {seconds:5}.{ns:09} 697 Q WS {sector} + {1 + number % 40} [postgres]")
        if number % 10 == 9:
            lines.append(f"  {device} 0 {number} {seconds:5}.{ns:09} 697 Q FWS [postgres]")
            lines.append(f"  {device} 0 {number} {seconds:5}.{ns:09} 697 Q D {sector} + 128 [fstrim]")
    path = tmp_path / "sda.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_traced_story_breaks_no_promise_and_is_the_same_without_its_trace(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "story.json"
    arguments = ["--seed", str(SEED), "--trace-file", str(trace), "--format", "blktrace", "--speed", "0.5"]
    assert main([*arguments, "--save", str(kept)]) == 0
    told = capsys.readouterr().out
    assert "under the trace sda.txt" in told
    changes, points = (int(number) for number in re.findall(r"(\d+) (?:changes|points recovered)", told))
    assert changes > 100
    assert points > 0
    trace.unlink()
    assert main(["--story", str(kept)]) == 0
    assert capsys.readouterr().out == told


def test_the_traced_disks_are_shared_out_in_the_order_in_which_they_appear(trace: Path) -> None:
    shares = [disk.workload for disk in with_trace(story_of(SEED), trace, Format.BLKTRACE).disks]
    assert [{record.disk for record in share.records} for share in shares if isinstance(share, Replay)] == [
        {"8,16"},
        {"8,0"},
    ]


def test_a_disk_without_a_trace_of_its_own_keeps_its_workload(tmp_path: Path) -> None:
    path = tmp_path / "hm_0.csv"
    path.write_text("128166372003061629,hm,0,Write,7014912,4096,26\n", encoding="utf-8")
    story = story_of(SEED)
    first, second = with_trace(story, path, Format.MSR).disks
    assert isinstance(first.workload, Replay)
    assert second == story.disks[1]


def test_what_comes_behind_the_storys_end_is_left_out_and_what_is_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "iolog"
    writes = [f"{number * 1000} /a write 0 512\n" for number in range(MOST_STORY_RECORDS + 1)]
    path.write_text("fio version 3 iolog\n0 /a add\n" + "".join(writes), encoding="utf-8")
    story = story_of(0)
    shares = [disk.workload for disk in with_trace(story, path, Format.FIO, speed=0.1).disks]
    assert isinstance(shares[0], Replay)
    assert len(shares[0].records) == STORY_SECONDS * 0.1 * 1000
    with pytest.raises(LimitError, match=f"more than {MOST_STORY_RECORDS} changes"):
        with_trace(story, path, Format.FIO)


def test_a_trace_of_reads_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hm_0.csv"
    path.write_text("128166372003061629,hm,0,Read,7014912,4096,26\n", encoding="utf-8")
    with pytest.raises(PermanentError, match="changes no disk"):
        with_trace(story_of(0), path, Format.MSR)


def test_the_command_says_what_is_wrong_with_a_trace(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "0", "--trace-file", str(trace), "--format", "msr"]) == 1
    assert f"{trace} line 1: " in capsys.readouterr().err
    for wrong in (["--trace-file", str(trace), "--format", "msr"], ["--seed", "0", "--trace-file", str(trace)]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "--trace-file needs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--seed", "0", "--trace-file", str(trace), "--format", "blktrace", "--speed", "0"])

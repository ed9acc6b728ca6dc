"""Each benchmark, small, as a user runs it: one JSON object, whole and sensible, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import seed_peers
from tests.support.tools import need

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 280


def _bench(*arguments: str, seconds: float = LIMIT_SECONDS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


def _report(*arguments: str, seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
    done = _bench(*arguments, seconds=seconds)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["valid"]
    assert report["faults"] == []
    assert report["command"] == " ".join(["python -m bench", *arguments])
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert report["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(report["commit"]) == {"id", "dirty"}
    assert any("random bytes" in remark for remark in report["remarks"])
    return report


def test_the_limit_is_the_cores_over_the_sum_of_the_raw_costs(tmp_path: Path) -> None:
    report = _report("limit", "--json", "--mib", "16", "--directory", str(tmp_path))
    costs = report["cpu_seconds_per_gb"]
    assert set(costs) == {
        *("tls_send", "tls_receive", "hash", "cache_write", "compress", "encrypt", "https_put", "sink")
    }
    assert sum(costs.values()) == pytest.approx(report["cpu_seconds_per_gb_total"], abs=0.01)
    expected = report["machine"]["cores"] * 1000 / report["cpu_seconds_per_gb_total"]
    assert report["limit_mb_per_s"] == pytest.approx(expected, rel=0.01)
    assert 1.3 < report["compress_ratio"] < 1.8
    assert costs["compress"] > costs["hash"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_datapath_moves_everything_into_the_sink_and_is_compared_with_the_limit(tmp_path: Path) -> None:
    size = ["--gib", "0.0625", "--limit-mib", "16"]
    report = _report("datapath", "--json", *size, "--directory", str(tmp_path))
    assert report["bytes"]["written"] == 64 << 20
    assert report["bytes"]["sent"] > report["bytes"]["written"]
    assert report["bytes"]["uploaded"] == pytest.approx(report["bytes"]["written"] / report["compress_ratio"], rel=0.01)
    assert report["ratio"] == pytest.approx(report["mb_per_s"] / report["limit_mb_per_s"], abs=0.01)
    for part in ("agent", "process_server", "sink"):
        assert set(report["cpu_seconds_per_gb"][part]) == {"user", "system", "total"}
        assert part in report["raw_cpu_seconds_per_gb"]
    assert report["cpu_seconds_per_gb"]["process_server"]["total"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_recovery_says_what_opening_a_point_takes_and_alternates_the_sides_of_a_whole_disk() -> None:
    report = _report("recovery", "--json", "--gib", "1", "--points", "8", "--share", "256", "--boots", "0")
    assert report["first_byte_seconds"] >= report["first_byte_seconds_median"] > 0
    assert report["first_byte_seconds_10_ms_away"] > 0.01
    assert report["index_bytes_per_write"] >= 0
    assert len(report["materialise_ratios"]) >= 5
    assert 0.05 < report["materialise_ratio"] < 20


def test_without_a_name_they_are_listed_one_line_each() -> None:
    done = _bench()
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "limit",
        "datapath",
        "capture",
        "churn",
        "fleet",
        "seed",
        "recovery",
        "simulator",
    ]


def test_without_json_there_is_a_table_for_people(tmp_path: Path) -> None:
    done = _bench("limit", "--mib", "1", "--directory", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "limit_mb_per_s" in done.stdout
    assert not done.stdout.startswith("{")


@pytest.mark.parametrize(
    "arguments",
    [["nothing-like-it"], ["limit", "--nonsense"], ["datapath", "--frame-kib", "6", "--limit-mib", "1"]],
)
def test_a_run_that_can_not_be_fails_and_says_why(arguments: list[str]) -> None:
    done = _bench(*arguments)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr


def test_capture_is_measured_beside_a_server_that_logs_nothing(tmp_path: Path) -> None:
    need("fio")
    need("nbdkit")
    report = _report(
        "capture", "--json", "--seconds", "0.3", "--rounds", "2", "--mib", "64", "--directory", str(tmp_path)
    )
    for load in ("nbd_iops", "nbd_sequential"):
        assert len(report[f"{load}_ratios"]) == 2
        assert 0.02 < report[f"{load}_ratio"] < 20
    assert report["nbd_iops_agent_iops"] > 500
    assert report["nbd_sequential_agent_mb_per_s"] > 10
    assert report["memory_per_tib_anon_bytes"] < 64 << 20
    if os.geteuid() == 0:
        for load in ("trace_iops", "fuse_iops", "fuse_sequential"):
            assert 0.02 < report[f"{load}_ratio"] < 20
        assert report["trace_lost"] == 0
        assert report["trace_events"] > 500
    assert list(tmp_path.iterdir()) == []


def test_churn_says_how_old_the_oldest_change_became_that_was_not_stored(tmp_path: Path) -> None:
    need("fio")
    rate = ["--mb-per-s", "2", "--seconds", "2", "--step-seconds", "0", "--disk-mib", "64"]
    report = _report("churn", "--json", *rate, "--directory", str(tmp_path))
    assert report["written_mb_per_s"] == pytest.approx(2, rel=0.2)
    assert 0 < report["rpo_seconds_p50"] <= report["rpo_seconds_p99"] <= report["rpo_seconds_max"]
    assert report["rpo_samples"] >= 100
    assert report["churn_mb_per_s_max"] == report["written_mb_per_s"]
    assert report["steps"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_fleet_is_served_and_the_greedy_one_of_it_harms_no_other(tmp_path: Path) -> None:
    small = ["--agents", "12", "--seconds", "2", "--modest-mb-per-s", "1"]
    report = _report("fleet", "--json", *small, "--directory", str(tmp_path))
    assert report["mb_per_s"] > report["greedy_mb_per_s"] >= 0
    assert 0 <= report["modest_rpo_seconds_p50"] <= report["modest_rpo_seconds_p99"]
    assert report["modest_rpo_seconds_max"] > 0
    assert 50 < report["rss_mib"] < 1024
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
@pytest.mark.timeout(620)
def test_a_first_copy_is_compared_with_azcopy_and_a_change_with_restic(tmp_path: Path) -> None:
    need("restic")
    need("mkfs.ext4")
    if not seed_peers.AZCOPY.exists():
        pytest.skip("no AzCopy here; run setup/azcopy.sh")
    small = ["--gib", "0.0625", "--delta-mib", "1", "--directory", str(tmp_path)]
    report = _report("seed", "--json", *small, seconds=600)
    assert report["recovered"] == "every file equal, e2fsck clean"
    assert report["left_out_mib"] > 0
    assert report["speedup"] > 0
    assert report["delta_speedup"] > 0
    assert list(tmp_path.iterdir()) == []

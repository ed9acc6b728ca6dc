"""The state directory (one agent, disks that keep their index, a lost log that is noticed), and the metrics."""

from __future__ import annotations

import multiprocessing
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from mobility_agent.metrics import MAX_FRAMES_UNDER_WAY, Metrics, Window
from mobility_agent.state import KnownDisk, StateDirectory, boot_id
from replicar.control.identity import Identity
from replicar.control.messages import AgentAssignment
from replicar.errors import CorruptionError, PermanentError

ASSIGNMENT = AgentAssignment(epoch=3, process_server_id=uuid.UUID(int=4), host="ps.example.org", port=9443)


def _enter(path: Path, outcome: multiprocessing.Queue[str]) -> None:
    try:
        with StateDirectory(path):
            outcome.put("entered")
    except PermanentError as error:
        outcome.put(error.message)


def test_a_second_agent_on_one_directory_is_refused_by_name(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    state = StateDirectory(tmp_path / "s")
    assert not state.is_running()
    with state:
        assert StateDirectory(tmp_path / "s").is_running()
        other = context.Process(target=_enter, args=(tmp_path / "s", outcome))
        other.start()
        said = outcome.get(timeout=30)
        other.join()
    assert said.startswith("another agent (process ")
    assert str(tmp_path / "s") in said
    assert not state.is_running()
    with StateDirectory(tmp_path / "s"):
        pass  # given back


def test_the_last_assignment_is_found_again(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "s")
    assert state.load_assignment() is None
    state.save_assignment(ASSIGNMENT)
    assert StateDirectory(tmp_path / "s").load_assignment() == ASSIGNMENT
    state.save_assignment(None)
    assert state.load_assignment() is None


def test_a_damaged_assignment_is_as_good_as_none(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "s")
    state.assignment_file.write_text('{"epoch": "three"}')
    assert state.load_assignment() is None


def begun(state: StateDirectory, identity: Identity, disks: dict[str, int]) -> tuple[KnownDisk, ...]:
    """What the service does: settle, open the log, say that it was begun."""
    known = state.settle_disks(identity, disks).present
    state.log.mkdir(exist_ok=True)
    (state.log / "changes-1.hrl").touch()
    state.log_begun(identity)
    return known


def test_disks_keep_their_index_whatever_their_order(tmp_path: Path, machine: Identity) -> None:
    state = StateDirectory(tmp_path / "s")
    assert begun(state, machine, {"root": 512, "data": 1024}) == (KnownDisk(0, "root", 512), KnownDisk(1, "data", 1024))
    assert begun(state, machine, {"data": 1024, "root": 512}) == (KnownDisk(1, "data", 1024), KnownDisk(0, "root", 512))


def test_a_disk_that_is_new_gets_an_index_of_its_own(tmp_path: Path, machine: Identity) -> None:
    state = StateDirectory(tmp_path / "s")
    begun(state, machine, {"root": 512})
    for _ in range(2):  # also after a start that died
        assert begun(state, machine, {"more": 512, "root": 512}) == (
            KnownDisk(1, "more", 512),
            KnownDisk(0, "root", 512),
        )


def test_a_disk_that_grew_keeps_its_index_and_one_that_shrank_is_refused(tmp_path: Path, machine: Identity) -> None:
    state = StateDirectory(tmp_path / "s")
    begun(state, machine, {"root": 512, "data": 1024})
    assert begun(state, machine, {"root": 512, "data": 4096})[1] == KnownDisk(1, "data", 4096)
    with pytest.raises(PermanentError, match="disk data has 1024 bytes now, but 4096") as caught:
        state.settle_disks(machine, {"root": 512, "data": 1024})
    assert "another name" in caught.value.hint


def test_a_disk_that_is_gone_is_told_until_the_stream_has_it_and_what_was_kept_of_it_goes(
    tmp_path: Path, machine: Identity
) -> None:
    state = StateDirectory(tmp_path / "s")
    begun(state, machine, {"root": 512, "data": 1024})
    kept = [state.log / name for name in ("disk-1.regions", "disk-1.digests", "disk-10.regions")]
    for path in kept:
        path.touch()
    for _ in range(2):
        assert state.settle_disks(machine, {"root": 512}).gone == (KnownDisk(1, "data", 1024),)
    state.disks_gone([KnownDisk(1, "data", 1024)])
    assert state.settle_disks(machine, {"root": 512}).gone == ()
    assert [path.exists() for path in kept] == [False, False, True]
    again = begun(state, machine, {"root": 512, "data": 1024})
    assert again[1] == KnownDisk(2, "data", 1024)  # it is another disk now


def test_an_index_is_never_given_to_another_disk(tmp_path: Path, machine: Identity) -> None:
    state = StateDirectory(tmp_path / "s")
    begun(state, machine, {"root": 512, "data": 1024})
    begun(state, replace(machine, incarnation=1), {"root": 512})
    last = begun(state, replace(machine, incarnation=2), {"root": 512, "new": 512})
    assert [disk.index for disk in last] == [0, 2]


def test_a_lost_log_is_noticed_before_its_numbers_are_used_again(tmp_path: Path, machine: Identity) -> None:
    state = StateDirectory(tmp_path / "s")
    begun(state, machine, {"root": 512})
    (state.log / "changes-1.hrl").unlink()
    with pytest.raises(PermanentError, match="is gone, but its sequence numbers were used") as caught:
        state.settle_disks(machine, {"root": 512})
    assert "mobility-agent enrol" in caught.value.hint
    begun(state, replace(machine, incarnation=1), {"root": 512})


def test_enrolling_again_leaves_nothing_of_the_old_log(tmp_path: Path, machine: Identity) -> None:
    state = StateDirectory(tmp_path / "s")
    begun(state, machine, {"root": 512})
    state.settle_disks(replace(machine, incarnation=1), {"root": 512})
    assert not state.log.exists()


def test_a_start_that_died_before_the_log_was_begun_can_be_made_again(tmp_path: Path, machine: Identity) -> None:
    state = StateDirectory(tmp_path / "s")
    state.settle_disks(machine, {"root": 512})
    assert state.settle_disks(machine, {"root": 1024}).present == (KnownDisk(0, "root", 1024),)


def test_a_damaged_list_of_disks_is_said(tmp_path: Path, machine: Identity) -> None:
    state = StateDirectory(tmp_path / "s")
    for damage in ("", "[]", '{"incarnation": 0}', '{"incarnation": 0, "disks": [{}]}'):
        state.disks_file.write_text(damage)
        with pytest.raises(CorruptionError, match=r"disks\.json"):
            state.settle_disks(machine, {"root": 512})


def test_the_boot_id_is_the_systems() -> None:
    assert len(boot_id()) == 16
    assert boot_id() == boot_id() != bytes(16)


def test_percentiles_are_by_nearest_rank_over_the_window() -> None:
    window = Window(100)
    assert window.percentiles(0.5, 0.99) == (0.0, 0.0)
    window.add(7.0)
    assert window.percentiles(0.0, 0.5, 1.0) == (7.0, 7.0, 7.0)
    for value in range(250):
        window.add(float(value))
    assert window.percentiles(0.5, 0.99, 1.0) == (199.0, 248.0, 249.0)


def test_the_rpo_is_the_age_of_the_oldest_change_that_is_not_stored() -> None:
    metrics = Metrics()
    metrics.sample_rpo(None, 10**9)
    assert metrics.rpo_seconds == 0.0
    metrics.sample_rpo(10**9, 3 * 10**9)
    assert metrics.rpo_seconds == 2.0
    metrics.sample_rpo(10**9, 5 * 10**8)  # a clock that was set back
    assert metrics.rpo_seconds == 0.0
    metrics.sample_rpo(0, 10**12, protected=False)  # nobody has been asked to protect it yet
    assert metrics.rpo_seconds == 1000.0
    assert metrics.rpo_percentiles() == (0.0, 2.0)


def test_the_lag_is_measured_for_every_frame_once() -> None:
    metrics = Metrics()
    for sequence in (5, 9, 12):
        metrics.frame_sent(sequence, sequence * 10**9)
    metrics.frame_sent(9, 9 * 10**9)  # sent again
    metrics.stored(10, 20 * 10**9)
    assert metrics.lag_percentiles() == (11.0, 15.0)
    metrics.stored(12, 20 * 10**9)
    assert metrics.lag_percentiles() == (11.0, 15.0)
    for sequence in range(13, 13 + 2 * MAX_FRAMES_UNDER_WAY):
        metrics.frame_sent(sequence, 0)
    assert len(metrics._under_way) == MAX_FRAMES_UNDER_WAY

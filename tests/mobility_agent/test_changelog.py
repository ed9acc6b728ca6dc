"""The change log over deaths: of the process, of the machine, of the files' tails."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from mobility_agent.changelog import ChangeLog
from mobility_agent.logstate import Past
from mobility_agent.regions import DirtyRegions
from replicar.clock import SystemClock
from replicar.errors import ConflictError, CorruptionError, LimitError, ReplicarError
from replicar.formats import record
from replicar.formats.changelog import FRAMES_OFFSET
from replicar.formats.frame import ANEW_STEP, Flag, Frame, Kind, begins_anew, may_begin_anew
from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import FILE_BYTES, MIB, agent_core, frames_of, gap_flags, open_log, replay


def _mark(log: ChangeLog, name: str) -> int:
    return log.append_record(Kind.MARK, record.Mark(name))


_Writes = list[tuple[int, bytes]]


async def _write_until_killed(directory: Path, seconds: float, seed: int) -> tuple[_Writes, _Writes]:
    """Serve in a process, write through it, SIGKILL it; the acknowledged writes in order, and those still in flight."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.mobility_agent.killable", str(directory)), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"serving\n"
    draw, acknowledged, in_flight = random.Random(seed), _Writes(), dict[int, tuple[int, bytes]]()

    async def write(client: NbdClient, lane: int) -> None:
        while True:  # each lane has a part of the disk to itself, so the order of acknowledgements is the order there
            offset = lane * 2 * MIB + draw.randrange(0, 2 * MIB - 65536, 512)
            content = draw.randbytes(draw.choice((512, 4096, 65536)))
            in_flight[lane] = (offset, content)
            await client.write(offset, content)
            acknowledged.append(in_flight.pop(lane))

    client = await NbdClient.connect(directory / "nbd")
    lanes = [asyncio.create_task(write(client, lane)) for lane in range(4)]
    while not acknowledged:  # a busy machine may take its time for the first one
        await asyncio.sleep(0.001)
    await asyncio.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    results = await asyncio.gather(*lanes, return_exceptions=True)
    assert all(isinstance(result, ReplicarError) for result in results), results
    return acknowledged, list(in_flight.values())


@pytest.mark.parametrize("seed", range(4))
async def test_a_killed_agent_loses_nothing_acknowledged_and_agrees_with_its_disk(tmp_path: Path, seed: int) -> None:
    for round_number in range(2):
        acknowledged, in_flight = await _write_until_killed(tmp_path, 0.05 + seed * 0.09 + round_number * 0.03, seed)
        assert acknowledged
        log = open_log(tmp_path / "log", limit_bytes=256 * MIB)
        assert log.survived
        replayed = replay(frames_of(log), 8 * MIB)
        newest = bytearray(replayed)
        for offset, content in acknowledged:
            newest[offset : offset + len(content)] = content
        # What differs from the acknowledged state is what a write in flight (one a lane) put there, and nothing else.
        landed = bytearray(newest)
        for offset, content in in_flight:
            for start in range(0, len(content), 512):
                place = slice(offset + start, offset + start + 512)
                if replayed[place] == content[start : start + 512]:
                    landed[place] = replayed[place]
        assert landed == replayed
        log.abandon()
        _take_for_copied(tmp_path)
        async with agent_core(tmp_path, limit_bytes=256 * MIB) as core:  # the redo happens here
            assert replay(frames_of(core.log), 8 * MIB) == core.disk.path.read_bytes()


def _take_for_copied(directory: Path) -> None:
    """Nothing is dirty: what is dirty is not redone, since it will be copied."""
    regions = DirtyRegions(directory / "root.regions", 8 * MIB)
    regions.clear(0, 8 * MIB)
    regions.close()


def test_sequences_go_on_where_they_were(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert [_mark(log, "a"), _mark(log, "b")] == [1, 2]
    log.abandon()
    log = open_log(tmp_path)
    assert _mark(log, "c") == 3
    assert [frame.header.first_sequence for frame in frames_of(log)] == [1, 2, 3]
    log.abandon()


async def test_a_clean_stop_before_a_reboot_is_trusted(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    _mark(log, "a")
    await log.close()
    log = open_log(tmp_path, boot_id=b"another boot".ljust(16))
    assert log.survived
    assert _mark(log, "b") == 2
    log.abandon()


async def test_after_a_power_cut_numbers_are_never_given_twice_and_everything_is_compared(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        core.ladder.regions[0].clear(0, core.disk.size_bytes)
        core.ladder.close_gap()
        async with await NbdClient.connect(core.socket) as client:
            await client.write(0, b"w" * 4096)
        core.log.seal()
        sent = core.log.next_sequence  # frames may have been sent up to here
        core.log.state.clean = False
        core.log.state.save()
        file = next((tmp_path / "log").glob("*.hrl"))
        image = file.read_bytes()
        state = (tmp_path / "log" / "state").read_bytes()
    file.write_bytes(image[: FRAMES_OFFSET + 100].ljust(len(image), b"\0"))  # the tail never reached the disk
    (tmp_path / "log" / "state").write_bytes(state)
    async with agent_core(tmp_path, boot_id=b"after the cut".ljust(16)) as core:
        assert not core.log.survived
        assert core.log.next_sequence > ANEW_STEP > sent
        assert core.ladder.dirty_bytes == core.disk.size_bytes
        assert core.ladder.in_gap
        first = frames_of(core.log)[0]
        assert first.header.first_sequence > sent
        assert begins_anew(first.table)
        assert may_begin_anew(first.header.first_sequence)


def test_a_log_that_died_before_it_could_begin_anew_does_so_next_time(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    _mark(log, "a")
    log.abandon()
    cut = open_log(tmp_path, boot_id=b"after the cut".ljust(16))
    anew = cut.next_sequence
    assert not cut.survived
    cut.abandon()  # before anything was captured
    again = open_log(tmp_path, boot_id=b"after the cut".ljust(16))
    assert not again.survived
    assert again.next_sequence == anew
    again.abandon()


def test_a_damaged_frame_on_the_same_boot_is_not_trusted_either(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for name in "abc":
        _mark(log, name)
    log.abandon()
    file = next(tmp_path.glob("*.hrl"))
    data = bytearray(file.read_bytes())
    data[FRAMES_OFFSET + 200] ^= 1
    file.write_bytes(data)
    log = open_log(tmp_path)
    assert not log.survived
    assert log.state.gap_open
    assert _mark(log, "d") > ANEW_STEP
    log.abandon()
    log = open_log(tmp_path)
    assert log.survived  # the damage was declared once, and is not found again
    log.abandon()


def test_a_file_without_a_header_is_set_aside_and_everything_is_compared(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    _mark(log, "a")
    log.abandon()
    file = next(tmp_path.glob("*.hrl"))
    file.write_bytes(bytes(len(file.read_bytes())))
    log = open_log(tmp_path)
    assert not log.survived
    assert _mark(log, "b") > ANEW_STEP
    log.abandon()


def test_a_full_log_that_has_to_begin_anew_can_say_so(tmp_path: Path) -> None:
    log = open_log(tmp_path, limit_bytes=2 * FILE_BYTES)
    while log.append_copy(Kind.WRITE, 0, 0, MIB, os.urandom(MIB)):
        pass
    log.abandon()
    log = open_log(tmp_path, limit_bytes=2 * FILE_BYTES, boot_id=b"after the cut".ljust(16))
    assert not log.survived
    assert _mark(log, "anew") > ANEW_STEP
    log.abandon()


def _fill(log: ChangeLog) -> None:
    """To the last byte that anything may take."""
    while log.append_copy(Kind.WRITE, 0, 0, MIB, os.urandom(MIB)):
        pass
    with suppress(LimitError):
        while True:
            _mark(log, "one more")


async def test_a_full_log_keeps_no_agent_from_starting_however_often_the_power_is_cut(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log", limit_bytes=2 * FILE_BYTES)
    _fill(log)
    log.abandon()
    for number in range(3):
        async with agent_core(tmp_path, limit_bytes=2 * FILE_BYTES, boot_id=b"cut %d".ljust(16) % number) as core:
            assert core.ladder.in_gap
            async with await NbdClient.connect(core.socket) as client:
                await client.write(number * MIB, bytes([number + 1]) * MIB)
            # What the first has to say it says in a file beyond the limit; the others find that full as well.
            assert core.log.ordered is (number == 0)
            assert len(list((tmp_path / "log").glob("*.hrl"))) == 3
            _fill(core.log)
    async with agent_core(tmp_path, limit_bytes=2 * FILE_BYTES, boot_id=b"cut again".ljust(16)) as core:
        reserved = core.log.next_sequence
        core.log.trim(reserved - 1)  # storage has all there was
        seeding, frames, wanted = asyncio.create_task(core.seeder.run()), list[Frame](), reserved
        while core.ladder.in_gap or core.log.take(wanted) is not None:
            await asyncio.sleep(0.002)
            frames += frames_of(core.log, wanted)
            wanted = core.log.next_sequence
            core.log.trim(wanted - 1)
        seeding.cancel()
        await asyncio.gather(seeding, return_exceptions=True)
        assert frames[0].header.first_sequence == reserved
        assert begins_anew(frames[0].table)
        assert replay(frames, core.disk.size_bytes) == core.disk.path.read_bytes()


async def test_a_gap_that_has_no_room_comes_before_all_else_when_there_is_room(tmp_path: Path) -> None:
    async with agent_core(tmp_path, limit_bytes=2 * FILE_BYTES) as core:
        core.ladder.regions[0].clear(0, core.disk.size_bytes)
        assert core.ladder.close_gap()
        _fill(core.log)
        end = core.log.next_sequence
        core.ladder.open_gap("a test")
        assert core.ladder.in_gap
        with pytest.raises(LimitError):
            _mark(core.log, "between")
        assert not core.log.append_copy(Kind.ZERO, 0, 0, 4096)
        assert not core.ladder.close_gap()
        core.log.trim(end - 1)
        assert core.log.append_copy(Kind.ZERO, 0, 0, 4096)
        gap, copy = frames_of(core.log, end)
        assert gap_flags([gap]) == [Flag.GAP_BEGIN]
        assert copy.table["kind"].tolist() == [Kind.ZERO]


def test_a_cut_that_takes_the_only_files_header_costs_what_the_record_names(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    while log.first_sequence == 1:
        assert log.append_copy(Kind.WRITE, 0, 0, MIB, os.urandom(MIB))
        log.trim(log.next_sequence - 1)
    log.state.retired_sequence = log.first_sequence
    log.state.save(durable=True)
    reserved = log.state.reserved_sequence
    log.abandon()
    (file,) = tmp_path.glob("*.hrl")
    file.write_bytes(bytes(len(file.read_bytes())))
    log = open_log(tmp_path, boot_id=b"after the cut".ljust(16))
    assert log.past is Past.TOUCHED
    assert log.next_sequence == reserved
    log.abandon()


@pytest.mark.parametrize("lost", ["the end", "the header"])
async def test_a_cut_that_leaves_a_later_file_and_not_the_one_before_goes_on_anew(tmp_path: Path, lost: str) -> None:
    log = open_log(tmp_path)
    log.append_record(Kind.GAP, record.Gap("initial replication"), flags=Flag.GAP_BEGIN)
    log.state.retired_sequence = log.next_sequence
    while len(list(tmp_path.glob("*.hrl"))) < 3:
        assert log.append_copy(Kind.WRITE, 0, 0, MIB, os.urandom(MIB))
    held, reserved = frames_of(log), log.state.reserved_sequence
    log.state.save(durable=True)
    log.abandon()
    first = min(tmp_path.glob("*.hrl"))
    whole = first.read_bytes()
    first.write_bytes(
        whole[: len(whole) - 2 * MIB].ljust(len(whole), b"\0") if lost == "the end" else bytes(len(whole))
    )
    log = open_log(tmp_path, boot_id=b"after the cut".ljust(16))
    assert log.past is (Past.TOUCHED if lost == "the end" else Past.UNKNOWN)
    log.append_record(Kind.GAP, record.Gap("after the cut"), flags=Flag.GAP_BEGIN)
    *before, last = frames_of(log)
    assert [found.header for found in before] == [found.header for found in held[: len(before)]]
    assert len(before) < len(held)
    assert last.header.first_sequence >= reserved
    log.abandon()


async def test_a_log_that_comes_back_shorter_than_it_was_closed_is_not_believed(tmp_path: Path) -> None:
    """As after a sync that failed: the next one succeeds, and what the kernel had dropped is on no disk."""
    log = open_log(tmp_path)
    _mark(log, "a")
    log.seal()
    (file,) = tmp_path.glob("*.hrl")
    shorter = file.read_bytes()
    _mark(log, "b")
    reserved, length = log.state.reserved_sequence, len(file.read_bytes())
    await log.close()
    file.write_bytes(shorter.ljust(length, b"\0"))
    log = open_log(tmp_path, boot_id=b"after the cut".ljust(16))
    assert log.past is Past.UNKNOWN
    assert log.next_sequence == reserved  # no number is given out twice
    log.abandon()


async def test_a_log_that_is_shorter_than_what_was_retired_is_not_believed_on_the_same_boot_either(
    tmp_path: Path,
) -> None:
    """A sync failed, the kernel dropped its pages, the next one succeeded, and later they were read anew."""
    log = open_log(tmp_path)
    for number in range(4):
        log.append_copy(Kind.WRITE, 0, number * 4096, 4096, bytes([number]) * 4096)
    await log.sync()
    [path] = tmp_path.glob("*.hrl")
    medium = path.read_bytes()
    for number in range(4, 8):
        log.append_copy(Kind.WRITE, 0, number * 4096, 4096, bytes([number]) * 4096)
    log.state.retired_sequence = given = log.next_sequence
    log.state.save(durable=True)
    log.abandon()
    path.write_bytes(medium)
    log = open_log(tmp_path)
    assert log.past is Past.UNKNOWN
    assert log.next_sequence > given
    log.abandon()


def test_another_machines_log_is_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    _mark(log, "a")
    log.abandon()
    with pytest.raises(ConflictError, match="state directory of its own"):
        ChangeLog(
            tmp_path,
            uuid.UUID(int=8),
            first_sequence=1,
            limit_bytes=8 * FILE_BYTES,
            boot_id=b"boot".ljust(16),
            clock=SystemClock(),
            file_bytes=FILE_BYTES,
        )


def test_a_damaged_state_page_says_what_to_do(tmp_path: Path) -> None:
    open_log(tmp_path).abandon()
    state = bytearray((tmp_path / "state").read_bytes())
    state[10] ^= 1
    (tmp_path / "state").write_bytes(state)
    with pytest.raises(CorruptionError, match="enrol this machine again"):
        open_log(tmp_path)


def test_a_limit_that_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="journal_bytes"):
        open_log(tmp_path, limit_bytes=FILE_BYTES)


def test_files_are_given_back_when_stored_and_stay_within_the_limit(tmp_path: Path) -> None:
    log = open_log(tmp_path, limit_bytes=4 * FILE_BYTES)
    for round_number in range(40):
        appended = log.append_copy(Kind.WRITE, 0, round_number * MIB, MIB, os.urandom(MIB))
        if not appended:
            log.trim(log.next_sequence - 1)
            assert log.append_copy(Kind.WRITE, 0, round_number * MIB, MIB, os.urandom(MIB))
        held = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix in (".hrl", ".spare"))
        assert held <= 4 * FILE_BYTES
    assert log.first_sequence > 1
    log.abandon()


def test_a_reused_file_is_not_read_beyond_its_new_frames(tmp_path: Path) -> None:
    log = open_log(tmp_path, limit_bytes=2 * FILE_BYTES)
    for number in range(14):
        if not log.append_copy(Kind.WRITE, 0, number * MIB, MIB, os.urandom(MIB)):
            log.trim(log.next_sequence - 1)
    held = [frame.header.first_sequence for frame in frames_of(log)]
    log.abandon()
    again = open_log(tmp_path, limit_bytes=2 * FILE_BYTES)
    assert again.survived
    assert [frame.header.first_sequence for frame in frames_of(again)] == held
    again.abandon()


async def test_a_gap_that_was_open_when_the_agent_died_is_opened_again(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        assert core.ladder.in_gap
    async with agent_core(tmp_path) as core:
        assert core.ladder.in_gap
        assert len(gap_flags(frames_of(core.log))) == 2

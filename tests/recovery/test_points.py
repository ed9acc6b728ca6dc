"""Which points are offered, and what is said about those that are not."""

from __future__ import annotations

import pytest

from recovery.points import AtSequence, Instant, Latest, Named, Request, locate
from recovery.view import View
from replicar.errors import CorruptionError, PermanentError
from replicar.moments import format_moment, parse_moment
from replicar.storage import PageBlobStore
from tests.recovery.log_builder import START_NS, TICK_NS, LogBuilder

SECTOR = 512


async def refusal(builder: LogBuilder, request: Request) -> PermanentError:
    with pytest.raises(PermanentError) as caught:
        await locate(builder.log, request)
    return caught.value


@pytest.fixture
async def with_gap(builder: LogBuilder) -> LogBuilder:
    """Sequences: 1 DISK, 2-3 initial replication, 4 before, 5 MARK, 6-9 a gap with a MARK (8), 9 GAP_END, 10 after."""
    builder.begin(4 * SECTOR)
    builder.write(0, 0, b"b" * SECTOR)
    builder.mark("before-upgrade")
    await builder.seal()
    builder.gap_begin("the journal was full")
    builder.write(0, SECTOR, b"g" * SECTOR)
    builder.mark("lost")
    await builder.seal()
    builder.gap_end()
    builder.write(0, 0, b"a" * SECTOR)
    await builder.seal()
    return builder


@pytest.mark.parametrize("sequence", [3, 4, 5, 9, 10])
async def test_points_outside_of_gaps_are_offered(with_gap: LogBuilder, sequence: int) -> None:
    for request in (AtSequence(sequence), Instant(with_gap.times[sequence])):
        state = await locate(with_gap.log, request)
        assert state.place.sequence == sequence
        view = View(with_gap.log, state)
        assert await view.read(view.disks[0], 0, 4 * SECTOR) == with_gap.expected[sequence][0]


async def test_an_instant_after_the_last_change_is_offered_if_the_machine_says_that_there_was_none(
    with_gap: LogBuilder,
) -> None:
    last = with_gap.sequence - 1
    end_ns = with_gap.times[last]
    for until_ns, sequence in ((end_ns + 50, last + 1), (end_ns + 50 - 1, last)):  # said of another end; too early
        with pytest.raises(PermanentError, match="lies after the log"):
            await locate(with_gap.log, Instant(end_ns + 50), quiet=(sequence, until_ns))
    state = await locate(with_gap.log, Instant(end_ns + 50), quiet=(last, end_ns + 50))
    assert state.place.sequence == last
    with pytest.raises(PermanentError) as late:
        await locate(with_gap.log, Instant(end_ns + 51), quiet=(last, end_ns + 50))
    assert f"the latest instant that can be chosen is {format_moment(end_ns + 50)}" in late.value.hint


async def test_a_log_that_is_not_in_the_container_is_said_to_offer_nothing(builder: LogBuilder) -> None:
    with pytest.raises(CorruptionError, match="can be recovered from this container") as nothing:
        await locate(builder.log, Latest(), stored_number=12)
    assert "sequence" not in nothing.value.hint


@pytest.mark.parametrize("sequence", [6, 7, 8])
async def test_a_point_inside_a_gap_is_refused_with_the_points_around_it(with_gap: LogBuilder, sequence: int) -> None:
    for request in (AtSequence(sequence), Instant(with_gap.times[sequence])):
        error = await refusal(with_gap, request)
        assert "gap (the journal was full)" in error.message
        assert format_moment(with_gap.times[5]) in error.message
        assert format_moment(with_gap.times[9]) in error.message
        assert "--sequence 5 " in error.hint
        assert "--sequence 9 " in error.hint


async def test_a_named_point_inside_a_gap_is_refused(with_gap: LogBuilder) -> None:
    error = await refusal(with_gap, Named("lost"))
    assert "'lost' lies in a gap" in error.message
    assert (error.fields["gap_first_sequence"], error.fields["gap_last_sequence"]) == (6, 8)


async def test_the_start_of_a_log_is_no_point_before_initial_replication_is_complete(with_gap: LogBuilder) -> None:
    for request in (AtSequence(1), AtSequence(2), Instant(START_NS), Instant(START_NS + TICK_NS)):
        error = await refusal(with_gap, request)
        assert "initial replication" in error.message
        assert "--sequence 3 " in error.hint


async def test_latest_is_the_last_state_before_a_gap_that_has_not_ended(builder: LogBuilder) -> None:
    builder.begin(SECTOR)
    last = builder.write(0, 0, b"1" * SECTOR)
    builder.gap_begin("too many extents")
    builder.write(0, 0, b"2" * SECTOR)
    await builder.seal()
    builder.write(0, 0, b"3" * SECTOR)
    await builder.seal()
    view = View(builder.log, await locate(builder.log, Latest()))
    assert view.state.place.sequence == last
    assert await view.read(view.disks[0], 0, SECTOR) == b"1" * SECTOR
    error = await refusal(builder, Instant(builder.times[last + 2]))
    assert "has not ended yet" in error.message


async def test_latest_during_initial_replication_is_refused_with_what_to_wait_for(builder: LogBuilder) -> None:
    builder.disk(0, "disk0", SECTOR)
    builder.gap_begin()
    builder.write(0, 0, b"1" * SECTOR)
    await builder.seal()
    error = await refusal(builder, Latest())
    assert "initial replication" in error.message
    assert "replicar machines" in error.hint


async def test_an_unknown_name_lists_the_names_that_are_near(builder: LogBuilder) -> None:
    builder.begin(SECTOR)
    for name in ("before-upgrade", "nightly-1", "nightly-2"):
        builder.mark(name)
    await builder.seal()
    error = await refusal(builder, Named("before-upgrde"))
    assert error.fields["near"] == ["before-upgrade"]
    error = await refusal(builder, Named("xyz"))
    assert "nightly-2" in error.hint


async def test_an_instant_outside_of_the_log_says_where_the_log_begins_and_ends(with_gap: LogBuilder) -> None:
    before = await refusal(with_gap, Instant(START_NS - 1))
    assert f"begins at {format_moment(START_NS)}" in before.message
    after = await refusal(with_gap, Instant(with_gap.times[10] + 1))
    assert f"ends at {format_moment(with_gap.times[10])}" in after.message
    assert "--latest" in after.hint
    unknown = await refusal(with_gap, AtSequence(11))
    assert "1 to 10" in unknown.message


async def test_after_a_power_cut_the_disks_keep_what_is_not_sent_again(builder: LogBuilder) -> None:
    """The agent names its disks behind the beginning of the gap, and sends only what the cut can have changed."""
    builder.begin(2 * SECTOR)
    builder.write(0, 0, b"1" * SECTOR)
    await builder.seal()
    builder.jump(1)
    builder.gap_begin("what happened before the agent started is not known")
    builder.disk(0, "disk0", 2 * SECTOR)
    builder.write(0, SECTOR, b"2" * SECTOR)
    builder.gap_end()
    await builder.seal()
    view = View(builder.log, await locate(builder.log, Latest()))
    assert await view.read(view.disks[0], 0, 2 * SECTOR) == b"1" * SECTOR + b"2" * SECTOR


async def test_a_log_that_was_lost_and_begun_anew_leaves_a_gap_between(builder: LogBuilder) -> None:
    builder.begin(2 * SECTOR, SECTOR)
    last = builder.write(0, 0, b"1" * SECTOR)
    await builder.seal()
    builder.time_ns += 1000 * TICK_NS
    builder.jump(1)
    first = builder.disk(0, "disk0", 2 * SECTOR)
    builder.gap_begin("the change log was lost")
    builder.write(0, SECTOR, b"2" * SECTOR)
    await builder.seal()
    assert (await locate(builder.log, Latest())).place.sequence == last
    error = await refusal(builder, Instant(builder.times[last] + 1))
    assert f"--sequence {last} " in error.hint
    assert (await locate(builder.log, Instant(builder.times[last]))).place.sequence == last
    error = await refusal(builder, AtSequence(last + 1))
    assert "not offered" in error.message
    end = builder.gap_end()
    await builder.seal()
    state = await locate(builder.log, Latest())
    assert state.place.sequence == end
    # The second disk was not named again, so it is gone; the first one keeps what it had.
    view = View(builder.log, state)
    assert [disk.name for disk in view.disks] == ["disk0"]
    assert await view.read(view.disks[0], 0, 2 * SECTOR) == b"1" * SECTOR + b"2" * SECTOR
    error = await refusal(builder, AtSequence(first))
    assert "the change log was lost" in error.message


async def test_an_empty_log_is_not_there_and_says_so(builder: LogBuilder, store: PageBlobStore) -> None:
    error = await refusal(builder, Latest())
    assert str(builder.machine_id) in error.message
    await builder.begin_run()  # made, but nothing in it yet
    assert "nothing in storage" in (await refusal(builder, Latest())).message


async def test_a_wrong_key_opens_nothing_and_says_so(with_gap: LogBuilder) -> None:
    with_gap.key = bytes(32)
    with pytest.raises(CorruptionError) as caught:
        await locate(with_gap.log, Latest())
    assert "another key" in caught.value.message
    assert "key" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("2026-11-22T10:00:00.123456Z", 1795341600123456000),
        ("2026-11-22T10:00:00.123456789Z", 1795341600123456789),
        ("2026-11-22 11:00:00+01:00", 1795341600000000000),
        ("2026-11-22T10:00Z", 1795341600000000000),
        ("1795341600000000001", 1795341600000000001),
    ],
)
def test_moments_are_read_to_the_nanosecond(text: str, time_ns: int) -> None:
    assert parse_moment(text) == time_ns
    assert parse_moment(format_moment(time_ns)) == time_ns


@pytest.mark.parametrize(
    "text", ["yesterday", "2026-11-22T10:00:00", "2026-13-01T00:00:00Z", "9999-01-01T00:00:00Z", "1" * 30, "-5", ""]
)
def test_what_is_no_moment_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PermanentError) as caught:
        parse_moment(text)
    assert "2026-11-22T10:00:00" in caught.value.hint

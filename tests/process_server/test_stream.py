"""The core of a stream, as a model: whatever happens, segments are the frames, once each, in order."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from process_server.stream import Cutting, Segment, Slot, Stream
from replicar.errors import ConflictError
from replicar.formats import segment
from replicar.formats.frame import FrameHeader

MACHINE = uuid.UUID(int=1)
CUTTING = Cutting(age_seconds=0.2, idle_age_seconds=0.05, in_flight=3)


def header(first: int, count: int = 1, payload_bytes: int = 4096) -> FrameHeader:
    return FrameHeader(MACHINE, first, count, payload_bytes, 0, 0)


@dataclass
class Feeder:
    """Appends frames as a receiver does, opening slots as needed."""

    stream: Stream
    slots: list[Slot] = field(default_factory=list)
    headers: list[FrameHeader] = field(default_factory=list)

    def frame(self, payload_bytes: int, count: int, now: float, *, first: int | None = None) -> None:
        head = header(first or self.stream.next_sequence, count, payload_bytes)
        if self.stream.open_slot is not None and not self.stream.has_room(head):
            self.stream.close()
        if self.stream.open_slot is None:
            slot = Slot(len(self.slots), len(self.slots) + 1, self.stream.next_sequence, memoryview(b""))
            self.slots.append(slot)
            self.stream.open(slot)
        opened = self.stream.open_slot
        assert opened is not None
        opened.filled = opened.parsed + head.frame_bytes
        self.headers.append(head)
        self.stream.append(head, now)


class StreamModel(RuleBasedStateMachine):
    """Frames in, ticks, commits, storing out of order, restarts of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream(MACHINE, 0, CUTTING)
        self.feeder = Feeder(self.stream)
        self.now = 100.0
        self.given: list[Segment] = []  # under way, in order
        self.settled: list[Segment] = []  # stored, with all before them
        self.watermark = 0

    @rule(payload=st.integers(0, 1 << 20), count=st.integers(1, 4096))
    def receive(self, payload: int, count: int) -> None:
        self.feeder.frame(payload, count, self.now)

    @rule(seconds=st.floats(0, 0.3))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        taken = self.stream.tick(self.now)
        self.given += taken
        assert len(self.given) - len(self.settled) <= CUTTING.in_flight

    @rule()
    def commit(self) -> None:
        commit = self.stream.begin_commit()
        before = self.stream.received_sequence
        for _, start, end, parsed in commit.ranges:
            assert start % 4096 == end % 4096 == 0
            assert start < parsed <= end
        self.stream.end_commit(commit)
        assert self.stream.received_sequence >= before
        assert self.stream.received_sequence == self.stream.next_sequence - 1

    @precondition(lambda self: len(self.given) > len(self.settled))
    @rule(data=st.data())
    def store(self, data: st.DataObject) -> None:
        waiting = [each for each in self.given[len(self.settled) :] if not each.is_stored]
        if not waiting:
            return
        self.stream.stored(data.draw(st.sampled_from(waiting)))
        while len(self.settled) < len(self.given) and self.given[len(self.settled)].is_stored:
            self.settled.append(self.given[len(self.settled)])

    @precondition(lambda self: len(self.given) > len(self.settled))
    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        """The log was opened again; some of what was under way had landed."""
        waiting = self.given[len(self.settled) :]
        landed = data.draw(st.integers(0, len(waiting)))
        self.settled += waiting[:landed]
        del self.given[len(self.settled) :]
        self.stream.restart(self.settled[-1].last_sequence if self.settled else 0)

    @invariant()
    def segments_are_the_frames_in_order(self) -> None:
        place = 0
        for each in self.given:
            run = self.feeder.headers[place : place + each.frames]
            assert run[0].first_sequence == each.first_sequence
            assert run[-1].last_sequence == each.last_sequence
            assert sum(item.frame_bytes for item in run) == each.raw_bytes
            index = segment.index_bytes(len(run), sum(item.count for item in run))
            assert each.raw_bytes + index <= segment.MAX_RAW_BYTES
            place += each.frames

    @invariant()
    def stored_is_a_prefix_that_only_grows(self) -> None:
        expected = self.settled[-1].last_sequence if self.settled else 0
        assert self.stream.stored_sequence == expected >= self.watermark
        assert self.stream.received_sequence >= expected
        self.watermark = expected


TestStreamModel = StreamModel.TestCase
TestStreamModel.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_lone_frame_goes_early_and_one_behind_others_waits_its_age() -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    feeder.frame(4096, 1, 10.0)
    assert not stream.tick(10.04)
    assert stream.deadline() == pytest.approx(10.05)
    [first] = stream.tick(10.05)
    feeder.frame(4096, 1, 10.06)
    assert not stream.tick(10.2)
    assert [each.first_sequence for each in stream.tick(10.26)] == [2]
    assert first.last_sequence == 1


def test_a_full_segment_goes_at_once() -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    for _ in range(5):
        feeder.frame(1 << 20, 256, 10.0)
    assert [each.frames for each in stream.tick(10.0)] == [3]


def test_when_storage_is_the_bottleneck_segments_grow() -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    given: list[Segment] = []
    for number in range(3 + 40):
        feeder.frame(4096, 1, float(number))
        given += stream.tick(number + 0.5)
    assert len(given) == CUTTING.in_flight
    assert stream.deadline() is None
    stream.stored(given[0])
    assert [each.frames for each in stream.tick(99.0)] == [40]


def test_a_stream_is_ahead_when_two_full_segments_wait_behind_those_under_way() -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    given: list[Segment] = []
    while not stream.is_ahead:
        assert len(feeder.slots) <= CUTTING.in_flight + 3
        feeder.frame(1 << 20, 256, 1.0)
        given += stream.tick(1.0)
    assert len(given) == CUTTING.in_flight
    stream.stored(given[1])
    assert stream.is_ahead, "what is stored out of order keeps its place"
    stream.stored(given[0])
    assert not stream.is_ahead


def test_a_segment_never_spans_a_jump() -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    feeder.frame(4096, 2, 1.0)
    feeder.frame(4096, 1, 1.0, first=(1 << 48) + 1)
    stream.flush()
    assert [(each.first_sequence, each.last_sequence) for each in stream.tick(1.0)] == [
        (1, 2),
        ((1 << 48) + 1, (1 << 48) + 1),
    ]


def test_an_idle_machine_keeps_no_slot() -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    feeder.frame(4096, 1, 1.0)
    [each] = stream.tick(2.0)
    [slot] = {id(slot): slot for slot in stream.stored(each)}.values()
    assert slot.is_done
    assert stream.open_slot is None


@given(st.integers(0, 5))
def test_a_log_that_lost_what_was_stored_is_a_conflict(theirs: int) -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    for _ in range(2):
        feeder.frame(4096, 3, 1.0)
        for each in stream.tick(2.0):
            stream.stored(each)
    assert stream.stored_sequence == 6
    with pytest.raises(ConflictError) as caught:
        stream.restart(theirs)
    assert (caught.value.ours, caught.value.theirs) == (6, theirs)


def test_damage_in_the_cache_takes_back_what_lies_behind_it_and_no_more() -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    for _ in range(9):
        feeder.frame(1 << 20, 10, 1.0)
    stream.end_commit(stream.begin_commit())
    given = stream.tick(1.0)
    stream.stored(given[0])
    stream.restart(given[0].last_sequence)
    stream.truncate(given[1])
    assert stream.next_sequence == given[1].first_sequence == stream.received_sequence + 1
    assert stream.tick(99.0) == []
    assert stream.pending_bytes == 0


def test_a_commit_from_before_the_stream_was_cut_back_makes_nothing_durable_that_came_again() -> None:
    feeder = Feeder(stream := Stream(MACHINE, 0, Cutting(in_flight=1)))
    feeder.frame(1 << 20, 50, 0.0)
    stream.close()
    stream.end_commit(stream.begin_commit())
    [first] = stream.tick(10.0)
    feeder.frame(1 << 20, 50, 0.0)
    hanging = stream.begin_commit()
    stream.restart(0)
    stream.truncate(first)
    for _ in range(3):
        feeder.frame(1 << 20, 50, 0.0)
    stream.end_commit(hanging)
    assert stream.received_sequence == 0
    stream.end_commit(stream.begin_commit())
    assert stream.received_sequence == 150


def test_damage_in_the_cache_lets_go_of_a_slot_that_holds_half_a_frame_and_no_other() -> None:
    stream = Stream(MACHINE, 0, CUTTING)
    feeder = Feeder(stream)
    feeder.frame(1 << 20, 10, 1.0)
    [given] = stream.tick(2.0)
    stream.restart(0)
    closed = stream.close()
    empty = Slot(9, 9, stream.next_sequence, memoryview(bytearray(4096)), filled=100)
    stream.open(empty)
    changed = stream.truncate(given)
    assert set(changed) == {closed, empty}
    assert all(slot.is_done for slot in changed)

"""Frames out of bytes: however they are cut, damaged or mixed up, what is accepted is the stream, in order."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given, settings, strategies as st

from process_server.intake import Accept, Begin, Drop, Intake, Part, Wait
from replicar.formats import frame
from replicar.formats.frame import Kind
from replicar.formats.record import Mark, pack_record
from tests.process_server.sender import START_NS, opening_frame, write_frame

MACHINE = uuid.UUID(int=7)


class Reader:
    """Feeds an intake as a receiver does; `accepted` are the frames' bytes, `resends` what was asked for."""

    def __init__(self, next_sequence: int = 1) -> None:
        self.intake = Intake(MACHINE, next_sequence)
        self.data = bytearray()
        self.accepted: list[bytes] = []
        self.resends: list[str] = []
        self.parted = ""
        self._needed = 1

    def feed(self, data: bytes) -> None:
        self.data += data
        while len(self.data) >= self._needed:
            step = self.intake.step(memoryview(bytes(self.data)), 0)
            self._needed = 1
            if isinstance(step, Accept):
                self.accepted.append(bytes(self.data[: step.header.frame_bytes]))
                del self.data[: step.header.frame_bytes]
            elif isinstance(step, Drop):
                assert 0 < step.count <= len(self.data)
                del self.data[: step.count]
                self.resends += [step.resend] if step.resend else []
            elif isinstance(step, Wait):
                assert step.count > len(self.data)
                self._needed = step.count
            elif isinstance(step, Part):
                self.parted = step.why
                del self.data[: step.count]
            else:
                assert isinstance(step, Begin)


def stream(count: int, *, size: int = 512) -> list[bytes]:
    frames, sequence = [], 1
    for number in range(count):
        frames.append(write_frame(MACHINE, sequence, [bytes([number & 255]) * size] * (1 + number % 3)))
        sequence += 1 + number % 3
    return frames


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_frames_are_accepted_however_their_bytes_arrive(cuts: list[int]) -> None:
    frames = stream(12)
    data, reader = b"".join(frames), Reader()
    for cut in cuts:
        reader.feed(data[:cut])
        data = data[cut:]
    reader.feed(data)
    assert reader.accepted == frames
    assert not reader.resends
    assert not reader.data


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_is_asked_for_once_and_nothing_is_lost_or_doubled(data: st.DataObject) -> None:
    frames = stream(8)
    hurt = data.draw(st.integers(0, 7))
    damaged = bytearray(frames[hurt])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    reader = Reader()
    sent = b"".join([*frames[:hurt], bytes(damaged), *frames[hurt + 1 :]])
    size = data.draw(st.integers(1, 5000))
    for start in range(0, len(sent), size):
        reader.feed(sent[start : start + size])
    assert reader.accepted == frames[:hurt]
    assert len(reader.resends) == 1
    again = b"".join(frames[hurt:])
    for start in range(0, len(again), size):
        reader.feed(again[start : start + size])
    assert reader.accepted == frames
    assert len(reader.resends) == 1


def test_a_frame_out_of_order_is_dropped_with_all_behind_it_until_the_right_one_comes() -> None:
    frames, reader = stream(5), Reader()
    reader.feed(frames[0] + frames[2] + frames[3])
    assert reader.accepted == frames[:1]
    assert len(reader.resends) == 1
    assert "sequence 4 came where 2 was due" in reader.resends[0]
    reader.feed(b"".join(frames[1:]))
    assert reader.accepted == frames


def test_a_frame_that_was_received_already_is_not_taken_twice() -> None:
    frames, reader = stream(3), Reader()
    reader.feed(frames[0] + frames[0] + frames[1] + frames[0] + frames[1] + frames[2])
    assert reader.accepted == frames
    assert not reader.resends


def test_another_machines_frame_is_never_accepted() -> None:
    reader = Reader()
    reader.feed(write_frame(uuid.UUID(int=8), 1, [bytes(512)]))
    assert not reader.accepted
    assert len(reader.resends) == 1


@pytest.mark.parametrize("rubbish", [b"RPFR" * 5000, b"\0" * 20000, b"RPF" * 3333, bytes(range(256)) * 50])
def test_rubbish_is_dropped_and_the_stream_found_again(rubbish: bytes) -> None:
    frames, reader = stream(3), Reader()
    reader.feed(frames[0] + rubbish + frames[1])
    assert len(reader.resends) == 1
    reader.feed(frames[1] + frames[2])
    assert reader.accepted == frames


def test_a_jump_needs_a_gap_that_begins() -> None:
    later = (1 << frame.INCARNATION_SHIFT) + 1
    for data, taken in (
        (opening_frame(MACHINE, later), True),
        (opening_frame(MACHINE, (1 << 32) + 1), True),
        (opening_frame(MACHINE, 500), False),  # the ladder says GAP too, and leaves no number out
        (opening_frame(MACHINE, 9), False),
        (write_frame(MACHINE, later, [bytes(512)]), False),
    ):
        reader = Reader(next_sequence=10)
        reader.feed(data)
        assert bool(reader.accepted) is taken
        assert bool(reader.resends) is not taken


def test_nothing_is_jumped_over_that_was_asked_for_again() -> None:
    frames, later = stream(4), (1 << 32) + 1
    hurt = bytearray(frames[1])
    hurt[-1] ^= 1
    reader = Reader()
    reader.feed(frames[0] + hurt + frames[2] + frames[3] + opening_frame(MACHINE, later))
    assert len(reader.resends) == 1
    assert reader.accepted == frames[:1]
    assert "anew while sequence 2 is sought" in reader.parted
    again = Reader(reader.intake.next_sequence)  # the agent connects again, and sends in order
    again.feed(b"".join(frames[1:]) + opening_frame(MACHINE, later))
    assert again.accepted == [*frames[1:], opening_frame(MACHINE, later)]
    assert not again.parted


def test_a_log_begins_anew_with_its_disks_and_a_gap_and_with_nothing_else() -> None:
    mark = pack_record(Mark("m"))
    described = frame.describe(Kind.MARK, length=len(mark), time_ns=START_NS)
    for data, expected in (
        (opening_frame(MACHINE, 1), True),
        (frame.build_frame(MACHINE, 1, described, mark), False),
        (write_frame(MACHINE, 1, [bytes(512)]), False),
    ):
        found = frame.read_frame(data)
        assert found is not None
        assert frame.begins_anew(found.table) is expected

"""The hot path's single steps, timed by pytest-benchmark: `make bench` shows the times, `make test` runs each once.

A frame of 256 KiB with 64 writes of 4 KiB is what an agent under load sends.
"""

from __future__ import annotations

import random
import uuid

import pytest
import zstandard
from pytest_benchmark.fixture import BenchmarkFixture

from process_server.intake import Accept, Intake
from replicar.formats import frame, segment
from replicar.formats.frame import Kind
from replicar.formats.segment import Position

MACHINE = uuid.UUID(int=7)
WRITES = 64
WRITE_BYTES = 4096


def _payload() -> bytes:
    draw = random.Random(1)
    return b"".join(draw.randbytes(WRITE_BYTES // 2) + b"half of it text " * (WRITE_BYTES // 32) for _ in range(WRITES))


def _table() -> bytes:
    rows = (
        frame.describe(Kind.WRITE, offset=index << 20, length=WRITE_BYTES, time_ns=index + 1, place=index * WRITE_BYTES)
        for index in range(WRITES)
    )
    return b"".join(rows)


@pytest.fixture(scope="module")
def sealed() -> bytes:
    return frame.build_frame(MACHINE, 1, _table(), _payload())


def test_seal_a_frame_in_place(benchmark: BenchmarkFixture) -> None:
    table, payload = _table(), _payload()
    region = memoryview(bytearray(frame.MAX_FRAME_BYTES))
    region[frame.HEADER_BYTES : frame.HEADER_BYTES + len(payload)] = payload
    length = benchmark(frame.seal_in_place, region, len(payload), table, MACHINE, 1)
    assert frame.read_frame(region[:length]) is not None


def test_verify_a_frame_on_arrival(benchmark: BenchmarkFixture, sealed: bytes) -> None:
    found = benchmark(frame.read_frame, memoryview(sealed))
    assert found is not None
    assert found.header.count == WRITES


def test_compress_and_encrypt_a_segment(benchmark: BenchmarkFixture) -> None:
    run = b"".join(frame.build_frame(MACHINE, 1 + n * WRITES, _table(), _payload()) for n in range(12))
    where = Position(MACHINE, 1, 1, 1, 1, 12 * WRITES)
    compressor = zstandard.ZstdCompressor(level=1)
    out = memoryview(bytearray(segment.MAX_SEGMENT_BYTES))

    def seal() -> segment.SealedChunks:
        return segment.seal_chunks(memoryview(run), where, bytes(32), bytes(32), compressor, out=out)

    assert benchmark(seal).data_bytes < len(run)


def test_take_in_a_run_of_frames(benchmark: BenchmarkFixture) -> None:
    """Sixty frames of 64 KiB, as a machine sends them that keeps up: what receiving costs besides TLS."""
    few = WRITES // 4
    table, payload = _table()[: few * frame.DESCRIPTOR_BYTES], _payload()[: few * WRITE_BYTES]
    frames = [frame.build_frame(MACHINE, 1 + n * few, table, payload) for n in range(60)]
    run = memoryview(b"".join(frames))

    def take_in() -> int:
        intake, at, taken = Intake(MACHINE, 1), 0, 0
        while at < len(run):
            step = intake.step(run, at)
            if isinstance(step, Accept):
                at, taken = at + step.header.frame_bytes, taken + 1
        return taken

    assert benchmark(take_in) == 60


def test_give_a_segment_its_table_and_its_place_in_the_chain(benchmark: BenchmarkFixture) -> None:
    run = b"".join(frame.build_frame(MACHINE, 1 + n * WRITES, _table(), _payload()) for n in range(12))
    where = Position(MACHINE, 1, 1, 1, 1, 12 * WRITES)
    frames = list(frame.frames_in(run))
    compressor = zstandard.ZstdCompressor(level=1)

    def sealed() -> tuple[tuple[segment.SealedChunks], dict[str, object]]:
        return (segment.seal_chunks(memoryview(run), where, bytes(32), bytes(32), compressor),), {}

    def finish(chunks: segment.SealedChunks) -> int:
        data, _ = segment.finish(chunks, frames, segment.FIRST_DIGEST)
        return len(data)

    rounds = benchmark.pedantic(finish, setup=sealed, rounds=20)  # type: ignore[no-untyped-call]
    assert rounds < segment.MAX_SEGMENT_BYTES

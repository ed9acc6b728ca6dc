"""Opened chunks get to where they belong in a file: by one call for many writes, or by one for each."""

from __future__ import annotations

import errno
import os
import platform
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from recovery import aio
from recovery.aio import MOST_WRITES, WriteContext, write_context
from recovery.filewriter import FileWriter
from recovery.plan import Copies
from replicar.errors import CorruptionError

BLOCK = 512
CHUNK_BYTES = 128 << 10
CHUNKS = 64


@pytest.fixture(params=["together", "one by one"])
def context(request: pytest.FixtureRequest) -> Iterator[WriteContext | None]:
    with write_context() if request.param == "together" else nullcontext() as context:
        if request.param == "together" and context is None:
            pytest.skip("no Linux AIO here")
        yield context


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    try:
        yield number
    finally:
        os.close(number)


def scattered_blocks(draw: random.Random) -> tuple[list[memoryview], list[Copies], bytes]:
    """Chunks of which every block goes somewhere else, and the file that they make."""
    blocks = CHUNKS * CHUNK_BYTES // BLOCK
    places = [place * BLOCK for place in draw.sample(range(blocks), blocks)]
    disk, chunks, wanted = bytearray(blocks * BLOCK), list[memoryview](), list[Copies]()
    for index in range(CHUNKS):
        data = draw.randbytes(CHUNK_BYTES)
        sources = list(range(0, CHUNK_BYTES, BLOCK))
        targets = places[index * len(sources) : (index + 1) * len(sources)]
        for source, target in zip(sources, targets, strict=True):
            disk[target : target + BLOCK] = data[source : source + BLOCK]
        chunks.append(memoryview(data))
        wanted.append(Copies(index, sources, targets, [BLOCK] * len(sources)))
    return chunks, wanted, bytes(disk)


def test_what_many_threads_bring_is_all_in_the_file_when_they_have_returned(
    context: WriteContext | None, descriptor: int
) -> None:
    chunks, wanted, disk = scattered_blocks(random.Random(1))
    writer = FileWriter(descriptor, context)
    together = CHUNKS // 8
    assert together * CHUNK_BYTES // BLOCK > MOST_WRITES, "a batch should take the kernel more than once"

    def bring(first: int) -> None:
        writer.write(chunks[first : first + together], wanted[first : first + together])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bring, range(0, CHUNKS, together)))
    assert os.pread(descriptor, len(disk) + 1, 0) == disk
    assert writer.written_bytes == len(disk)


def test_zeros_that_are_worth_a_hole_are_left_out(context: WriteContext | None, descriptor: int) -> None:
    data = os.urandom(64 << 10) + bytes(256 << 10) + os.urandom(4096)
    writer = FileWriter(descriptor, context)
    writer.write([memoryview(data)], [Copies(0, [0], [1 << 20], [len(data)])])
    assert os.pread(descriptor, len(data), 1 << 20) == data
    assert writer.written_bytes == (64 << 10) + 4096


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_what_the_file_does_not_take_is_an_error_with_its_reason(
    context: WriteContext | None, tmp_path: Path, pieces: int
) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    descriptor = os.open(tmp_path / "disk", os.O_RDONLY)
    try:
        places = [BLOCK * piece for piece in range(pieces)]
        with pytest.raises(OSError) as caught:
            FileWriter(descriptor, context).write(
                [memoryview(os.urandom(4096))], [Copies(0, places, places, [BLOCK] * pieces)]
            )
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(descriptor)


def test_when_a_write_failed_nothing_is_written_any_more(context: WriteContext | None, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    descriptor = os.open(tmp_path / "disk", os.O_RDONLY)
    chunk, copies = memoryview(os.urandom(4096)), Copies(0, [0], [0], [4096])
    try:
        writer = FileWriter(descriptor, context)
        for _ in range(2):
            with pytest.raises(OSError):
                writer.write([chunk], [copies])
        assert writer.written_bytes == 0
    finally:
        os.close(descriptor)


def test_more_than_a_chunk_has_is_not_taken_from_what_lies_behind_it(
    context: WriteContext | None, descriptor: int
) -> None:
    with pytest.raises(CorruptionError, match="names byte 4608 of a chunk that has 4096"):
        FileWriter(descriptor, context).write([memoryview(bytes(4096))], [Copies(0, [512], [0], [4096])])
    assert os.fstat(descriptor).st_size == 0


def test_a_context_is_used_again_also_after_a_write_that_failed(descriptor: int) -> None:
    with write_context() as first:
        if first is None:
            pytest.skip("no Linux AIO here")
        data = memoryview(os.urandom(BLOCK))
        assert first.write(a_write(descriptor, data, offset=-BLOCK)).tolist() == [-errno.EINVAL]
    with write_context() as second:
        assert second is first


def test_a_context_of_which_nobody_knows_what_is_under_way_is_not(
    monkeypatch: pytest.MonkeyPatch, descriptor: int
) -> None:
    with write_context() as first:
        if first is None:
            pytest.skip("no Linux AIO here")
        monkeypatch.setattr(first, "_collect", -1)  # no such system call
        data = memoryview(os.urandom(BLOCK))
        with pytest.raises(OSError):
            first.write(a_write(descriptor, data, offset=0))
    with write_context() as second:
        assert second is not first


def test_a_machine_whose_calls_are_not_known_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "_free", [])
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with write_context() as context:
        assert context is None


def a_write(descriptor: int, data: memoryview, *, offset: int) -> aio.Blocks:
    address, length, place = (np.array([value], np.int64) for value in (aio.address_of(data), len(data), offset))
    return aio.described(descriptor, address, length, place)

"""The digests say what the stream holds, and forget it as soon as the stream says otherwise."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings, strategies as st

from mobility_agent.digests import CHUNK_BYTES, Digests

SECTORS = CHUNK_BYTES // 512
DISK_BYTES = 6 * CHUNK_BYTES + 1536  # the last chunk is short


def _content(seed: int, length: int = DISK_BYTES) -> bytes:
    return random.Random(seed).randbytes(length)


def _put(digests: Digests, content: bytes) -> None:
    digests.put(0, digests.rows(0, memoryview(content)))


def test_a_disk_that_the_stream_has_does_not_differ(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "digests", DISK_BYTES)
    content = _content(1)
    assert list(digests.differing(0, DISK_BYTES, digests.rows(0, memoryview(content)))) == [(0, DISK_BYTES)]
    _put(digests, content)
    assert list(digests.differing(0, DISK_BYTES, digests.rows(0, memoryview(content)))) == []
    assert digests.known == digests.chunks == 7
    digests.close()


def test_what_was_put_is_there_after_a_restart_and_not_for_a_disk_of_another_size(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "digests", DISK_BYTES)
    _put(digests, _content(1))
    digests.close()
    again = Digests(tmp_path / "digests", DISK_BYTES)
    assert again.known == 7
    again.close()
    other = Digests(tmp_path / "digests", DISK_BYTES - 512)
    assert other.known == 0
    other.close()


def test_zeros_are_known_without_being_read(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "digests", DISK_BYTES)
    digests.put_zeros(0, DISK_BYTES)
    assert list(digests.differing(0, DISK_BYTES, digests.rows(0, memoryview(bytes(DISK_BYTES))))) == []
    assert digests.has_zeros(CHUNK_BYTES, 2 * CHUNK_BYTES)
    assert not digests.has_zeros(512, CHUNK_BYTES)
    digests.forget(np.array([CHUNK_BYTES + 512]), np.array([512]))
    assert not digests.has_zeros(CHUNK_BYTES, 2 * CHUNK_BYTES)
    digests.close()


_range = st.tuples(st.integers(0, DISK_BYTES // 512 - 1), st.integers(1, 3 * SECTORS)).map(
    lambda found: (found[0] * 512, min(found[1] * 512, DISK_BYTES - found[0] * 512))
)


@settings(max_examples=150, deadline=None)
@given(forgotten=st.lists(_range, max_size=4), changed=st.lists(_range, max_size=3), asked=_range)
def test_what_differs_or_was_forgotten_is_always_named(
    forgotten: list[tuple[int, int]], changed: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        _named(Path(directory), forgotten, changed, asked)


def _named(
    directory: Path, forgotten: list[tuple[int, int]], changed: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    digests = Digests(directory / "digests", DISK_BYTES)
    before = _content(2)
    _put(digests, before)
    if forgotten:
        digests.forget(np.array([place for place, _ in forgotten]), np.array([length for _, length in forgotten]))
    now = bytearray(before)
    for place, length in changed:
        now[place : place + length] = bytes(length)
    offset, length = asked
    rows = digests.rows(offset, memoryview(bytes(now))[offset : offset + length])
    parts = list(digests.differing(offset, length, rows))
    digests.close()
    named = np.zeros(DISK_BYTES, bool)
    for place, size in parts:
        assert offset <= place < place + size <= offset + length
        assert not named[place : place + size].any()
        named[place : place + size] = True
    differs = np.frombuffer(before, np.uint8) != np.frombuffer(bytes(now), np.uint8)
    inside = np.zeros(DISK_BYTES, bool)
    inside[offset : offset + length] = True
    assert not (differs & inside & ~named).any()
    for place, size in forgotten:
        chunks = slice(place // CHUNK_BYTES * CHUNK_BYTES, -(-(place + size) // CHUNK_BYTES) * CHUNK_BYTES)
        assert named[chunks][inside[chunks]].all()
    if not forgotten and not changed:  # nothing but parts of chunks, which can't be compared
        first, end = digests.whole(offset, length)
        assert not named[first * CHUNK_BYTES : end * CHUNK_BYTES].any()

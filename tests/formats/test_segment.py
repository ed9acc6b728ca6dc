"""Sealed segments: they open to what was sealed, in their place and with their key, and in no other way."""

from __future__ import annotations

import random
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings, strategies as st

from replicar.errors import CorruptionError, LimitError
from replicar.formats import cipher, frame, sections, segment
from replicar.formats.frame import Kind
from replicar.formats.segment import Position, SegmentHeader, SegmentTable
from tests.formats.strategies import MACHINE, runs
from tests.golden.make_golden import flipped

KEY, SALT = bytes(range(32)), bytes(range(32, 64))


def _seal(
    frames: list[bytes],
    *,
    number: int = 1,
    previous: bytes = segment.FIRST_DIGEST,
    salt: bytes = SALT,
    chunk_bytes: int = 4096,
    level: int | None = 1,
    run: int = 1,
    choose: Callable[[Sequence[memoryview]], Sequence[bool]] | None = None,
) -> tuple[bytes, bytes]:
    raw = b"".join(frames)
    items = list(frame.frames_in(raw))
    position = _position(items, number, run)
    compressor = zstandard.ZstdCompressor(level=level) if level is not None else None
    chunks = segment.seal_chunks(
        memoryview(raw), position, KEY, salt, compressor, chunk_bytes=chunk_bytes, choose=choose
    )
    data, digest = segment.finish(chunks, items, previous)
    return bytes(data), digest


def _position(items: list[tuple[int, frame.Frame]], number: int = 1, run: int = 1) -> Position:
    first, last = items[0][1].header.first_sequence, items[-1][1].header.last_sequence
    return Position(MACHINE, 1, run, number, first, last)


def _open(data: bytes, key: bytes = KEY) -> tuple[SegmentTable, bytes]:
    header = segment.read_header(data)
    if header is None:
        raise CorruptionError("nothing is here")
    assert header.total_bytes == len(data)
    table = segment.open_table(header, data[header.table_offset : header.table_offset + header.table_bytes], key)
    edges = [int(edge) for edge in table.chunk_offsets]
    parts = [segment.open_chunk(table, i, data[edges[i] : edges[i + 1]], key) for i in range(header.chunk_count)]
    segment.check_run(table, b"".join(parts))
    assert _open_together(table, data, key) == parts
    return table, b"".join(parts)


def _open_together(table: SegmentTable, data: bytes, key: bytes = KEY) -> list[memoryview]:
    edges = table.chunk_offsets.tolist()
    sealed = [data[start:end] for start, end in pairwise(edges)]
    return segment.open_chunks(table, range(len(sealed)), sealed, key)


def _writes(count: int, first: int = 1, payload: bytes = b"") -> bytes:
    table = b"".join(
        frame.describe(Kind.WRITE, offset=512 * i, length=512, time_ns=9, place=512 * i) for i in range(count)
    )
    return frame.build_frame(MACHINE, first, table, payload or b"s" * (512 * count))


@settings(max_examples=60, deadline=None)
@given(
    frames=runs(),
    number=st.integers(1, 1 << 63),
    previous=st.binary(min_size=32, max_size=32),
    salt=st.binary(min_size=32, max_size=32),
    chunk_bytes=st.sampled_from([4096, 5000, 1 << 17, 4 << 20]),
    level=st.sampled_from([None, -3, 1]),
    tried=st.lists(st.booleans(), min_size=1, max_size=3),
)
def test_a_segment_opens_to_what_was_sealed(
    frames: list[bytes],
    number: int,
    previous: bytes,
    salt: bytes,
    chunk_bytes: int,
    level: int | None,
    tried: list[bool],
) -> None:
    def choose(chunks: Sequence[memoryview]) -> list[bool]:
        return [tried[index % len(tried)] for index in range(len(chunks))]

    data, digest = _seal(
        frames, number=number, previous=previous, salt=salt, chunk_bytes=chunk_bytes, level=level, choose=choose
    )
    assert len(data) % segment.ALIGNMENT == 0
    table, run = _open(data)
    assert run == b"".join(frames)
    codecs = table.chunks["codec"].tolist()
    assert not any(codec for index, codec in enumerate(codecs) if not tried[index % len(tried)])
    assert (table.digest, table.header.previous, table.header.position.number) == (digest, previous, number)
    items = list(frame.frames_in(run))
    assert table.frame_headers == tuple(item.header for _, item in items)
    assert table.descriptors.tobytes() == b"".join(item.table.tobytes() for _, item in items)
    wanted = [place + 64 + int(row["place"]) for place, item in items for row in item.table]
    assert table.payload_places().tolist() == wanted
    sequences = [item.header.first_sequence + i for _, item in items for i in range(item.header.count)]
    assert table.sequences().tolist() == sequences


def test_any_flipped_bit_is_found_but_in_the_zeros_at_the_end() -> None:
    noise = random.Random(1)
    data, _ = _seal([_writes(12, payload=noise.randbytes(6144)), _writes(1, 13)])
    header = segment.read_header(data)
    assert header is not None
    end = header.table_offset + header.table_bytes
    assert header.chunk_count == 2
    for place in range(end):
        bits = range(8) if place < segment.HEADER_BYTES or place >= header.table_offset else (noise.randrange(8),)
        for bit in bits:
            with pytest.raises(CorruptionError):
                _open(flipped(data, place, bit))
    assert not any(data[end:])


def test_a_header_altered_with_its_checksum_does_not_open() -> None:
    data, _ = _seal([_writes(3)])
    for place in range(16, 176):
        changed = bytearray(data)
        changed[place] ^= 1
        struct.pack_into("<Q", changed, 184, xxhash.xxh3_64_intdigest(bytes(changed[:184])))
        try:
            header = segment.read_header(bytes(changed))
        except CorruptionError:
            continue
        assert header is not None
        sealed = bytes(changed[header.table_offset :][: header.table_bytes])
        with pytest.raises(CorruptionError):
            segment.open_table(header, sealed, KEY)


def test_another_key_does_not_open_it() -> None:
    data, _ = _seal([_writes(3)])
    with pytest.raises(CorruptionError, match="another key"):
        _open(data, flipped(KEY, 31))


@pytest.mark.parametrize("changed", [{"number": 2}, {"run": 2}, {"salt": bytes(32)}])
def test_the_same_frames_in_another_place_share_no_key_and_no_section(changed: dict[str, int | bytes]) -> None:
    """Chunks and tables can't be moved between segments: not even where machine, salt and content are the same."""
    frames = [_writes(12), _writes(3, 13)]
    one, _ = _seal(frames, level=None)
    other, _ = _seal(frames, level=None, **changed)  # type: ignore[arg-type]
    ours, _ = _open(one)
    theirs, _ = _open(other)
    for index in range(2):
        start, end = (int(edge) for edge in theirs.chunk_offsets[index : index + 2])
        assert one[start:end] != other[start:end]
        with pytest.raises(CorruptionError):
            segment.open_chunk(ours, index, other[start:end], KEY)
        forged = ours.chunks.copy()
        forged["tag"][index] = theirs.chunks["tag"][index]
        with pytest.raises(CorruptionError):  # a table that names the foreign chunk does not help
            segment.open_chunk(replace(ours, chunks=forged), index, other[start:end], KEY)
    with pytest.raises(CorruptionError):
        segment.open_table(ours.header, other[theirs.header.table_offset :][: theirs.header.table_bytes], KEY)


def test_chunks_of_one_segment_cannot_be_exchanged() -> None:
    data, _ = _seal([_writes(16, payload=b"s" * 8192)], level=None, chunk_bytes=4096)
    table, _ = _open(data)
    edges = [int(edge) for edge in table.chunk_offsets]
    assert edges[1] - edges[0] == edges[2] - edges[1]
    swapped = table.chunks.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    forged = replace(table, chunks=swapped)
    with pytest.raises(CorruptionError):
        segment.open_chunk(table, 0, data[edges[1] : edges[2]], KEY)
    with pytest.raises(CorruptionError):
        segment.open_chunk(forged, 0, data[edges[1] : edges[2]], KEY)


@pytest.mark.parametrize("level", [None, 3])
@pytest.mark.parametrize("chunk", [0, 2])
def test_of_chunks_opened_together_none_may_be_altered(level: int | None, chunk: int) -> None:
    data, _ = _seal([_writes(16, payload=b"s" * 8192)], level=level, chunk_bytes=4096)
    table, _ = _open(data)
    altered = bytearray(data)
    altered[int(table.chunk_offsets[chunk])] ^= 1
    with pytest.raises(CorruptionError):
        _open_together(table, bytes(altered))


@pytest.mark.parametrize(
    "sizes", [pytest.param((4096, 4095), id="one is longer"), pytest.param((4096, 4097), id="one is shorter")]
)
def test_frames_decompressed_together_have_the_sizes_that_are_said(sizes: tuple[int, int]) -> None:
    frames: list[bytes | bytearray | memoryview] = [zstandard.compress(b"s" * 4096)] * 2
    with pytest.raises(CorruptionError, match="one of 2 frames"):
        cipher.decompress_together(frames, list(sizes))
    assert cipher.decompress_together(frames, [4096, 4096]) == [b"s" * 4096] * 2


def test_a_frame_that_wants_a_larger_window_than_a_segment_is_not_decompressed() -> None:
    data = bytes(cipher.MAX_WINDOW_BYTES * 2)
    parameters = zstandard.ZstdCompressionParameters(window_log=24)
    frame_ = zstandard.ZstdCompressor(compression_params=parameters).compress(data)
    with pytest.raises(CorruptionError, match="larger window"):
        cipher.decompress_together([frame_], [len(data)])


def test_a_digest_vouches_for_everything_before_it() -> None:
    one, first = _seal([_writes(1)])
    _, second = _seal([_writes(1, 2)], number=2, previous=first)
    _, forged = _seal([_writes(1, payload=b"f" * 512)])
    _, other = _seal([_writes(1, 2)], number=2, previous=forged)
    assert len({first, second, forged, other}) == 4
    assert _open(one)[0].digest == first


# -- nonces and keys ------------------------------------------------------------------------------------------------


def test_no_key_ever_meets_a_nonce_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: every call of AES-GCM while sealing is noted, over segments that differ in one thing each."""
    used: list[tuple[bytes, bytes]] = []

    class Recorder:
        def __init__(self, key: bytes) -> None:
            self._key, self._real = bytes(key), AESGCM(key)

        def encrypt_into(self, nonce: bytes, data: bytes, associated: bytes, into: memoryview) -> int:
            used.append((self._key, nonce))
            return self._real.encrypt_into(nonce, data, associated, into)

    monkeypatch.setattr(cipher, "AESGCM", Recorder)
    frames = [_writes(40), _writes(3, 41)]
    for number in (1, 2, 1 << 32):
        for run in (1, 2):
            for salt in (SALT, bytes(32)):
                _seal(frames, number=number, run=run, salt=salt)
    _seal([_writes(40, 5)])
    _seal([_writes(41)])
    assert len(used) == len(set(used)) > 14 * 6
    assert len({nonce for _, nonce in used}) == 7
    assert {len(nonce) for _, nonce in used} == {12}


def test_a_segment_is_finished_once() -> None:
    raw = _writes(3)
    items = list(frame.frames_in(raw))
    chunks = segment.seal_chunks(memoryview(raw), _position(items), KEY, SALT, None)
    segment.finish(chunks, items, segment.FIRST_DIGEST)
    with pytest.raises(ValueError, match="finished once"):
        segment.finish(chunks, items, b"d" * 32)


def test_no_key_shows_in_what_is_printed() -> None:
    raw = _writes(3)
    items = list(frame.frames_in(raw))
    chunks = segment.seal_chunks(memoryview(raw), _position(items), b"K" * 32, SALT, None)
    assert "KKKK" not in repr(chunks) + repr(chunks.key) + str(vars(type(chunks)))


@pytest.mark.parametrize(("key", "salt"), [(bytes(31), SALT), (bytes(33), SALT), (KEY, bytes(31)), (b"", b"")])
def test_a_key_or_salt_of_the_wrong_length_is_a_programmers_error(key: bytes, salt: bytes) -> None:
    raw = _writes(1)
    with pytest.raises(ValueError, match="32"):
        segment.seal_chunks(memoryview(raw), Position(MACHINE, 1, 1, 1, 1, 1), key, salt, None)


# -- what must not be sealed ----------------------------------------------------------------------------------------


def test_what_could_not_be_opened_is_not_sealed() -> None:
    raw = _writes(2) + _writes(2, 3)
    items = list(frame.frames_in(raw))
    good = _position(items)
    wrong = [
        (replace(good, first_sequence=2), items),
        (replace(good, last_sequence=5), items),
        (replace(good, machine_id=uuid.UUID(int=1)), items),
        (good, items[:1]),
        (good, items[1:]),
        (good, items[::-1]),
        (good, []),
    ]
    for position, frames in wrong:
        chunks = segment.seal_chunks(memoryview(raw), position, KEY, SALT, None)
        with pytest.raises(ValueError, match="frame"):
            segment.finish(chunks, frames, segment.FIRST_DIGEST)
        assert not chunks.finished
    for chunk_bytes in (0, -1, 1, 4095, (4 << 20) + 1):
        with pytest.raises(ValueError, match="chunks"):
            segment.seal_chunks(memoryview(raw), good, KEY, SALT, None, chunk_bytes=chunk_bytes)
    with pytest.raises(LimitError):
        segment.seal_chunks(memoryview(b""), good, KEY, SALT, None)
    with pytest.raises(LimitError):
        segment.seal_chunks(memoryview(bytes(segment.MAX_RAW_BYTES + 1)), good, KEY, SALT, None)


@pytest.mark.parametrize("chunk_bytes", [segment.MIN_CHUNK_BYTES, segment.DEFAULT_CHUNK_BYTES])
@pytest.mark.parametrize("payload_bytes", [0, 65536, 1 << 20])
def test_the_fullest_segment_of_what_does_not_shrink_fits_and_opens(chunk_bytes: int, payload_bytes: int) -> None:
    """A run that keeps to the rule (bytes and index together within MAX_RAW_BYTES) always has room."""
    noise = np.random.default_rng(5)
    frames: list[bytes] = []
    total, sequence = 0, 1
    while True:
        count = 4096 if not payload_bytes else 100
        table = np.zeros(count, frame.DESCRIPTOR)
        table["kind"], table["length"] = Kind.ZERO, noise.integers(1, 1 << 50, count) * 512
        table["offset"] = noise.integers(0, 1 << 50, count) * 512
        table["time_ns"] = np.sort(noise.integers(0, 1 << 62, count))
        table["place"], table["disk"] = 0, noise.integers(0, 65536, count)
        table["flags"] = noise.integers(0, 256, count)
        made = frame.build_frame(MACHINE, sequence, table.tobytes(), noise.bytes(payload_bytes))
        total += len(made) + segment.index_bytes(1, count)
        if total > segment.MAX_RAW_BYTES:
            break
        frames.append(made)
        sequence += count
    data, _ = _seal(frames, chunk_bytes=chunk_bytes)
    assert len(data) <= segment.MAX_SEGMENT_BYTES
    assert _open(data)[1] == b"".join(frames)


def test_a_table_that_no_reader_would_take_is_refused_when_sealing(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b"".join(frame.build_frame(MACHINE, i + 1, frame.describe(Kind.ZERO, length=512)) for i in range(100))
    items = list(frame.frames_in(raw))
    chunks = segment.seal_chunks(memoryview(raw), _position(items), KEY, SALT, None)
    index_bytes = 8 + 24 * len(chunks.chunks) + segment.index_bytes(100, 100)
    monkeypatch.setattr(sections, "MAX_INDEX_BYTES", index_bytes - 1)
    with pytest.raises(LimitError):
        segment.finish(chunks, items, segment.FIRST_DIGEST)
    monkeypatch.setattr(sections, "MAX_INDEX_BYTES", index_bytes)
    assert segment.finish(chunks, items, segment.FIRST_DIGEST)


# -- headers --------------------------------------------------------------------------------------------------------

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


HEADERS = st.builds(
    SegmentHeader,
    position=st.builds(Position, st.just(MACHINE), U32, U32, U64, U64, U64),
    first_time_ns=U64,
    last_time_ns=U64,
    raw_bytes=st.integers(0, 5000),
    chunk_bytes=st.integers(4000, 5000),
    chunk_count=st.integers(0, 2),
    data_bytes=st.integers(0, 200),
    table_bytes=st.integers(0, 200),
    total_bytes=st.sampled_from([0, 512, 1024, 5 << 20]),
    key_id=U64,
    salt=st.just(SALT),
    previous=st.binary(min_size=32, max_size=32),
)


@given(header=HEADERS)
def test_a_header_of_any_numbers_comes_back_or_is_refused(header: SegmentHeader) -> None:
    end = 192 + header.data_bytes + header.table_bytes
    sane = (
        header.raw_bytes > 0
        and header.chunk_bytes >= 4096
        and header.chunk_count == -(-header.raw_bytes // header.chunk_bytes)
        and header.table_bytes > 16
        and header.total_bytes == -(-end // 512) * 512
        and 0 < header.position.first_sequence <= header.position.last_sequence < (1 << 64) - 1
        and header.position.number > 0
    )
    if sane:
        assert segment.read_header(header.pack()) == header
    else:
        with pytest.raises(CorruptionError):
            segment.read_header(header.pack())


@pytest.mark.parametrize("data", [b"", bytes(191), b"\x01" + bytes(191), b"RPSEGMT\x01" + bytes(184)])
def test_what_is_no_header_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptionError):
        segment.read_header(data)


def test_zeros_are_no_segment_and_no_error() -> None:
    assert segment.read_header(bytes(192)) is None

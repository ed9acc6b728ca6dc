"""Every parser against what nobody meant it to read: only declared errors come out, and memory stays small.

Seeded, so a failure comes back; the seed is in the test's name. Three kinds of bytes: noise, good input that was
changed in a few places, and (for segments) nonsense that was sealed with the right key, so that nothing but the parser
itself stands in its way.
"""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import xxhash
import zstandard

from replicar.errors import CorruptionError, ReplicarError
from replicar.formats import changelog, cipher, frame, logblob, record, sections, segment, vhd, wire
from replicar.formats.segment import SegmentHeader
from tests.golden import make_golden, sample

ROUNDS = 1500
#: The largest thing any parser may allocate is a segment's table or chunk, and a few views of it.
MEMORY_LIMIT = 24 << 20
INTERESTING = (
    0,
    1,
    2,
    3,
    7,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
)


def _mutated(noise: random.Random, good: bytes) -> bytes:
    """`good` with a few places changed: bits, numbers at their edges, pieces moved, cut or put in."""
    data = bytearray(good)
    for _ in range(noise.choice((1, 1, 2, 3, 8))):
        place = noise.randrange(len(data) + 1)
        match noise.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << noise.randrange(8)
            case 1:
                size = noise.choice((1, 2, 4, 8))
                data[place : place + size] = (noise.choice(INTERESTING) % (1 << 8 * size)).to_bytes(size, "little")
            case 2:
                del data[place : place + noise.randrange(64)]
            case 3:
                data[place:place] = noise.randbytes(noise.randrange(64))
            case 4:
                start = noise.randrange(len(data) + 1)
                data[place : place + 32] = data[start : start + 32]
            case 5:
                size = 1 << noise.randrange(4)
                aligned = place - place % size
                data[aligned : aligned + size] = noise.choice(INTERESTING).to_bytes(8, "little")[:size]
            case _:
                data[place:] = bytes(len(data) - place)
    return bytes(data)


def _with_sum(data: bytes, end: int) -> bytes:
    """`data` with the checksum that its first `end` bytes should have right behind them."""
    if len(data) < end + 8:
        return data
    return data[:end] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:end])) + data[end + 8 :]


def _frame_with_sums(data: bytes) -> bytes:
    """`data` as a frame whose three checksums fit, wherever it says that its parts lie."""
    if len(data) < frame.HEADER_BYTES:
        return data
    payload_bytes, count = struct.unpack_from("<II", data, 8)
    table, end = 64 + frame.padded(payload_bytes), 64 + frame.padded(payload_bytes) + 32 * count
    sums = struct.pack("<QQ", xxhash.xxh3_64_intdigest(data[64:table]), xxhash.xxh3_64_intdigest(data[table:end]))
    return _with_sum(data[:40] + sums + data[56:], 56)


def _message_with_sum(data: bytes) -> bytes:
    if len(data) < wire.HEADER_BYTES:
        return data
    body = data[wire.HEADER_BYTES :]
    head = data[:8] + struct.pack("<I", len(body))
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + body)) + body


def _footer_with_sum(data: bytes) -> bytes:
    bare = data[:64] + bytes(4) + data[68:]
    return data[:64] + struct.pack(">I", ~sum(bare) & 0xFFFFFFFF) + data[68:]


def _read_frame(data: bytes) -> None:
    found = frame.read_frame(data)
    if found is None:
        return
    ends = frame.payload_ends(found.table)
    assert int(ends.max()) <= found.header.payload_bytes
    assert int((found.table["offset"] + found.table["length"]).max()) <= frame.MAX_DISK_BYTES
    frame.begins_anew(found.table)
    list(frame.frames_in(data[: found.header.frame_bytes]))


def _read_record(data: bytes) -> None:
    for read in (record.read_mark, record.read_gap, record.read_disk):
        try:
            found: record.Mark | record.Gap | record.Disk = read(data)
        except CorruptionError:
            continue
        assert record.pack_record(found)


def _read_messages(data: bytes) -> None:
    for opening in (b"", wire.pack_message(wire.Welcome(1, 0))):
        session = wire.AgentSession()
        session.hello(wire.Hello(sample.MACHINE, 1, 1))
        try:
            for message in session.receive(opening + data):
                assert wire.read_message(wire.pack_message(message)) is not None
        except CorruptionError:
            assert session.state is wire.State.CLOSED
        assert len(session._data) <= wire.HEADER_BYTES + wire.MAX_BODY_BYTES
    wire.read_message(data)


def _read_name(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    name = logblob.read_name(text)
    assert name is None or str(name) == text


PARSERS: dict[str, tuple[Callable[[bytes], object], Callable[[bytes], bytes], list[bytes]]] = {
    "frame": (_read_frame, _frame_with_sums, sample.stream().frames),
    "record": (
        _read_record,
        bytes,
        [
            record.pack_record(item)
            for item in (record.Mark("n", mark_id="m"), record.Gap("r"), record.Disk(1, "d", 512))
        ]
        + [b'{"index":1e400,"name":"\\ud800","size_bytes":-0,"action":NaN}', b'{"reason":"\\u0000","x":' + b"9" * 900],
    ),
    "message": (
        _read_messages,
        _message_with_sum,
        [
            wire.pack_message(message)
            for message in (
                wire.Hello(sample.MACHINE, 1, 9),
                wire.Welcome(1, 0),
                wire.Ack(1, 0),
                wire.Resend(1, "x"),
                wire.Refusal("FencedError", "m", "h"),
            )
        ]
        + [make_golden.raw_message(2, b'{"next_sequence":-1e9,"stored_sequence":NaN,"version":"\\udfff"}')],
    ),
    "change-log header": (
        changelog.read_header,
        lambda data: _with_sum(data, 56),
        [changelog.ChangeLogHeader(sample.MACHINE, 1, 4 << 20, 5).pack()],
    ),
    "segment header": (
        segment.read_header,
        lambda data: _with_sum(data, 184),
        [sample.sealed(sample.stream().frames[:2], 1, 1, 1, bytes(32))[0][:192]],
    ),
    "blob header": (
        logblob.read_header,
        lambda data: _with_sum(data, 152),
        [next(iter(sample.log()[0].values()))[:512]],
    ),
    "blob name": (_read_name, bytes, [name.encode() for name in sample.log()[0]]),
    "vhd footer": (vhd.read_footer, _footer_with_sum, [vhd.pack_footer(3 << 20, sample.MACHINE, 1)]),
}


@pytest.fixture
def small_memory() -> Iterator[None]:
    """Nothing in the test may take more than `MEMORY_LIMIT` at a time."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY_LIMIT, f"{peak} bytes at once"


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_lets_out_nothing_but_declared_errors(name: str, seed: int) -> None:
    read, mended, goods = PARSERS[name]
    noise = random.Random(seed)
    read(goods[0])
    for round_ in range(ROUNDS):
        data = _mutated(noise, noise.choice(goods)) if round_ % 8 else noise.randbytes(noise.randrange(700))
        for attempt in (data, mended(data)):
            try:
                read(attempt)
            except ReplicarError as error:
                str(error).encode()


@pytest.mark.parametrize("seed", [1, 2])
def test_scanning_a_change_log_lets_out_nothing_at_all_behind_its_header(seed: int) -> None:
    noise = random.Random(seed)
    good = bytearray(changelog.MIN_FILE_BYTES)
    raw = b"".join(sample.stream().frames)
    good[:4096] = changelog.ChangeLogHeader(sample.MACHINE, 1, len(good), 5).pack()
    good[changelog.FRAMES_OFFSET : changelog.FRAMES_OFFSET + len(raw)] = raw
    for _ in range(150):
        start, room = changelog.FRAMES_OFFSET, 3000
        data = bytearray(good)
        data[start : start + room] = _mutated(noise, bytes(good[start : start + room]))[:room].ljust(room, b"\0")
        first = changelog.scan(memoryview(data), trust_staging=False)
        table = _mutated(noise, frame.describe(frame.Kind.WRITE, length=512, place=0) * noise.choice((1, 3, 2046)))
        changelog.stage_frame(memoryview(data), first.end_offset, first.next_sequence)
        at = changelog.STAGING_OFFSET + changelog.STAGING_TABLE
        size = min(len(table), changelog.FRAMES_OFFSET - at)
        data[at : at + size] = table[:size]
        data[changelog.STAGED_COUNT] = changelog.PACK_STAGED_COUNT.pack(noise.choice((size // 32, 1, *INTERESTING)))
        found = changelog.scan(memoryview(data), trust_staging=True)
        assert len(data) == len(good)
        assert found.next_sequence >= first.next_sequence


# -- sealed with the right key --------------------------------------------------------------------------------------

GOOD, _ = sample.sealed(sample.stream().frames[:3], 1, 1, 1, segment.FIRST_DIGEST)


def _good() -> tuple[SegmentHeader, bytes, bytes]:
    """The good segment's header, table section in the clear, and sealed chunks."""
    header = segment.read_header(GOOD)
    assert header is not None
    key = cipher.segment_key(sample.DATA_KEY, header.salt, header.position)
    sealed = GOOD[header.table_offset : header.table_offset + header.table_bytes]
    packed = key.decrypt(cipher.nonce(0), sealed, header.pack())
    return header, zstandard.ZstdDecompressor().decompress(packed), GOOD[192 : header.table_offset]


def _sealed_table(header: SegmentHeader, packed: bytes) -> tuple[SegmentHeader, bytes]:
    """A header for a table section of these bytes, sound and authentic, and the section."""
    end = header.table_offset + len(packed) + 16
    fitted = replace(header, table_bytes=len(packed) + 16, total_bytes=-(-end // 512) * 512)
    key = cipher.segment_key(sample.DATA_KEY, fitted.salt, fitted.position)
    return fitted, key.encrypt(cipher.nonce(0), packed, fitted.pack())


def _open_all(header: SegmentHeader, sealed: bytes, chunks: bytes) -> None:
    again = segment.read_header(header.pack())
    assert again == header
    table = segment.open_table(header, sealed, sample.DATA_KEY)
    table.payload_places()
    table.sequences()
    edges = [int(edge) - 192 for edge in table.chunk_offsets]
    parts = [
        segment.open_chunk(table, i, chunks[edges[i] : edges[i + 1]], sample.DATA_KEY)
        for i in range(header.chunk_count)
    ]
    segment.check_run(table, b"".join(parts))


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("seed", [1, 2])
def test_an_authentic_table_of_nonsense_is_corrupt_and_nothing_else(seed: int) -> None:
    noise = random.Random(seed)
    header, index, chunks = _good()
    compressor = zstandard.ZstdCompressor(level=1)
    fitted, sealed = _sealed_table(header, compressor.compress(index))
    _open_all(fitted, sealed, chunks)
    for _ in range(ROUNDS):
        changed = _mutated(noise, index)
        if noise.randrange(2):  # a frame's header with a checksum that fits gets further
            place = 8 + 24 * header.chunk_count + 72 * noise.randrange(3) + 8
            changed = changed[:place] + _with_sum(changed[place:], 56)
        packed = compressor.compress(changed) if noise.randrange(8) else _mutated(noise, compressor.compress(changed))
        fitted, sealed = _sealed_table(header, packed)
        try:
            _open_all(fitted, sealed, chunks)
        except CorruptionError:
            continue
        assert changed[8 : 8 + 24 * header.chunk_count] == index[8 : 8 + 24 * header.chunk_count]


@pytest.mark.usefixtures("small_memory")
def test_an_authentic_table_cannot_name_more_than_there_is() -> None:
    header, index, chunks = _good()
    compressor = zstandard.ZstdCompressor(level=1)
    frames, count = struct.unpack_from("<II", index)
    for row in ((0, 0), (0, count), (frames, 0), (frames - 1, count), (frames + 1, count), ((1 << 32) - 1,) * 2):
        fitted, sealed = _sealed_table(header, compressor.compress(struct.pack("<II", *row) + index[8:]))
        with pytest.raises(CorruptionError):
            _open_all(fitted, sealed, chunks)
    sizes = bytearray(index)
    for value in (0, 1, 15, (1 << 31) - 1, (1 << 32) - 1):
        struct.pack_into("<I", sizes, 8, value)
        fitted, sealed = _sealed_table(header, compressor.compress(bytes(sizes)))
        with pytest.raises(CorruptionError):
            _open_all(fitted, sealed, chunks)


def _unsized(data: bytes) -> bytes:
    """A zstd frame that does not say how much it holds."""
    return zstandard.ZstdCompressor(level=1, write_content_size=False).compress(data)


BOMBS = {
    "claims 2^50 bytes": bytes.fromhex("28b52ffde0") + struct.pack("<Q", 1 << 50) + b"\x01\x00\x00",
    "claims 2^64 - 1 bytes": bytes.fromhex("28b52ffde0") + b"\xff" * 8 + b"\x01\x00\x00",
    "claims 64 MiB and holds them": zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20)),
    "holds 64 MiB and does not say so": _unsized(bytes(64 << 20)),
    "something behind it": zstandard.ZstdCompressor().compress(b"x" * 100) + b"more",
    "two frames": zstandard.ZstdCompressor().compress(b"x" * 100) * 2,
    "nothing": b"",
    "no zstd": b"\x00" * 40,
    "a skippable frame": bytes.fromhex("502a4d18") + struct.pack("<I", 4) + b"skip",
    "a frame of no bytes": zstandard.ZstdCompressor().compress(b""),
    "cut off": zstandard.ZstdCompressor().compress(b"x" * 1000)[:-3],
}


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("name", BOMBS)
def test_an_authentic_section_that_does_not_decompress_within_bounds_is_corrupt(name: str) -> None:
    header, index, chunks = _good()
    if BOMBS[name]:
        fitted, sealed = _sealed_table(header, BOMBS[name])
        with pytest.raises(CorruptionError):
            _open_all(fitted, sealed, chunks)
    # The same as a chunk: sealed with the right key, named by an authentic table.
    key = cipher.segment_key(sample.DATA_KEY, header.salt, header.position)
    length = min(header.chunk_bytes, header.raw_bytes)
    associated = cipher.chunk_data(header.position, 0, length, sections.CODEC_ZSTD)
    sealed = key.encrypt(cipher.nonce(1), BOMBS[name], associated)
    changed = bytearray(index)
    struct.pack_into("<II", changed, 8, len(sealed), sections.CODEC_ZSTD)
    changed[16:32] = sealed[-16:]
    old = struct.unpack_from("<I", index, 8)[0]
    moved = replace(header, data_bytes=header.data_bytes - old + len(sealed))
    fitted, table = _sealed_table(moved, zstandard.ZstdCompressor().compress(bytes(changed)))
    opened = segment.open_table(fitted, table, sample.DATA_KEY)
    with pytest.raises(CorruptionError):
        segment.open_chunk(opened, 0, sealed, sample.DATA_KEY)


def test_an_authentic_run_that_is_not_what_its_table_says_is_corrupt() -> None:
    header, index, _ = _good()
    fitted, sealed = _sealed_table(header, zstandard.ZstdCompressor().compress(index))
    table = segment.open_table(fitted, sealed, sample.DATA_KEY)
    frames = sample.stream().frames[:3]
    segment.check_run(table, b"".join(frames))
    other = frame.build_frame(sample.MACHINE, 1, frame.describe(frame.Kind.ZERO, length=512))
    for run in (
        b"",
        b"".join(frames[:2]),
        b"".join(frames) + other,
        b"".join([frames[1], frames[0], frames[2]]),
        b"".join(frames)[:-1] + b"\xff",
        bytes(header.raw_bytes),
    ):
        with pytest.raises(CorruptionError):
            segment.check_run(table, run)


def test_an_error_about_bytes_can_be_shown_as_json() -> None:
    with pytest.raises(CorruptionError) as caught:
        frame.read_header(b"\xff" * 64)
    assert json.loads(json.dumps(caught.value.as_dict()))["magic"] == "ffffffff"

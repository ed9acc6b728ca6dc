"""What is fuzzed: each parser as a function of bytes, from which nothing but declared errors may come.

Checksums would stop every fuzzer at the door, so the first byte of an input decides: odd, and the input is parsed as it
is; even, and its checksums are put right first, so that what is behind them is reached. Segments are sealed with the
right key for the same reason.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import xxhash
import zstandard

from replicar.errors import ReplicarError
from replicar.formats import changelog, cipher, frame, logblob, sections, segment, vhd, wire
from tests.golden import sample

GOLDEN: Final = Path(__file__).parents[1] / "golden"
_MOST_BYTES: Final = 256 << 10
_SEGMENT: Final = (GOLDEN / "segment.v1.good.bin").read_bytes()


def _checksum(data: bytes | bytearray | memoryview) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


def _mended_frame(data: bytearray, at: int = 0) -> None:
    if len(data) < at + frame.HEADER_BYTES:
        return
    data[at : at + 6] = b"RPFR\x01\x00"
    payload_bytes, count = struct.unpack_from("<II", data, at + 8)
    table = at + frame.HEADER_BYTES + (payload_bytes + 7) // 8 * 8
    end = table + count * frame.DESCRIPTOR_BYTES
    if end <= len(data):
        data[at + 40 : at + 48] = _checksum(data[at + frame.HEADER_BYTES : table])
        data[at + 48 : at + 56] = _checksum(data[table:end])
    data[at + 56 : at + 64] = _checksum(data[at : at + 56])


def fuzz_frame(data: bytes) -> None:
    """One frame, and a run of them."""
    body = bytearray(data[1:])
    if data[:1] and not data[0] & 1:
        _mended_frame(body)
    found = frame.read_frame(body)
    if found is not None:
        frame.table_view(bytes(body[found.header.table_offset : found.header.frame_bytes]))
    list(frame.frames_in(bytes(body)))


def fuzz_wire(data: bytes) -> None:
    """What an agent hears, in two pieces."""
    body = bytearray(data[1:])
    if data[:1] and not data[0] & 1 and len(body) >= 20:
        body[:5] = b"RPMS\x01"
        body[6:8] = bytes(2)
        length = min(struct.unpack_from("<I", body, 8)[0], len(body) - 20)
        body[8:12] = struct.pack("<I", length)
        body[12:20] = _checksum(bytes(body[:12]) + bytes(body[20 : 20 + length]))
    wire.read_message(bytes(body))
    session = wire.AgentSession()
    session.hello(wire.Hello(sample.MACHINE, 1, 1))
    session.receive(body[: len(body) // 2])
    session.receive(body[len(body) // 2 :])


def fuzz_changelog(data: bytes) -> None:
    """A change-log file: its header, frames and staging area."""
    body = bytearray(data[1:])
    if data[:1] and not data[0] & 1 and len(body) >= changelog.HEADER_BYTES:
        body[:16] = b"RPHRLOG\x01" + struct.pack("<II", 1, changelog.HEADER_BYTES)
        body[40:48] = struct.pack("<Q", changelog.MIN_FILE_BYTES)
        body[56:64] = _checksum(body[:56])
        _mended_frame(body, changelog.FRAMES_OFFSET)
    changelog.read_header(bytes(body[: changelog.HEADER_BYTES]))
    body += bytes(max(changelog.FRAMES_OFFSET + 8192 - len(body), 0))
    for trust in (False, True):
        changelog.scan(memoryview(bytearray(body)), trust_staging=trust)


def fuzz_segment(data: bytes) -> None:
    """A segment's header as it is; its table and chunks under the right key."""
    body = data[1:]
    if data[:1] and data[0] & 1:
        segment.read_header(body)
        return
    header = sections.read_header(_SEGMENT)
    assert header is not None
    packed = zstandard.ZstdCompressor(level=1).compress(body)
    fitted = replace(header, table_bytes=len(packed) + 16)
    fitted = replace(fitted, total_bytes=-(-(fitted.table_offset + len(packed) + 16) // 512) * 512)
    if fitted.total_bytes > segment.MAX_SEGMENT_BYTES:
        return
    key = cipher.segment_key(sample.DATA_KEY, fitted.salt, fitted.position)
    table = segment.open_table(fitted, key.encrypt(cipher.nonce(0), packed, fitted.pack()), sample.DATA_KEY)
    table.payload_places()
    edges = [int(edge) for edge in table.chunk_offsets]
    sealed = [_SEGMENT[edges[number] : edges[number + 1]] for number in range(fitted.chunk_count)]
    segment.open_chunks(table, range(fitted.chunk_count), sealed, sample.DATA_KEY)
    for number in range(fitted.chunk_count):
        segment.open_chunk(table, number, sealed[number], sample.DATA_KEY)


def fuzz_vhd(data: bytes) -> None:
    """The footer of a fixed VHD."""
    body = bytearray(data[1:])
    if data[:1] and not data[0] & 1 and len(body) >= 512:
        body[:8] = b"conectix"
        body[64:68] = bytes(4)
        body[64:68] = struct.pack(">I", ~sum(body[:512]) & 0xFFFFFFFF)
    vhd.read_footer(bytes(body))


def fuzz_blob(data: bytes) -> None:
    """The name and header of a log blob."""
    logblob.read_name(data.decode("latin-1"))
    logblob.read_header(data[1:])


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "frame": fuzz_frame,
    "wire": fuzz_wire,
    "changelog": fuzz_changelog,
    "segment": fuzz_segment,
    "vhd": fuzz_vhd,
    "blob": fuzz_blob,
}
_FILES: Final = {"wire": "message-", "vhd": "vhd-"}


def seeds(name: str) -> list[bytes]:
    """What a target's fuzzing begins with: the golden files, as they are and to be mended."""
    pattern = f"{_FILES.get(name, name + '.')}*.bin"
    found = [path.read_bytes()[:_MOST_BYTES] for path in sorted(GOLDEN.glob(pattern))]
    if name == "vhd":
        found = [data.ljust(512, b"\0") for data in found]  # golden files leave zeros at their ends away
    return [flag + data for data in found for flag in (b"\0", b"\1")]


def feed(name: str, data: bytes) -> None:
    """One input: whatever it is, a parser takes it or raises one of our errors.

    Raises:
        Exception: anything else; that is a bug.
    """
    try:
        TARGETS[name](data)
    except ReplicarError:
        return

"""A decoder of Replicar's logs, written from docs/formats.md alone: it imports nothing of Replicar.

It is there to show that the document is enough. It favours plainness over speed, and raises `ValueError` for anything
that is not as the document says.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash
import zstandard
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_NAME = re.compile(r"machines/([0-9a-f-]{36})/log/([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{2})\.rlog")


@dataclass
class Machine:
    """What came out: disks by index, named points, and whether the last sequence lies within a gap."""

    disks: dict[int, bytearray] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)  # name: sequence of its MARK
    in_gap: bool = False
    sequence: int = 0
    audits: int = 0


@dataclass
class Start:
    """Where a walk begins: the next segment's number, the digest before it, and from which places of which run on."""

    number: int = 1
    previous: bytes = bytes(32)
    run: tuple[int, int] = (0, 0)
    offsets: dict[str, int] = field(default_factory=dict)


def decode(
    blobs: Mapping[str, bytes], machine: uuid.UUID, keys: Mapping[int, bytes], until: int | None = None
) -> Machine:
    """The machine right after sequence `until`, or at the end of its log."""
    result, start = Machine(), Start()
    fold = _fold(blobs, machine, keys)
    if fold is not None:
        floor = _root(blobs, fold["floor"], machine, keys)[0]
        kept = {
            _root(blobs, item["checkpoint"], machine, keys)[0]["last"][0]: item["checkpoint"] for item in fold["kept"]
        }
        if until is not None and until < floor["last"][0]:
            _check(until in kept, f"sequence {until} was given up")
            return _checkpoint(blobs, kept[until], machine, keys)
        result = _checkpoint(blobs, fold["floor"], machine, keys)
        tail = floor["tail"]
        previous = bytes.fromhex(tail["digest"])
        start = Start(tail["number"] + 1, previous, (tail["epoch"], tail["run"]), tail["offsets"])
    for _, _, header, segment in _segments(blobs, machine, keys, start):
        for sequence, descriptor, payload in _descriptors(header, segment):
            if until is not None and sequence > until:
                return result
            _apply(result, sequence, descriptor, payload)
    return result


def _segments(
    blobs: Mapping[str, bytes], machine: uuid.UUID, keys: Mapping[int, bytes], start: Start
) -> Iterator[tuple[int, str, tuple[int, ...], bytes]]:
    """Steps 1 to 5: number, blob, (first, last sequence), run of frames."""
    runs: dict[tuple[int, int], dict[int, str]] = {}
    for name in blobs:
        match = _NAME.fullmatch(name)
        if match and uuid.UUID(match[1]) == machine and (int(match[2], 16), int(match[3], 16)) >= start.run:
            runs.setdefault((int(match[2], 16), int(match[3], 16)), {})[int(match[4], 16)] = name
    firsts = []
    for (epoch, run), stripes in sorted(runs.items()):
        head = blobs[stripes[0]][:512]
        if not any(head):
            continue
        _check(head[:8] == b"RPLGBLB\x01" and struct.unpack_from("<II", head, 8) == (1, 512), "blob header")
        _check(struct.unpack_from("<Q", head, 152)[0] == xxhash.xxh3_64_intdigest(head[:152]), "blob checksum")
        _check(head[16:32] == machine.bytes and struct.unpack_from("<III", head, 32) == (epoch, run, 0), "blob's place")
        firsts.append((struct.unpack_from("<Q", head, 48)[0], epoch, run, stripes))
    following, previous = start.number, start.previous
    for index, (_, epoch, run, stripes) in enumerate(firsts):
        end = min((first for first, *_ in firsts[index + 1 :]), default=None)
        while end is None or following < end:
            found = _find(blobs, stripes, following, start.offsets)
            if found is None:
                _check(end is None, f"segment {following} is missing")
                return
            name, data = found
            head = data[:192]
            _check(head[16:32] == machine.bytes and struct.unpack_from("<II", head, 32) == (epoch, run), "place")
            _check(head[144:176] == previous, f"chain at segment {following}")
            raw, previous = _open(data, keys)
            yield following, name, struct.unpack_from("<QQ", head, 48), raw
            following += 1


def _find(
    blobs: Mapping[str, bytes], stripes: Mapping[int, str], number: int, offsets: Mapping[str, int]
) -> tuple[str, bytes] | None:
    for name in stripes.values():
        blob, at = blobs[name], offsets.get(name, 512)
        while any(head := blob[at : at + 192]):
            _check(head[:8] == b"RPSEGMT\x01" and struct.unpack_from("<HHI", head, 8) == (1, 0, 192), "segment header")
            _check(struct.unpack_from("<Q", head, 184)[0] == xxhash.xxh3_64_intdigest(head[:184]), "segment checksum")
            (total,) = struct.unpack_from("<I", head, 100)
            if struct.unpack_from("<Q", head, 40)[0] == number:
                return name, blob[at : at + total]
            at += total
    return None


def _open(data: bytes, keys: Mapping[int, bytes]) -> tuple[bytes, bytes]:
    """A segment's run of frames and its digest."""
    head = data[:192]
    raw_bytes, chunk_bytes, chunk_count, data_bytes, table_bytes, _ = struct.unpack_from("<6I", head, 80)
    (key_id,) = struct.unpack_from("<Q", head, 104)
    position = head[:8] + head[16:64]
    info = b"replicar segment v1" + position
    key = AESGCM(HKDF(hashes.SHA256(), 32, head[112:144], info).derive(keys[key_id]))
    start = 192 + data_bytes
    sealed = data[start : start + table_bytes]
    index = _unpack(key.decrypt(bytes(12), sealed, head), 4 << 20)
    frames, descriptors = struct.unpack_from("<II", index)
    _check(len(index) == 8 + 24 * chunk_count + 72 * frames + 32 * descriptors, "table length")
    run, at = b"", 192
    for i in range(chunk_count):
        size, codec, tag = struct.unpack_from("<II16s", index, 8 + 24 * i)
        length = min(chunk_bytes, raw_bytes - i * chunk_bytes)
        chunk = data[at : at + size]
        _check(chunk[-16:] == tag, "chunk tag")
        nonce = (i + 1).to_bytes(12, "little")
        opened = key.decrypt(nonce, chunk, position + struct.pack("<III", i, length, codec))
        run += _unpack(opened, length) if codec == 1 else opened
        at += size
    _check(at == start and len(run) == raw_bytes, "run length")
    return run, hashlib.sha256(head + sealed[-16:]).digest()


def _fold(blobs: Mapping[str, bytes], machine: uuid.UUID, keys: Mapping[int, bytes]) -> Any:
    """The fold in force, if there is any."""
    for name in sorted(
        (n for n in blobs if n.startswith(f"machines/{machine}/index/") and n.endswith(".fold")), reverse=True
    ):
        if any(blobs[name][:512]):
            return _root(blobs, name, machine, keys)[0]
    return None


def _root(
    blobs: Mapping[str, bytes], name: str, machine: uuid.UUID, keys: Mapping[int, bytes]
) -> tuple[Any, list[bytes]]:
    """An index blob's object, and its sections opened."""
    blob = blobs[name]
    head = blob[:512]
    match = re.fullmatch(r"machines/[0-9a-f-]{36}/index/([0-9a-f]{16})-([0-9a-f]{16})-[0-9a-f]{8}\.(\w+)", name)
    _check(match is not None and head[:8] == b"RPINDEX\x01" and struct.unpack_from("<I", head, 12) == (512,), "index")
    (version,) = struct.unpack_from("<I", head, 8)
    _check(version in (1, 2), "index version")
    assert match is not None
    _check(struct.unpack_from("<Q", head, 160)[0] == xxhash.xxh3_64_intdigest(head[:160]), "index checksum")
    kind, sections, first, last, at, size = struct.unpack_from("<IIQQQI", head, 32)
    kinds = {"tier": 1, "checkpoint": 2, "fold": 3}
    said = (int(match[1], 16), int(match[2], 16), kinds[match[3]], machine.bytes)
    _check(said == (first, last, kind, head[16:32]), "index name")
    position = head[:8] + head[16:36] + bytes(4) + head[40:56]
    (key_id,) = struct.unpack_from("<Q", head, 72)
    info = b"replicar index v1" + position
    key = AESGCM(HKDF(hashes.SHA256(), 32, head[80:112], info).derive(keys[key_id]))
    bound = head if version == 1 else _without_key(head)
    root = _unpack(key.decrypt(bytes(12), blob[at : at + size], bound), 32 << 20)
    (length,) = struct.unpack_from("<I", root)
    opened = []
    for i in range(sections):
        place, sealed, raw, codec, _ = struct.unpack_from("<QIIII", root, 4 + length + 24 * i)
        bound = position + struct.pack("<III", i, raw, codec)
        data = key.decrypt((i + 1).to_bytes(12, "little"), blob[place : place + sealed], bound)
        opened.append(_unpack(data, raw) if codec == 1 else data)
        _check(len(opened[-1]) == raw, "section length")
    return json.loads(root[4 : 4 + length]), opened


def _without_key(head: bytes) -> bytes:
    """An index blob's header without its wrapped key, and without the checksum over that."""
    return head[:112] + bytes(40) + head[152:160] + bytes(8) + head[168:]


def _checkpoint(blobs: Mapping[str, bytes], name: str, machine: uuid.UUID, keys: Mapping[int, bytes]) -> Machine:
    """The disks of a checkpoint."""
    said, _ = _root(blobs, name, machine, keys)
    result = Machine(sequence=said["last"][0])
    result.points = {mark["name"]: mark["place"][0] for mark in said["points"]}
    result.in_gap = any(gap["after"] is None for gap in said["gaps"])
    tiers = []
    for item in said["tiers"]:
        there, said_there = blobs[item["blob"]][:168], bytes.fromhex(item["header"])
        _check(_without_key(there) == _without_key(said_there), "tier header")
        tiers.append(_root(blobs, item["blob"], machine, keys))
    for disk in said["disks"]:
        content = bytearray(disk["size_bytes"])
        for tier, sections in tiers:
            for part in tier["maps"]:
                if (part["disk"], part["what"]) == (disk["index"], "extents"):
                    if part["opaque"]:
                        content = bytearray(disk["size_bytes"])
                    _lay(content, part["pages"], tier, sections, blobs, keys)
        result.disks[disk["index"]], result.names[disk["index"]] = content, disk["name"]
    return result


def _lay(
    content: bytearray,
    pages: list[list[int]],
    tier: Any,
    sections: list[bytes],
    blobs: Mapping[str, bytes],
    keys: Mapping[int, bytes],
) -> None:
    """A tier's extents of one disk, over what is there."""
    entries = {}
    for section, _, _ in tier["directory"]:
        for at in range(0, len(sections[section]), 240):
            blob, _, offset = struct.unpack_from("<IIQ", sections[section], at)
            digest, head = sections[section][at + 16 : at + 48], sections[section][at + 48 : at + 240]
            entries[struct.unpack_from("<Q", head, 40)[0]] = (tier["blobs"][blob], offset, head, digest)
    for page in pages:
        for start, length, number, place in _columns(sections[page[0]]):
            end = min(start + length, len(content))
            if start >= end:
                continue
            data = bytes(end - start)
            if number != -1:
                name, offset, head, digest = entries[number]
                (total,) = struct.unpack_from("<I", head, 100)
                data = _part(blobs[name][offset : offset + total], head, digest, keys, place, end - start)
            content[start:end] = data


def _part(segment: bytes, head: bytes, digest: bytes, keys: Mapping[int, bytes], place: int, length: int) -> bytes:
    """Some bytes of a segment's run of frames, of which other chunks may be gone."""
    _check(segment[:192] == head, "segment in the directory")
    raw_bytes, chunk_bytes, _, data_bytes, table_bytes, _ = struct.unpack_from("<6I", head, 80)
    position = head[:8] + head[16:64]
    info = b"replicar segment v1" + position
    (key_id,) = struct.unpack_from("<Q", head, 104)
    key = AESGCM(HKDF(hashes.SHA256(), 32, head[112:144], info).derive(keys[key_id]))
    sealed = segment[192 + data_bytes : 192 + data_bytes + table_bytes]
    _check(hashlib.sha256(head + sealed[-16:]).digest() == digest, "segment digest")
    index = _unpack(key.decrypt(bytes(12), sealed, head), 4 << 20)
    found, at = b"", 192
    first, last = place // chunk_bytes, (place + length - 1) // chunk_bytes
    for i in range(last + 1):
        size, codec, _ = struct.unpack_from("<II16s", index, 8 + 24 * i)
        if i >= first:
            raw = min(chunk_bytes, raw_bytes - i * chunk_bytes)
            bound = position + struct.pack("<III", i, raw, codec)
            opened = key.decrypt((i + 1).to_bytes(12, "little"), segment[at : at + size], bound)
            found += _unpack(opened, raw) if codec == 1 else opened
        at += size
    return found[place - first * chunk_bytes :][:length]


def _columns(page: bytes) -> Iterator[tuple[int, ...]]:
    rows, columns = struct.unpack_from("<II", page)
    _check(len(page) == 8 + rows * columns * 8, "page length")
    found = []
    for column in range(columns):
        values, last = [], 0
        for row in range(rows):
            folded = sum(page[8 + (column * 8 + plane) * rows + row] << 8 * plane for plane in range(8))
            last += (folded >> 1) ^ -(folded & 1)
            values.append(last)
        found.append(values)
    yield from zip(*found, strict=True)


def _unpack(data: bytes, limit: int) -> bytes:
    _check(zstandard.get_frame_parameters(data).content_size <= limit, "content size")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=limit)


def _descriptors(sequences: tuple[int, ...], run: bytes) -> Iterator[tuple[int, tuple[int, ...], bytes]]:
    at, expected = 0, sequences[0]
    while at < len(run):
        head = run[at : at + 64]
        magic, version, codec, flags, payload_bytes, count = struct.unpack_from("<4sBBHII", head)
        first, payload_sum, table_sum, own = struct.unpack_from("<4Q", head, 32)
        _check((magic, version, codec, flags, first) == (b"RPFR", 1, 0, 0, expected), "frame header")
        table_at = at + 64 + (payload_bytes + 7) // 8 * 8
        at, start = table_at + 32 * count, at + 64
        sums = (xxhash.xxh3_64_intdigest(part) for part in (head[:56], run[start:table_at], run[table_at:at]))
        _check(tuple(sums) == (own, payload_sum, table_sum), "frame checksum")
        for row in range(count):
            yield first + row, struct.unpack_from("<QQQIHBB", run, table_at + 32 * row), run[start:table_at]
        expected += count
    _check(expected == sequences[1] + 1, "last sequence")


def _apply(result: Machine, sequence: int, descriptor: tuple[int, ...], payload: bytes) -> None:
    offset, length, _, place, disk, kind, flags = descriptor
    result.sequence = sequence
    content = payload[place : place + length]
    if kind == 1:
        result.disks[disk][offset : offset + length] = content
    elif kind == 2:
        result.disks[disk][offset : offset + length] = bytes(length)
    elif kind == 4:
        result.points[json.loads(content)["name"]] = sequence
    elif kind == 5 and not result.in_gap:
        digest = xxhash.xxh3_128_digest(bytes(result.disks[disk][offset : offset + length]))
        _check(digest == payload[place : place + 16], f"audit at sequence {sequence}")
        result.audits += 1
    elif kind == 6:
        result.in_gap = (result.in_gap or bool(flags & 0x10)) and not flags & 0x20
    elif kind == 7:
        said = json.loads(content)
        if said["action"] == "removed":
            del result.disks[said["index"]]
        else:
            old, size = result.disks.get(said["index"], bytearray()), said["size_bytes"]
            result.disks[said["index"]] = bytearray(old[:size].ljust(size, b"\0"))
            result.names[said["index"]] = said["name"]


def _check(held: bool, what: str) -> None:
    if not held:
        raise ValueError(what)

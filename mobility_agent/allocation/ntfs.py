"""The free space of an NTFS volume that was dismounted cleanly.

All that a volume has is files, described by the records of its master file table; record 6 is a bitmap of the clusters.
It is believed if the volume says of itself that it is sound (no flag in record 3) and if its log, record 2, says so:

    the restart page says "clean"   Windows has dismounted it, and has nothing left to replay
    all of the log is 0xFF          it was emptied, as drivers of Linux do, and says nothing: then every cluster of
                                    every file has to be in the bitmap

The latter means reading the whole table, so it is done for small volumes only. A hibernated Windows has not dismounted
anything. Anything else, and all that does not add up, is "not known".

Source: the documentation of the Linux-NTFS project.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from mobility_agent.allocation.source import NotKnownError, Ranges, Window, joined

_BOOT_BYTES: Final = 512
_MFT, _LOG_FILE, _VOLUME, _BITMAP = 0, 2, 3, 6
_ATTRIBUTE_LIST, _VOLUME_INFORMATION, _DATA, _END = 0x20, 0x70, 0x80, 0xFFFFFFFF
_IN_USE: Final = 1
_NOT_PLAIN: Final = 0xC0FF  # of an attribute's flags: compressed, encrypted, sparse
_STRIDE: Final = 512  # of update sequences, whatever a sector has
_CLEAN: Final = 0x2
_NO_CLIENT: Final = 0xFFFF
_MAX_RUNS: Final = 1 << 16
_MAX_LOG_BYTES: Final = 4 << 30
_PIECE_BYTES: Final = 16 << 20
#: A volume whose log was emptied is believed up to so many file records, and 4 TiB in clusters of 4 KiB.
_MAX_RECORDS: Final = 1 << 18
_MAX_CHECKED_BYTES: Final = 128 << 20

#: A run of clusters: its first one (None: a hole), and how many.
_Run = tuple[int | None, int]


@dataclass(frozen=True, slots=True)
class _Volume:
    cluster_bytes: int
    clusters: int
    record_bytes: int
    table_at: int  # the first cluster of the master file table


@dataclass(frozen=True, slots=True)
class _Attribute:
    """One attribute of a file: `value` if it lies in the record, else `runs` that hold `size` bytes."""

    kind: int
    name: bytes
    is_plain: bool
    first_cluster: int  # of the attribute, that `runs` begin with
    value: bytes | None
    runs: tuple[_Run, ...]
    size: int
    written: int  # up to here; behind it are zeros, whatever the clusters hold


def is_here(window: Window) -> bool:
    """Whether there is a boot sector, sound or not."""
    return window.size_bytes >= _BOOT_BYTES and window.fetch(3, 8) == b"NTFS    "


def free_ranges(window: Window) -> Ranges:
    """The free byte ranges of the volume, from the window's start.

    Raises:
        NotKnownError: they can't be told, or may not be believed.
    """
    volume = _volume(window)
    first = _record(window, volume, volume.table_at * volume.cluster_bytes, _MFT)
    table = _content(volume, first, _MFT, whole=False)
    _check_flags(window, volume, table)
    bitmap = _content(volume, _numbered(window, volume, table, _BITMAP), _BITMAP)
    needed = -(-volume.clusters // 8)
    if bitmap.size < needed or bitmap.written < needed:
        raise NotKnownError("the NTFS bitmap is shorter than its volume")
    if _log_is_empty(window, volume, table):
        _check_files(window, volume, table, bitmap, needed)
    parts = []
    for at in range(0, needed, _PIECE_BYTES):
        raw = _read(window, volume, bitmap.runs, at, min(_PIECE_BYTES, needed - at))
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[: volume.clusters - at * 8]
        edges = np.flatnonzero(np.diff(np.concatenate(([1], bits, [1])).astype(np.int8)))
        parts.append((edges.reshape(-1, 2) + at * 8) * volume.cluster_bytes)
    return joined(parts)


def _volume(window: Window) -> _Volume:
    raw = window.fetch(0, _BOOT_BYTES)
    sector, shift = struct.unpack_from("<HB", raw, 11)
    sectors, table_at = struct.unpack_from("<QQ", raw, 40)
    (record,) = struct.unpack_from("<b", raw, 64)
    per_cluster = shift if shift <= 0x80 else 1 << min(256 - shift, 31)
    cluster = sector * per_cluster
    possible = sector in (512, 1024, 2048, 4096) and per_cluster and not per_cluster & (per_cluster - 1)
    record_bytes = record * cluster if record > 0 else 1 << min(-record, 31)
    if (
        raw[510:512] != b"\x55\xaa"
        or not possible
        or not sector <= cluster <= 2 << 20
        or record_bytes not in (512, 1024, 2048, 4096)
        or not 0 < table_at < sectors // per_cluster
        or sectors // per_cluster >= 1 << 48
    ):
        raise NotKnownError("the NTFS boot sector describes no possible volume")
    if sectors * sector > window.size_bytes:
        raise NotKnownError("the NTFS volume is larger than what holds it: a part of an array, or cut off")
    return _Volume(cluster, sectors // per_cluster, record_bytes, table_at)


def _check_flags(window: Window, volume: _Volume, table: _Attribute) -> None:
    found = [item for item in _numbered(window, volume, table, _VOLUME) if item.kind == _VOLUME_INFORMATION]
    if len(found) != 1 or found[0].value is None or len(found[0].value) < 12:
        raise NotKnownError("the NTFS volume does not say how it is")
    major, minor, flags = struct.unpack_from("<BBH", found[0].value, 8)
    if (major, minor) not in ((3, 0), (3, 1)):
        raise NotKnownError(f"version {major}.{minor} of NTFS is not known here")
    if flags:
        raise NotKnownError(
            "the NTFS volume is marked as dirty: it is in use, was not dismounted, or has to be checked"
        )


def _log_is_empty(window: Window, volume: _Volume, table: _Attribute) -> bool:
    """Whether the log was emptied; else it says that all is in place.

    Raises:
        NotKnownError: it says something else.
    """
    log = _content(volume, _numbered(window, volume, table, _LOG_FILE), _LOG_FILE)
    if not 2 * 4096 <= log.size <= _MAX_LOG_BYTES:
        raise NotKnownError("the NTFS log has no possible size")
    head = _read(window, volume, log.runs, 0, 4096)
    if head == b"\xff" * 4096:
        for at in range(4096, log.size, _PIECE_BYTES):
            length = min(_PIECE_BYTES, log.size - at)
            if _read(window, volume, log.runs, at, length) != b"\xff" * length:
                raise NotKnownError("the NTFS log is neither in order nor empty")
        return True
    (page_bytes,) = struct.unpack_from("<I", head, 16)
    if page_bytes not in (4096, 8192, 16384, 32768, 65536) or 2 * page_bytes > log.size:
        raise NotKnownError("the NTFS log has no sound restart page")
    for at in (0, page_bytes):  # whichever is newer: both have to say so
        page = _mended(_read(window, volume, log.runs, at, page_bytes), b"RSTR")
        (area,) = struct.unpack_from("<H", page, 24)
        if area + 16 > page_bytes:
            raise NotKnownError("the NTFS log has no sound restart page")
        _, _, _, in_use, flags = struct.unpack_from("<QHHHH", page, area)
        if in_use != _NO_CLIENT and not flags & _CLEAN:
            raise NotKnownError("the NTFS log has to be replayed: the volume is in use, hibernated or not dismounted")
    return False


def _check_files(window: Window, volume: _Volume, table: _Attribute, bitmap: _Attribute, needed: int) -> None:
    """See that the bitmap has every cluster of every file.

    Raises:
        NotKnownError: it has not, or there are too many to look at.
    """
    count = table.written // volume.record_bytes
    if count > _MAX_RECORDS or needed > _MAX_CHECKED_BYTES:
        raise NotKnownError("the NTFS log was emptied, and all files would have to be looked at: they are too many")
    raw = b"".join(
        _read(window, volume, bitmap.runs, at, min(_PIECE_BYTES, needed - at)) for at in range(0, needed, _PIECE_BYTES)
    )
    taken = np.frombuffer(raw, np.uint8)
    step = _PIECE_BYTES // volume.record_bytes
    for first in range(0, count, step):
        length = min(step, count - first) * volume.record_bytes
        records = _read(window, volume, table.runs, first * volume.record_bytes, length)
        for at in range(0, length, volume.record_bytes):
            record = records[at : at + volume.record_bytes]
            if record[:4] == b"BAAD":
                raise NotKnownError("a record of the NTFS file table was torn")
            if record[:4] != b"FILE" or not struct.unpack_from("<H", record, 22)[0] & _IN_USE:
                continue
            for item in _attributes(volume, _mended(record, b"FILE")):
                for start, length_ in item.runs:
                    if start is not None and not _all_taken(taken, start, length_):
                        raise NotKnownError("the NTFS bitmap has clusters of a file as free: let it be checked")


def _all_taken(taken: np.ndarray[tuple[int], np.dtype[np.uint8]], first: int, count: int) -> bool:
    begin, end = first >> 3, -(-(first + count) // 8)
    bits = np.unpackbits(taken[begin:end], bitorder="little")
    return bool(bits[first - begin * 8 : first - begin * 8 + count].all())


def _numbered(window: Window, volume: _Volume, table: _Attribute, number: int) -> list[_Attribute]:
    """The attributes of a file by its number in the table."""
    raw = _read(window, volume, table.runs, number * volume.record_bytes, volume.record_bytes)
    return _parsed(volume, raw, number)


def _record(window: Window, volume: _Volume, offset: int, number: int) -> list[_Attribute]:
    return _parsed(volume, window.fetch(offset, volume.record_bytes), number)


def _parsed(volume: _Volume, raw: bytes, number: int) -> list[_Attribute]:
    data = _mended(raw, b"FILE")
    (flags,), (base,) = struct.unpack_from("<H", data, 22), struct.unpack_from("<Q", data, 32)
    if not flags & _IN_USE or base:
        raise NotKnownError(f"record {number} of the NTFS file table is not what it has to be")
    return list(_attributes(volume, data))


def _mended(raw: bytes, magic: bytes) -> bytes:
    """A record as it was before its sectors were stamped, which tells a torn one.

    Raises:
        NotKnownError: it is torn, or none.
    """
    where, count = struct.unpack_from("<HH", raw, 4)
    if raw[:4] != magic or count != len(raw) // _STRIDE + 1 or where % 2 or where + 2 * count > _STRIDE - 2:
        raise NotKnownError("a structure of NTFS is not where it has to be")
    stamps = raw[where : where + 2 * count]
    data = bytearray(raw)
    for number in range(1, count):
        end = number * _STRIDE
        if data[end - 2 : end] != stamps[:2]:
            raise NotKnownError("a structure of NTFS was torn")
        data[end - 2 : end] = stamps[2 * number : 2 * number + 2]
    return bytes(data)


def _attributes(volume: _Volume, data: bytes) -> Iterator[_Attribute]:
    (at,), (used,) = struct.unpack_from("<H", data, 20), struct.unpack_from("<I", data, 24)
    end = min(used, len(data))
    while at + 4 <= end:
        (kind,) = struct.unpack_from("<I", data, at)
        if kind == _END:
            return
        if at + 24 > end:
            break
        length, is_outside, name_length, name_at, flags = struct.unpack_from("<IBBHH", data, at + 4)
        if length < 24 or length % 8 or at + length > end or name_at + 2 * name_length > length or is_outside > 1:
            break
        name = data[at + name_at : at + name_at + 2 * name_length]
        body = data[at : at + length]
        if is_outside:
            if length < 64:
                break
            first, last = struct.unpack_from("<QQ", body, 16)
            (runs_at,) = struct.unpack_from("<H", body, 32)
            size, written = struct.unpack_from("<QQ", body, 48)
            runs = tuple(_runs(volume, body, runs_at))
            if sum(count for _, count in runs) != (last + 1 - first) % (1 << 64):
                break
            yield _Attribute(kind, name, not flags & _NOT_PLAIN, first, None, runs, size, written)
        else:
            value_length, value_at = struct.unpack_from("<IH", body, 16)
            if value_at + value_length > length:
                break
            value = body[value_at : value_at + value_length]
            yield _Attribute(kind, name, not flags & _NOT_PLAIN, 0, value, (), value_length, value_length)
        at += length
    raise NotKnownError("a record of the NTFS file table is not sound")


def _runs(volume: _Volume, body: bytes, at: int) -> Iterator[_Run]:
    """Runs of clusters: a byte that says how long the two numbers behind it are, until it is zero."""
    place = 0
    for _ in range(_MAX_RUNS):
        if not 64 <= at < len(body):
            break
        sizes = body[at]
        if not sizes:
            return
        count_bytes, place_bytes = sizes & 15, sizes >> 4
        following = at + 1 + count_bytes + place_bytes
        if not 0 < count_bytes <= 8 or place_bytes > 8 or following > len(body):
            break
        count = int.from_bytes(body[at + 1 : at + 1 + count_bytes], "little", signed=True)
        place += int.from_bytes(body[at + 1 + count_bytes : following], "little", signed=True)
        if not 0 < count <= volume.clusters:
            break
        if place_bytes and not 0 <= place <= volume.clusters - count:
            break
        yield (place if place_bytes else None), count
        at = following
    raise NotKnownError("a row of clusters of NTFS is not sound")


def _content(volume: _Volume, attributes: list[_Attribute], number: int, *, whole: bool = True) -> _Attribute:
    """The unnamed data of a file of the system's.

    Args:
        whole: all of it has to be described here, and none of it in further records.
    """
    if whole and any(item.kind == _ATTRIBUTE_LIST for item in attributes):
        raise NotKnownError(f"file {number} of the NTFS volume is in too many pieces")
    found = [item for item in attributes if item.kind == _DATA and not item.name]
    if len(found) != 1 or found[0].value is not None or not found[0].is_plain or found[0].first_cluster:
        raise NotKnownError(f"file {number} of the NTFS volume has no such content as it has to have")
    held = sum(count for _, count in found[0].runs) * volume.cluster_bytes
    if whole and not found[0].written <= found[0].size <= held:
        raise NotKnownError(f"file {number} of the NTFS volume is larger than its clusters")
    return found[0]


def _read(window: Window, volume: _Volume, runs: tuple[_Run, ...], offset: int, length: int) -> bytes:
    """The bytes of some runs."""
    parts: list[bytes] = []
    for start, count in runs:
        size = count * volume.cluster_bytes
        if offset < size and length > 0:
            if start is None:
                raise NotKnownError("a file of the NTFS volume's own has a hole")
            taken = min(size - offset, length)
            parts.append(window.fetch(start * volume.cluster_bytes + offset, taken))
            length, offset = length - taken, 0
        else:
            offset -= size
        if length <= 0:
            return b"".join(parts)
    raise NotKnownError("a structure of NTFS lies behind the end of its file")

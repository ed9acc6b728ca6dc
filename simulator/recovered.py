"""Recovered disks, judged: byte for byte against the oracle, the file system by e2fsck, real files by their content.

A disk comes back as a raw file or as a fixed VHD in a page blob. The blob is fetched through the storage client (only
the pages that were written; the others are zeros by the service's word), its footer is read here by the letter of the
VHD specification rather than by the product's own code, and what lies before the footer is then judged like a raw file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicar.errors import CorruptionError, ReplicarError
from replicar.storage.store import PageBlobStore
from simulator import disk_image, e2fsprogs
from simulator.disk_image import DATABASE_DIRECTORY, FILES_DIRECTORY, DiskImage
from simulator.ext4_files import differing_files, files_below
from simulator.oracle import FileImage, Oracle

MIB: Final = 1 << 20
_FOOTER_BYTES: Final = 512
_FETCH_BYTES: Final = 4 * MIB
_FIXED: Final = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What judging one recovered disk gave. `problems` is empty when all was true, else it says what was not."""

    bytes_compared: int
    changes_included: int
    files_compared: int
    problems: tuple[str, ...]


def judge(image: DiskImage, oracle: Oracle, raw: Path, name: str, at_ns: int) -> Verdict:
    """Judge a raw file that should be the disk at an instant; the expected image made for that is removed again.

    Args:
        raw: may be longer than the disk (a VHD is filled up to whole MiB): the rest must be zeros.
        name: of this judgement, for the files it makes.
    """
    length = raw.stat().st_size
    if length < oracle.size_bytes:
        return Verdict(0, 0, 0, (f"{raw.name} has {length} bytes, the disk {oracle.size_bytes}",))
    problems: list[str] = []
    if any(FileImage(raw).read(oracle.size_bytes, length - oracle.size_bytes)):
        problems.append(f"{raw.name} is not zeros behind the disk's end")
    comparison = oracle.compare(FileImage(raw), name, at_ns, keep=True)
    if not comparison.equal:
        problems.append(str(comparison))
    expected, files = oracle.expected_path(name), 0
    try:
        e2fsprogs.check(raw)
        files, unequal = differing_files(raw, image.source, FILES_DIRECTORY)
        problems += [f"{len(unequal)} files differ, among them {unequal[0]}"] if unequal else []
        files += len(image.databases)
        problems += [f"{database} differs" for database in _differing_databases(image, expected, raw)]
    except ReplicarError as error:
        problems.append(str(error))
    finally:
        expected.unlink(missing_ok=True)
    return Verdict(comparison.bytes_compared, comparison.changes_required, files, tuple(problems))


def _differing_databases(image: DiskImage, expected: Path, raw: Path) -> Iterator[str]:
    """Database files that the recovered file system does not have as the oracle's image has them."""
    found = files_below(raw, DATABASE_DIRECTORY)
    with raw.open("rb") as file:
        for database, extents in image.database_extents().items():
            size = (image.source / database).stat().st_size
            wanted = disk_image.file_content(expected, extents, size)
            if database not in found or found[database].content(file.fileno()) != wanted:
                yield database


async def fetch_vhd(store: PageBlobStore, blob: str, path: Path) -> int:
    """Fetch a fixed VHD from its page blob into a raw file without the footer; its virtual size in bytes.

    Raises:
        CorruptionError: it is no fixed VHD that Azure would import.
    """
    size = (await store.properties(blob)).size_bytes
    footer = await store.read(blob, size - _FOOTER_BYTES, _FOOTER_BYTES)
    virtual = fixed_size(footer)
    if virtual + _FOOTER_BYTES != size or virtual % MIB:
        raise CorruptionError(f"the VHD {blob} says {virtual} bytes in a blob of {size}; Azure wants whole MiB")
    with path.open("wb") as file:
        for start, length in await store.page_ranges(blob):
            for offset in range(start, min(start + length, virtual), _FETCH_BYTES):
                count = min(_FETCH_BYTES, start + length - offset, virtual - offset)
                file.seek(offset)
                file.write(await store.read(blob, offset, count))
        file.truncate(virtual)
    return virtual


def fixed_size(footer: bytes) -> int:
    """The virtual size that a fixed VHD's footer says (Virtual Hard Disk Image Format Specification 1.0).

    Raises:
        CorruptionError: it is no such footer.
    """
    cookie, _, version, data_offset = struct.unpack_from(">8sIIQ", footer)
    _, current_size, _, kind, checksum = struct.unpack_from(">QQIII", footer, 40)
    if cookie != b"conectix" or version != 0x0001_0000 or data_offset != (1 << 64) - 1 or kind != _FIXED:
        raise CorruptionError("this is no footer of a fixed VHD")
    if checksum != ~sum(footer[:64] + footer[68:]) & 0xFFFF_FFFF:
        raise CorruptionError("the VHD footer fails its checksum")
    return int(current_size)

"""What a view is written to: a fixed VHD in a page blob, or a raw, a qcow2 or a fixed VHD file.

Only data is written; zeros are left as holes (files) or unwritten pages (blobs). What was there before is refused
unless it is to be replaced, and nothing half-written keeps the target's name: a file is made beside its place and
renamed when it is complete and durable, a blob that was not finished is removed again, and a VHD's footer, without
which it is none, is written last and read back.

Weak: Azure has no rename, so replacing a blob removes the old one first.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recovery.aio import write_context
from recovery.files import REPLACE_HINT, held_stretches, in_thread, new_file, write_at
from recovery.filewriter import FileWriter
from recovery.view import Piece, Progress, View
from replicar.clock import Clock, SystemClock
from replicar.errors import ConflictError, CorruptionError, PermanentError, ReplicarError
from replicar.formats import qcow2, vhd
from replicar.formats.record import Disk
from replicar.storage.store import PageBlobStore

#: A VHD's own id among its blob's metadata: with the footer, which is written last, it says that the blob is whole.
VHD_ID: Final = "replicar_vhd"
#: Blobs of the product itself; no output goes there.
RESERVED_PREFIX: Final = "machines/"
#: A hole in a file costs a system call, which is about as long as copying 16 KiB takes.
FILE_HOLE_BYTES: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Written:
    """What was written where; `data_bytes` without the zeros that were left out."""

    disk: str
    target: str
    size_bytes: int
    data_bytes: int
    sequence: int
    time_ns: int


async def write_raw_file(
    view: View, disk: Disk, path: Path, *, replace: bool = False, progress: Progress | None = None
) -> Written:
    """The disk's bytes as a sparse file.

    Raises:
        PermanentError: the file is there already, or can't be written (no space, no permission).
        CorruptionError: the log is damaged where the disk's data lies.
    """
    async with new_file(path, disk.size_bytes, replace=replace) as descriptor:
        data_bytes = await copy_to_file(view, disk, descriptor, progress)
    return written_at(view, disk, str(path), disk.size_bytes, data_bytes)


async def write_vhd_file(
    view: View,
    disk: Disk,
    path: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Written:
    """The disk as a fixed VHD: its bytes, zeros up to a whole MiB, the footer. Raises as `write_raw_file`, and
    LimitError when Azure could not hold the disk."""
    size = vhd.virtual_bytes(disk.size_bytes)
    footer = _footer(size, uuid.uuid4(), clock)
    async with new_file(path, size + vhd.FOOTER_BYTES, replace=replace) as descriptor:
        data_bytes = await copy_to_file(view, disk, descriptor, progress)
        await in_thread(write_at, descriptor, memoryview(footer), size)
    return written_at(view, disk, str(path), size + vhd.FOOTER_BYTES, data_bytes)


async def write_qcow2_file(
    view: View, disk: Disk, path: Path, *, replace: bool = False, progress: Progress | None = None
) -> Written:
    """The disk as a qcow2 image, without clusters of zeros; raises as `write_raw_file`."""
    layout, written = qcow2.Layout(disk.size_bytes), 0

    async def sink(batch: Sequence[Piece]) -> None:
        nonlocal written
        for offset, data in batch:
            for start, end in held_stretches(data):
                written += end - start
                places = list(layout.pieces(offset + start, end - start))
                await in_thread(_write_places, descriptor, data[start:end], places)

    async with new_file(path, disk.size_bytes, replace=replace) as descriptor:
        await view.copy(disk, sink, hole_bytes=FILE_HOLE_BYTES, progress=progress)
        length, writes = layout.finish()
        await in_thread(os.ftruncate, descriptor, length)
        for offset, data in writes:
            await in_thread(write_at, descriptor, memoryview(data), offset)
    return written_at(view, disk, str(path), disk.size_bytes, written)


async def write_vhd_blob(
    view: View,
    disk: Disk,
    store: PageBlobStore,
    name: str,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Written:
    """The disk as a fixed VHD in a page blob, ready for import as a managed disk.

    Raises:
        PermanentError: the blob is there already, or its name is reserved.
        LimitError: Azure could not hold the disk.
        CorruptionError: the log is damaged where the disk's data lies, or the footer reads back differently.
    """
    _check_blob_name(name)
    size = vhd.virtual_bytes(disk.size_bytes)
    vhd_id = uuid.uuid4()
    footer = _footer(size, vhd_id, clock)
    if replace:
        await store.delete(name)
    await _create(store, name, size + vhd.FOOTER_BYTES, {VHD_ID: str(vhd_id)})
    written = 0

    async def sink(batch: Sequence[Piece]) -> None:
        nonlocal written
        for offset, data in batch:
            for start, end in held_stretches(data):
                await store.put_pages(name, offset + start, data[start:end])
                written += end - start

    try:
        await view.copy(disk, sink, progress=progress)
        await store.put_pages(name, size, footer)
        if await store.read(name, size, vhd.FOOTER_BYTES) != footer:
            raise CorruptionError(f"the footer of {name} reads back differently", hint="recover again", blob=name)
    except BaseException:
        # The first error is the one to report, also when storage is away and the unfinished blob has to stay.
        with contextlib.suppress(ReplicarError):
            await store.delete(name)
        raise
    return written_at(view, disk, name, size + vhd.FOOTER_BYTES, written)


async def _create(store: PageBlobStore, name: str, size_bytes: int, metadata: dict[str, str]) -> None:
    try:
        await store.create(name, size_bytes, metadata=metadata)
    except ConflictError:
        raise PermanentError(f"the blob {name} is there already", hint=REPLACE_HINT, blob=name) from None


def _check_blob_name(name: str) -> None:
    if name.startswith(RESERVED_PREFIX):
        raise PermanentError(
            f"blobs under {RESERVED_PREFIX} are the machines' logs", hint="choose another name", blob=name
        )
    if not 0 < len(name) <= 1024:
        raise PermanentError("a blob's name has 1 to 1024 characters", hint="choose another name")


def _footer(size: int, vhd_id: uuid.UUID, clock: Clock | None) -> bytes:
    return vhd.pack_footer(size, vhd_id, (clock or SystemClock()).now_ns() // 10**9)


def written_at(view: View, disk: Disk, target: str, size_bytes: int, data_bytes: int) -> Written:
    place = view.state.place
    return Written(disk.name, target, size_bytes, data_bytes, place.sequence, place.time_ns)


async def copy_to_file(view: View, disk: Disk, descriptor: int, progress: Progress | None = None) -> int:
    """Write the disk's data into a file that holds nothing but zeros; returns how much was written."""
    with write_context() as context:
        writer = FileWriter(descriptor, context)
        await view.scatter(disk, writer.write, progress=progress)
    return writer.written_bytes


def _write_places(descriptor: int, data: memoryview, places: Sequence[tuple[int, int, int]]) -> None:
    for place, start, end in places:
        write_at(descriptor, data[start:end], place)

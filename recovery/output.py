"""What a view is written to: a fixed VHD in a page blob, a fixed VHD file, or a raw file.

Only data is written; zeros are left as holes (files) or unwritten pages (blobs). What was there before is refused
unless it is to be replaced, and nothing half-written keeps the target's name: a file is made beside its place and
renamed when it is complete and durable, a blob that was not finished is removed again, and a VHD's footer, without
which it is none, is written last and read back.

Weak: Azure has no rename, so replacing a blob removes the old one first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from recovery.view import Piece, Progress, View
from replicar.clock import Clock, SystemClock
from replicar.control.files import sync_directory
from replicar.errors import ConflictError, CorruptionError, PermanentError, ReplicarError
from replicar.formats import vhd
from replicar.formats.record import Disk
from replicar.storage.store import PageBlobStore

_Result = TypeVar("_Result")

#: Blobs of the product itself; no output goes there.
RESERVED_PREFIX: Final = "machines/"
#: A hole in a file costs a system call, which is about as long as copying 16 KiB takes.
FILE_HOLE_BYTES: Final = 16 << 10
#: Zeros that were written are looked for in so large pieces; holes below 128 KiB cost more than they save (see `plan`).
GRANULE_BYTES: Final = 64 << 10
_GRANULE_WORDS: Final = GRANULE_BYTES // 8
_BRIDGE_GRANULES: Final = 2
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REPLACE: Final = "choose another name, or say that it is to be replaced (--replace)"


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
    async with _new_file(path, disk.size_bytes, replace=replace) as descriptor:
        data_bytes = await _copy_to_file(view, disk, descriptor, progress)
    return _written(view, disk, str(path), disk.size_bytes, data_bytes)


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
    async with _new_file(path, size + vhd.FOOTER_BYTES, replace=replace) as descriptor:
        data_bytes = await _copy_to_file(view, disk, descriptor, progress)
        await _in_thread(_write_at, descriptor, memoryview(footer), size)
    return _written(view, disk, str(path), size + vhd.FOOTER_BYTES, data_bytes)


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
    await _create(store, name, size + vhd.FOOTER_BYTES, {"replicar_vhd": str(vhd_id)})
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
    return _written(view, disk, name, size + vhd.FOOTER_BYTES, written)


async def _create(store: PageBlobStore, name: str, size_bytes: int, metadata: dict[str, str]) -> None:
    try:
        await store.create(name, size_bytes, metadata=metadata)
    except ConflictError:
        raise PermanentError(f"the blob {name} is there already", hint=_REPLACE, blob=name) from None


def _check_blob_name(name: str) -> None:
    if name.startswith(RESERVED_PREFIX):
        raise PermanentError(
            f"blobs under {RESERVED_PREFIX} are the machines' logs", hint="choose another name", blob=name
        )
    if not 0 < len(name) <= 1024:
        raise PermanentError("a blob's name has 1 to 1024 characters", hint="choose another name")


def _footer(size: int, vhd_id: uuid.UUID, clock: Clock | None) -> bytes:
    return vhd.pack_footer(size, vhd_id, (clock or SystemClock()).now_ns() // 10**9)


def _written(view: View, disk: Disk, target: str, size_bytes: int, data_bytes: int) -> Written:
    place = view.state.place
    return Written(disk.name, target, size_bytes, data_bytes, place.sequence, place.time_ns)


@contextlib.asynccontextmanager
async def _new_file(path: Path, size_bytes: int, *, replace: bool) -> AsyncIterator[int]:
    """A descriptor of a new sparse file that gets the name `path` when the block ends well, and is removed if not."""
    _check_file(path, replace=replace)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            yield descriptor
            await _in_thread(os.fsync, descriptor)
        finally:
            os.close(descriptor)
        _check_file(path, replace=replace)
        os.replace(partial, path)
        sync_directory(path.parent)
    except OSError as error:
        raise _file_error(error, path, size_bytes) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


async def _copy_to_file(view: View, disk: Disk, descriptor: int, progress: Progress | None) -> int:
    written = 0

    async def sink(batch: Sequence[Piece]) -> None:
        nonlocal written
        written += await _in_thread(_write_pieces, descriptor, batch)

    await view.copy(disk, sink, hole_bytes=FILE_HOLE_BYTES, progress=progress)
    return written


async def _in_thread(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """As `asyncio.to_thread`, but a cancelled caller waits until the thread is done: it can't be stopped, and the
    descriptor that it uses is about to be closed and its number given to another file."""
    future = asyncio.get_running_loop().run_in_executor(None, partial(work, *arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # looked at: what another write failed with is being raised already
        raise


def _write_pieces(descriptor: int, pieces: Sequence[Piece]) -> int:
    """Write what is not zeros; returns its length."""
    written = 0
    for offset, data in pieces:
        for start, end in held_stretches(data) if len(data) > GRANULE_BYTES else [(0, len(data))]:
            _write_at(descriptor, data[start:end], offset + start)
            written += end - start
    return written


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def held_stretches(data: memoryview) -> list[tuple[int, int]]:
    """Where `data` is not zeros, as (start, end) in granules of 64 KiB; two that are nearer than 128 KiB are one.

    Args:
        data: a multiple of 512 bytes.
    """
    words = np.frombuffer(data, dtype=np.uint64)
    whole = len(words) // _GRANULE_WORDS * _GRANULE_WORDS
    held = words[:whole].reshape(-1, _GRANULE_WORDS).any(axis=1)
    if whole < len(words):
        held = np.append(held, words[whole:].any())
    rows = np.flatnonzero(held)
    if not len(rows):
        return []
    apart = np.flatnonzero(np.diff(rows) > _BRIDGE_GRANULES)
    first = rows[np.concatenate(([0], apart + 1))] * GRANULE_BYTES
    last = (rows[np.concatenate((apart, [len(rows) - 1]))] + 1) * GRANULE_BYTES
    return [(int(start), min(int(end), len(data))) for start, end in zip(first, last, strict=True)]


def _check_file(path: Path, *, replace: bool) -> None:
    try:
        found = path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise PermanentError(
                f"there is no directory {path.parent}", hint="make it first, or choose another place", path=str(path)
            ) from None
        return
    except OSError as error:
        raise _file_error(error, path, 0) from error
    if not stat.S_ISREG(found.st_mode):
        raise PermanentError(f"{path} is no regular file", hint="choose the name of a file", path=str(path))
    if not replace:
        raise PermanentError(f"{path} is there already", hint=_REPLACE, path=str(path))


def _file_error(error: OSError, path: Path, size_bytes: int) -> PermanentError:
    if error.errno in _FULL:
        return PermanentError(
            f"there is not enough space for {path}: {error.strerror}",
            hint=f"it needs up to {size_bytes} bytes; free some, or choose another place",
            path=str(path),
            size_bytes=size_bytes,
        )
    return PermanentError(
        f"can't write {path}: {error.strerror}", hint="check the directory, its owner and its space", path=str(path)
    )

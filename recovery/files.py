"""New files, made beside their place and put there when they are whole; and where bytes are not zeros."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from replicar.control.files import sync_directory
from replicar.errors import PermanentError

_Result = TypeVar("_Result")

#: Zeros that were written are looked for in so large pieces; holes below 128 KiB cost more than they save (see `plan`).
GRANULE_BYTES: Final = 64 << 10
_ZEROS: Final = bytes(GRANULE_BYTES)
_BRIDGE_GRANULES: Final = 2
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REPLACE_HINT: Final = "choose another name, or say that it is to be replaced (--replace)"


@contextlib.asynccontextmanager
async def new_file(path: Path, size_bytes: int, *, replace: bool) -> AsyncIterator[int]:
    """A descriptor of a new sparse file that gets the name `path` when the block ends well, and is removed if not."""
    _check_file(path, replace=replace)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            yield descriptor
            await in_thread(os.fsync, descriptor)
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


async def in_thread(work: Callable[..., _Result], *arguments: Any, pool: Executor | None = None) -> _Result:
    """As `asyncio.to_thread`, or in threads of `pool`, but a cancelled caller waits until the thread is done: it can't
    be stopped, and the descriptor that it uses is about to be closed and its number given to another file."""
    future = asyncio.get_running_loop().run_in_executor(pool, partial(work, *arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # looked at: what another write failed with is being raised already
        raise


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while (count := os.pwrite(descriptor, data, offset)) < len(data):
        data, offset = data[count:], offset + count


def held_stretches(data: memoryview) -> list[tuple[int, int]]:
    """Where `data` is not zeros, as (start, end) in granules of 64 KiB; two that are nearer than 128 KiB are one."""
    stretches: list[tuple[int, int]] = []
    for start in range(0, len(data), GRANULE_BYTES):
        if not _holds(data[start : start + GRANULE_BYTES]):
            continue
        end = min(start + GRANULE_BYTES, len(data))
        if stretches and start - stretches[-1][1] < _BRIDGE_GRANULES * GRANULE_BYTES:
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((start, end))
    return stretches


def _holds(granule: memoryview) -> bool:
    """Whether a byte of it is not zero. Most granules show it with the first few, and the others are compared by
    the C library, which is faster than going through them even with the copy that it takes."""
    return any(granule[:8]) or bytes(granule) != _ZEROS[: len(granule)]


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
        raise PermanentError(f"{path} is there already", hint=REPLACE_HINT, path=str(path))


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

"""Where a disk goes home to: the machine's own disk over NBD, a device or file of this host, a VHD in a page blob.

    nbd+unix:///EXPORT?socket=PATH, nbd://HOST:PORT/EXPORT    the agent's export: what is written there is captured, so
                                                              the replica follows without a copy
    /dev/vg0/shop, /srv/shop.img                              a block device that nobody has open, or a raw file
    blob:vhds/shop.vhd                                        a fixed VHD in a storage account (Azure Stack Hub's, say)

`{disk}` stands for the disk's name. A destination must be there and large enough; none is made.
"""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from recovery.failback.carry import Destination
from recovery.holes import make_zeros
from replicar.errors import PermanentError
from replicar.formats import vhd
from replicar.nbd.client import NbdClient
from replicar.storage.store import PAGE_BYTES, PageBlobStore

DISK_MARK: Final = "{disk}"
BLOB: Final = "blob:"
_NBD_PORT: Final = 10809


def named(destination: str, disk: str, disks: int) -> str:
    """The destination of one disk.

    Raises:
        PermanentError: several disks would go to the same place.
    """
    if disks > 1 and DISK_MARK not in destination:
        raise PermanentError(
            f"{disks} disks can't all go to {destination}", hint=f"put {DISK_MARK} where their names should go"
        )
    return destination.replace(DISK_MARK, disk)


async def open_destination(place: str, stack: AsyncExitStack, store: PageBlobStore | None) -> Destination:
    """A disk to write to, until the stack ends.

    Args:
        store: of the account that `blob:` means; None: there is none.

    Raises:
        PermanentError: it is not there, is in use, or is nothing that a disk can go to.
        TransientError: nobody answers there.
    """
    if place.startswith(BLOB):
        if store is None:
            raise PermanentError(f"which account is {place} in?", hint="name its settings: option storage_settings")
        return await BlobDisk.open(store, place.removeprefix(BLOB))
    if "://" not in place:
        disk = await asyncio.to_thread(FileDisk, Path(place))
        stack.callback(disk.close)
        return disk
    parts = urlsplit(place)
    export, sockets = unquote(parts.path.removeprefix("/")), parse_qs(parts.query).get("socket", [])
    if parts.scheme == "nbd+unix" and len(sockets) == 1:
        return await stack.enter_async_context(await NbdClient.connect(Path(sockets[0]), export=export))
    if parts.scheme == "nbd" and parts.hostname:
        address = (parts.hostname, parts.port or _NBD_PORT)
        return await stack.enter_async_context(await NbdClient.connect(address, export=export))
    raise PermanentError(
        f"{place!r} is nowhere that a disk can go to",
        hint="nbd+unix:///EXPORT?socket=PATH, nbd://HOST:PORT/EXPORT, a device's or file's path, or blob:NAME",
    )


class FileDisk:
    """A raw file, or a block device that nobody else has open (the kernel refuses one that is mounted)."""

    def __init__(self, path: Path) -> None:
        try:
            is_device = stat.S_ISBLK(path.stat().st_mode)
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if is_device else 0))
        except OSError as error:
            raise PermanentError(
                f"{path} can't be written to: {error.strerror}",
                hint="it has to be there, yours, and neither mounted nor used by anybody",
                path=str(path),
            ) from None
        self.size_bytes = os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        os.close(self._fd)

    async def read(self, offset: int, length: int) -> bytes:
        return await asyncio.to_thread(os.pread, self._fd, length, offset)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        await asyncio.to_thread(self._write, offset, data)

    async def write_zeroes(self, offset: int, length: int) -> None:
        await asyncio.to_thread(make_zeros, self._fd, offset, length)

    async def flush(self) -> None:
        await asyncio.to_thread(os.fsync, self._fd)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count


class BlobDisk:
    """A fixed VHD in a page blob, whose footer stays as it is."""

    def __init__(self, store: PageBlobStore, name: str, size_bytes: int) -> None:
        self._store, self._name = store, name
        self.size_bytes = size_bytes

    @classmethod
    async def open(cls, store: PageBlobStore, name: str) -> BlobDisk:
        """Raises PermanentError: there is no such blob; CorruptionError: it is no VHD."""
        size = (await store.properties(name)).size_bytes - vhd.FOOTER_BYTES
        if size <= 0:
            raise PermanentError(f"the blob {name} is no VHD", hint="it is too small to be one", blob=name)
        vhd.read_footer(await store.read(name, size, vhd.FOOTER_BYTES))
        return cls(store, name, size)

    async def read(self, offset: int, length: int) -> bytes:
        return await self._store.read(self._name, offset, length)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        await self._store.put_pages(self._name, offset, bytes(data))

    async def write_zeroes(self, offset: int, length: int) -> None:
        assert not (offset | length) % PAGE_BYTES
        await self._store.clear_pages(self._name, offset, length)

    async def flush(self) -> None:
        """A page is durable when it was put."""

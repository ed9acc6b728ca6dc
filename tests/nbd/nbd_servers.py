"""NBD servers of other makes, for trying the simulator's client and application on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.tools import need


@asynccontextmanager
async def qemu_nbd(image: Path, *options: str) -> AsyncIterator[tuple[Path, asyncio.subprocess.Process]]:
    """qemu-nbd serving a raw file on a Unix socket; gives the socket and the process."""
    socket = image.with_suffix(".sock")
    command = [need("qemu-img").replace("qemu-img", "qemu-nbd"), "-f", "raw", "-k", str(socket), "-t", *options]
    async with _server(socket, *command, str(image)) as process:
        yield socket, process


@asynccontextmanager
async def nbdkit(socket: Path, *arguments: str) -> AsyncIterator[tuple[Path, asyncio.subprocess.Process]]:
    """nbdkit with a plugin and filters on a Unix socket; gives the socket and the process."""
    async with _server(socket, need("nbdkit"), "-f", "-U", str(socket), *arguments) as process:
        yield socket, process


@asynccontextmanager
async def _server(socket: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    socket.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(10):
            while process.returncode is None and not await _listens(socket):
                await asyncio.sleep(0.01)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        socket.unlink(missing_ok=True)


async def _listens(socket: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    writer.close()
    return True

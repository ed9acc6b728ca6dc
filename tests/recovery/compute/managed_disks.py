"""A stand-in for the storage of managed disks, whose bytes are real: page blobs and their snapshots in Azurite.

A managed disk is a page blob, imported from another; its snapshots are the blob's. By a link ranges of a snapshot are
read, as Get Blob gives them, and lists of ranges, as Get Page Ranges and Get Page Ranges Diff give them: those are made
here, of the bytes, since Azurite has no diff. A list has few entries, and a marker where it goes on.
"""

from __future__ import annotations

import uuid
from urllib.parse import unquote, urlsplit

from aiohttp import web

from replicar.storage import PageBlobStore

PAGE = 512
#: Entries of a list before it goes on behind a marker.
LIST_ENTRIES = 3


class ManagedDisks:
    """Disks by name. `disks` is where VHDs are imported from, `managed` where managed disks are kept."""

    def __init__(self, disks: PageBlobStore, managed: PageBlobStore) -> None:
        self._disks, self._managed = disks, managed
        self._snapshots: dict[str, tuple[str, str]] = {}
        self._read: dict[tuple[str, str], bytes] = {}  # of snapshots, which don't change
        self.links: dict[str, str] = {}
        self.knows_diffs = True
        self.bytes_read = 0
        self.troubles: list[int] = []

    async def make(self, name: str, source: str) -> int:
        """Import a disk, unless it is there; its size."""
        path = unquote(urlsplit(source).path).split("/", 3)[3]
        size = (await self._disks.properties(path)).size_bytes
        if not [info for info in await self._managed.list(name) if info.name == name]:
            await self._managed.create(name, size)
            await self._managed.put_pages(name, 0, await self._disks.read(path, 0, size))
        return size - PAGE

    async def write(self, name: str, offset: int, data: bytes) -> None:
        """What the machine writes."""
        await self._managed.put_pages(name, offset, data)

    async def content(self, name: str) -> bytes:
        """All of a disk, without its footer."""
        size = (await self._managed.properties(name)).size_bytes
        return await self._managed.read(name, 0, size - PAGE)

    async def snapshot(self, name: str, disk: str) -> None:
        if name not in self._snapshots:
            self._snapshots[name] = (disk, await self._managed.snapshot(disk))

    async def delete(self, name: str) -> None:
        """A disk with its snapshots, or a snapshot; none that may be read is deleted."""
        assert name not in self.links.values(), "somebody has a link to it"
        if name in self._snapshots:
            await self._managed.delete_snapshot(*self._snapshots.pop(name))
            return
        for info in await self._managed.snapshots(name):
            await self._managed.delete_snapshot(info.name, info.snapshot or "")
        await self._managed.delete(name)

    def link(self, snapshot: str) -> str:
        """The path and query of a link to it."""
        secret = uuid.uuid4().hex
        self.links[secret] = snapshot
        return f"/exported/{snapshot}?sv=1&sig={secret}%3D"

    def take_back(self, snapshot: str) -> None:
        self.links = {secret: name for secret, name in self.links.items() if name != snapshot}

    async def answer(self, request: web.Request) -> web.Response:
        if self.troubles:
            return web.Response(status=self.troubles.pop(0))
        data = await self._linked(str(request.url))
        if data is None:
            return web.Response(status=403, headers={"x-ms-error-code": "AuthenticationFailed"})
        if request.query.get("comp") != "pagelist":
            first, last = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
            self.bytes_read += last + 1 - first
            where = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return web.Response(status=206, body=data[first : last + 1], headers=where)
        earlier: bytes | None = bytes(len(data))
        if link := request.headers.get("x-ms-previous-snapshot-url", ""):
            earlier = await self._linked(link) if self.knows_diffs else None
            if earlier is None or len(earlier) != len(data):
                return web.Response(status=409, headers={"x-ms-error-code": "BlobOverwritten"})
        assert earlier is not None
        return web.Response(text=_page_list(data, earlier, int(request.query.get("marker", "0"))))

    async def _linked(self, link: str) -> bytes | None:
        """All that a link leads to, footer and all."""
        secret = unquote(urlsplit(link).query.partition("sig=")[2].partition("&")[0]).removesuffix("=")
        if secret not in self.links:
            return None
        disk, snapshot = self._snapshots[self.links[secret]]
        if (disk, snapshot) not in self._read:
            size = (await self._managed.properties(disk)).size_bytes
            self._read[disk, snapshot] = await self._managed.read_snapshot(disk, snapshot, 0, size)
        return self._read[disk, snapshot]


def _page_list(data: bytes, earlier: bytes, start: int) -> str:
    """The ranges that differ from before, from page `start` on, until there are entries enough."""
    entries: list[str] = []
    at, pages = start, len(data) // PAGE

    def kind(page: int) -> str:
        here = data[page * PAGE : (page + 1) * PAGE]
        if page >= pages or here == earlier[page * PAGE : (page + 1) * PAGE]:
            return ""
        return "PageRange" if any(here) else "ClearRange"

    while at < pages and len(entries) < LIST_ENTRIES:
        first, of_kind = at, kind(at)
        while at < pages and kind(at) == of_kind:
            at += 1
        if of_kind:
            entries.append(f"<{of_kind}><Start>{first * PAGE}</Start><End>{at * PAGE - 1}</End></{of_kind}>")
    marker = f"<NextMarker>{at}</NextMarker>" if at < pages else "<NextMarker />"
    return f'<?xml version="1.0" encoding="utf-8"?><PageList>{"".join(entries)}{marker}</PageList>'

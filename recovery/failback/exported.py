"""A managed disk's snapshot, read through a link: ranges of it, where it has data, what differs from an earlier one.

What a link leads to is a page blob that holds a fixed VHD. Three requests of its REST interface are all that is used:

    Get Blob             ranges of it, with the VHD's size in the answer
    Get Page Ranges      where it was written at all; the rest is zeros
    Get Page Ranges Diff with `x-ms-previous-snapshot-url`, a link to an earlier incremental snapshot of the same disk:
                         what was written or cleared since. Only managed disks have that header

They are made here and not by the storage client: its call for the diff knows no markers, and a list of 10,000 ranges
that goes on behind a marker which nobody asks for would be bytes that nobody carries home.

A link is a secret. It is in no error, and nothing of the HTTP library, whose errors hold it, is kept as their cause.

Weak: a link that ends in the midst of a long read is met as an error that is worth trying again, with another link.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

import aiohttp
import numpy as np
from yarl import URL

from recovery.failback.spans import Spans
from replicar.clock import Clock
from replicar.errors import CorruptionError, PermanentError, ReplicarError, TransientError
from replicar.formats import vhd

#: The first that divides long lists of ranges by markers, and says so.
API_VERSION: Final = "2020-10-02"
#: Tries of one request, and the pause before the second; each further pause is twice as long.
TRIES: Final = 5
PAUSE_SECONDS: Final = 0.5
REQUEST_SECONDS: Final = 60.0
#: Of a list of ranges: Azure tells 10,000 at most in one answer, of about a hundred bytes each.
MAX_LIST_BYTES: Final = 16 << 20
#: Of a disk of 32 TiB, page by page, in lists as short as an answer may be: more is no honest service.
MAX_LISTS: Final = 1 << 23
_LATER: Final = frozenset({408, 429, 500, 502, 503, 504})
_TOTAL: Final = re.compile(r"bytes \d+-\d+/(\d+)")


class ExportedDisk:
    """An `Origin`: what a disk held when its snapshot was taken.

    `size_bytes` is what the machine's disk has, `vhd_bytes` what the managed one has: the next whole MiB, or more if it
    was made larger over there. All methods raise TransientError when nobody answers, or the link has ended.
    """

    def __init__(
        self, session: aiohttp.ClientSession, link: str, disk: str, size_bytes: int, vhd_bytes: int, clock: Clock
    ) -> None:
        self._session, self._link, self._disk, self._clock = session, link, disk, clock
        self.size_bytes, self.vhd_bytes = size_bytes, vhd_bytes

    @classmethod
    async def open(
        cls, session: aiohttp.ClientSession, link: str, disk: str, size_bytes: int, clock: Clock
    ) -> ExportedDisk:
        """Look at what a link leads to.

        Raises:
            PermanentError: it is closed to us, or too small to be that disk.
            CorruptionError: it leads to no VHD.
        """
        made = cls(session, link, disk, size_bytes, 0, clock)
        status, headers, _ = await made._get({"Range": f"bytes=0-{vhd.FOOTER_BYTES - 1}"}, vhd.FOOTER_BYTES)
        found = _TOTAL.fullmatch(headers.get("Content-Range", ""))
        if status != 206 or found is None:
            raise made._refused(status, headers)
        made.vhd_bytes = int(found[1]) - vhd.FOOTER_BYTES
        if made.vhd_bytes < size_bytes:
            raise PermanentError(
                f"the managed disk of {disk} has {made.vhd_bytes} bytes, the machine's has {size_bytes}",
                hint="it is not the disk that the failover made; bring it home by hand",
                disk=disk,
            )
        return made

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk."""
        status, headers, data = await self._get({"Range": f"bytes={offset}-{offset + length - 1}"}, length)
        if status != 206:
            raise self._refused(status, headers)
        if len(data) != length:
            raise TransientError(f"a read of the managed disk of {self._disk} was cut short", hint="it is tried again")
        return data

    async def written(self) -> Spans:
        """Where there is data, behind the machine's disk as well; the rest of the VHD is zeros."""
        found = await self._ranges({})
        assert found is not None
        return found

    async def changed_since(self, earlier: str) -> Spans | None:
        """What was written or cleared since another snapshot, by its link; None: the service can't say.

        It can't where the other one is not an incremental snapshot of the same disk, or the disk was resized since.
        """
        return await self._ranges({"x-ms-previous-snapshot-url": earlier})

    async def _ranges(self, condition: Mapping[str, str]) -> Spans | None:
        """The ranges of all lists; None: there is a condition, and the question was refused for it."""
        parts: list[Spans] = []
        marker = ""
        for _ in range(MAX_LISTS):
            query = {"comp": "pagelist", **({"marker": marker} if marker else {})}
            status, answered, data = await self._get(condition, MAX_LIST_BYTES, query)
            if condition and status in (400, 404, 409, 412):
                return None
            if status != 200:
                raise self._refused(status, answered)
            found, marker = self._parsed(data)
            parts.append(found)
            if not marker:
                return _together(parts).clipped(0, self.vhd_bytes)
        raise self._unreadable()

    def _parsed(self, data: bytes) -> tuple[Spans, str]:
        try:
            root = ElementTree.fromstring(data)  # noqa: S314 - bounded, and expat itself ends entities that grow
            if root.tag != "PageList":
                raise self._unreadable()
            pairs = []
            for each in root:
                if each.tag in ("PageRange", "ClearRange"):
                    start, end = int(each.findtext("Start", "")), int(each.findtext("End", ""))
                    if not 0 <= start <= end:
                        raise self._unreadable()
                    pairs.append((start, end + 1 - start))
            return Spans.of(pairs), root.findtext("NextMarker") or ""
        except (ElementTree.ParseError, ValueError):
            raise self._unreadable() from None

    async def _get(
        self, headers: Mapping[str, str], most: int, query: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        pause, failure = PAUSE_SECONDS, TransientError("nobody was asked")
        for attempt in range(TRIES):
            if attempt:
                await self._clock.sleep(pause)
                pause *= 2
            try:
                return await self._once(headers, most, query or {})
            except TransientError as error:
                failure = error
        raise failure

    async def _once(
        self, headers: Mapping[str, str], most: int, query: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        url = self._link + "".join(f"&{name}={quote(value, safe='')}" for name, value in query.items())
        where = f"the managed disk of {self._disk}"
        try:
            async with self._session.get(
                URL(url, encoded=True),  # a signature is of what stands there, to the letter
                headers={"x-ms-version": API_VERSION, **headers},
                timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
            ) as answer:
                if answer.status in _LATER:
                    raise TransientError(f"{where} answers with status {answer.status}", hint="it is tried again")
                data = bytearray()
                while len(data) <= most and (more := await answer.content.read(most + 1 - len(data))):
                    data += more
                if len(data) > most:
                    raise self._unreadable()
                return answer.status, answer.headers, bytes(data)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            failed = type(error).__name__
        raise TransientError(f"{where} can't be reached: {failed}", hint="it is tried again")

    def _refused(self, status: int, headers: Mapping[str, str]) -> ReplicarError:
        code = headers.get("x-ms-error-code", "")
        what = f"the managed disk of {self._disk} is not given out: status {status} {code}".rstrip()
        if status == 403 and self.vhd_bytes:  # it was, a moment ago
            return TransientError(what, hint="the link has ended; the step goes on with another")
        hint = (
            "may this host reach exports of disks? See the disk's network access policy, and the way to Azure's storage"
        )
        return PermanentError(what, hint=hint, disk=self._disk)

    def _unreadable(self) -> CorruptionError:
        return CorruptionError(
            f"what is told of the managed disk of {self._disk} makes no sense", hint="is a proxy between us and Azure?"
        )


def _together(parts: list[Spans]) -> Spans:
    """All of them, joined once: they may be many."""
    starts, ends = [part.start for part in parts], [part.end for part in parts]
    return Spans.of(()).union(Spans(np.concatenate(starts), np.concatenate(ends)))

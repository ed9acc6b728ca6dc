"""A link to a managed disk's snapshot: what is refused, garbled or away is an error that does not hold the link."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web

from recovery.failback.exported import ExportedDisk
from replicar.clock import SystemClock
from replicar.errors import CorruptionError, PermanentError, ReplicarError, TransientError

SIZE, SECRET = 2 << 20, "c2VjcmV0"


class QuickClock(SystemClock):
    async def sleep(self, seconds: float) -> None:
        await super().sleep(min(seconds, 0.001))


@dataclass
class Service:
    """Answers with what it is told to, of a disk of so many bytes; `answers` come before."""

    address: str = ""
    size_bytes: int = SIZE
    lists: list[str] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        if self.answers:
            return web.Response(status=self.answers.pop(0))
        if request.query.get("comp") == "pagelist":
            return web.Response(text=self.lists[int(request.query.get("marker", "0"))])
        first, last = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        where = {"Content-Range": f"bytes {first}-{last}/{self.size_bytes + 512}"}
        return web.Response(status=206, body=bytes(last + 1 - first), headers=where)

    def link(self) -> str:
        return f"{self.address}/disk?sv=1&sig={SECRET}%2F%3D"


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made, app = Service(), web.Application()
    app.router.add_get("/disk", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def _opened(session: aiohttp.ClientSession, service: Service, size: int = SIZE) -> ExportedDisk:
    return await ExportedDisk.open(session, service.link(), "root", size, QuickClock())


def _is_kept(error: ReplicarError) -> bool:
    return SECRET not in "".join(traceback.format_exception(error)) + repr(error.as_dict())


async def test_lists_that_go_on_behind_a_marker_are_one(session: aiohttp.ClientSession, service: Service) -> None:
    service.lists = [
        "<PageList><PageRange><Start>0</Start><End>511</End></PageRange><NextMarker>1</NextMarker></PageList>",
        "<PageList><ClearRange><Start>512</Start><End>1023</End></ClearRange>"
        f"<PageRange><Start>{SIZE - 512}</Start><End>{SIZE + 511}</End></PageRange><NextMarker/></PageList>",
    ]
    changed = await (await _opened(session, service)).changed_since(service.link())
    assert changed is not None
    assert list(zip(changed.start.tolist(), changed.end.tolist(), strict=True)) == [(0, 1024), (SIZE - 512, SIZE)]


async def test_a_link_that_is_closed_from_the_start_is_no_matter_of_waiting(
    session: aiohttp.ClientSession, service: Service
) -> None:
    service.answers = [403]
    with pytest.raises(PermanentError, match="status 403") as raised:
        await _opened(session, service)
    assert raised.value.hint
    assert _is_kept(raised.value)


async def test_a_link_that_ends_on_the_way_and_a_service_that_is_away_are(
    session: aiohttp.ClientSession, service: Service
) -> None:
    disk = await _opened(session, service)
    service.answers = [503, 500, 403]
    with pytest.raises(TransientError, match="status 403") as raised:
        await disk.read(0, 512)
    assert _is_kept(raised.value)
    service.answers = [503] * 5
    with pytest.raises(TransientError, match="status 503"):
        await disk.read(0, 512)
    service.address = "http://127.0.0.1:1"
    with pytest.raises(TransientError, match="can't be reached") as away:
        await _opened(session, service)
    assert _is_kept(away.value)


@pytest.mark.parametrize(
    "text",
    [
        "<html>a proxy's page</html>",
        "<PageList><PageRange><Start>0</Start>",
        "<PageList><PageRange><Start>512</Start><End>0</End></PageRange></PageList>",
        "<PageList><PageRange><Start>0</Start></PageRange></PageList>",
    ],
)
async def test_a_list_that_makes_no_sense_is_never_taken_for_an_empty_one(
    session: aiohttp.ClientSession, service: Service, text: str
) -> None:
    disk = await _opened(session, service)
    service.lists = [text]
    with pytest.raises(CorruptionError, match="makes no sense"):
        await disk.changed_since(service.link())


async def test_a_disk_that_is_too_small_is_not_the_machines(session: aiohttp.ClientSession, service: Service) -> None:
    with pytest.raises(PermanentError, match="managed disk of root"):
        await _opened(session, service, SIZE + 512)

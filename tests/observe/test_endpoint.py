"""Where Prometheus asks: on this machine unless told otherwise, nowhere unless told at all."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from replicar.errors import TransientError
from replicar.observe.endpoint import MAX_CONNECTIONS, Endpoint, parse_listen
from replicar.observe.exposition import Page


async def a_page() -> Page:
    page = Page()
    page.gauge("replicar_x", "X.", 5)
    return page


async def get(port: int, path: str = "/metrics") -> tuple[int, str, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, response.headers["Content-Type"], await response.text()


async def test_a_scrape_is_answered_with_the_page_of_that_moment() -> None:
    async with Endpoint("0", a_page) as endpoint:
        status, kind, text = await get(endpoint.port)
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert next(iter(text_string_to_metric_families(text))).samples[0].value == 5
        assert (await get(endpoint.port, "/"))[0] == 404


async def test_it_listens_nowhere_unless_it_is_told_to() -> None:
    async with Endpoint("", a_page) as endpoint:
        assert endpoint.port == 0


async def test_a_port_that_is_taken_keeps_nobody_from_working_and_is_had_when_it_is_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Endpoint("127.0.0.1:0", a_page) as first:
        port = first.port
        second = Endpoint(str(port), a_page, retry_seconds=0.05)
        await second.__aenter__()
        assert second.port == 0
        assert "is taken" in caplog.text
        assert "set another `metrics_listen`" in caplog.text
    try:
        async with asyncio.timeout(60):
            while not second.port:
                await asyncio.sleep(0.05)
        assert (await get(port))[0] == 200
    finally:
        await second.__aexit__()


async def test_one_that_never_got_its_port_ends_without_it() -> None:
    async with Endpoint("127.0.0.1:0", a_page) as first, Endpoint(str(first.port), a_page) as second:
        assert second.port == 0


async def test_what_can_not_be_told_now_is_a_503_with_its_reason() -> None:
    async def away() -> Page:
        raise TransientError("the registry is busy")

    async with Endpoint("0", away) as endpoint:
        status, _, text = await get(endpoint.port)
        assert (status, text) == (503, "the registry is busy\n")


async def test_idle_connections_do_not_add_up_beyond_the_limit() -> None:
    async with Endpoint("0", a_page) as endpoint:
        open_ones = [await asyncio.open_connection("127.0.0.1", endpoint.port) for _ in range(MAX_CONNECTIONS)]
        try:
            status, _, text = await get(endpoint.port)
            assert (status, text) == (503, f"{MAX_CONNECTIONS} connections are open here already\n")
        finally:
            for _, writer in open_ones:
                writer.close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", None),
        ("9464", ("127.0.0.1", 9464)),
        ("10.0.0.5:9464", ("10.0.0.5", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("metrics.example.net:0", ("metrics.example.net", 0)),
    ],
)
def test_a_port_alone_means_this_machine_alone(text: str, address: tuple[str, int] | None) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", [":9464", "host", "host:", "1:2:3", "host:70000", "::1:9464", "9464 ", "-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no port, and no host:port"):
        parse_listen(text)

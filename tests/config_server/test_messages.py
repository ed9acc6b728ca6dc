"""Messages and the client's transport: strict where it matters, patient with what is newer, clear about faults."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from config_server.vault import IDENTITY_DIRECTORY
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.control.messages import (
    MAX_REQUEST_BYTES,
    AgentHeartbeat,
    MachineKey,
    MachineProgress,
    ProcessServerAssignment,
)
from replicar.control.transport import Transport, parse_address
from replicar.errors import CorruptionError, LimitError, PermanentError, ReplicarError, TransientError
from replicar.tls import client_context, server_context
from tests.config_server.support import House


def test_unknown_fields_are_ignored_so_that_a_newer_part_is_understood() -> None:
    disk = {"index": 0, "name": "a", "size_bytes": 1, "spin": 2}
    newer = {"time_ns": 5, "state": "from the future", "colour": "blue", "disks": [disk]}
    heartbeat = AgentHeartbeat.from_json(json.dumps(newer).encode())
    assert (heartbeat.state, heartbeat.disks[0].name) == ("from the future", "a")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"time_ns": "5"}, "time_ns"),
        ({"time_ns": -1}, "time_ns"),
        ({"captured_sequence": 2**63}, "captured_sequence"),
        ({"captured_sequence": 1.5}, "captured_sequence"),
        ({"state": "x" * 65}, "state"),
        ({"wait_seconds": 31}, "wait_seconds"),
        ({"disks": [{"index": 0, "name": "a", "size_bytes": 1}] * 257}, "disks"),
        ({"marks": [{"name": "m", "kind": "magic", "sequence": 1, "time_ns": 1}]}, "marks.0.kind"),
        ({"ordered_from": [1]}, "ordered_from"),
    ],
)
def test_a_field_that_is_wrong_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(PermanentError, match="not a valid AgentHeartbeat") as refusal:
        AgentHeartbeat.from_json(json.dumps({"time_ns": 1, "state": "x", **change}).encode())
    assert str(refusal.value.fields["field"]).startswith(named)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_nonsense_is_refused_and_never_anything_else(data: bytes) -> None:
    with pytest.raises(PermanentError):
        AgentHeartbeat.from_json(data)


def test_an_error_about_a_key_does_not_quote_it() -> None:
    key = {"machine_id": "x", "data_key": "c2VjcmV0", "key_id": 5}
    with pytest.raises(PermanentError) as refusal:
        MachineKey.from_json(json.dumps(key).encode())
    assert "c2VjcmV0" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "!", "AAAA", "A" * 44])
def test_a_data_key_that_is_none_is_corruption(text: str) -> None:
    assignment = ProcessServerAssignment.model_validate(
        {
            "machine_id": "12345678123456781234567812345678",
            "name": "db1",
            "epoch": 1,
            "incarnation": 0,
            "data_key": text,
            "wrapped_key": "",
            "key_id": "k",
        }
    )
    with pytest.raises(CorruptionError):
        assignment.data_key_bytes()


@given(st.builds(MachineProgress, machine_id=st.uuids(), stored_sequence=st.integers(0, 2**63 - 1)))
def test_a_message_comes_back_as_it_was_sent(progress: MachineProgress) -> None:
    assert MachineProgress.from_json(progress.to_json()) == progress


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("config.example.org", ("config.example.org", 443)),
        ("config.example.org:8443", ("config.example.org", 8443)),
        ("[::1]:8443", ("::1", 8443)),
        ("[::1]", ("::1", 443)),
    ],
)
def test_addresses_are_read(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", ":443", "host:", "host:0", "host:65536", "::1", "https://host", "a b:1", "host:x"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(PermanentError, match="no address of a config server"):
        parse_address(text)


async def test_a_request_that_is_too_long_is_refused(house: House) -> None:
    async with house.operator() as operator:
        context = client_context(operator.identity)
        async with Transport(house.address, context, server_hostname="config-server.replicar") as transport:
            with pytest.raises(LimitError, match=f"more than {MAX_REQUEST_BYTES} bytes"):
                await transport.request("POST", "/machines/x/marks", body=b"x" * (MAX_REQUEST_BYTES + 1))
            with pytest.raises(PermanentError, match="no GET /v1/nothing in this API"):
                await transport.request("GET", "/nothing")
            with pytest.raises(PermanentError, match="not a valid MarkRequest"):
                await transport.request("POST", "/machines/x/marks", body=b"{}")


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 3\r\n\r\nbad", TransientError, "answered 502"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}", PermanentError, "answered 404"),
        (b"HTTP/1.1 302 Go\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", PermanentError, "answered 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", TransientError, "can't reach"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", PermanentError, "not a valid VaultStatus"),
        (b"SSH-2.0-OpenSSH\r\n", TransientError, "can't reach"),
        (b"", TransientError, "can't reach"),
    ],
)
async def test_whatever_answers_the_client_raises_one_of_the_declared_errors(
    house: House, answer: bytes, kind: type[ReplicarError], words: str
) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with _listening(house, speak) as port, _client(house, port) as client:
        with pytest.raises(kind, match=words):
            await client.status()


async def test_a_server_error_arrives_as_what_it_was(house: House) -> None:
    body = TransientError("the disk is full", hint="make room", path="/x").as_dict()
    data = json.dumps(body).encode()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 503 No\r\nRetry-After: 7\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        writer.close()

    async with _listening(house, speak) as port, _client(house, port) as client:
        with pytest.raises(TransientError) as refusal:
            await client.status()
    assert (refusal.value.as_dict(), refusal.value.retry_after_seconds) == (body, 7.0)


def _listening(house: House, speak: object) -> _Listening:
    return _Listening(house.directory / IDENTITY_DIRECTORY, speak)


class _Listening:
    """Something on a port that shows the config server's certificate and then says what a test wants."""

    def __init__(self, identity: Path, speak: object) -> None:
        self._context: ssl.SSLContext = server_context(Identity.load(identity), require_client=False)
        self._speak = speak

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._speak, "127.0.0.1", 0, ssl=self._context)  # type: ignore[arg-type]
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()


def _client(house: House, port: int) -> ControlClient:
    return ControlClient(Identity.load(house.directory / "operator"), address=f"127.0.0.1:{port}")

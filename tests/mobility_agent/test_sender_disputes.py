"""The sender where the two sides do not agree: histories, refusals, damage, and certificates of strangers."""

from __future__ import annotations

import asyncio
import socket
import ssl
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mobility_agent.sender import SenderState
from replicar.control.identity import Identity, Role
from replicar.errors import ConflictError, CorruptionError, FencedError, PermanentError, TransientError
from replicar.formats import changelog, frame
from replicar.formats.frame import Kind
from replicar.formats.wire import Ack, Refusal, Resend
from replicar.tls import server_context
from tests.mobility_agent.sending import Writer, capture, sending
from tests.mobility_agent.wire_server import Vault, WireServer


async def test_a_server_that_keeps_asking_again_is_left_for_a_while(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    wire_server.on_frame = lambda found: Resend(found.header.first_sequence, "no")
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        capture(it.log)
        error = await it.error(TransientError)
        assert "64" in error.message or "65" in error.message
        wire_server.on_frame = None
        await wire_server.received(1)


async def test_damage_in_the_log_itself_is_said_and_not_sent_for_ever(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        capture(it.log)
        (path,) = (tmp_path / "log").glob("*.hrl")
        with path.open("r+b") as file:
            file.seek(changelog.FRAMES_OFFSET + frame.HEADER_BYTES + 100)
            file.write(b"damage")
        it.sender.assign(wire_server.assignment())
        error = await it.error(CorruptionError)
        assert "payload fails its checksum" in error.message
        assert wire_server.frames == []


async def test_a_server_with_another_history_is_a_conflict_that_shows_both(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    wire_server.wanted = 1000
    async with sending(tmp_path / "log", machine) as it:
        capture(it.log, 10)
        it.sender.assign(wire_server.assignment())
        error = await it.error(ConflictError)
        assert error.ours == {"first_sequence": 1, "next_sequence": 11, "stored": 0}
        assert error.theirs == {"next_sequence": 1000, "stored": 0}
        assert wire_server.frames == []
        assert it.sender.status.as_dict()["error"]["error"] == "ConflictError"
        wire_server.wanted = None  # somebody started the right server
        await wire_server.received(10)
        assert it.sender.status.error is None


async def test_a_server_that_needs_what_was_let_go_is_a_conflict(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        last = capture(it.log, 20, 1 << 20)
        it.log.trim(last)
        assert it.log.first_sequence > 1
        wire_server.wanted = 1
        it.sender.assign(wire_server.assignment())
        await it.error(ConflictError)
        assert wire_server.frames == []


async def test_acknowledging_what_was_never_captured_is_a_conflict(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        await wire_server.received(capture(it.log, 3))
        wire_server.say(Ack(900, 900))
        await it.error(ConflictError)
        assert it.log.stored_sequence == 0
        assert it.log.take(1) is not None


async def test_a_position_inside_a_frame_is_a_conflict(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        owner = Writer()
        it.log.claim(owner, b"")
        for number in range(8):
            it.log.describe(Kind.ZERO, 0, number * 4096, 4096, 0, it.log.now_ns())
        it.log.seal()
        wire_server.wanted = 5
        it.sender.assign(wire_server.assignment())
        error = await it.error(ConflictError)
        assert "inside the frame" in error.message


async def test_a_fenced_sender_stops_until_it_is_assigned_elsewhere(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    wire_server.refusal = Refusal("FencedError", "epoch 2 owns this stream", "see `replicar machines`")
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        last = capture(it.log)
        await it.state(SenderState.FENCED)
        assert isinstance(it.sender.status.error, FencedError)
        wire_server.refusal = None
        await asyncio.sleep(0.5)
        assert wire_server.connections == 1
        it.sender.assign(wire_server.assignment(epoch=2))
        await wire_server.received(last)


async def test_a_refusal_is_shown_and_tried_again_slowly(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    wire_server.refusal = Refusal("PermanentError", "machine db1 is not assigned here", "run `replicar protect db1`")
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        last = capture(it.log)
        error = await it.error(PermanentError)
        assert error.message == "machine db1 is not assigned here"
        assert error.hint == "run `replicar protect db1`"
        wire_server.refusal = None
        await wire_server.received(last)
        assert it.sender.status.error is None


async def test_a_refusal_in_mid_stream_ends_the_conversation(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        await wire_server.received(capture(it.log))
        wire_server.refusal = Refusal("TransientError", "the cache's disk is full", "")
        wire_server.say(wire_server.refusal)
        error = await it.error(TransientError)
        assert error.message == "the cache's disk is full"


async def test_a_server_with_another_name_is_not_sent_a_byte(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    """The certificate is of the right authority, but not the assigned server's."""
    async with sending(tmp_path / "log", machine) as it:
        capture(it.log)
        it.sender.assign(wire_server.assignment().model_copy(update={"process_server_id": uuid.uuid4()}))
        error = await it.error(PermanentError)
        assert "is not the process server this machine is assigned to" in error.message
        assert wire_server.hellos == []


async def test_a_server_of_another_vault_is_not_sent_a_byte(tmp_path: Path, machine: Identity) -> None:
    stranger = WireServer(Vault(tmp_path / "other").identity(Role.PROCESS_SERVER, "ps1"))
    async with stranger.running(), sending(tmp_path / "log", machine) as it:
        capture(it.log)
        it.sender.assign(stranger.assignment())
        error = await it.error(PermanentError)
        assert "is not the process server" in error.message
        assert stranger.hellos == []


def stranger(directory: Path, server: WireServer) -> Identity:
    """A machine that believes the server's authority, but shows a certificate of another one."""
    theirs = Vault(directory).identity(Role.MACHINE, "db1")
    return replace(theirs, authority_pem=server.identity.authority_pem)


async def test_a_machine_of_another_vault_gets_no_answer_and_a_hint_why(
    tmp_path: Path, wire_server: WireServer
) -> None:
    """asyncio's TLS hangs up without sending the alert."""
    async with sending(tmp_path / "log", stranger(tmp_path / "other", wire_server)) as it:
        capture(it.log)
        it.sender.assign(wire_server.assignment())
        error = await it.error(TransientError)
        assert "hung up without an answer" in error.message
        assert "certificate" in error.hint
        assert wire_server.hellos == []


async def test_a_machine_whose_certificate_is_refused_is_told_so(tmp_path: Path, wire_server: WireServer) -> None:
    """OpenSSL by itself says why, as an alert that arrives after the agent's own handshake."""
    context = server_context(wire_server.identity, require_client=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            raw, _ = listener.accept()
            with context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False) as connection:
                with pytest.raises(ssl.SSLCertVerificationError):
                    connection.do_handshake()
                connection.shutdown(socket.SHUT_WR)
                with suppress(OSError):  # what the agent had sent is read, or the kernel would reset the connection
                    while socket.socket.recv(connection, 4096):
                        pass

        refusing = asyncio.create_task(asyncio.to_thread(refuse))
        async with sending(tmp_path / "log", stranger(tmp_path / "other", wire_server)) as it:
            wire_server.port = listener.getsockname()[1]
            it.sender.assign(wire_server.assignment())
            error = await it.error(PermanentError)
            assert "refuses this machine's certificate" in error.message
            assert "mobility-agent enrol" in error.hint
        await refusing

"""The sender against a server that speaks the real protocol over real TLS: what it sends, when, and what it keeps."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from mobility_agent.sender import SenderState
from replicar.control.identity import Identity, Role
from replicar.errors import TransientError
from replicar.formats import frame
from replicar.formats.frame import Kind
from replicar.formats.wire import Ack, Message, Resend
from tests.mobility_agent.sending import Writer, capture, sending
from tests.mobility_agent.wire_server import Vault, WireServer


async def test_what_is_captured_arrives_in_order_and_byte_for_byte(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        last = capture(it.log, 300)
        it.sender.assign(wire_server.assignment())
        await wire_server.received(last)
        last = capture(it.log, 5)
        await wire_server.received(last)
        sent = b"".join(bytes(found.data) for found in wire_server.frames)
        kept = b""
        while (data := it.log.take(1 + sum(f.header.count for f in frames_in(kept)))) is not None:
            kept += bytes(data)
        assert sent == kept
        assert wire_server.peers == [machine.id]
        assert it.metrics.bytes_sent == len(sent)


def frames_in(data: bytes) -> list[frame.Frame]:
    return [found for _, found in frame.frames_in(data)]


async def test_a_change_on_an_idle_machine_is_sent_at_once(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        await it.state(SenderState.STREAMING)
        loop = asyncio.get_running_loop()
        took = []
        for _ in range(10):
            begun = loop.time()
            await wire_server.received(capture(it.log))
            took.append(loop.time() - begun)
        assert sorted(took)[5] < 0.25


async def test_changes_captured_together_travel_in_one_frame(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    """An open frame is left open for `seal_delay_seconds`, so that what comes meanwhile joins it."""
    async with sending(tmp_path / "log", machine, seal_delay_seconds=0.1) as it:
        it.sender.assign(wire_server.assignment())
        await it.state(SenderState.STREAMING)
        owner = Writer()
        it.log.claim(owner, b"")
        for number in range(20):
            it.log.describe(Kind.ZERO, 0, number * 4096, 4096, 0, it.log.now_ns())
            it.log.batch_done()
            await asyncio.sleep(0.001)
        await wire_server.received(20)
        assert [found.header.count for found in wire_server.frames] == [20]


async def test_the_log_is_trimmed_on_stored_and_never_on_received(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        last = capture(it.log, 20, 1 << 20)  # five files and more
        await wire_server.received(last)
        await it.until(lambda: it.sender.status.received_sequence == last)
        assert it.log.first_sequence == 1
        assert it.log.stored_sequence == 0
        wire_server.say(Ack(last, 10))
        await it.until(lambda: it.log.stored_sequence == 10)
        assert 1 < it.log.first_sequence <= 11
        assert it.log.take(11) is not None
        wire_server.say(Ack(last, last))
        await it.until(lambda: it.log.stored_sequence == last)
        assert it.sender.status.stored_sequence == last
        assert it.metrics.lag_percentiles()[1] > 0


async def test_after_a_cut_connection_it_goes_on_where_the_server_says(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        for _ in range(5):
            last = capture(it.log, 20, 64 << 10)
            await wire_server.received(last - 10)
            wire_server.hang_up()
            await wire_server.received(last)
        assert wire_server.connections >= 5
        sequences = [found.header.first_sequence for found in wire_server.frames]
        assert sequences == sorted(set(sequences))


async def test_what_a_server_received_and_lost_is_sent_again(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    """Its machine died with its cache: it asks for what follows the stored end, and gets it from the log."""
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        last = capture(it.log, 30)
        await wire_server.received(last)
        wire_server.stored = 12
        wire_server.frames = wire_server.frames[:12]
        wire_server.hang_up()
        await wire_server.received(last)
        assert [found.header.first_sequence for found in wire_server.frames] == list(range(1, last + 1))


async def test_it_goes_back_when_a_frame_is_asked_for_again(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    asked: list[int] = []

    def damaged_once(found: frame.Frame) -> Message | None:
        if found.header.first_sequence == 7 and not asked:
            asked.append(7)
            return Resend(7, "the frame's payload fails its checksum")
        return None

    wire_server.on_frame = damaged_once
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        last = capture(it.log, 40)
        await wire_server.received(last)
        assert it.metrics.resends == 1
        assert wire_server.connections == 1
        assert [found.header.first_sequence for found in wire_server.frames] == list(range(1, last + 1))


async def test_an_idle_sender_goes_back_too(tmp_path: Path, machine: Identity, wire_server: WireServer) -> None:
    """It waits for a change when the server asks again; it must not wait on."""
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        await wire_server.received(capture(it.log, 3))
        await asyncio.sleep(0.05)
        wire_server.frames = wire_server.frames[:1]
        wire_server.say(Resend(2, "a bad sector"))
        await wire_server.received(3)


async def test_a_log_of_a_later_incarnation_begins_at_its_own_beginning(tmp_path: Path, vault: Vault) -> None:
    machine = vault.identity(Role.MACHINE, "db1", incarnation=2)
    server = WireServer(vault.identity(Role.PROCESS_SERVER, "ps1"))
    server.wanted = 5000  # where the lost log had got to
    server.stored = 4999
    async with server.running(), sending(tmp_path / "log", machine) as it:
        last = capture(it.log, 3)
        it.sender.assign(server.assignment())
        await server.received(last)
        assert server.frames[0].header.first_sequence == (2 << 48) + 1
        assert it.log.stored_sequence == 2 << 48  # what was stored of the lost log says nothing of this one


async def test_silence_ends_a_connection_and_another_one_is_made(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    wire_server.silent = True
    async with sending(tmp_path / "log", machine, silence_seconds=0.3) as it:
        it.sender.assign(wire_server.assignment())
        error = await it.error(TransientError)
        assert "silent for 0.3 s" in error.message
        await wire_server.connected(2)
        wire_server.silent = False


async def test_a_server_that_accepts_and_says_nothing_is_silence_too(tmp_path: Path, machine: Identity) -> None:
    """Nothing but a TCP listener: not even TLS answers."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        async with sending(tmp_path / "log", machine) as it:
            server = WireServer(machine)
            server.port = mute.getsockname()[1]
            it.sender.assign(server.assignment())
            await asyncio.sleep(0.1)
            assert it.sender.status.state is SenderState.CONNECTING
            it.sender.assign(None)
            await it.state(SenderState.UNASSIGNED)


async def test_another_assignment_moves_the_stream(tmp_path: Path, vault: Vault, machine: Identity) -> None:
    one, other = (WireServer(vault.identity(Role.PROCESS_SERVER, name)) for name in ("ps1", "ps2"))
    async with one.running(), other.running(), sending(tmp_path / "log", machine) as it:
        it.sender.assign(one.assignment())
        await one.received(capture(it.log, 5))
        other.wanted = 4  # what the first one had stored
        it.sender.assign(other.assignment(epoch=2))
        await other.received(capture(it.log, 5))
        assert other.frames[0].header.first_sequence == 4


async def test_a_server_that_is_away_is_tried_again_until_it_is_back(
    tmp_path: Path, vault: Vault, machine: Identity
) -> None:
    server = WireServer(vault.identity(Role.PROCESS_SERVER, "ps1"))
    async with server.running():
        port = server.port
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(server.assignment())
        last = capture(it.log)
        error = await it.error(TransientError)
        assert f"127.0.0.1:{port}" in error.message
        async with server.running(port):
            await server.received(last)


async def test_a_server_that_reads_slowly_is_not_sent_more_than_a_bounded_amount(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    wire_server.reading.clear()
    async with sending(tmp_path / "log", machine, files=32) as it:
        last = capture(it.log, 60, 1 << 20)
        it.sender.assign(wire_server.assignment())
        await it.state(SenderState.STREAMING)
        stalled = -1
        while stalled != it.metrics.bytes_sent:
            stalled = it.metrics.bytes_sent
            await asyncio.sleep(0.3)
        # The kernel's socket buffers and the reader's own hold some of it; the sender at most two writes.
        assert stalled < 24 << 20
        wire_server.reading.set()
        await wire_server.received(last)


async def test_the_rate_limit_holds(tmp_path: Path, machine: Identity, wire_server: WireServer) -> None:
    async with sending(tmp_path / "log", machine, rate_limit_bytes_per_second=4 << 20) as it:
        last = capture(it.log, 8, 1 << 20)
        it.sender.assign(wire_server.assignment())
        await it.state(SenderState.STREAMING)
        begun = asyncio.get_running_loop().time()
        await wire_server.received(last)
        took = asyncio.get_running_loop().time() - begun
        assert 1.2 < took < 4.0


async def test_cancelling_the_sender_leaves_no_connection(
    tmp_path: Path, machine: Identity, wire_server: WireServer
) -> None:
    async with sending(tmp_path / "log", machine) as it:
        it.sender.assign(wire_server.assignment())
        await wire_server.received(capture(it.log, 50, 64 << 10))
    async with asyncio.timeout(5):
        while wire_server._writers:
            await asyncio.sleep(0.01)

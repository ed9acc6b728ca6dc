"""Agents on port 9443, over real TLS: what is stored is what was sent, and whoever may not send is told why."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import pytest

from process_server.listener import Listener
from process_server.machine import Tuning
from replicar.control.identity import Role
from replicar.errors import PermanentError
from replicar.formats import wire
from replicar.formats.frame import INCARNATION_SHIFT
from replicar.formats.wire import Ack, Resend, Welcome
from replicar.tls import client_context, server_context, server_name
from tests.mobility_agent.wire_server import Vault
from tests.process_server.stores import GatedStore
from tests.process_server.support import SMALL_BLOBS, Site, memory_store, running, stored_frames

STORY_SECONDS = 30


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


async def test_what_was_sent_is_stored_in_order_and_both_acknowledgements_come(site: Site) -> None:
    store = GatedStore()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server, asyncio.TaskGroup() as group:
        agent = site.agent(server.port)
        await agent.run(until_stored=agent.begin())
        store.gate.clear()
        for size in (600, 4096, 70_000, 1_000_000, 1_100_000):
            agent.fill(7, size=size)
        last = agent.fill(5, size=1 << 20, compressible=False)
        sending = group.create_task(agent.run(until_stored=last))
        while agent.received <= agent.stored:
            await asyncio.sleep(0.01)
        store.gate.set()
        await sending
        machine = server.machine(agent.machine_id)
        assert machine.counters.frames == 41
        assert machine.counters.bytes_received == machine.counters.bytes_stored == len(agent.everything)
    assert agent.messages[0] == Welcome(1, 0)
    acknowledged = [message for message in agent.messages if isinstance(message, Ack)]
    assert all(each.received_sequence >= each.stored_sequence for each in acknowledged)
    assert acknowledged == sorted(acknowledged, key=lambda each: (each.received_sequence, each.stored_sequence))
    assert acknowledged[-1] == Ack(last, last)
    assert any(each.received_sequence > each.stored_sequence for each in acknowledged)
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_many_machines_at_once_keep_to_themselves(site: Site) -> None:
    store = memory_store()
    machines = [site.vault.identity(Role.MACHINE, f"m{number}") for number in range(8)]
    assignments = [site.assignment(machine=machine) for machine in machines]
    async with asyncio.timeout(STORY_SECONDS), running(site, store, assignments=assignments) as server:
        agents = [site.agent(server.port, machine) for machine in machines]
        lasts = []
        for number, agent in enumerate(agents):
            agent.begin()
            lasts.append(agent.fill(10 + number, size=10_000 * (number + 1)))
        await asyncio.gather(*(agent.run(until_stored=last) for agent, last in zip(agents, lasts, strict=True)))
        await server.holding_nothing()  # idle machines hold nothing
    for agent in agents:
        assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_an_idle_agent_hears_from_the_server(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "ACK_INTERVAL_SECONDS", 0.05)
    async with asyncio.timeout(STORY_SECONDS), running(site, memory_store()) as server:
        agent = site.agent(server.port)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await agent.run()
        assert len([message for message in agent.messages if isinstance(message, Ack)]) >= 5


async def test_a_flipped_bit_is_asked_for_again_and_never_stored(site: Site) -> None:
    store = memory_store()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
        agent = site.agent(server.port)
        agent.begin()
        last = agent.fill(40)
        for number, sequence in enumerate((5, 17, 30)):
            damaged = bytearray(agent.frames[sequence])
            damaged[(10, 40_000, len(damaged) - 5)[number]] ^= 0x10
            agent.mangle[sequence] = bytes(damaged)
        await agent.run(until_stored=last)
        assert server.machine(agent.machine_id).counters.resends == 3
    asked = [message.next_sequence for message in agent.messages if isinstance(message, Resend)]
    assert asked == [5, 17, 30]
    assert agent.connections == 1
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_frame_out_of_order_is_asked_for_again(site: Site) -> None:
    store = memory_store()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
        agent = site.agent(server.port)
        agent.begin()
        last = agent.fill(10)
        agent.mangle[6] = agent.frames[8]
        await agent.run(until_stored=last)
    [asked] = [message for message in agent.messages if isinstance(message, Resend)]
    assert asked.next_sequence == 6
    assert "sequence 8 came where 6 was due" in asked.reason
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_an_agent_that_never_sends_it_sound_is_hung_up_on(site: Site) -> None:
    async with asyncio.timeout(STORY_SECONDS), running(site, memory_store()) as server:
        agent = site.agent(server.port)
        agent.begin()
        agent.fill(3)
        damaged = bytearray(agent.frames[4])
        damaged[-1] ^= 1
        agent.frames[4] = bytes(damaged)
        refusal = await agent.converse()
        assert refusal is not None
        assert refusal.error == "CorruptionError"
        assert "sequence 4" in refusal.message


async def test_a_certificate_of_another_authority_is_refused_by_tls(site: Site, tmp_path: Path) -> None:
    stranger = Vault(tmp_path / "other").identity(Role.MACHINE, "stranger", party_id=site.machine.id)
    async with asyncio.timeout(STORY_SECONDS), running(site, memory_store()) as server:
        assert stranger.directory is not None
        forged = (stranger.directory / "certificate.pem", stranger.directory / "key.pem")
        for shown in (forged, None):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await _first_byte(site, server.port, shown)
        assert not server.machine(site.machine.id).counters.connections


async def _first_byte(site: Site, port: int, shown: tuple[Path, Path] | None) -> None:
    """Connect, showing a certificate or none. TLS 1.3: a refused client learns it at its first read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=site.server.authority_pem.decode())
    if shown is not None:
        context.load_cert_chain(*shown)
    name = server_name(Role.PROCESS_SERVER, site.server.id)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        writer.write(b"anything")
        if not await reader.read(1):
            raise ConnectionResetError
    finally:
        writer.transport.abort()


async def test_only_machines_may_send_and_only_as_themselves(site: Site) -> None:
    async with asyncio.timeout(STORY_SECONDS), running(site, memory_store()) as server:
        operator = site.vault.identity(Role.OPERATOR, "op")
        refusal = await site.agent(server.port, operator).converse()
        assert refusal is not None
        assert "operator" in refusal.message

        unknown = site.vault.identity(Role.MACHINE, "unknown")
        refusal = await site.agent(server.port, unknown).converse()
        assert refusal is not None
        assert str(unknown.id) in refusal.message
        assert "replicar protect" in refusal.hint

        context = client_context(unknown)
        name = server_name(Role.PROCESS_SERVER, site.server.id)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname=name)
        session = wire.AgentSession()
        writer.write(session.hello(wire.Hello(site.machine.id, 1, 1)))
        [message] = session.receive(await reader.read(65536))
        assert isinstance(message, wire.Refusal)
        assert "certificate of machine" in message.message
        writer.close()


@pytest.mark.parametrize("rubbish", [b"GET / HTTP/1.1\r\n\r\n" * 3, bytes(40_000), b"RPMS" + bytes(60)])
async def test_whatever_is_no_hello_ends_in_a_refusal(site: Site, rubbish: bytes) -> None:
    async with asyncio.timeout(STORY_SECONDS), running(site, memory_store()) as server:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            server.port,
            ssl=client_context(site.machine),
            server_hostname=server_name(Role.PROCESS_SERVER, site.server.id),
        )
        writer.write(rubbish)
        found = wire.read_message(await reader.read(65536))
        assert found is not None
        assert isinstance(found[0], wire.Refusal)
        assert found[0].error == "CorruptionError"
        writer.close()


async def test_a_newer_connection_takes_over_from_an_older_one(site: Site) -> None:
    store = memory_store()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
        older, newer = site.agent(server.port), site.agent(server.port)
        older.begin()
        newer.frames, newer.everything, newer.next_sequence = older.frames, older.everything, older.next_sequence
        waiting = asyncio.create_task(older.converse())
        while not older.messages:
            await asyncio.sleep(0.01)
        last = newer.fill(20)
        await newer.run(until_stored=last)
        refusal = await waiting
        assert refusal is not None
        assert refusal.error == "TransientError"
        assert "newer connection" in refusal.message
    assert await stored_frames(store, newer.machine_id, site.data_key) == newer.everything


async def test_an_agent_that_no_longer_has_what_is_needed_is_a_conflict_with_both_sides(site: Site) -> None:
    async with asyncio.timeout(STORY_SECONDS), running(site, memory_store()) as server:
        agent = site.agent(server.port)
        agent.begin()
        agent.fill(10)
        agent.hello_first = 7
        refusal = await agent.converse()
        assert refusal is not None
        assert refusal.error == "ConflictError"
        assert "begins at sequence 7, but 1 is needed" in refusal.message
        error = server.machine(agent.machine_id).error
        assert error is not None
        assert error.fields["theirs"] == {"first_sequence": 7, "next_sequence": 13}

        agent.hello_first = None
        await agent.run(until_stored=12)
        agent.next_sequence = 5  # as if its directory had been put back from a copy
        agent.hello_first = 1
        refusal = await agent.converse()
        assert refusal is not None
        assert refusal.error == "ConflictError"
        assert "ends before sequence 5, but 12 was received" in refusal.message


async def test_a_log_begun_anew_goes_on_at_its_incarnation_and_not_without_a_gap(site: Site) -> None:
    store = memory_store()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=agent.fill(10))
        before = len(agent.everything)
        agent.next_sequence = agent.trimmed_to = (1 << INCARNATION_SHIFT) + 1
        agent.write(bytes(4096))  # no gap: a hole in the stream
        refusal = await agent.converse()
        assert refusal is not None
        assert refusal.error == "CorruptionError"
        del agent.everything[before:]
        agent.begin(incarnation=1)
        await agent.run(until_stored=agent.fill(10))
        assert agent.stored >> INCARNATION_SHIFT == 1
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_port_that_is_taken_is_named(site: Site) -> None:
    async with running(site, memory_store()) as server:
        other = Listener(lambda _: None, server.slots, lambda: 0.0)
        context = server_context(site.server, require_client=True)
        with pytest.raises(PermanentError, match=f"port {server.port} is taken") as caught:
            await other.open("127.0.0.1", server.port, context)
        assert "`port`" in caught.value.hint


async def test_a_machine_that_is_taken_away_is_refused_and_may_come_back(site: Site) -> None:
    store = memory_store()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=agent.fill(5))
        waiting = asyncio.create_task(agent.converse())
        while sum(isinstance(message, Welcome) for message in agent.messages) < 2:
            await asyncio.sleep(0.01)
        await server.roster.apply([])
        refusal = await waiting
        assert refusal is not None
        assert "stops serving" in refusal.message
        refusal = await agent.converse()
        assert refusal is not None
        assert "not assigned" in refusal.message
        await server.roster.apply([site.assignment(epoch=2)])
        await agent.run(until_stored=agent.fill(5))
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_small_segments_still_make_one_log(site: Site) -> None:
    store = memory_store()
    tuning = Tuning(segment_age_seconds=0.004, uploads=2, log=SMALL_BLOBS)
    async with asyncio.timeout(STORY_SECONDS), running(site, store, tuning=tuning) as server:
        agent = site.agent(server.port)
        agent.begin()
        sending = asyncio.create_task(agent.run())
        for _ in range(60):
            agent.fill(1, size=2048)
            await asyncio.sleep(0.005)
        while agent.stored < agent.next_sequence - 1:
            await asyncio.sleep(0.01)
        sending.cancel()
        assert server.machine(agent.machine_id).counters.segments > 10
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything

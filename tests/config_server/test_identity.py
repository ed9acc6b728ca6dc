"""Identities and TLS: directories that are damaged, authorities that are foreign, certificates that grow old."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.x509 import load_pem_x509_certificate

from config_server.authority import CERTIFICATE_DAYS, Authority, serial_text
from config_server.foundation import found_vault
from config_server.vault import IDENTITY_DIRECTORY, OPERATOR_DIRECTORY
from replicar.control.identity import Identity, Role, new_key, signing_request
from replicar.errors import PermanentError, TransientError
from replicar.tls import PeerIdentity, client_context, peer_identity, server_context, server_name
from tests.config_server.support import House, SetClock, running


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo", SetClock().now_ns())


def make(authority: Authority, directory: Path, role: Role, *, clock: SetClock | None = None) -> Identity:
    key_pem, party_id = new_key(), uuid.uuid4()
    certificate = authority.issue(signing_request(key_pem), role, party_id, (clock or SetClock()).now_ns())
    identity = Identity(
        id=party_id,
        role=role,
        name="it",
        config_server="127.0.0.1:443",
        vault="demo",
        vault_id=uuid.uuid4(),
        incarnation=3,
        certificate_pem=certificate.pem,
        authority_pem=authority.certificate_pem,
        key_pem=key_pem,
    )
    return identity.save(directory)


async def meet(server: Identity, client: Identity, *, name: str | None = None, require: bool = True) -> PeerIdentity:
    """Connect, and return whom the server takes the client for."""
    met: asyncio.Future[PeerIdentity] = asyncio.get_running_loop().create_future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        met.set_result(peer_identity(writer.get_extra_info("ssl_object")))
        writer.write(b"!")
        writer.close()
        await writer.wait_closed()

    listening = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=server_context(server, require_client=require))
    async with listening:
        reader, writer = await asyncio.open_connection(
            *listening.sockets[0].getsockname()[:2],
            ssl=client_context(client),
            server_hostname=name or server_name(server.role, server.id),
        )
        try:
            assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
            assert await reader.read(1) == b"!"
        finally:
            writer.close()
        return met.result()


def alert(server: Identity, client: Identity, *, require: bool) -> str:
    """What a client is told by a blocking server that refuses it."""
    near, far = socket.socketpair()

    def accept() -> None:
        with contextlib.suppress(ssl.SSLError):
            server_context(server, require_client=require).wrap_socket(far, server_side=True)

    accepting = threading.Thread(target=accept)
    accepting.start()
    name = server_name(server.role, server.id)
    with near, pytest.raises(ssl.SSLError) as refusal:
        client_context(client).wrap_socket(near, server_hostname=name).recv(1)
    accepting.join()
    far.close()
    return str(refusal.value.reason)


def test_an_identity_comes_back_as_it_was_saved(authority: Authority, tmp_path: Path) -> None:
    identity = make(authority, tmp_path / "new" / "it", Role.MACHINE)
    assert Identity.load(tmp_path / "new" / "it") == identity
    assert (tmp_path / "new" / "it" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert identity.first_sequence == 3 * 2**48 + 1
    assert "PRIVATE" not in repr(identity)


async def test_each_side_knows_who_the_other_is(authority: Authority, tmp_path: Path) -> None:
    server = make(authority, tmp_path / "s", Role.PROCESS_SERVER)
    client = make(authority, tmp_path / "c", Role.MACHINE)
    peer = await meet(server, client)
    assert peer == PeerIdentity(Role.MACHINE, client.id)
    assert len(peer.serial) > 30


async def test_a_server_is_not_taken_for_another(authority: Authority, tmp_path: Path) -> None:
    server = make(authority, tmp_path / "s", Role.PROCESS_SERVER)
    client = make(authority, tmp_path / "c", Role.MACHINE)
    for wrong in (server_name(Role.PROCESS_SERVER, uuid.uuid4()), server_name(Role.CONFIG_SERVER)):
        with pytest.raises(ssl.SSLCertVerificationError, match="ostname mismatch"):
            await meet(server, client, name=wrong)


async def test_a_machine_can_not_pose_as_a_server(authority: Authority, tmp_path: Path) -> None:
    server, client = make(authority, tmp_path / "s", Role.MACHINE), make(authority, tmp_path / "c", Role.MACHINE)
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        await meet(server, client)


@pytest.mark.parametrize("require", [True, False])
async def test_a_client_of_another_authority_gets_nothing_but_a_tls_alert(
    authority: Authority, tmp_path: Path, require: bool
) -> None:
    server = make(authority, tmp_path / "s", Role.PROCESS_SERVER)
    stranger = make(Authority.create("other", SetClock().now_ns()), tmp_path / "c", Role.MACHINE)
    trusting = replace(stranger, authority_pem=authority.certificate_pem).save(tmp_path / "c")
    assert await asyncio.to_thread(alert, server, trusting, require=require) == "TLSV1_ALERT_UNKNOWN_CA"
    with pytest.raises((ConnectionError, AssertionError)):  # asyncio's servers hang up without the alert
        await meet(server, trusting, require=require)


async def test_a_server_of_another_authority_is_refused_by_its_client(authority: Authority, tmp_path: Path) -> None:
    server = make(Authority.create("other", SetClock().now_ns()), tmp_path / "s", Role.PROCESS_SERVER)
    with pytest.raises(ssl.SSLCertVerificationError):
        await meet(server, make(authority, tmp_path / "c", Role.MACHINE))


async def test_an_expired_certificate_gets_a_tls_alert(authority: Authority, tmp_path: Path) -> None:
    server = make(authority, tmp_path / "s", Role.PROCESS_SERVER)
    past = SetClock(-(CERTIFICATE_DAYS + 1) * 86_400)
    old = make(Authority(authority.key, authority.certificate), tmp_path / "c", Role.MACHINE, clock=past)
    assert await asyncio.to_thread(alert, server, old, require=True) == "SSLV3_ALERT_CERTIFICATE_EXPIRED"


@pytest.mark.parametrize("missing", ["key.pem", "certificate.pem", "authority.pem", "identity.json"])
def test_a_missing_file_is_named(authority: Authority, tmp_path: Path, missing: str) -> None:
    make(authority, tmp_path, Role.MACHINE)
    (tmp_path / missing).unlink()
    with pytest.raises(PermanentError, match=missing) as refusal:
        Identity.load(tmp_path)
    assert "enrol this part again" in refusal.value.hint


def test_a_private_key_that_others_may_read_is_refused(authority: Authority, tmp_path: Path) -> None:
    make(authority, tmp_path, Role.MACHINE)
    (tmp_path / "key.pem").chmod(0o640)
    with pytest.raises(PermanentError, match="may be read by others"):
        Identity.load(tmp_path)


@pytest.mark.parametrize("change", ["[]", "{", '{"id": "x"}', "{}", '{"id": 5}'])
def test_damaged_facts_are_said_to_be_damaged(authority: Authority, tmp_path: Path, change: str) -> None:
    make(authority, tmp_path, Role.MACHINE)
    (tmp_path / "identity.json").write_text(change)
    with pytest.raises(PermanentError, match="is damaged"):
        Identity.load(tmp_path)


def test_files_that_do_not_fit_together_are_found(authority: Authority, tmp_path: Path) -> None:
    identity = make(authority, tmp_path, Role.MACHINE)
    replace(identity, key_pem=new_key()).save(tmp_path)
    with pytest.raises(PermanentError, match="do not fit together"):
        Identity.load(tmp_path)
    facts = json.loads((tmp_path / "identity.json").read_text()) | {"role": "operator"}
    identity.save(tmp_path)
    (tmp_path / "identity.json").write_text(json.dumps(facts))
    with pytest.raises(PermanentError, match="do not fit together"):
        Identity.load(tmp_path)
    for name in ("key.pem", "certificate.pem"):
        identity.save(tmp_path)
        (tmp_path / name).write_bytes(b"-----BEGIN NONSENSE-----\n")
        with pytest.raises(PermanentError, match="is damaged"):
            Identity.load(tmp_path)


async def test_a_machine_of_another_vault_is_told_that_this_is_not_its_config_server(
    house: House, tmp_path: Path
) -> None:
    found_vault(tmp_path / "other", "other", address=house.address, listen="127.0.0.1", port=443, clock=SetClock())
    stranger = Identity.load(tmp_path / "other" / OPERATOR_DIRECTORY)
    async with house.client(stranger) as client:
        with pytest.raises(PermanentError, match="is not this vault's config server") as refusal:
            await client.status()
    assert refusal.value.fields["port"] == house.server.port
    trusting = replace(stranger, authority_pem=house.server.vault.authority.certificate_pem).save(tmp_path / "trusting")
    with pytest.raises(PermanentError, match="do not fit together"):
        Identity.load(tmp_path / "trusting")
    async with house.client(trusting) as client:
        with pytest.raises(TransientError, match="refused this part's certificate"):
            await client.status()


async def test_a_part_without_a_certificate_gets_no_further_than_enrolment(house: House, tmp_path: Path) -> None:
    context = ssl.create_default_context(cadata=house.server.vault.authority.certificate_pem.decode())
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", house.server.port, ssl=context, server_hostname="config-server.replicar"
    )
    writer.write(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"enrol it with the config server first" in answer


async def test_a_certificate_is_renewed_when_a_third_is_left_and_the_old_one_does_until_then(
    house: House, tmp_path: Path
) -> None:
    house.clock.move(days=-250)  # certificates are judged by the real time, so this story ends in it
    identity = await house.enrol(tmp_path / "db1", "db1")
    old = replace(identity).save(tmp_path / "old")
    async with house.client(identity) as client:
        assert await client.renew_if_due() is None
        house.clock.move(days=250)
        renewed = await client.renew_if_due()
        assert renewed is not None
        assert renewed.expires_ns > identity.expires_ns + 200 * 86_400 * 10**9
        assert Identity.load(tmp_path / "db1") == renewed
        assert await client.renew_if_due() is None
    for current in (renewed, old):  # the answer might have been lost, so the old one still opens the door
        async with house.client(current) as client:
            assert (await client.agent_heartbeat(house.machine_heartbeat())).assignment is None


async def test_a_certificate_that_expired_can_not_be_renewed_and_says_when_it_ended(
    house: House, tmp_path: Path
) -> None:
    identity = await house.enrol(tmp_path / "db1", "db1")
    house.clock.move(days=CERTIFICATE_DAYS + 1)
    async with house.client(identity) as client:
        with pytest.raises(PermanentError, match=r"certificate of machine db1 expired at \d{4}") as refusal:
            await client.renew()
    assert "enrol this part again" in refusal.value.hint
    assert (await house.enrol(tmp_path / "db1", "db1")).id == identity.id


async def test_the_config_server_renews_its_own_certificate_while_it_runs(tmp_path: Path) -> None:
    clock, directory = SetClock(-300 * 86_400), tmp_path / "vault"
    found_vault(directory, "old", address="127.0.0.1:443", listen="127.0.0.1", port=443, clock=clock)
    before = Identity.load(directory / IDENTITY_DIRECTORY)
    async with running(directory, clock) as house:
        assert not await house.server.renew_certificate()
        clock.move(days=300)
        assert await house.server.renew_certificate()
        context = client_context(Identity.load(directory / OPERATOR_DIRECTORY))
        _, writer = await asyncio.open_connection(
            "127.0.0.1", house.server.port, ssl=context, server_hostname=server_name(Role.CONFIG_SERVER)
        )
        shown = peer_identity(writer.get_extra_info("ssl_object"))
        writer.close()
    after = Identity.load(directory / IDENTITY_DIRECTORY)
    assert after.expires_ns > before.expires_ns
    assert shown.serial == serial_text(load_pem_x509_certificate(after.certificate_pem).serial_number)


def test_the_authority_signs_only_keys_it_understands(authority: Authority) -> None:
    now_ns = SetClock().now_ns()
    for nonsense in (b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"):
        with pytest.raises(PermanentError, match="signing request is damaged"):
            authority.issue(nonsense, Role.MACHINE, uuid.uuid4(), now_ns)
    request = signing_request(new_key())
    with pytest.raises(PermanentError, match="authority expired"):
        authority.issue(request, Role.MACHINE, uuid.uuid4(), authority.expires_ns)
    late = authority.issue(request, Role.MACHINE, uuid.uuid4(), authority.expires_ns - 86_400 * 10**9)
    assert late.expires_ns == authority.expires_ns

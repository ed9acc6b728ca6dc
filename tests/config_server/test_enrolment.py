"""Being let in: what it takes, what each refusal says, and what somebody in the middle can't do."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import ssl
from pathlib import Path

import pytest
from aiohttp import web
from pydantic import SecretStr

from config_server.enrolment import MAX_WRONG_PER_MINUTE, MAX_WRONG_PER_MINUTE_OVERALL, AttemptLimit
from config_server.vault import IDENTITY_DIRECTORY, PASSPHRASE_FILE, REGISTRATION_FILE
from replicar.control.admission import EnrolRequest
from replicar.control.enrolment import RegistrationKey, enrol, read_passphrase
from replicar.control.identity import Identity, Role, first_sequence, new_key, signing_request
from replicar.control.proofs import client_proof, enrolment_key
from replicar.control.transport import Transport
from replicar.errors import FencedError, LimitError, PermanentError, TransientError
from replicar.tls import server_context
from tests.config_server.support import House, SetClock


async def test_a_machine_enrols_with_the_passphrase_and_is_known(house: House, tmp_path: Path) -> None:
    identity = await house.enrol(tmp_path / "db1", "db1")
    assert (identity.role, identity.name, identity.vault, identity.incarnation) == (Role.MACHINE, "db1", "demo", 0)
    assert identity.first_sequence == 1
    assert Identity.load(tmp_path / "db1") == identity
    async with house.operator() as operator:
        assert [machine.name for machine in await operator.machines()] == ["db1"]
        assert (await operator.machine("db1")).id == identity.id
    async with house.client(identity) as client:
        assert (await client.agent_heartbeat(house.machine_heartbeat())).assignment is None


async def test_nothing_secret_is_sent_or_shown(house: House, tmp_path: Path) -> None:
    passphrase = read_passphrase(house.directory / PASSPHRASE_FILE)
    key = RegistrationKey.load(house.directory / REGISTRATION_FILE)
    identity = await house.enrol(tmp_path / "ps1", "ps1", Role.PROCESS_SERVER)
    shown = f"{identity!r} {key!r} {passphrase!r} {house.server.vault!r}"
    for secret in (passphrase.get_secret_value(), key.key.get_secret_value(), identity.key_pem.decode()):
        assert secret not in shown
        assert secret.encode() not in (house.directory / "registry.sqlite-wal").read_bytes()
    assert "PRIVATE" not in shown


async def test_a_wrong_passphrase_is_refused_with_the_next_step(house: House, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="wrong passphrase") as refusal:
        await enrol(
            config_server=house.address,
            role=Role.MACHINE,
            name="db1",
            passphrase=SecretStr("open sesame"),
            directory=tmp_path / "db1",
        )
    assert refusal.value.fields["status"] == 403
    assert "passphrase" in refusal.value.hint
    assert "open sesame" not in str(refusal.value)
    assert not (tmp_path / "db1").exists()
    async with house.operator() as operator:
        assert await operator.machines() == ()


async def test_guessing_is_cut_short_for_the_one_who_guesses(house: House, tmp_path: Path) -> None:
    async with Transport(house.address, _unverified(), server_hostname=None) as transport:
        for _ in range(MAX_WRONG_PER_MINUTE):
            with pytest.raises(PermanentError, match="wrong passphrase"):
                await transport.request("POST", "/enrol", body=_request("db1").to_json())
        with pytest.raises(LimitError, match="too many wrong attempts"):
            await transport.request("POST", "/enrol", body=_request("db1").to_json())
    with pytest.raises(LimitError):
        await house.enrol(tmp_path / "db1", "db1")
    house.clock.move(seconds=61)
    assert (await house.enrol(tmp_path / "db1", "db1")).name == "db1"


def test_guessing_from_many_addresses_is_cut_short_too_and_costs_little_memory() -> None:
    limit = AttemptLimit()
    for number in range(MAX_WRONG_PER_MINUTE_OVERALL):
        limit.check(f"10.0.0.{number}", 1.0)
        limit.note_wrong(f"10.0.0.{number}", 1.0)
    with pytest.raises(LimitError):
        limit.check("10.0.1.1", 60.0)
    limit.check("10.0.1.1", 61.5)


async def test_a_process_server_needs_a_registration_key_of_this_vault(house: House, tmp_path: Path) -> None:
    passphrase = read_passphrase(house.directory / PASSPHRASE_FILE)

    async def come(key: RegistrationKey | None) -> Identity:
        return await enrol(
            config_server=house.address,
            role=Role.PROCESS_SERVER,
            name="ps1",
            passphrase=passphrase,
            directory=tmp_path / "ps1",
            registration_key=key,
        )

    with pytest.raises(PermanentError, match="needs a registration key"):
        await come(None)
    key = RegistrationKey.load(house.directory / REGISTRATION_FILE)
    with pytest.raises(PermanentError, match="no registration key of this vault") as refusal:
        await come(RegistrationKey(key.vault, key.key_id, SecretStr("made up"), key.expires_ns))
    assert "config-server registration-key" in refusal.value.hint
    with pytest.raises(PermanentError, match="for vault other"):
        await come(RegistrationKey("other", key.key_id, key.key, key.expires_ns))
    assert (await come(key)).role is Role.PROCESS_SERVER


async def test_an_expired_registration_key_says_when_it_expired_and_how_to_make_one(
    house: House, tmp_path: Path
) -> None:
    house.clock.move(days=4.9)
    await house.enrol(tmp_path / "ps1", "ps1", Role.PROCESS_SERVER)
    house.clock.move(days=0.2)
    with pytest.raises(PermanentError, match=r"expired at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC") as refusal:
        await house.enrol(tmp_path / "ps2", "ps2", Role.PROCESS_SERVER)
    assert "config-server registration-key" in refusal.value.hint
    assert refusal.value.fields["expired_ns"] < house.clock.now_ns()


@pytest.mark.parametrize(("off_seconds", "way"), [(301, "ahead of"), (-301, "behind"), (90_000, "ahead of")])
async def test_a_clock_more_than_five_minutes_off_is_refused_and_told_by_how_much(
    house: House, tmp_path: Path, off_seconds: int, way: str
) -> None:
    wrong = SetClock(off_seconds)
    with pytest.raises(PermanentError, match=way) as refusal:
        await house.enrol(tmp_path / "db1", "db1", clock=wrong)
    assert refusal.value.fields["clock_off_seconds"] == pytest.approx(off_seconds, abs=5)
    assert "clock" in refusal.value.hint
    assert ("25.0 hours" if off_seconds == 90_000 else "5 min") in refusal.value.message


@pytest.mark.parametrize("off_seconds", [285, -285])
async def test_a_clock_less_than_five_minutes_off_will_do(house: House, tmp_path: Path, off_seconds: int) -> None:
    assert await house.enrol(tmp_path / "db1", "db1", clock=SetClock(off_seconds))


async def test_enrolling_again_keeps_the_id_raises_the_incarnation_and_ends_the_copy(
    house: House, tmp_path: Path
) -> None:
    first = await house.enrol(tmp_path / "db1", "db1")
    shutil.copytree(tmp_path / "db1", tmp_path / "copy")
    second = await house.enrol(tmp_path / "db1", "db1")
    assert (second.id, second.incarnation) == (first.id, 1)
    assert second.first_sequence == first_sequence(1) == 2**48 + 1
    async with house.client(second) as client:
        await client.agent_heartbeat(house.machine_heartbeat())
    async with house.client(Identity.load(tmp_path / "copy")) as client:
        with pytest.raises(FencedError, match="enrolled again"):
            await client.agent_heartbeat(house.machine_heartbeat())


async def test_a_wrong_passphrase_does_not_raise_the_incarnation(house: House, tmp_path: Path) -> None:
    await house.enrol(tmp_path / "db1", "db1")
    with pytest.raises(PermanentError):
        await enrol(
            config_server=house.address,
            role=Role.MACHINE,
            name="db1",
            passphrase=SecretStr("wrong"),
            directory=tmp_path / "x",
        )
    async with house.operator() as operator:
        assert (await operator.machine("db1")).incarnation == 0


async def test_a_request_that_was_seen_can_not_be_used_again(house: House) -> None:
    key = house.server.vault.enrolment_key
    request = _request("db1", time_ns=house.clock.now_ns())
    body = request.model_copy(update={"proof": client_proof(key, request)}).to_json()
    async with Transport(house.address, _unverified(), server_hostname=None) as transport:
        await transport.request("POST", "/enrol", body=body)
        with pytest.raises(PermanentError, match="used before"):
            await transport.request("POST", "/enrol", body=body)
        house.clock.move(seconds=1000)  # the nonce may be forgotten by now, but the time is stale
        with pytest.raises(PermanentError, match="behind"):
            await transport.request("POST", "/enrol", body=body)


@pytest.mark.parametrize("change", [{"name": "db2"}, {"csr": ""}, {"role": "operator"}, {"time_ns": 5}])
async def test_a_request_changed_on_the_way_is_refused(house: House, change: dict[str, object]) -> None:
    key = house.server.vault.enrolment_key
    request = _request("db1", time_ns=house.clock.now_ns())
    changed = request.model_copy(update={"proof": client_proof(key, request), **change})
    async with Transport(house.address, _unverified(), server_hostname=None) as transport:
        with pytest.raises(PermanentError, match="wrong passphrase"):
            await transport.request("POST", "/enrol", body=changed.to_json())


async def test_nobody_becomes_an_operator_over_the_network(house: House, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="not enrolled over the network"):
        await house.enrol(tmp_path / "x", "mallory", Role.OPERATOR)
    request = _request("mallory", time_ns=house.clock.now_ns()).model_copy(update={"role": "operator"})
    proven = request.model_copy(update={"proof": client_proof(house.server.vault.enrolment_key, request)})
    async with Transport(house.address, _unverified(), server_hostname=None) as transport:
        with pytest.raises(PermanentError, match="not enrolled over the network"):
            await transport.request("POST", "/enrol", body=proven.to_json())


@pytest.mark.parametrize("name", ["", "-x", "a/b", "ü", "a" * 64, "a b", "a\n"])
async def test_a_name_that_is_none_is_refused_before_anything_is_sent(house: House, tmp_path: Path, name: str) -> None:
    with pytest.raises(PermanentError, match="is no name for a machine") as refusal:
        await house.enrol(tmp_path / "x", name)
    assert "letters" in refusal.value.hint


async def test_a_server_that_does_not_know_the_passphrase_is_found_out_and_nothing_is_kept(
    house: House, tmp_path: Path
) -> None:
    """A man in the middle passes everything on but puts an authority of his own into the answer."""
    real = Transport(house.address, _unverified(), server_hostname=None)

    async def pass_on(request: web.Request) -> web.Response:
        path = request.path.removeprefix("/v1")
        data = await real.request(request.method, path, body=await request.read() or None)
        return web.Response(body=data.replace(b"BEGIN CERTIFICATE-----\\nMI", b"BEGIN CERTIFICATE-----\\nMJ"))

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", pass_on)
    runner = web.AppRunner(app)
    await runner.setup()
    context = server_context(Identity.load(house.directory / IDENTITY_DIRECTORY), require_client=False)
    async with real:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        try:
            with pytest.raises(PermanentError, match="can't prove that it knows the vault's passphrase"):
                await enrol(
                    config_server=f"127.0.0.1:{runner.addresses[0][1]}",
                    role=Role.MACHINE,
                    name="db1",
                    passphrase=read_passphrase(house.directory / PASSPHRASE_FILE),
                    directory=tmp_path / "db1",
                )
        finally:
            await runner.cleanup()
    assert not (tmp_path / "db1").exists()


async def test_a_config_server_that_is_away_is_named_with_its_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(TransientError, match=f"127.0.0.1:{port}") as refusal:
        await enrol(
            config_server=f"127.0.0.1:{port}",
            role=Role.MACHINE,
            name="db1",
            passphrase=SecretStr("x"),
            directory=tmp_path / "db1",
        )
    assert "config-server run" in refusal.value.hint


async def test_twenty_machines_enrol_at_once_and_each_is_its_own(house: House, tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(house.enrol(tmp_path / f"m{n}", f"m{n}")) for n in range(20)]
    assert len({task.result().id for task in tasks}) == 20


def test_the_key_depends_on_passphrase_and_vault(house: House) -> None:
    vault = house.server.vault
    assert enrolment_key(read_passphrase(house.directory / PASSPHRASE_FILE), vault.id) == vault.enrolment_key
    assert enrolment_key(SecretStr("x"), vault.id) != vault.enrolment_key


def test_a_passphrase_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_text("secret\n")
    path.chmod(0o644)
    with pytest.raises(PermanentError, match="may be read by others") as refusal:
        read_passphrase(path)
    assert f"chmod 600 {path}" in refusal.value.hint
    path.chmod(0o600)
    assert read_passphrase(path).get_secret_value() == "secret"
    path.write_text("two\nlines\n")
    with pytest.raises(PermanentError, match="does not hold a passphrase"):
        read_passphrase(path)


def _request(name: str, *, time_ns: int = 0) -> EnrolRequest:
    csr = signing_request(new_key()).decode()
    nonce = secrets.token_hex(16)
    return EnrolRequest(role="machine", name=name, csr=csr, nonce=nonce, time_ns=time_ns, proof="00")


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context

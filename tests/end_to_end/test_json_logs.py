"""All parts with JSON logs through a story with faults: every line is an object, and no secret is in any of them."""

from __future__ import annotations

import asyncio
import datetime
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

from replicar.control.files import write_file
from simulator import command
from simulator.cluster import Cluster, write_toml
from simulator.command import Result
from simulator.recovery_host import RecoveryHost
from tests.end_to_end.leaks import Secrets
from tests.end_to_end.stage import Stage, stage

JSON = {"log_format": "json"}
WRONG = "this-passphrase-is-somebody-elses"
BOGUS = "replicar_bogus-token-0123456789abcdefghij"


def test_the_search_finds_a_secret_however_it_was_written_down() -> None:
    secrets = Secrets()
    secrets.add("key", bytes(range(200, 232)))
    secrets.add("word", "correct-horse-battery")
    encoded = b"yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5uc"
    assert secrets.leaks([("a", b"x " + bytes(range(200, 232)).hex().encode()), ("b", encoded + b"=")]) == [
        "key in a",
        "key in b",
    ]
    assert secrets.leaks([("c", b'{"p": "correct-horse-battery"}'), ("d", b"correct-horse")]) == ["word in c"]


@pytest.mark.timeout(600)
async def test_no_secret_of_a_whole_story_is_in_any_log_output_or_status(tmp_path: Path) -> None:
    async with stage(tmp_path, process_server_settings=JSON, agent_settings=JSON, config_server_settings=JSON) as it:
        cluster = it.cluster
        async with RecoveryHost(cluster, JSON) as host:
            secrets, said = Secrets(), list[Result]()
            await with_faults(it, secrets, said)
            collect_secrets(cluster, secrets)
            for child in (cluster.agent, cluster.process_server, cluster.config_server, host.child):
                await child.stop()
        files = [*(tmp_path / "logs").iterdir(), tmp_path / "recovery-worker.log", *tmp_path.glob("*/status.json")]
        texts = [(file.name, file.read_bytes()) for file in files]
        texts += [(each.command, (each.output + each.errors).encode()) for each in said]
        assert len(secrets.found) >= 10, sorted(secrets.found)
        assert secrets.leaks(texts) == []
        entries = {file.stem: parsed(file) for file in files if file.suffix == ".log"}
        check_the_lines(entries, cluster)


async def with_faults(it: Stage, secrets: Secrets, said: list[Result]) -> None:
    """What makes parts talk: keys rotated, servers killed, wrong words, a bearer's token, storage gone."""
    cluster, machine = it.cluster, it.cluster.machine
    settings = with_signature(cluster, secrets)
    async with cluster.control() as control:
        secrets.add("data key", (await control.key(machine)).data_key.get_secret_value())
    said.append((await cluster.replicar("rotate-key", machine)).require())
    async with it.writing():
        await asyncio.sleep(0.5)
        cluster.process_server.kill()
        await cluster.start_process_server()
    await it.settle()
    async with cluster.control() as control:
        secrets.add("next data key", (await control.key(machine)).data_key.get_secret_value())
    said.append(await settings_verify(settings, machine))
    assert said[-1].status == 0, said[-1].errors
    said.append(await wrong_passphrase(cluster))
    secrets.add("wrong passphrase", WRONG)
    await with_token(cluster, secrets)
    cluster.azurite.kill()
    said.append(await settings_verify(settings, machine, "--bytes-per-second", "65536"))
    assert said[-1].status != 0
    async with it.writing():
        await asyncio.sleep(0.2)
    log = cluster.process_server.log
    await cluster.process_server.until(
        "saying that storage is away", lambda: b"storage service" in log.read_bytes(), 180
    )


def with_signature(cluster: Cluster, secrets: Secrets) -> dict[str, str]:
    """An operator's environment whose credential is a shared access signature."""
    signature = generate_account_sas(
        cluster.azurite.account_name,
        cluster.azurite.account_key,
        resource_types=ResourceTypes(container=True, object=True),
        permission=AccountSasPermissions(read=True, list=True),
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
    )
    secrets.add("signature", signature.rpartition("sig=")[2].partition("&")[0])
    path = cluster.directory / "signature"
    write_file(path, signature.encode())
    fields: dict[str, Any] = {
        **{name: value for name, value in cluster.target_fields().items() if not name.startswith("account")},
        "shared_access_signature_file": str(path),
    }
    toml = cluster.directory / "signed.toml"
    write_toml(toml, {"identity": str(cluster.vault / "operator"), "log_format": "json", "storage": fields})
    return {"REPLICAR_SETTINGS": str(toml)}


async def settings_verify(environment: dict[str, str], machine: str, *more: str) -> Result:
    return await command.run("replicar", "verify", machine, *more, environment=environment)


async def wrong_passphrase(cluster: Cluster) -> Result:
    path = cluster.directory / "wrong"
    write_file(path, WRONG.encode())
    arguments: list[str | Path] = ["--config-server", cluster.config_server_address, "--passphrase-file", path]
    return await command.run(
        "mobility-agent", "enrol", *arguments, "--directory", cluster.directory / "other", "--name", "other"
    )


async def with_token(cluster: Cluster, secrets: Secrets) -> None:
    """A program's token, used for what it may and what it may not; and one that nobody made."""
    admin = cluster.vault / "ada"
    words: list[str | Path] = ["operator", "ada", "--admin", "--output", admin, "--directory", cluster.vault]
    (await command.run("config-server", *words)).require()
    identity = {"REPLICAR_IDENTITY": str(admin)}
    made = await command.run("replicar", "token", "create", "probe", "--role", "reader", "--json", environment=identity)
    token = made.require().json()["text"]
    secrets.add("token", token)
    secrets.add("bogus token", BOGUS)
    async with aiohttp.ClientSession() as session:
        for bearer, method, path, status in (
            (token, "GET", "/v1/status", 200),
            (token, "POST", f"/v1/machines/{cluster.machine}/remove", 403),
            (BOGUS, "GET", "/v1/status", 401),
        ):
            async with session.request(
                method,
                f"https://{cluster.config_server_address}{path}",
                headers={"Authorization": f"Bearer {bearer}"},
                ssl=False,
            ) as response:
                assert response.status == status, await response.text()


def collect_secrets(cluster: Cluster, secrets: Secrets) -> None:
    """The secrets that lie in files: the vault's, the account's, and every private key."""
    secrets.add("account key", cluster.azurite.account_key)
    for name in ("passphrase", "registration.key", "vault.key"):
        secrets.add(name, (cluster.vault / name).read_bytes().strip())
    for pem in cluster.directory.rglob("*.pem"):
        if b"PRIVATE KEY" in pem.read_bytes() and "azurite" not in pem.parts:
            secrets.add_private_key(str(pem.relative_to(cluster.directory)), pem)


def parsed(log: Path) -> list[dict[str, Any]]:
    """The lines of a log, but those that whoever started the part wrote."""
    lines = [line for line in log.read_text().splitlines() if not line.startswith("--- start ")]
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            raise AssertionError(f"{log.name} has a line that is no JSON: {line}") from None
    return entries


def check_the_lines(entries: dict[str, list[dict[str, Any]]], cluster: Cluster) -> None:
    parts = {"config-server", "process-server", "mobility-agent", "recovery-worker"}
    assert parts <= entries.keys()
    for part in parts:
        assert entries[part], f"{part} said nothing"
        for entry in entries[part]:
            assert entry.keys() >= {"time", "level", "part", "logger", "message"}
            assert entry["part"] == part
    served = [entry for entry in entries["mobility-agent"] if "is served at" in entry["message"]]
    assert [(entry["machine"], entry["disk"]) for entry in served] == [(cluster.machine, "data")]
    away = [
        entry for entry in entries["process-server"] if entry.get("machine") == cluster.machine and "error" in entry
    ]
    assert away, "nothing was said of storage that is away"
    assert {entry["level"] for entry in away} == {"warning"}

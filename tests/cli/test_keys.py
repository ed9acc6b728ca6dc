"""Rotation, auditors and the end of a machine, as operators meet them, on a real Azurite."""

from __future__ import annotations

import base64
import datetime
import os
from pathlib import Path

import pytest
from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas
from typer.testing import CliRunner

from config_server import data_keys
from config_server.cli import app as config_server
from recovery.chunks import MachineLog
from recovery.folding import Folder
from recovery.indexing import make_index
from recovery.replica.warm import WarmReplica
from recovery.retention import Policy, Rule
from replicar.clock import SystemClock
from replicar.control.files import write_file
from replicar.control.keys import key_number
from replicar.control.vault_key import VaultKey
from replicar.errors import PermanentError
from replicar.formats import logblob
from replicar.log.index import list_index, read_index_header
from replicar.log.tail import Stored as StoredSegment
from replicar.storage import PageBlobStore, StorageTarget, open_store
from simulator.azurite import Azurite
from tests.cli.conftest import SECTOR, Operator, Stored


async def rotated(stored: Stored) -> None:
    """The machine's key is rotated, and its process server writes on under the new one."""
    cast, builder = stored.cast, stored.builder
    await cast.operator.rotate_key("db1")
    (assignment,) = (await cast.server.process_server_heartbeat(cast.house.server_heartbeat())).assignments
    builder.key, builder.key_id = assignment.data_key_bytes(), key_number(assignment.key_id)
    builder.wrapped_key = base64.b64decode(assignment.wrapped_key)
    await builder.begin_run()
    builder.write(0, 0, os.urandom(10 * SECTOR))
    builder.mark("after-rotation")
    await builder.seal()
    await cast.report_stored(
        builder.sequence - 1, stored_segment=builder.number - 1, stored_digest=builder.previous.hex()
    )


async def test_a_log_of_two_data_keys_is_read_with_either_way_to_them(operator: Operator, stored: Stored) -> None:
    await rotated(stored)
    assert (await operator("verify", "db1")).status == 0
    vault_key = stored.cast.house.directory / "vault.key"
    rescue = ("--vault-key-file", vault_key, "--machine-id", stored.builder.machine_id)
    ended = await operator("verify", "db1", *rescue, "--json")
    assert ended.status == 0, ended.output
    assert ended.json["segments"] == 9


async def test_after_a_rotation_of_the_vaults_key_rewrap_makes_the_new_one_enough(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    await rotated(stored)
    house = stored.cast.house
    ring = VaultKey.read(house.directory / "vault.key").rotated()
    # As a restart on the rotated vault would: `vault-key rotate` itself wants the server stopped.
    object.__setattr__(house.server.vault, "key", ring)
    await house.server.registry.run(lambda c: data_keys.wrap_anew(c, house.server.vault))
    write_file(tmp_path / "new.key", ring.keys[0])
    rescue = ("--vault-key-file", tmp_path / "new.key", "--machine-id", stored.builder.machine_id)
    early = await operator("verify", "db1", *rescue, "--json")
    assert "does not open the data key" in early.json["message"]
    wrapped = await operator("rewrap", "--json")
    assert wrapped.status == 0, wrapped.output
    assert (wrapped.json["changed"], wrapped.json["in_use"]) == (4, 0)
    assert (await operator("verify", "db1", *rescue)).status == 0
    assert (await operator("rewrap", "--json")).json["changed"] == 0


async def folded(stored: Stored) -> None:
    """The log is indexed and, the machine's disks being written over under its next key, folded: of what the first key
    sealed only tiers of the index are left."""
    builder, log = stored.builder, stored.builder.log
    await indexed(stored, log, every=8)
    await rotated(stored)
    for disk, content in builder.disks.items():
        for offset in range(0, len(content), 100 * SECTOR):
            length = min(100 * SECTOR, len(content) - offset)
            builder.write(disk, offset, os.urandom(length))
    builder.mark("all-anew")
    await builder.seal()
    await builder.begin_run()
    builder.write(0, 0, os.urandom(SECTOR))
    await builder.seal()
    both = MachineLog(log.store, log.machine_id, {**log.keys, **builder.log.keys})
    await indexed(stored, both, every=1)
    for _ in range(2):  # the second sweeps what the first gave up
        await Folder(both, Policy(1, (Rule(2, 1),)), clock=SystemClock(), random=os.urandom, grace_seconds=0).run()
    await stored.cast.report_stored(
        builder.sequence - 1, stored_segment=builder.number - 1, stored_digest=builder.previous.hex()
    )


async def indexed(stored: Stored, log: MachineLog, *, every: int) -> None:
    builder = stored.builder
    known = StoredSegment(builder.number - 1, builder.sequence - 1, builder.previous)
    await make_index(log, clock=SystemClock(), random=os.urandom, stored=known, every=every)


async def test_a_key_that_only_the_index_of_a_folded_log_still_carries_is_rewrapped_and_destroyed_too(
    operator: Operator, stored: Stored, store: PageBlobStore, tmp_path: Path
) -> None:
    first_key, machine_id = stored.builder.key_id, stored.builder.machine_id
    await folded(stored)
    log = await store.list(logblob.log_prefix(machine_id))
    headers = [logblob.read_header(await store.read(info.name, 0, logblob.HEADER_BYTES)) for info in log]
    assert first_key not in {header.key_id for header in headers if header is not None}, "the story needs it gone there"
    listing = await list_index(store, machine_id)
    entries = [await read_index_header(store, name) for name in listing.sizes]
    assert first_key in {entry.key_id for entry in entries if entry is not None}, "and left here"

    house = stored.cast.house
    ring = VaultKey.read(house.directory / "vault.key").rotated()
    object.__setattr__(house.server.vault, "key", ring)
    await house.server.registry.run(lambda c: data_keys.wrap_anew(c, house.server.vault))
    write_file(tmp_path / "new.key", ring.keys[0])
    rescue = ("--vault-key-file", tmp_path / "new.key", "--machine-id", machine_id)
    assert "does not open the data key" in (await operator("verify", "db1", *rescue, "--json")).json["message"]
    wrapped = await operator("rewrap", "--json")
    assert wrapped.status == 0, wrapped.output
    assert wrapped.json["changed"] == len(log) + len(listing.sizes)
    verified = await operator("verify", "db1", *rescue, "--json")
    assert verified.status == 0, verified.output
    for number, content in stored.builder.disks.items():
        path = tmp_path / f"{number}.raw"
        ended = await operator(
            *("recover", "db1", "--latest", "--disk", f"disk{number}", "--raw", path, *rescue, "--json")
        )
        assert ended.status == 0, ended.output
        assert path.read_bytes() == bytes(content)
    assert (await operator("rewrap", "--json")).json["changed"] == 0

    assert (await operator("remove", "db1", "--destroy-keys", "--confirm", "db1", "--json")).status == 0
    left = await store.list(f"machines/{machine_id}/")
    assert [await store.read(info.name, 0, info.size_bytes) for info in left] == [bytes(512)], "the tombstone is empty"


async def test_an_auditor_verifies_with_a_signature_that_may_only_read(
    operator: Operator, stored: Stored, azurite: Azurite, target: StorageTarget, tmp_path: Path
) -> None:
    signature = generate_account_sas(
        azurite.account_name,
        azurite.account_key,
        resource_types=ResourceTypes(container=True, object=True),
        permission=AccountSasPermissions(read=True, list=True),
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
    )
    write_file(tmp_path / "read-only.sas", signature.encode())
    house = stored.cast.house
    made = CliRunner().invoke(
        config_server, ["auditor", "eve", "-o", str(tmp_path / "eve"), "-d", str(house.directory)]
    )
    assert made.exit_code == 0, made.output
    settings = tmp_path / "auditor.toml"
    settings.write_text(
        f'identity = "{tmp_path}/eve"\nconfig_server = "{house.address}"\n[storage]\n'
        f'endpoint = "{azurite.blob_endpoint}"\nshared_access_signature_file = "{tmp_path}/read-only.sas"\n'
        f'authority_file = "{azurite.authority_file}"\ncontainer = "{target.container}"\n'
    )
    auditor = Operator(settings, operator.environment)
    ended = await auditor("verify", "db1", "--json")
    assert ended.status == 0, ended.output
    assert ended.json["segments"] == 8
    assert (await auditor("status", "--json")).json["machines"]
    refused = await auditor("remove", "db1", "--json")
    assert "may not" in refused.json["message"]
    read_only = StorageTarget.model_validate(
        {
            "endpoint": azurite.blob_endpoint,
            "shared_access_signature": signature,
            "authority_file": azurite.authority_file,
            "container": target.container,
        }
    )
    async with open_store(read_only) as store:
        with pytest.raises(PermanentError):
            await store.create("machines/x", 512)


async def test_remove_alone_leaves_what_is_stored_and_destroying_leaves_nothing(
    operator: Operator, stored: Stored, store: PageBlobStore, tmp_path: Path
) -> None:
    async with WarmReplica(stored.builder.log, store, clock=SystemClock(), random=os.urandom) as replica:
        await replica.advance()
        await replica.keep_held()
    await rotated(stored)
    assert (await operator("remove", "db1", "--destroy-keys")).status == 2, "it wants the name once more"
    assert (await operator("remove", "db1", "--destroy-keys", "--confirm", "db2")).status == 2
    assert (await operator("verify", "db1")).status == 0
    assert (await operator("remove", "db1")).status == 0
    assert (await operator("verify", "db1")).status == 0, "removed, and still there"
    ended = await operator("remove", "db1", "--destroy-keys", "--confirm", "db1", "--json")
    assert ended.status == 0, ended.output
    assert (ended.json["keys_destroyed"], ended.json["blobs_deleted"]) == (True, 4 + 3)
    assert await store.list("replicas/") == await store.snapshots("") == []
    verified = await operator("verify", "db1", "--json")
    assert "were destroyed" in verified.json["message"]
    machine_id = stored.builder.machine_id
    left = await store.list(f"machines/{machine_id}/")
    assert [await store.read(info.name, 0, info.size_bytes) for info in left] == [bytes(512)], "the tombstone is empty"
    again = await operator("remove", "db1", "--destroy-keys", "--confirm", "db1", "--json")
    assert (again.status, again.json["blobs_deleted"]) == (0, 0)

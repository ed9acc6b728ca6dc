"""Drills and failovers in Azure as jobs: the real config server, worker, log, SDK and Azurite; Resource Manager is a
stand-in (`tests/recovery/compute/resource_manager.py`), since there is none to be had."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

import pytest

from recovery.output import write_vhd_blob
from recovery.replica.warm import WarmReplica
from recovery.worker import azure_hands
from recovery.worker.azure_hands import account_of, azure_target, is_whole
from recovery.worker.service import hands_of
from recovery.worker.settings import AzureSettings, load_settings
from replicar.control.messages import JobKind, JobParameters, JobState, LifeState
from replicar.errors import PermanentError
from replicar.formats import vhd
from replicar.moments import format_moment
from replicar.storage import MemoryStore, StorageTarget, open_store
from tests.config_server.script import life
from tests.recovery.compute.resource_manager import GROUP, MACHINES, NETWORKS, SUBSCRIPTION
from tests.recovery.compute.test_azure import QuickClock
from tests.recovery.worker.azure_stage import DRILL, POINT, TARGET, Stage

SOME, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)


def _holds(found: bytes, disk: bytes) -> bool:
    """Whether a VHD is that disk: its bytes, zeros up to a whole MiB, a footer that says so."""
    virtual, footer = found[: -vhd.FOOTER_BYTES], vhd.read_footer(found[-vhd.FOOTER_BYTES :])
    return (
        virtual[: len(disk)] == disk
        and not any(virtual[len(disk) :])
        and footer.virtual_bytes == len(virtual) == vhd.virtual_bytes(len(disk))
    )


def _at(stage: Stage, sequence: int) -> list[bytes]:
    return [data for _, data in sorted(stage.stored.builder.expected[sequence].items())]


async def _dies(stage: Stage, held: asyncio.Event) -> None:
    """A worker that is gone once this has happened."""
    dying = asyncio.create_task(stage.worker().run(asyncio.Event(), once=True))
    async with asyncio.timeout(60):
        await held.wait()
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)


async def test_a_drill_in_azure_from_a_point_to_its_clean_up(stage: Stage) -> None:
    drill = await stage.job(JobKind.TEST_FAILOVER, DRILL)
    assert drill.state is JobState.SUCCEEDED, drill.error
    made = drill.result["machine"]
    assert f"{MACHINES}/{made}" in stage.azure.resources
    assert stage.is_made_once()
    assert stage.subnet() == f"{NETWORKS}/island/subnets/front"
    found = await stage.vhds()
    assert all(name.startswith(f"{made}/0") for name in found)
    expected = _at(stage, stage.stored.points[POINT])
    assert len(found) == len(expected) == 2
    assert all(_holds(each, disk) for (_, each), disk in zip(sorted(found.items()), expected, strict=True))
    sources = [
        stage.azure.resources[path]["properties"]["creationData"]["sourceUri"] for path in stage.azure.paths("disks")
    ]
    assert sources == [f"{stage.disks.endpoint}/{stage.disks.container}/{name}" for name in sorted(found)]

    # whatever the target settings say by then, what was made is removed where it was made
    elsewhere = TARGET.model_copy(update={"resource_group": "moved"})
    await stage.stored.cast.operator.set_target("db1", elsewhere, base_version=1)
    cleaned = await stage.job(JobKind.CLEAN_UP, JobParameters(notes="it ran"))
    assert cleaned.state is JobState.SUCCEEDED, cleaned.error
    kinds = ("virtualMachines", "networkInterfaces", "disks")
    assert [stage.azure.paths(kind) for kind in kinds] == [[], [], []]
    assert await stage.vhds() == {}


async def test_a_failover_to_azure_is_committed_and_keeps_what_its_disks_were(stage: Stage) -> None:
    failover = await stage.job(JobKind.FAILOVER, JobParameters(options={"banner": "login:", "system": "Windows"}))
    assert failover.state is JobState.SUCCEEDED, failover.error
    assert stage.subnet() == f"{NETWORKS}/production/subnets/front"
    machine = stage.azure.resources[f"{MACHINES}/{failover.result['machine']}"]["properties"]
    assert machine["storageProfile"]["osDisk"]["osType"] == "Windows"
    assert machine["availabilitySet"] == {"id": f"{GROUP}/providers/Microsoft.Compute/availabilitySets/shops"}
    latest = _at(stage, stage.stored.builder.sequence - 1)
    assert all(_holds(found, disk) for found, disk in zip((await stage.vhds()).values(), latest, strict=True))
    assert [path.rpartition("-")[2] for path in stage.azure.paths("snapshots")] == ["base", "base"]
    assert (await stage.job(JobKind.COMMIT)).state is JobState.SUCCEEDED
    assert await life(stage.stored.cast) is LifeState.COMMITTED


async def test_a_failover_goes_on_from_the_warm_replica_and_makes_what_the_log_alone_would(stage: Stage) -> None:
    builder = stage.stored.builder
    async with WarmReplica(builder.log, builder.store, clock=QuickClock(), random=os.urandom) as replica:
        held = await replica.advance()
    for sector in (3, 250):
        builder.write(0, sector * 512, os.urandom(2 * 512))
    await builder.seal()
    last = builder.sequence - 1
    stored = {"stored_segment": builder.number - 1, "stored_digest": builder.previous.hex()}
    cast = stage.stored.cast
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(captured_sequence=last, ordered_from=(1, 1)))
    await cast.report_stored(last, **stored)
    failover = await stage.job(JobKind.FAILOVER, JobParameters(options={"banner": "login:"}))
    assert failover.state is JobState.SUCCEEDED, failover.error
    (said,) = [step.message for step in failover.steps if step.name == "disks"]
    assert said.count(f"the replica of {format_moment(held.time_ns)}") == 2
    assert "and 2,048 bytes of the log" in said
    assert all(_holds(found, disk) for found, disk in zip((await stage.vhds()).values(), _at(stage, last), strict=True))


async def test_a_replica_that_was_altered_or_is_not_wanted_is_left_for_the_log(stage: Stage) -> None:
    builder = stage.stored.builder
    async with WarmReplica(builder.log, builder.store, clock=QuickClock(), random=os.urandom) as replica:
        await replica.advance()
    await builder.store.put_pages(f"replicas/{builder.machine_id}/0.vhd", 0, os.urandom(250 * 512))
    drill = await stage.job(JobKind.TEST_FAILOVER, DRILL)
    assert drill.state is JobState.SUCCEEDED, drill.error
    (said,) = [step.message for step in drill.steps if step.name == "disks"]
    assert "disk0: from the log alone, since the replica of disk disk0 does not hold what the log has" in said
    expected = _at(stage, stage.stored.points[POINT])
    assert all(_holds(found, disk) for found, disk in zip((await stage.vhds()).values(), expected, strict=True))

    assert (await stage.job(JobKind.CLEAN_UP)).state is JobState.SUCCEEDED
    asked = DRILL.model_copy(update={"options": {**DRILL.options, "replica": "leave"}})
    again = await stage.job(JobKind.TEST_FAILOVER, asked)
    (said,) = [step.message for step in again.steps if step.name == "disks"]
    assert said.count("from the log alone") == 2
    assert "since" not in said


async def test_a_failover_that_is_taken_back_leaves_nothing_in_azure(stage: Stage) -> None:
    assert (await stage.job(JobKind.FAILOVER, JobParameters(options={"banner": "login:"}))).state is JobState.SUCCEEDED
    assert (await stage.job(JobKind.CANCEL_FAILOVER)).state is JobState.SUCCEEDED
    assert stage.azure.paths("disks") == stage.azure.paths("virtualMachines") == stage.azure.paths("snapshots") == []
    assert await stage.vhds() == {}
    assert await life(stage.stored.cast) is LifeState.PROTECTED


@pytest.mark.parametrize("request_number", [4, 10])
async def test_a_worker_that_dies_behind_a_request_is_followed_by_one_that_makes_nothing_twice(
    stage: Stage, request_number: int
) -> None:
    """The request was carried out, and nobody knows: a disk, an interface or a machine may be there."""
    made = await stage.stored.cast.operator.make_job(
        "db1", JobKind.FAILOVER, JobParameters(options={"banner": "login:"})
    )
    stage.azure.hold_at = request_number
    await _dies(stage, stage.azure.held)
    assert not (await stage.stored.cast.operator.job(made.id)).state.has_ended
    await stage.worker().run(asyncio.Event(), once=True)
    job = await stage.stored.cast.operator.job(made.id)
    assert job.state is JobState.SUCCEEDED, job.error
    assert stage.is_made_once()
    assert (await stage.job(JobKind.CANCEL_FAILOVER)).state is JobState.SUCCEEDED
    assert stage.azure.paths("disks") == []


async def test_a_vhd_that_was_cut_off_is_written_anew_and_a_whole_one_is_left(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, held = list[str](), asyncio.Event()

    async def dies_in_the_second(view: object, disk: object, store: object, name: str, **options: object) -> object:
        written.append(name)
        if len(written) == 2:
            async with open_store(stage.disks) as opened:
                await opened.create(name, vhd.MIB + vhd.FOOTER_BYTES, metadata={"replicar_vhd": "half"})
                await opened.put_pages(name, 0, b"half" * 128)
            held.set()
            await asyncio.Event().wait()
        return await write_vhd_blob(view, disk, store, name, **options)  # type: ignore[arg-type]

    made = await stage.stored.cast.operator.make_job("db1", JobKind.TEST_FAILOVER, DRILL)
    monkeypatch.setattr(azure_hands, "write_vhd_blob", dies_in_the_second)
    await _dies(stage, held)
    await stage.worker().run(asyncio.Event(), once=True)
    job = await stage.stored.cast.operator.job(made.id)
    assert job.state is JobState.SUCCEEDED, job.error
    assert written == [written[0], written[1], written[1]]
    expected = _at(stage, stage.stored.points[POINT])
    assert all(_holds(found, disk) for found, disk in zip((await stage.vhds()).values(), expected, strict=True))


async def test_what_can_not_be_made_is_said_before_anything_is(stage: Stage) -> None:
    operator, version = stage.stored.cast.operator, 1
    cases: list[tuple[dict[str, str], dict[str, str], str]] = [
        ({"storage_account": "another"}, {}, "writes disks to the storage account devstoreaccount1"),
        ({"size": ""}, {}, "do not say size"),
        ({"drill_network": ""}, {}, "no network for drills"),
        ({}, {"memory_mib": "2048"}, "the option 'memory_mib' is not known"),
        ({}, {"system": "Plan9"}, "the option system is Linux or Windows"),
        ({}, {"replica": "perhaps"}, "the option replica is use or leave"),
    ]
    for change, options, words in cases:
        await operator.set_target("db1", TARGET.model_copy(update=change), base_version=version)
        job = await stage.job(JobKind.TEST_FAILOVER, DRILL.model_copy(update={"options": options}))
        assert job.state is JobState.FAILED
        assert job.error is not None
        assert words in job.error.message
        assert job.error.hint
        assert (await stage.job(JobKind.CLEAN_UP)).state is JobState.SUCCEEDED
        version += 1
    assert not [method for method, _ in stage.azure.requests if method == "PUT"]
    assert await stage.vhds() == {}


def test_a_network_that_a_job_asks_for_takes_the_place_of_the_settings_one() -> None:
    disks = StorageTarget.model_validate(
        {"endpoint": "https://shopdisks.blob.core.windows.net", "identity": "managed", "container": "disks"}
    )
    settings = AzureSettings(subscription_id=SUBSCRIPTION, disks=disks)
    plain = azure_target(settings, TARGET, None)
    assert plain.subnet_id == f"{NETWORKS}/production/subnets/front"
    assert plain.drill_subnet_id == f"{NETWORKS}/island/subnets/front"
    assert plain.storage_account_id == f"{GROUP}/providers/Microsoft.Storage/storageAccounts/devstoreaccount1"
    assert account_of(disks) == "shopdisks"


async def test_a_vhd_counts_as_whole_by_its_own_footer_only() -> None:
    async with MemoryStore() as opened:
        await opened.ensure_container()
        assert not await is_whole(opened, "none.vhd", vhd.MIB)
        await opened.create("some.vhd", vhd.MIB + vhd.FOOTER_BYTES, metadata={"replicar_vhd": str(SOME)})
        assert not await is_whole(opened, "some.vhd", vhd.MIB)
        await opened.put_pages("some.vhd", vhd.MIB, vhd.pack_footer(vhd.MIB, OTHER, 0))
        assert not await is_whole(opened, "some.vhd", vhd.MIB)
        await opened.put_pages("some.vhd", vhd.MIB, vhd.pack_footer(vhd.MIB, SOME, 0))
        assert await is_whole(opened, "some.vhd", vhd.MIB)


def test_a_settings_file_says_who_asks_and_where_disks_go(tmp_path: Path) -> None:
    (tmp_path / "key").touch(mode=0o600)
    file = tmp_path / "worker.toml"
    account = 'endpoint = "https://shop.blob.core.windows.net"\naccount_name = "shop"\naccount_key_file = "key"\n'
    azure = f'[azure]\nsubscription_id = "{SUBSCRIPTION}"\nidentity = "managed"\n'
    file.write_text(f'[storage]\n{account}container = "replicar"\n{azure}[azure.disks]\n{account}container = "disks"\n')
    settings = load_settings(file)
    assert settings.azure is not None
    assert (settings.azure.identity, settings.azure.disks.container) == ("managed", "disks")
    assert set(hands_of(settings, file, QuickClock())) == {"qemu", "azure"}
    file.write_text(file.read_text().replace(SUBSCRIPTION, "mine"))
    with pytest.raises(PermanentError, match="subscription_id"):
        load_settings(file)

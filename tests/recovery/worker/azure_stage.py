"""db1 with its log in Azurite, protected; a stand-in for Azure with what it is to be made of; and workers for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from bench.certificates import Certificates
from recovery.worker.service import Worker, azure_for
from recovery.worker.settings import AzureSettings, WorkerSettings
from replicar.control.identity import Role
from replicar.control.messages import (
    Job,
    JobKind,
    JobParameters,
    MarkReport,
    PointChoice,
    PointKind,
    TargetSettings,
)
from replicar.storage import StorageTarget, open_store
from tests.cli.conftest import Stored
from tests.recovery.compute.managed_disks import ManagedDisks
from tests.recovery.compute.resource_manager import NETWORKS, SUBSCRIPTION, ResourceManager
from tests.recovery.compute.test_azure import QuickClock, Token

TARGET = TargetSettings(
    compute="azure",
    storage_account="devstoreaccount1",
    resource_group="recovered",
    location="westeurope",
    size="Standard_B2s",
    network="production",
    subnet="front",
    drill_network="island",
    availability_set="shops",
    disk_kind="Premium_LRS",
)
POINT = "point-3"
DRILL = JobParameters(point=PointChoice(kind=PointKind.NAMED, name=POINT), options={"banner": "login:"})


@dataclass
class Stage:
    """db1 with its log in Azurite, protected; a Resource Manager; and a worker that has hands in Azure."""

    stored: Stored
    azure: ResourceManager
    settings: WorkerSettings

    @property
    def disks(self) -> StorageTarget:
        assert self.settings.azure is not None
        return self.settings.azure.disks

    def worker(self) -> Worker:
        """One that is there until there is nothing to do. It knows nothing of those before it."""
        assert self.settings.azure is not None
        options = {"retry_total": 2, "retry_backoff_factor": 0.001, "polling_interval": 0}
        evidence = self.settings.directory / "evidence"
        make = partial(
            azure_for,
            self.settings.azure,
            evidence,
            QuickClock(),
            tokens=Token,
            options=options,
            logs=self.settings.storage,
        )
        return Worker(self.settings, None, QuickClock(), hands={"azure": make})

    async def job(self, kind: JobKind, parameters: JobParameters | None = None) -> Job:
        """A job from its making to its end."""
        made = await self.stored.cast.operator.make_job("db1", kind, parameters)
        await self.worker().run(asyncio.Event(), once=True)
        return await self.stored.cast.operator.job(made.id)

    async def vhds(self) -> dict[str, bytes]:
        """The VHDs that there are, whole."""
        async with open_store(self.disks) as opened:
            blobs = await opened.list("") if await opened.container_exists() else []
            return {blob.name: await opened.read(blob.name, 0, blob.size_bytes) for blob in blobs}

    def is_made_once(self) -> bool:
        """One machine of two disks and an interface, and nothing else."""
        counts = [len(self.azure.paths(kind)) for kind in ("virtualMachines", "networkInterfaces", "disks")]
        return counts == [1, 1, 2]

    def subnet(self) -> str:
        (interface,) = self.azure.paths("networkInterfaces")
        (address,) = self.azure.resources[interface]["properties"]["ipConfigurations"]
        return str(address["properties"]["subnet"]["id"])


@pytest.fixture
async def stage(stored: Stored, target: StorageTarget, tmp_path: Path) -> AsyncIterator[Stage]:
    cast, last = stored.cast, stored.builder.sequence - 1
    marks = [MarkReport(name=name, sequence=sequence, time_ns=sequence) for name, sequence in stored.points.items()]
    await cast.machine.agent_heartbeat(
        cast.house.machine_heartbeat(captured_sequence=last, marks=marks, ordered_from=(1, 1))
    )
    await cast.operator.set_target("db1", TARGET, base_version=0)
    await cast.house.enrol(tmp_path / "rw1", "rw1", Role.RECOVERY)
    made = Certificates.make(tmp_path / "certificates")
    async with ResourceManager(made.certificate, made.key) as azure:
        azure.resources[f"{NETWORKS}/island"] = {"properties": {}}
        azure.resources[f"{NETWORKS}/production"] = {"properties": {"virtualNetworkPeerings": [{"name": "office"}]}}
        azure.console = b"db1 login: "
        settings = AzureSettings(
            subscription_id=SUBSCRIPTION,
            endpoint=azure.endpoint,
            authority_file=made.authority,
            disks=target.model_copy(update={"container": f"{target.container}-disks"[-63:].lstrip("-")}),
        )
        managed = target.model_copy(update={"container": f"{target.container}-managed"[-63:].lstrip("-")})
        async with open_store(settings.disks) as disks, open_store(managed) as content:
            await content.ensure_container()
            azure.content = ManagedDisks(disks, content)
            yield Stage(
                stored,
                azure,
                WorkerSettings(
                    identity=tmp_path / "rw1",
                    config_server=cast.house.address,
                    directory=tmp_path / "w",
                    fold_seconds=0,
                    storage=target,
                    azure=settings,
                ),
            )

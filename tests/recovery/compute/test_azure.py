"""Machines in Azure, at the HTTP boundary: the real SDK against a stand-in for Resource Manager (see there)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken

from bench.certificates import Certificates
from recovery.compute.azure import AzureCompute, AzureTarget
from recovery.compute.machine import DiskSource, MachineSpec, Power, Wanted
from replicar.clock import SystemClock
from replicar.errors import ConflictError, PermanentError, TransientError
from tests.recovery.compute.resource_manager import GROUP, MACHINES, NETWORKS, SUBSCRIPTION, ResourceManager

MIB = 1 << 20
SPEC = MachineSpec(
    "drill-shop",
    (
        DiskSource("root", "https://recovered.blob.example/vhds/shop-root.vhd", 64 * MIB),
        DiskSource("data", "https://recovered.blob.example/vhds/shop-data.vhd", 128 * MIB),
    ),
    tags={"job": "42"},
)
TARGET = AzureTarget(
    subscription_id=SUBSCRIPTION,
    resource_group="recovered",
    location="westeurope",
    size="Standard_B2s",
    subnet_id=f"{NETWORKS}/production/subnets/front",
    drill_subnet_id=f"{NETWORKS}/island/subnets/all",
    storage_account_id=f"{GROUP}/providers/Microsoft.Storage/storageAccounts/recovered",
    availability_set_id=f"{GROUP}/providers/Microsoft.Compute/availabilitySets/shops",
    disk_kind="Premium_LRS",
)


class Token:
    """A credential that has its token already."""

    async def get_token(self, *scopes: str, **_: Any) -> AccessToken:
        return AccessToken("a-token", int(time.time()) + 3600)

    async def close(self) -> None:
        return None

    async def __aenter__(self) -> Token:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class QuickClock(SystemClock):
    async def sleep(self, seconds: float) -> None:
        await super().sleep(min(seconds, 0.01))


@dataclass
class Stage:
    """The stand-in, and what speaks to it."""

    azure: ResourceManager
    compute: AzureCompute


@asynccontextmanager
async def _stage(directory: Path) -> AsyncIterator[Stage]:
    made = Certificates.make(directory / "certificates")
    async with ResourceManager(made.certificate, made.key) as azure:
        azure.resources[f"{NETWORKS}/island"] = {"properties": {}}
        azure.resources[f"{NETWORKS}/production"] = {"properties": {"virtualNetworkPeerings": [{"name": "office"}]}}
        target = replace(TARGET, endpoint=azure.endpoint)
        options = {"retry_total": 2, "retry_backoff_factor": 0.001, "polling_interval": 0}
        async with AzureCompute(
            target, Token(), clock=QuickClock(), authority_file=made.authority, options=options
        ) as compute:
            yield Stage(azure, compute)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with _stage(tmp_path) as made:
        yield made


async def test_a_machine_is_made_of_its_disks_and_the_targets_settings(stage: Stage) -> None:
    assert await stage.compute.power(SPEC.name) is Power.ABSENT
    await stage.compute.create(SPEC)
    disks = stage.azure.paths("disks")
    assert [path.rpartition("/")[2] for path in disks] == ["drill-shop-0-root", "drill-shop-1-data"]
    first = stage.azure.resources[disks[0]]
    assert first["sku"] == {"name": "Premium_LRS"}
    assert first["properties"]["creationData"] == {
        "createOption": "Import",
        "sourceUri": SPEC.disks[0].place,
        "storageAccountId": TARGET.storage_account_id,
    }
    (interface,) = stage.azure.paths("networkInterfaces")
    (address,) = stage.azure.resources[interface]["properties"]["ipConfigurations"]
    assert address["properties"]["subnet"] == {"id": TARGET.drill_subnet_id}
    machine = stage.azure.resources[f"{MACHINES}/drill-shop"]
    properties = machine["properties"]
    assert machine["tags"]["job"] == "42"
    assert properties["hardwareProfile"] == {"vmSize": "Standard_B2s"}
    assert properties["availabilitySet"] == {"id": TARGET.availability_set_id}
    assert properties["storageProfile"]["osDisk"]["managedDisk"] == {"id": disks[0]}
    assert [each["managedDisk"] for each in properties["storageProfile"]["dataDisks"]] == [{"id": disks[1]}]
    assert properties["networkProfile"]["networkInterfaces"][0]["id"] == interface
    assert stage.azure.tokens == {"Bearer a-token"}
    assert await stage.compute.power(SPEC.name) is Power.RUNNING


async def test_a_failover_goes_into_the_targets_own_network(stage: Stage) -> None:
    await stage.compute.create(replace(SPEC, isolated=False))
    (interface,) = stage.azure.paths("networkInterfaces")
    (address,) = stage.azure.resources[interface]["properties"]["ipConfigurations"]
    assert address["properties"]["subnet"] == {"id": TARGET.subnet_id}


async def test_asked_again_it_makes_nothing_and_another_machine_of_that_name_is_a_conflict(stage: Stage) -> None:
    await stage.compute.create(SPEC)
    made = len([1 for method, _ in stage.azure.requests if method == "PUT"])
    await stage.compute.create(SPEC)
    assert len([1 for method, _ in stage.azure.requests if method == "PUT"]) == made
    with pytest.raises(ConflictError, match="made from something else"):
        await stage.compute.create(replace(SPEC, disks=SPEC.disks[:1]))


async def test_a_creation_that_was_cut_short_goes_on_and_is_removed_whole(stage: Stage) -> None:
    stage.azure.troubles["PUT", "virtualMachines"] = [(400, "QuotaExceeded")]
    with pytest.raises(PermanentError, match="QuotaExceeded"):
        await stage.compute.create(SPEC)
    assert len(stage.azure.paths("disks")) == 2
    await stage.compute.create(SPEC)
    assert await stage.compute.power(SPEC.name) is Power.RUNNING
    stage.azure.resources[f"{GROUP}/providers/Microsoft.Compute/disks/precious"] = {"name": "precious", "tags": {}}
    await stage.compute.remove(SPEC.name)
    await stage.compute.remove(SPEC.name)
    assert stage.azure.paths("virtualMachines") == stage.azure.paths("networkInterfaces") == []
    assert [path.rpartition("/")[2] for path in stage.azure.paths("disks")] == ["precious"]


async def test_disks_that_a_failed_creation_left_are_removed_though_there_is_no_machine(stage: Stage) -> None:
    stage.azure.troubles["PUT", "networkInterfaces"] = [(403, "AuthorizationFailed")]
    with pytest.raises(PermanentError, match="AuthorizationFailed"):
        await stage.compute.create(SPEC)
    await stage.compute.remove(SPEC.name)
    assert stage.azure.paths("disks") == []


async def test_somebody_elses_machine_is_never_removed(stage: Stage) -> None:
    stage.azure.resources[f"{MACHINES}/drill-shop"] = {"name": "drill-shop", "tags": {}}
    with pytest.raises(PermanentError, match="not ours"):
        await stage.compute.remove("drill-shop")
    assert stage.azure.paths("virtualMachines") == [f"{MACHINES}/drill-shop"]


@pytest.mark.parametrize(("status", "code"), [(429, "TooManyRequests"), (503, "ServerBusy"), (409, "Conflict")])
async def test_a_busy_azure_is_a_reason_to_try_again(stage: Stage, status: int, code: str) -> None:
    stage.azure.troubles["PUT", "disks"] = [(status, code)] * 5
    with pytest.raises(TransientError):
        await stage.compute.create(SPEC)


async def test_an_identity_that_may_not_is_told_which_role_it_needs(stage: Stage) -> None:
    stage.azure.troubles["GET", "virtualNetworks"] = [(401, "InvalidAuthenticationToken")]
    with pytest.raises(PermanentError, match="does not let us") as caught:
        await stage.compute.create(SPEC)
    assert "Contributor" in caught.value.hint


async def test_an_azure_that_is_not_there_is_transient(tmp_path: Path) -> None:
    async with _stage(tmp_path) as stage:
        pass
    target = replace(TARGET, endpoint=stage.azure.endpoint)
    options = {"retry_total": 0}
    async with AzureCompute(target, Token(), clock=QuickClock(), options=options) as compute:
        with pytest.raises(TransientError, match="can't be reached"):
            await compute.power("drill-shop")


async def test_boot_diagnostics_prove_that_it_came_up(stage: Stage, tmp_path: Path) -> None:
    await stage.compute.create(SPEC)
    stage.azure.console = b"\x1b[2JDebian GNU/Linux 12 shop ttyS0\r\n\r\nshop login: "
    check = tmp_path / "check"
    check.write_text('#!/bin/sh\necho "$REPLICAR_RESOURCE"\n')
    check.chmod(0o755)
    proof = await stage.compute.prove(SPEC, Wanted(tmp_path / "evidence", banner="shop login:", check=check))
    assert proof.banner.startswith("shop login:")
    assert proof.check_said == f"{MACHINES}/drill-shop"
    assert proof.screenshot is not None
    assert proof.screenshot.read_bytes() == b"BM a picture"


async def test_a_machine_that_says_something_else_is_reported_with_its_last_words(stage: Stage, tmp_path: Path) -> None:
    await stage.compute.create(SPEC)
    stage.azure.console = b"Kernel panic - not syncing: VFS: Unable to mount root fs\n"
    with pytest.raises(PermanentError, match="was not seen") as caught:
        await stage.compute.prove(SPEC, Wanted(tmp_path, banner="login:", banner_seconds=0.1))
    assert "Unable to mount root" in caught.value.hint


async def test_a_machine_is_asked_to_end(stage: Stage) -> None:
    await stage.compute.create(SPEC)
    assert await stage.compute.shut_down(SPEC.name, 5.0)
    assert await stage.compute.power(SPEC.name) is Power.STOPPED


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (replace(SPEC, disks=(replace(SPEC.disks[0], place="/srv/shop.raw"),)), "is no blob's URL"),
        (replace(SPEC, disks=(replace(SPEC.disks[0], size_bytes=1000),)), "no whole number of MiB"),
        (replace(SPEC, ports=(22,)), "no forwarded ports"),
    ],
)
async def test_what_azure_can_not_run_is_said_before_anything_is_made(
    stage: Stage, spec: MachineSpec, words: str
) -> None:
    with pytest.raises(PermanentError, match=words):
        await stage.compute.create(spec)
    assert not [path for method, path in stage.azure.requests if method == "PUT"]


async def test_a_drill_is_kept_out_of_a_network_that_has_peers(tmp_path: Path) -> None:
    async with _stage(tmp_path) as stage:
        stage.azure.resources[f"{NETWORKS}/island"] = {"properties": {"virtualNetworkPeerings": [{"name": "office"}]}}
        with pytest.raises(PermanentError, match="peered with others"):
            await stage.compute.create(SPEC)
        del stage.azure.resources[f"{NETWORKS}/island"]
        with pytest.raises(PermanentError, match="there is no network island"):
            await stage.compute.create(SPEC)

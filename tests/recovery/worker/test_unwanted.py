"""A warm replica's whole life, by the upkeep of a real worker at a real config server and Azurite."""

from __future__ import annotations

from pathlib import Path

from recovery.replica.warm import points_kept
from recovery.worker.service import Worker
from recovery.worker.settings import WorkerSettings
from replicar.clock import SystemClock
from replicar.control.client import ControlClient
from replicar.control.identity import Role
from replicar.control.messages import Policy
from replicar.storage import PageBlobStore, StorageTarget
from tests.cli.conftest import Stored


async def test_a_replica_is_made_when_the_policy_wants_one_and_removed_when_it_does_not(
    stored: Stored, target: StorageTarget, store: PageBlobStore, tmp_path: Path
) -> None:
    cast, log = stored.cast, stored.builder.log
    identity = await cast.house.enrol(tmp_path / "rw1", "rw1", Role.RECOVERY)
    last = stored.builder.sequence - 1
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(captured_sequence=last, ordered_from=(1, 1)))
    settings = WorkerSettings(
        identity=tmp_path / "rw1", config_server=cast.house.address, directory=tmp_path / "w", storage=target
    )
    async with ControlClient(identity, address=cast.house.address) as control:

        async def goes_round() -> list[bool]:
            """Everything that a worker does by the clock, once: whether there was something to do."""
            chores = Worker(settings, None, SystemClock(), hands={})._upkeep(control, store, "one")
            return [await each.once() for each in chores]

        await goes_round()
        assert await store.list("replicas/") == []
        warm = Policy(name="default", replica="warm", replica_point_seconds=60)
        warm = await cast.operator.set_policy(warm, base_version=0)
        await goes_round()
        assert [point.sequence for point in await points_kept(log, store)] == [last]

        sealed = warm.model_copy(update={"replica": "sealed"})
        await cast.operator.set_policy(sealed, base_version=warm.version)
        await goes_round()
        assert len(await store.list("replicas/")) == 3, "an hour to think better of it"
        cast.house.clock.move(seconds=3601)
        await goes_round()
        assert await store.list("replicas/") == await store.snapshots("") == []
        cast.house.clock.move(days=1)
        assert (await goes_round())[1:] == [False, False]

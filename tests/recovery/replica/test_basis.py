"""A disk made from the warm replica's nearest point is the disk that the log alone gives, byte for byte."""

from __future__ import annotations

import os
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import cast

import pytest

from recovery.output import VHD_ID
from recovery.points import AtSequence, locate
from recovery.replica.basis import Basis, find_basis, make_vhd, nearest
from recovery.replica.points import DiskSnapshot, ReplicaPoint
from recovery.replica.warm import WarmReplica, points_kept
from recovery.view import View
from replicar.clock import SystemClock
from replicar.errors import CorruptionError, TransientError
from replicar.formats import vhd
from replicar.formats.record import Disk
from replicar.storage import MemoryStore, PageBlobStore
from replicar.storage.store import Pages
from tests.recovery.faults import Stopped, StoppingStore
from tests.recovery.log_builder import LogBuilder
from tests.recovery.replica.test_warm import SECTOR, SIZES, busy

DISKS = (Disk(0, "disk0", SIZES[0]), Disk(1, "disk1", SIZES[1]))


class Dying(MemoryStore):
    """A store whose user loses it for a moment after so many writes to disks that are made; -1: never."""

    def __init__(self) -> None:
        super().__init__()
        self.life = -1

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        if name.startswith("made/"):
            if self.life == 0:
                self.life = -1
                raise TransientError("away")
            self.life -= self.life > 0
        await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)


@dataclass
class Scene:
    """A log with a warm replica, of which some points were kept as snapshots."""

    store: Dying
    builder: LogBuilder
    stack: AsyncExitStack

    async def kept(self) -> list[int]:
        return [point.sequence for point in await points_kept(self.builder.log, self.store)]

    async def warm(self, *, keep: bool) -> None:
        async with WarmReplica(self.builder.log, self.store, clock=SystemClock(), random=os.urandom) as replica:
            await replica.advance()
            if keep:
                await replica.keep_held()

    async def view(self, sequence: int) -> View:
        return View(self.builder.log, await locate(self.builder.log, AtSequence(sequence)))

    async def basis(self, sequence: int) -> tuple[View, Basis | None]:
        view = await self.view(sequence)
        return view, await find_basis(view, self.stack, clock=SystemClock(), random_bytes=os.urandom)

    async def make(self, view: View, basis: Basis, disk: Disk, store: PageBlobStore | None = None) -> int:
        return await make_vhd(
            *(basis, view, disk, store or self.store, f"made/{disk.index}.vhd"),
            container="",
            clock=SystemClock(),
            random_bytes=os.urandom,
        )

    async def is_made(self, sequence: int, disk: Disk) -> bool:
        """Whether it is the whole disk at that point, in a VHD that says so."""
        name, size = f"made/{disk.index}.vhd", vhd.virtual_bytes(disk.size_bytes)
        data = await self.store.read(name, 0, size + vhd.FOOTER_BYTES)
        footer = vhd.read_footer(data[size:])
        assert (await self.store.properties(name)).metadata == {VHD_ID: str(footer.unique_id)}
        expected = self.builder.expected[sequence][disk.index]
        return data[: len(expected)] == expected and not any(data[len(expected) : size])


@pytest.fixture
async def scene() -> Scene:
    store = Dying()
    await store.ensure_container()
    builder = LogBuilder(store)
    builder.begin(*SIZES)
    return Scene(store, builder, AsyncExitStack())


def _point(sequence: int, *disks: int) -> ReplicaPoint:
    return ReplicaPoint(
        sequence, sequence, tuple(DiskSnapshot(sequence, sequence, disk, len(disks), "b", "s") for disk in disks)
    )


def test_the_nearest_point_that_has_just_these_disks_is_taken_and_an_earlier_one_before_a_later() -> None:
    points = [_point(3, 0, 1), _point(5, 0), _point(7, 0, 1), _point(9, 0, 1), _point(6, 0, 1, 2)]
    assert [point.sequence for point in nearest(points, 5, DISKS)] == [3, 7, 9]


@pytest.mark.parametrize("seed", range(8))
async def test_whichever_point_it_is_made_from_it_is_what_the_log_says(scene: Scene, seed: int) -> None:
    draw, ends = random.Random(seed), list[int]()
    for _ in range(6):
        await busy(scene.builder, draw, 2)
        ends.append(scene.builder.sequence - 1)
        if draw.random() < 0.6 or not ends[1:]:
            await scene.warm(keep=draw.random() < 0.7)
    wanted = draw.choice(ends)
    view, basis = await scene.basis(wanted)
    assert basis is not None
    for disk in DISKS:
        count = await scene.make(view, basis, disk)
        assert await scene.is_made(wanted, disk)
        assert count == 0 or basis.point.sequence != wanted
    await scene.stack.aclose()


async def test_what_the_replica_holds_is_kept_first_where_it_is_the_nearest(scene: Scene) -> None:
    draw = random.Random(1)
    await busy(scene.builder, draw, 2)
    await scene.warm(keep=True)
    await busy(scene.builder, draw, 2)
    await scene.warm(keep=False)
    latest = scene.builder.sequence - 1
    view, basis = await scene.basis(latest)
    assert basis is not None
    assert basis.point.sequence == latest == (await scene.kept())[-1]
    assert [await scene.make(view, basis, disk) for disk in DISKS] == [0, 0], "nothing lies between"
    assert await scene.is_made(latest, DISKS[0])


async def test_one_that_is_cut_off_is_gone_on_with_and_says_that_it_is_whole_at_its_end_only(scene: Scene) -> None:
    draw = random.Random(2)
    await busy(scene.builder, draw, 2)
    await scene.warm(keep=True)
    await busy(scene.builder, draw, 3)
    wanted = scene.builder.sequence - 1
    view = await scene.view(wanted)
    await scene.store.create("made/0.vhd", 1 << 20, metadata={"replicar_vhd": "of the log alone, and half"})
    basis = Basis((await points_kept(scene.builder.log, scene.store))[0], await scene.view((await scene.kept())[0]))
    scene.store.life = 2
    with pytest.raises(TransientError):
        await scene.make(view, basis, DISKS[0])
    assert VHD_ID not in (await scene.store.properties("made/0.vhd")).metadata
    await scene.make(view, basis, DISKS[0])
    assert await scene.is_made(wanted, DISKS[0])


@pytest.mark.parametrize("applied", [False, True])
async def test_killed_at_any_operation_it_is_made_by_the_next_one(scene: Scene, applied: bool) -> None:
    draw, disk = random.Random(7), DISKS[1]
    await busy(scene.builder, draw, 3)
    await scene.warm(keep=True)
    await busy(scene.builder, draw, 3)
    wanted = scene.builder.sequence - 1
    view, basis = await scene.basis(wanted)
    assert basis is not None
    for step in range(400):
        await scene.store.delete("made/1.vhd")
        dying = cast("PageBlobStore", StoppingStore(scene.store, step, applied=applied))
        try:
            await scene.make(view, basis, disk, dying)
        except Stopped:
            await scene.make(view, basis, disk)
            assert await scene.is_made(wanted, disk)
        else:
            assert await scene.is_made(wanted, disk)
            await scene.stack.aclose()
            return
    raise AssertionError("it did not end")


async def test_a_replica_that_somebody_altered_is_not_taken_for_the_machine(scene: Scene) -> None:
    await busy(scene.builder, random.Random(3), 4)
    await scene.warm(keep=False)
    name = f"replicas/{scene.builder.machine_id}/0.vhd"
    await scene.store.put_pages(name, 300 * SECTOR, random.Random(4).randbytes(300 * SECTOR))
    view, basis = await scene.basis(scene.builder.sequence - 1)
    assert basis is not None
    with pytest.raises(CorruptionError, match="does not hold what the log has"):
        await scene.make(view, basis, DISKS[0])
    assert VHD_ID not in (await scene.store.properties("made/0.vhd")).metadata


async def test_the_point_it_is_made_from_stays_as_long_as_it_is_read(scene: Scene) -> None:
    draw = random.Random(5)
    await busy(scene.builder, draw, 2)
    await scene.warm(keep=True)
    read = (await scene.kept())[0]
    await scene.basis(read)
    scene.builder.disk(2, "disk2", 8 * SECTOR)  # the blobs would be made anew, and the snapshots go first
    await scene.builder.seal()
    with pytest.raises(TransientError, match="is being read"):
        await scene.warm(keep=False)
    assert await scene.kept() == [read]
    await scene.stack.aclose()
    await scene.warm(keep=False)
    assert await scene.kept() == []


async def test_without_a_replica_or_with_one_of_other_disks_there_is_no_basis(scene: Scene) -> None:
    await busy(scene.builder, random.Random(6), 2)
    assert (await scene.basis(scene.builder.sequence - 1))[1] is None
    await scene.warm(keep=True)
    scene.builder.disk(2, "disk2", 8 * SECTOR)
    await scene.builder.seal()
    assert (await scene.basis(scene.builder.sequence - 1))[1] is None

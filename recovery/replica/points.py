"""A warm replica's earlier points: snapshots of its blobs, one of every disk at one sequence.

Each snapshot says in its metadata of which point it is and how many disks that has. So nothing else has to be written,
and a point counts when every disk has its snapshot: whoever dies between two disks leaves none. What belongs to no
point is removed by the next round, which then takes one anew.

Which are taken and which are given up is a plan, made of what there is, the machine's retention policy, and how far
apart points are to be. As the log's, they are thinned to the latest of each stretch, and ages count from the point that
the replica holds, or from the clock where that is behind it.

Weak: nothing but storage's own lease on the blob protects a snapshot, and that not from being deleted; somebody who was
replaced may cost a point that was just being taken, and never makes one that holds anything else than it says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from recovery.retention import Policy
from replicar.storage.store import BlobInfo

#: Points that a replica keeps; of more the oldest go. Of hourly ones the usual retention of 15 days keeps 144. All
#: snapshots are listed in every round: of up to 31 disks that is one request, which tells 5,000 of them.
MAX_POINTS: Final = 160
#: How far apart points are unless somebody says otherwise: no closer than retention thins them to.
POINT_SECONDS: Final = 3600.0

_SEQUENCE: Final = "replicar_sequence"
_TIME_NS: Final = "replicar_time_ns"
_DISK: Final = "replicar_disk"
_DISKS: Final = "replicar_disks"


@dataclass(frozen=True, slots=True, order=True)
class DiskSnapshot:
    """A snapshot of the blob of one disk (its index), at a point of a machine that had so many disks then."""

    sequence: int
    time_ns: int
    disk: int
    disks: int
    blob: str
    snapshot: str


@dataclass(frozen=True, slots=True)
class ReplicaPoint:
    """A point of which every disk has its snapshot; they are ascending by disk."""

    sequence: int
    time_ns: int
    snapshots: tuple[DiskSnapshot, ...]


@dataclass(frozen=True, slots=True)
class PointPlan:
    """What a round does when the blobs hold a point: `remove` snapshots, and then, if `take`, one of every disk."""

    take: bool
    remove: tuple[DiskSnapshot, ...]


def snapshot_metadata(sequence: int, time_ns: int, disk: int, disks: int) -> Mapping[str, str]:
    """What a snapshot says of itself."""
    return {_SEQUENCE: str(sequence), _TIME_NS: str(time_ns), _DISK: str(disk), _DISKS: str(disks)}


def read_snapshot_info(info: BlobInfo) -> DiskSnapshot | None:
    """What a snapshot is of; None of one that is not ours, but somebody's who took it by hand."""
    texts = [info.metadata.get(name, "") for name in (_SEQUENCE, _TIME_NS, _DISK, _DISKS)]
    if info.snapshot is None or not all(text.isascii() and text.isdigit() for text in texts):
        return None
    sequence, time_ns, disk, disks = map(int, texts)
    return DiskSnapshot(sequence, time_ns, disk, disks, info.name, info.snapshot)


def points_of(snapshots: Iterable[DiskSnapshot]) -> tuple[list[ReplicaPoint], list[DiskSnapshot]]:
    """The points that count, ascending, and the snapshots that belong to none: of a disk twice the first counts."""
    points: list[ReplicaPoint] = []
    strays: list[DiskSnapshot] = []
    groups: dict[int, dict[int, DiskSnapshot]] = {}
    for each in sorted(snapshots):
        group = groups.setdefault(each.sequence, {})
        if each.disk in group:
            strays.append(each)
        else:
            group[each.disk] = each
    for sequence, group in groups.items():
        whole = tuple(group.values())
        if all(each.disks == len(whole) for each in whole):
            points.append(ReplicaPoint(sequence, whole[0].time_ns, whole))
        else:
            strays.extend(whole)
    return points, strays


def plan_points(
    snapshots: Iterable[DiskSnapshot],
    policy: Policy,
    *,
    sequence: int,
    time_ns: int,
    now_ns: int,
    every_ns: int,
    read: Collection[int] = (),
    most: int = MAX_POINTS,
) -> PointPlan:
    """What is to be done when the replica holds the point `sequence` of `time_ns`; no `every_ns`: none is taken.

    `read`: sequences of points that somebody reads, and that stay whatever the policy says.
    """
    points, strays = points_of(snapshots)
    newest = points[-1] if points else None
    is_due = newest is None or (newest.sequence < sequence and newest.time_ns + every_ns <= time_ns)
    take = every_ns > 0 and is_due
    kept = _thinned(policy, min(now_ns, time_ns), points)
    kept = kept[max(0, len(kept) - (most - take)) :]
    staying = {point.sequence for point in kept}.union(read)
    given_up = [each for point in points if point.sequence not in staying for each in point.snapshots]
    return PointPlan(take, tuple(sorted([*strays, *given_up])))


def _thinned(policy: Policy, as_of_ns: int, points: Sequence[ReplicaPoint]) -> list[ReplicaPoint]:
    """All points of the window, and of each stretch before it the latest."""
    latest: dict[tuple[int, int], ReplicaPoint] = {}
    for point in points:
        if point.time_ns > as_of_ns - policy.window_ns:
            latest[0, point.sequence] = point
        elif (rule := policy.rule(point.time_ns, as_of_ns)) is not None:
            latest[rule.every_ns, point.time_ns // rule.every_ns] = point
    return sorted(latest.values(), key=lambda point: point.sequence)

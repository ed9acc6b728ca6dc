"""A story: everything that one seed decides before it begins, as data that can be written down and cut short.

Which disks, which workloads, which settings, and which faults at which times. A fault carries a number of its own,
from which it draws whatever it needs; so a story from which faults were taken away is the same story with fewer
faults, and a failing one can be shrunk (`shrinking`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Final

from simulator.faults.catalogue import CATALOGUE, Fault, kinds_of
from simulator.neighbour import GroupPlan
from simulator.traces.replay import Replay
from simulator.workloads import Kind, Workload
from simulator.world.folder import UpkeepPlan
from simulator.world.parts import AgentPlan, ServerPlan

#: How long the faults go on, in virtual seconds; settling and judging come on top.
STORY_SECONDS: Final = 60.0
#: The first fault comes when the machine is protected, or soon enough to come in between.
FIRST_FAULT_SECONDS: Final = 2.0
LEAST_FAULTS: Final = 10
MOST_FAULTS: Final = 16
#: Of stories: how many have somebody keep the log up, a second machine, or parts of other versions; and how many
#: faults of these at most come on top.
UPKEEP_SHARE: Final = 0.3
GROUP_SHARE: Final = 0.2
VERSIONS_SHARE: Final = 0.2
#: How many leave free space out of the first copy.
LEFT_OUT_SHARE: Final = 0.25
#: How many have background copies held to a rate, and to which, in bytes a second.
PACED_SHARE: Final = 0.2
PACES: Final = (64 << 10, 256 << 10)
MORE_FAULTS: Final = 3
_KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """One protected disk: its size, how much of it is written at first, and what its application does.

    `free` is what a file system would say that it does not use, in bytes (begin, end); garbage lies there. The
    application writes there as anywhere.
    """

    name: str
    size_bytes: int
    filled_share: float
    workload: Workload | Replay
    free: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Story:
    """See the module. `marks` are when the operator asks for a point; `upkeep`: how the log is folded, if it is;
    `group`: when points of two machines are asked for, if there is a second one."""

    seed: int
    seconds: float
    disks: tuple[DiskPlan, ...]
    agent: AgentPlan
    server: ServerPlan
    marks: tuple[float, ...]
    faults: tuple[Fault, ...]
    upkeep: UpkeepPlan | None = None
    group: GroupPlan | None = None

    def without(self, faults: tuple[Fault, ...]) -> Story:
        """The same story with these faults only."""
        return replace(self, faults=faults)

    def __str__(self) -> str:
        disks = ", ".join(
            f"{disk.name} of {disk.size_bytes >> 10} KiB under {disk.workload.kind}" for disk in self.disks
        )
        lines = [f"seed {self.seed}: {disks}; {len(self.faults)} faults in {self.seconds:g} s"]
        if not self.agent.copy_free_space:
            lines.append("  free space is left out")
        if self.upkeep is not None:
            lines.append(f"  folded{' by a worker and by hand' if self.upkeep.by_hand else ' by a worker'}")
        if self.group is not None:
            lines.append(f"  points with a second machine at {', '.join(f'{at:.1f}' for at in self.group.marks)} s")
        lines += [f"  {fault}" for fault in self.faults]
        return "\n".join(lines)


def story_of(
    seed: int,
    *,
    kinds: tuple[str, ...] | None = None,
    workload: Workload | None = None,
    leaves_out: bool = False,
    is_paced: bool = False,
) -> Story:
    """The story of a seed.

    Args:
        kinds: of faults, instead of all.
        workload: of every disk, instead of what the seed would choose.
        leaves_out: with `kinds`: free space is left out.
        is_paced: with `kinds`: background copies are held to a rate.
    """
    draw = random.Random(f"{seed} story")
    names = ("root", "data")[: draw.choice((1, 1, 1, 2))]
    disks = tuple(_disk(name, draw) for name in names)
    if workload is not None:
        disks = tuple(replace(disk, workload=workload) for disk in disks)
    agent = AgentPlan(
        disks=names,
        journal_files=draw.choice((2, 2, 3, 4)),
        audit_bytes_per_second=draw.choice((0, 32 * _KIB, 256 * _KIB)),
        mark_every_seconds=draw.choice((0, 15, 25)),
    )
    server = ServerPlan(
        cache_slots=draw.choice((4, 4, 5, 8)),
        buffers=draw.choice((2, 4)),
        segment_age_seconds=draw.choice((0.2, 0.7, 2.0)),
        stripes=draw.choice((1, 2, 3)),
        uploads=draw.choice((1, 2, 4)),
        compression_level=draw.choice((0, 1)),
    )
    marks = tuple(sorted(draw.uniform(3.0, STORY_SECONDS) for _ in range(draw.randint(1, 5))))
    faults = _faults(draw, kinds or kinds_of())
    story = Story(seed, STORY_SECONDS, disks, agent, server, marks, faults)
    if kinds is not None:
        wanted = bool(set(kinds) & set(kinds_of("upkeep")))
        upkeep = replace(_upkeep(seed), reader=True) if wanted else None
        group = _group(seed) if set(kinds) & set(kinds_of("group")) else None
        story = replace(story, upkeep=upkeep, group=group)
        story = _paced(story, random.Random(f"{seed} pace")) if is_paced else story
        return _leaving_out(story, random.Random(f"{seed} free space")) if leaves_out else story
    return _with_versions(_in_a_group(_kept_up(_with_free_space(_with_a_pace(story)))))


def _with_a_pace(story: Story) -> Story:
    """The story with copies held to a rate, if they are. What is drawn here leaves the rest of it as it is."""
    draw = random.Random(f"{story.seed} pace")
    return _paced(story, draw) if draw.random() < PACED_SHARE else story


def _paced(story: Story, draw: random.Random) -> Story:
    return replace(story, agent=replace(story.agent, seed_bytes_per_second=draw.choice(PACES)))


def _with_free_space(story: Story) -> Story:
    """The story with free space that is left out, if it is; likewise."""
    draw = random.Random(f"{story.seed} free space")
    return _leaving_out(story, draw) if draw.random() < LEFT_OUT_SHARE else story


def _leaving_out(story: Story, draw: random.Random) -> Story:
    disks = tuple(replace(disk, free=_free(disk.size_bytes, draw)) for disk in story.disks)
    return replace(story, disks=disks, agent=replace(story.agent, copy_free_space=False))


def _free(size: int, draw: random.Random) -> tuple[tuple[int, int], ...]:
    begin = draw.randrange(0, size // 2, 4 * _KIB)
    end = size - draw.randrange(0, 3 * size // 4 - begin, 4 * _KIB)
    used = draw.randrange(begin + 4 * _KIB, end - 4 * _KIB, 4 * _KIB)
    return draw.choice((((begin, end),), ((begin, used), (used + 4 * _KIB, end))))


def _kept_up(story: Story) -> Story:
    """The story with its upkeep, if it has any; likewise."""
    draw = random.Random(f"{story.seed} kept up")
    if draw.random() >= UPKEEP_SHARE:
        return story
    marks = [draw.uniform(3.0, STORY_SECONDS - 10.0) for _ in range(draw.randint(2, 6))]
    story = replace(story, upkeep=_upkeep(story.seed), marks=tuple(sorted((*story.marks, *marks))))
    return _with_more(story, draw, kinds_of("upkeep"), draw.randint(0, MORE_FAULTS))


def _in_a_group(story: Story) -> Story:
    """The story with a second machine, if it has any and nothing is folded; likewise."""
    draw = random.Random(f"{story.seed} in a group")
    if story.upkeep is not None or draw.random() >= GROUP_SHARE:
        return story
    story = replace(story, group=_group(story.seed))
    return _with_more(story, draw, kinds_of("group"), draw.randint(0, MORE_FAULTS))


def _with_versions(story: Story) -> Story:
    """The story with parts of other versions, if it has any; likewise."""
    draw = random.Random(f"{story.seed} versions")
    if draw.random() >= VERSIONS_SHARE:
        return story
    return _with_more(story, draw, kinds_of("versions"), draw.randint(1, MORE_FAULTS))


def _with_more(story: Story, draw: random.Random, kinds: tuple[str, ...], count: int) -> Story:
    first = 1 + max(fault.number for fault in story.faults)
    more = [_fault(draw, draw.choice(kinds), first + number) for number in range(count)]
    return replace(story, faults=tuple(sorted((*story.faults, *more), key=lambda fault: fault.at)))


def _group(seed: int) -> GroupPlan:
    draw = random.Random(f"{seed} group")
    return GroupPlan(
        marks=tuple(sorted(draw.uniform(4.0, STORY_SECONDS) for _ in range(draw.randint(2, 5)))),
        hold_seconds=draw.choice((0.5, 2.0, 5.0, 10.0)),
        rate=draw.choice((1.0, 3.0, 8.0)),
    )


def _upkeep(seed: int) -> UpkeepPlan:
    draw = random.Random(f"{seed} upkeep")
    return UpkeepPlan(
        every_seconds=draw.choice((2.0, 4.0, 8.0)),
        checkpoint_segments=draw.choice((1, 2, 4)),
        window_seconds=draw.choice((4.0, 8.0, 15.0)),
        stretch_seconds=draw.choice((4.0, 8.0)),
        until_seconds=draw.choice((20.0, 60.0)),
        grace_seconds=draw.choice((1.0, 3.0, 8.0)),
        by_hand=draw.random() < 0.5,
        reader=draw.random() < 0.3,
    )


def _disk(name: str, draw: random.Random) -> DiskPlan:
    size = draw.choice((128, 256, 512, 2048)) * _KIB + draw.choice((0, 0, 512, 20 * _KIB))
    workload = Workload(
        kind=draw.choice(tuple(Kind)),
        rate=draw.choice((0.2, 0.2, 0.5, 0.5, 1.0, 5.0)),  # the last one fills a change log when nothing goes out
        flush_share=draw.choice((0.0, 0.05, 0.3)),
        trim_share=draw.choice((0.0, 0.03, 0.1)),
    )
    return DiskPlan(name, size, draw.choice((0.0, 0.1, 0.5)), workload)


def _faults(draw: random.Random, kinds: tuple[str, ...]) -> tuple[Fault, ...]:
    # A few kinds a story: faults of one kind in a row find what a mixture of all never reaches.
    chosen = draw.sample(kinds, min(len(kinds), draw.randint(2, 8)))
    faults = []
    for number in range(draw.randint(LEAST_FAULTS, MOST_FAULTS)):
        faults.append(_fault(draw, draw.choice(chosen), number))
    return tuple(sorted(faults, key=lambda fault: fault.at))


def _fault(draw: random.Random, kind: str, number: int) -> Fault:
    at = draw.uniform(FIRST_FAULT_SECONDS, STORY_SECONDS - 5.0)
    return Fault(kind, round(at, 3), CATALOGUE[kind].seconds(draw), number)

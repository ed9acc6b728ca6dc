"""Stories in files: one that once failed, cut short for a person to read, and told again for ever.

A seed means another story as soon as anything about drawing one changes; a file means the same one. It is JSON, a
`Story` field by field, with a sentence on what it found (`what`), and the planted bug that puts the mistake back
(`bug`): so that a test can show both, that the story breaks nothing today, and that it would, were the mistake there.

    replicar-simulate --seed 28 --shrink --save story.json      keep it
    replicar-simulate --story story.json --trace                tell it again
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from replicar.errors import PermanentError
from simulator.faults.catalogue import CATALOGUE, Fault
from simulator.neighbour import GroupPlan
from simulator.story import DiskPlan, Story
from simulator.traces import record
from simulator.traces.replay import Replay
from simulator.workloads import Kind, Workload
from simulator.world.folder import UpkeepPlan
from simulator.world.parts import AgentPlan, ServerPlan


@dataclass(frozen=True, slots=True)
class Kept:
    """A story with what is known of it."""

    story: Story
    what: str = ""
    bug: str = ""


def save(kept: Kept, path: Path) -> None:
    """Write it down."""
    data = {"what": kept.what, "bug": kept.bug, "story": asdict(kept.story)}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Kept:
    """Read it.

    Raises:
        PermanentError: it is no story, or one of faults that nobody knows.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Kept(_story(data["story"]), str(data["what"]), str(data["bug"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PermanentError(
            f"{path} holds no story: {type(error).__name__} {error}",
            hint="make one with `replicar-simulate --seed N --save FILE`",
            path=str(path),
        ) from None


def _story(data: dict[str, Any]) -> Story:
    faults = tuple(Fault(**each) for each in data["faults"])
    for fault in faults:
        if fault.kind not in CATALOGUE:
            raise ValueError(f"nobody knows a fault {fault.kind!r}")
    agent = data["agent"]
    return Story(
        seed=int(data["seed"]),
        seconds=float(data["seconds"]),
        disks=tuple(_disk(each) for each in data["disks"]),
        agent=AgentPlan(**{**agent, "disks": tuple(agent["disks"])}),
        server=ServerPlan(**data["server"]),
        marks=tuple(data["marks"]),
        faults=faults,
        group=_group(data.get("group")),
        upkeep=UpkeepPlan(**data["upkeep"]) if data.get("upkeep") else None,
    )


def _group(data: dict[str, Any] | None) -> GroupPlan | None:
    return GroupPlan(**{**data, "marks": tuple(data["marks"])}) if data else None


def _disk(data: dict[str, Any]) -> DiskPlan:
    free = tuple((begin, end) for begin, end in data.get("free", ()))
    return DiskPlan(**{**data, "workload": _workload(data["workload"]), "free": free})


def _workload(data: dict[str, Any]) -> Workload | Replay:
    if "records" not in data:
        sizes = tuple(data.get("block_bytes", ()))
        return Workload(**{**data, "kind": Kind(data["kind"]), "block_bytes": sizes})
    records = tuple(record.Record(**{**each, "kind": record.Kind(each["kind"])}) for each in data["records"])
    return Replay(**{**data, "records": records})

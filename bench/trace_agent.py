"""An agent's trace capture by itself, for `capture_trace`: `python -m bench.trace_agent DIRECTORY DEVICE`.

Everything from the kernel's events to the change log on a disk is the product's. In the sender's place somebody has
everything that is finished trimmed, as if storage took it at once. It obeys lines on its standard input: `point` makes
one; the answer to each, and to having copied the disk in full, is a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import uvloop

from mobility_agent.capture.trace.capture import TraceCapture
from mobility_agent.capture.trace.choice import Method, open_source
from mobility_agent.capture.trace.tracked import TrackedDisk
from mobility_agent.changelog import ChangeLog
from mobility_agent.ladder import Ladder
from mobility_agent.regions import DirtyRegions
from mobility_agent.touched import TouchedRegions
from replicar.clock import SystemClock
from replicar.errors import ReplicarError
from replicar.formats import record
from replicar.formats.frame import Kind

JOURNAL_BYTES: Final = 4 << 30
#: How often what is finished is said to be stored.
STORED_SECONDS: Final = 0.02
#: Large, since it is the capture's cost that is measured, and not whether a point can be had.
BUDGET_SECONDS: Final = 2.0


async def main(directory: Path, device: Path) -> None:
    clock = SystemClock()
    with ExitStack() as closing:
        log = ChangeLog(
            directory / "log", uuid.uuid4(), first_sequence=1, limit_bytes=JOURNAL_BYTES, boot_id=bytes(16), clock=clock
        )
        disk = TrackedDisk(0, "disk", device)
        closing.callback(disk.close)
        disk.follow(DirtyRegions(directory / "regions", disk.size_bytes))
        touched = TouchedRegions(directory / "touched", disk.size_bytes)
        ladder = Ladder(log, [disk], {0: disk.regions}, {0: touched})
        ladder.start()
        source = open_source(Method.BPF)
        async with (
            TraceCapture(ladder, [disk], source, clock, freeze_budget_seconds=BUDGET_SECONDS) as capture,
            asyncio.TaskGroup() as tasks,
        ):
            running = [tasks.create_task(capture.run()), tasks.create_task(_store(log))]
            while not capture.is_whole:  # noqa: ASYNC110  # it says so to whoever looks
                await asyncio.sleep(0.02)
            _say(whole=True)
            while (line := (await asyncio.to_thread(sys.stdin.readline)).strip()) == "point":
                facts: dict[str, Any] = {"events": disk.event_count}
                try:
                    point = await capture.point(lambda: log.append_record(Kind.MARK, record.Mark("point")))
                    facts |= {"freeze_seconds": point.freeze_seconds, "tries": point.tries}
                except ReplicarError as error:
                    facts["refused"] = error.message
                _say(**facts, lost=source.lost(), doubts=capture.doubts)
            assert not line, f"{line!r} is nothing to be told"
            for task in running:
                task.cancel()


async def _store(log: ChangeLog) -> None:
    while True:
        await asyncio.sleep(STORED_SECONDS)
        log.seal()
        log.trim(log.next_sequence - 1)


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*map(Path, sys.argv[1:3])))

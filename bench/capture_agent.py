"""An agent's capture by itself: `python -m bench.capture_agent [--file FILE] DIRECTORY IMAGE SOCKET`.

Everything between the socket and the disk is the product's: InlineCapture, the ladder, the change log on a real disk,
the touched record, the digests, checkpoints. In the sender's place somebody has everything that is finished trimmed, as
if storage took it at once; so the log never fills and order is kept, which is the state that is measured. The disk is
taken to be replicated already, so that nothing is copied beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from pathlib import Path
from typing import Final

import uvloop

from mobility_agent.capture.disk import Disk
from mobility_agent.capture.inline import InlineCapture
from mobility_agent.changelog import ChangeLog
from mobility_agent.checkpoint import Checkpointer
from mobility_agent.digests import Digests
from mobility_agent.extents import DirtyExtents
from mobility_agent.ladder import Ladder
from mobility_agent.regions import DirtyRegions
from mobility_agent.touched import TouchedRegions
from replicar.clock import SystemClock

JOURNAL_BYTES: Final = 4 << 30
#: How often what is finished is said to be stored.
STORED_SECONDS: Final = 0.02


async def main(directory: Path, image: Path, socket: Path, file: Path | None) -> None:
    clock = SystemClock()
    log = ChangeLog(
        directory / "log", uuid.uuid4(), first_sequence=1, limit_bytes=JOURNAL_BYTES, boot_id=bytes(16), clock=clock
    )
    disk = Disk(0, "disk", image)
    regions = DirtyRegions(directory / "regions", disk.size_bytes)
    touched = TouchedRegions(directory / "touched", disk.size_bytes)
    digests = Digests(directory / "digests", disk.size_bytes)
    ladder = Ladder(log, [disk], {0: regions}, {0: touched}, {0: digests}, DirtyExtents(directory / "extents"))
    ladder.start()
    regions.clear(0, disk.size_bytes)
    ladder.close_gap()
    capture = InlineCapture(
        ladder, {"disk": socket}, files={"disk": file} if file is not None else {}, keepers=directory / "files"
    )
    async with capture, asyncio.TaskGroup() as tasks:
        tasks.create_task(Checkpointer(ladder, clock).run())
        tasks.create_task(_store(log, ladder))
        sys.stdout.write("serving\n")
        sys.stdout.flush()


async def _store(log: ChangeLog, ladder: Ladder) -> None:
    while True:
        await asyncio.sleep(STORED_SECONDS)
        log.seal()
        log.trim(log.next_sequence - 1)
        if not log.ordered:
            raise SystemExit("the log was full, so order was not kept, and that is not what is measured")


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        parser = argparse.ArgumentParser()
        parser.add_argument("--file", type=Path)
        for argument in ("directory", "image", "socket"):
            parser.add_argument(argument, type=Path)
        runner.run(main(**vars(parser.parse_args())))

"""An agent's core in a process of its own, to be killed: `python -m tests.mobility_agent.killable DIRECTORY`.

With `--file` it shows its disk as that file. With `--away` (seconds) there is a server as well, which is away for so
long and slow afterwards: what it takes it appends to DIRECTORY/stored, and then has it trimmed. So the log, which is
small then, fills and empties, and every rung of the ladder is stood on.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from replicar.formats import frame
from tests.mobility_agent.core import MIB, Core, agent_core

SMALL_LOG = 8 * MIB
LARGE_LOG = 512 * MIB
FEW_EXTENTS = 64


async def main(directory: Path, away_seconds: float | None, file: Path | None) -> None:
    limit = LARGE_LOG if away_seconds is None else SMALL_LOG
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with agent_core(directory, limit_bytes=limit, extents_held=FEW_EXTENTS, file=file) as core:
        tasks = [asyncio.create_task(core.seeder.run())]
        if away_seconds is not None:
            tasks.append(asyncio.create_task(_serve(core, directory / "stored", away_seconds)))
        print("serving", flush=True)
        await stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve(core: Core, stored: Path, away_seconds: float) -> None:
    await asyncio.sleep(away_seconds)
    with stored.open("ab", buffering=0) as file:
        while True:
            core.log.seal()
            frames = core.log.take(core.log.stored_sequence + 1)
            if frames is not None:
                file.write(frames)
                core.log.trim(last_of(bytes(frames)))
            await asyncio.sleep(0.005)


def last_of(frames: bytes) -> int:
    """The last sequence of these frames."""
    return max(found.header.last_sequence for _, found in frame.frames_in(frames))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--away", type=float)
    parser.add_argument("--file", type=Path)
    given = parser.parse_args()
    asyncio.run(main(given.directory, given.away, given.file))

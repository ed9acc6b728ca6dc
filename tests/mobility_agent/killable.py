"""An agent's core in a process of its own, to be killed: `python -m tests.mobility_agent.killable DIRECTORY`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.mobility_agent.core import agent_core


async def main(directory: Path) -> None:
    async with agent_core(directory, limit_bytes=256 << 20) as core:
        seeding = asyncio.create_task(core.seeder.run())
        print("serving", flush=True)
        await seeding


asyncio.run(main(Path(sys.argv[1])))

"""An export in a process of its own, to be killed: `python -m tests.recovery.export.killable DIRECTORY`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from recovery.export.server import ExportServer
from tests.recovery.export.support import build, served, view_of


async def main(directory: Path) -> None:
    disks = served(await view_of(await build()), overlay=directory / "over")
    async with ExportServer(disks, directory / "nbd.sock"):
        print("serving", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))

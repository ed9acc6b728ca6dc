"""Programs of the operating system (util-linux), run beside the event loop: what is mounted here has to be answered."""

from __future__ import annotations

import asyncio
import os
from typing import Final

from replicar.errors import PermanentError

#: Where programs for root are, which a plain user's PATH often leaves out.
_PATH: Final = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
#: A mount may replay a journal that is in storage first.
LIMIT_SECONDS: Final = 300.0


async def run(*command: str, statuses: tuple[int, ...] = (0,)) -> str:
    """What a program says on its standard output.

    Raises:
        PermanentError: there is no such program, or it ended with another status, or not at all.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PATH": _PATH, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise PermanentError(
            f"there is no {command[0]} here", hint="install util-linux, or use `replicar export`", program=command[0]
        ) from None
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            output, errors = await process.communicate()
    except TimeoutError:
        raise PermanentError(f"`{' '.join(command)}` did not end in {LIMIT_SECONDS:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode not in statuses:
        said = errors.decode(errors="replace").strip().splitlines()
        raise PermanentError(
            f"`{' '.join(command)}` ended with status {process.returncode}: {' '.join(said)[-300:]}",
            program=command[0],
            status=process.returncode,
        )
    return output.decode(errors="replace")

"""The operator's own program that looks at a machine that came up, and says by its exit status whether it will do.

It is told in the environment what there is, and nothing else beside PATH; status 0 means that the machine will do. What
it prints is kept, bounded, as what it said. A program that is late is ended with all that it started.

    REPLICAR_MACHINE        the machine's name
    REPLICAR_CONSOLE_LOG    a file: what the console has said so far
    REPLICAR_CONSOLE        a Unix socket: the console itself, to type on (QEMU)
    REPLICAR_PORT_<n>       where the guest's TCP port n is to be reached, as host:port (QEMU)
    REPLICAR_RESOURCE       the machine's resource id (Azure)
    REPLICAR_EVIDENCE       a directory: what is left there is kept with the drill
"""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError

#: What is kept of what it prints: the end.
SAID_BYTES: Final = 16 << 10
_PIECE_BYTES: Final = 4096


async def run_check(program: Path, told: Mapping[str, str], seconds: float, *, what: str = "check") -> str:
    """Run it; what it said. `what` is what errors call it.

    Raises:
        PermanentError: it can't be started, ended with another status than 0, or took longer than `seconds`.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath), **told}
    try:
        process = await asyncio.create_subprocess_exec(
            program, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        raise PermanentError(
            f"the {what} {program} can't be run: {error.strerror}",
            hint="it has to be an executable file with its #! line",
        ) from None
    said = bytearray()
    try:
        async with asyncio.timeout(seconds):
            status = await _listen(process, said)
    except TimeoutError:
        raise PermanentError(
            f"the {what} {program} did not end within {seconds:.0f} s", hint=_end_of(said), check=str(program)
        ) from None
    finally:
        with suppress(ProcessLookupError):  # what it left running as well
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    text = _end_of(said)
    if status:
        raise PermanentError(
            f"the {what} {program} found fault: it ended with status {status}", hint=text, check=str(program)
        )
    return text


async def _listen(process: Process, said: bytearray) -> int:
    assert process.stdout is not None
    while piece := await process.stdout.read(_PIECE_BYTES):
        said += piece
        del said[:-SAID_BYTES]
    return await process.wait()


def _end_of(said: bytearray) -> str:
    return said.decode(errors="replace").strip()

"""Hooks: the operator's programs that hold an application still around a point, and let it go again.

Every program in one directory is called with `freeze`, in the order of names, then the mark is made, then each is
called with `thaw`, in the reverse order: as QEMU's guest agent does it, so that such scripts serve here too. A program
may be told to thaw although it never froze, or twice, and has to take that well.

    NAME freeze     must return 0 within the time there is; else the point is refused, and all is thawed
    NAME thaw       must return 0; one that does not is said again to all the world, since something may hang there

Told are, in the environment and nothing else beside PATH: REPLICAR_MARK (the point's name), REPLICAR_TIMEOUT_SECONDS,
REPLICAR_HOOKS_STATE (a directory of the hook's own, kept from freeze to thaw). Passwords belong into files that
the hook reads. What a hook prints is kept only for the message that says why it failed.

A file in the state directory says that something may be frozen, from before the first `freeze` until after the last
`thaw`: an agent that finds it when it starts, and `mobility-agent thaw` after one has died, thaw first.

Only programs that nobody but root or the agent's own user can change are run, since they run with the agent's rights.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import stat
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from replicar.control.files import make_directory, sync_directory, write_file
from replicar.errors import PermanentError, TransientError

#: Hooks in one directory.
MAX_HOOKS: Final = 32
#: What is kept of what a hook printed, for the message.
OUTPUT_BYTES: Final = 2000
#: How often a thaw that failed is tried before it is reported.
THAW_TRIES: Final = 3
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # as run-parts has it: no backups, no package leftovers

_log = logging.getLogger(__name__)


class Held:
    """One time that applications were held. `pause_seconds` is set when they are let go."""

    pause_seconds: float = 0.0


class Hooks:
    """The hooks of one machine.

    Args:
        directory: where the programs are.
        state: a directory for what they keep between freeze and thaw; made if need be.
        timeout_seconds: of each call.
    """

    def __init__(self, directory: Path, state: Path, *, timeout_seconds: float) -> None:
        self.directory = directory
        self._state = state
        self._timeout = timeout_seconds
        self._begun = state / "frozen"
        #: Why something may still be held; empty while all is well.
        self.trouble = ""

    def programs(self) -> list[Path]:
        """The hooks, in order.

        Raises:
            PermanentError: there is none, or one that somebody else could have changed.
        """
        try:
            found = sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))
        except OSError as error:
            raise PermanentError(
                f"the hooks' directory {self.directory} can't be read: {error.strerror}",
                hint="make it, or remove [application] from the settings",
                path=str(self.directory),
            ) from None
        programs = [path for path in found if path.is_file() and os.access(path, os.X_OK)]
        if not programs or len(programs) > MAX_HOOKS:
            raise PermanentError(
                f"{self.directory} has {len(programs)} executable hooks; 1 to {MAX_HOOKS} are called",
                hint="put the application's hook there, executable, its name of letters, digits, - and _",
                path=str(self.directory),
            )
        for path in (self.directory, *programs):
            _refuse_strangers(path)
        return programs

    @asynccontextmanager
    async def held(self, mark: str) -> AsyncIterator[Held]:
        """Have applications hold still while the block runs; whatever happens, they are let go.

        Raises:
            PermanentError: the hooks are not as they have to be.
            TransientError: one failed, or took too long; nothing is held any more.
        """
        programs, made = self.programs(), Held()
        make_directory(self._state)
        write_file(self._begun, f"{mark}\n".encode())
        began = time.monotonic()
        reached = 0
        try:
            for program in programs:
                reached += 1
                await self._call(program, "freeze", mark)
            yield made
        finally:
            await _to_the_end(self._thaw(programs[:reached], mark))
            made.pause_seconds = time.monotonic() - began

    async def recover(self) -> None:
        """Thaw whatever an agent that died has left held; nothing to do where it left nothing."""
        if self._begun.exists():
            _log.warning("an agent died while applications were held: they are let go")
            await self._thaw(self.programs(), "")

    async def _thaw(self, programs: Sequence[Path], mark: str) -> None:
        failed: list[str] = []
        for program in reversed(programs):
            for attempt in range(THAW_TRIES):
                try:
                    await self._call(program, "thaw", mark)
                    break
                except TransientError as error:
                    _log.error("%s", error.message)
                    if attempt == THAW_TRIES - 1:
                        failed.append(error.message)
        self.trouble = "; ".join(failed)
        if not failed:
            with suppress(FileNotFoundError):
                os.unlink(self._begun)
                sync_directory(self._state)

    async def _call(self, program: Path, what: str, mark: str) -> None:
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "REPLICAR_MARK": mark,
            "REPLICAR_TIMEOUT_SECONDS": f"{self._timeout:g}",
            "REPLICAR_HOOKS_STATE": str(self._state),
        }
        try:
            process = await asyncio.create_subprocess_exec(
                *(str(program), what),
                env=environment,
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # so that all that it started can be ended with it
            )
        except OSError as error:
            raise TransientError(
                f"the hook {program.name} can't be run: {error.strerror}", hint=f"run `{program} {what}` by hand"
            ) from None
        said = b""
        try:
            async with asyncio.timeout(self._timeout):
                said = await _tail(process)
                await process.wait()
        except TimeoutError:
            raise TransientError(
                f"the hook {program.name} did not {what} within {self._timeout:g} s",
                hint=f"run `{program} {what}` by hand, or raise hook_timeout_seconds",
                hook=program.name,
            ) from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode:
            words = said.decode(errors="replace").strip().splitlines()
            raise TransientError(
                f"the hook {program.name} did not {what} (status {process.returncode})"
                + (f": {words[-1][:300]}" if words else ""),
                hint=f"run `{program} {what}` by hand",
                hook=program.name,
            )


async def _tail(process: asyncio.subprocess.Process) -> bytes:
    """The end of what a process prints. A child that it leaves behind may hold the pipe open: its own end counts."""
    assert process.stdout is not None
    said, ended = b"", asyncio.ensure_future(process.wait())
    try:
        while True:
            piece = asyncio.ensure_future(process.stdout.read(OUTPUT_BYTES))
            await asyncio.wait({piece, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                piece.cancel()
                return said
            if not piece.result():
                return said
            said = (said + piece.result())[-OUTPUT_BYTES:]
    finally:
        ended.cancel()


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await, and if cancelled meanwhile, not before it has ended."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _refuse_strangers(path: Path) -> None:
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermanentError(
            f"{path} could be changed by others (owner {found.st_uid}, mode {found.st_mode & 0o777:o}), and would run"
            " with the agent's rights",
            hint=f"chown root {path}; chmod go-w {path}",
            path=str(path),
        )

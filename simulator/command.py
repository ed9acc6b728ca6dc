"""The product's commands, run as a user runs them: as processes of their own, from the environment that runs this.

Each command ends with an exit status and, with `--json`, one JSON object; both are what tests and the demo look at.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from replicar.errors import PermanentError

#: Longer than any command of the demo or the tests takes.
LIMIT_SECONDS: Final = 110.0
_MODULES: Final = {
    "replicar": "replicar.cli",
    "config-server": "config_server.cli",
    "process-server": "process_server.cli",
    "mobility-agent": "mobility_agent.cli",
    "recovery-worker": "recovery.worker.cli",
}


@dataclass(frozen=True, slots=True)
class Result:
    """What a command came to."""

    command: str
    status: int
    output: str
    errors: str

    def json(self) -> dict[str, Any]:
        """Its standard output as one JSON object.

        Raises:
            PermanentError: it is none.
        """
        try:
            value = json.loads(self.output)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise PermanentError(f"`{self.command}` did not print one JSON object", hint=self.output[-500:])
        return value

    def require(self) -> Result:
        """Itself, if it succeeded.

        Raises:
            PermanentError: it did not; with what it said.
        """
        if self.status:
            said = (self.errors or self.output).strip()[-1500:]
            raise PermanentError(f"`{self.command}` ended with status {self.status}", hint=said, status=self.status)
        return self


def program(name: str) -> list[str]:
    """The words that start one of the product's commands: its script beside this Python, or else its module."""
    script = Path(sys.executable).with_name(name)
    if script.exists():
        return [str(script)]
    return [sys.executable, "-c", f"from {_MODULES[name]} import main; main()"]


async def run(
    name: str, *arguments: str | Path, environment: dict[str, str] | None = None, limit_seconds: float = LIMIT_SECONDS
) -> Result:
    """Run a command to its end. A cancelled caller takes the command along.

    Raises:
        PermanentError: it did not end in time.
    """
    words: Sequence[str] = [*program(name), *(str(argument) for argument in arguments)]
    shown = " ".join([name, *words[len(program(name)) :]])
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    try:
        async with asyncio.timeout(limit_seconds):
            output, errors = await process.communicate()
    except TimeoutError:
        raise PermanentError(f"`{shown}` did not end within {limit_seconds:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Result(shown, process.returncode or 0, output.decode(errors="replace"), errors.decode(errors="replace"))

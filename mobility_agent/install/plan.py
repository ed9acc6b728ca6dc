"""What installing and removing the agent come to: steps as data, made by pure functions, done by a driver that may be
run again.

A step knows whether it is done already, so a second run does what the first one could not, and a dry run says what is
left. Nothing that somebody else may have written is replaced without being told to: a settings file that differs stops
the plan before its first step.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicar.control.files import sync_directory, write_file
from replicar.errors import PermanentError

#: systemctl waits for a unit to stop, which is bounded by the unit itself; it is not waited for longer than this.
COMMAND_SECONDS: Final = 180.0
#: What is told of a command that failed.
MAX_OUTPUT: Final = 2000

Run = Callable[[Sequence[str]], None]


@dataclass(frozen=True, slots=True)
class MakeDirectory:
    """A directory with this mode; one that exists keeps its mode unless it is wider."""

    path: Path
    mode: int = 0o700

    def __str__(self) -> str:
        return f"make the directory {self.path} ({self.mode:o})"

    def is_done(self) -> bool:
        return self.path.is_dir()

    def do(self, run: Run) -> None:
        self.path.mkdir(mode=self.mode, parents=True, exist_ok=True)


@dataclass(frozen=True, slots=True)
class WriteFile:
    """A file with exactly this content."""

    path: Path
    content: str
    mode: int = 0o644

    def __str__(self) -> str:
        return f"write {self.path}"

    def is_done(self) -> bool:
        try:
            return self.path.read_text() == self.content
        except OSError:
            return False

    def do(self, run: Run) -> None:
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_file(self.path, self.content.encode(), mode=self.mode)


@dataclass(frozen=True, slots=True)
class CopyProgram:
    """The archive at the place from which the service runs it."""

    source: Path
    path: Path

    def __str__(self) -> str:
        return f"copy {self.source} to {self.path}"

    def is_done(self) -> bool:
        return self.path.exists() and (
            self.path.samefile(self.source) or self.path.read_bytes() == self.source.read_bytes()
        )

    def do(self, run: Run) -> None:
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        shutil.copyfile(self.source, new)
        os.chmod(new, 0o755)  # noqa: S103  # a program, like every other in that directory
        os.replace(new, self.path)  # an agent that runs from the old one keeps it
        sync_directory(self.path.parent)


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the system, run whenever the plan is."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"run {' '.join(self.words)}"

    def is_done(self) -> bool:
        return False

    def do(self, run: Run) -> None:
        run(self.words)


@dataclass(frozen=True, slots=True)
class Remove:
    """A file, or a directory with all that is in it, that is not there afterwards."""

    path: Path

    def __str__(self) -> str:
        return f"remove {self.path}"

    def is_done(self) -> bool:
        return not os.path.lexists(self.path)

    def do(self, run: Run) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


Step = MakeDirectory | WriteFile | CopyProgram | Command | Remove


def carry_out(steps: Sequence[Step], say: Callable[[str], None], *, run: Run | None = None) -> None:
    """Do what is not done yet, in order; stops at the first step that fails.

    Args:
        say: told of each step before it is done.
        run: runs a command; the system's own by default.

    Raises:
        PermanentError: naming the step; running the plan again goes on there.
    """
    for step in steps:
        if step.is_done():
            continue
        say(str(step))
        try:
            step.do(run or run_command)
        except OSError as error:
            raise PermanentError(
                f"could not {step}: {error.strerror or error}",
                hint="run it as root; what was done before stays, and the same command goes on from here",
            ) from None


def run_command(words: Sequence[str]) -> None:
    """Run a command of the system.

    Raises:
        PermanentError: it is missing, failed or hung; with the end of what it said.
    """
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PermanentError(f"`{' '.join(words)}` could not be run: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-MAX_OUTPUT:]
        raise PermanentError(
            f"`{' '.join(words)}` failed with status {done.returncode}: {said}",
            hint="see `systemctl status replicar-agent` and `journalctl -u replicar-agent`",
        )

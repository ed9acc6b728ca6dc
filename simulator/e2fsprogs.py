"""The programs of e2fsprogs: found, run, and their failures told."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from replicar.errors import CorruptionError, PermanentError

#: Of every file system made here.
BLOCK_BYTES: Final = 4096
TOOL_SECONDS: Final = 120.0
#: Debian keeps these where a plain user's PATH does not look.
_DIRECTORIES: Final = ("/usr/sbin", "/sbin")


def tool(name: str) -> str:
    """The path of a program.

    Raises:
        PermanentError: it is not installed.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_DIRECTORIES])
    found = shutil.which(name, path=path)
    if found is None:
        raise PermanentError(f"{name} is not installed", hint="install e2fsprogs (apt install e2fsprogs)")
    return found


def run(name: str, *arguments: str) -> str:
    """Run a program; what it printed.

    Raises:
        PermanentError: it failed; with what it said.
    """
    ran = subprocess.run([tool(name), *arguments], capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    if ran.returncode:
        said = (ran.stderr or ran.stdout).strip()[-800:]
        raise PermanentError(f"{name} failed with status {ran.returncode}: {said}", hint="are the files too large?")
    return ran.stdout + ran.stderr


def check(image: Path) -> None:
    """Have e2fsck look at the whole file system, changing nothing.

    Raises:
        CorruptionError: with what it said, when it is not clean.
    """
    ran = subprocess.run(
        [tool("e2fsck"), "-f", "-n", str(image)], capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
    )
    if ran.returncode:
        said = (ran.stdout + ran.stderr).strip()[-800:]
        raise CorruptionError(f"e2fsck finds the file system of {image} unclean (status {ran.returncode}): {said}")

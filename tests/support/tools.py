"""Tools of the operating system that some tests need, found, or the test skipped with the package that brings it.

`setup/system-packages.txt` is the list; a tool that is not on it is a mistake of the test.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

import pytest

_LIST = Path(__file__).resolve().parents[2] / "setup" / "system-packages.txt"
_ALSO = {
    "qemu-io": "qemu-utils",
    "nbdinfo": "libnbd-bin",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
    "xfs_db": "xfsprogs",
    "xfs_repair": "xfsprogs",
}


@cache
def packages() -> dict[str, str]:
    """Command to the Debian package that brings it."""
    lines = (line.split() for line in _LIST.read_text().splitlines() if line and not line.startswith("#"))
    return {words[1]: words[0] for words in lines} | _ALSO


def need(tool: str) -> str:
    """The path of `tool`; the running test is skipped, with the reason, where there is none."""
    package = packages()[tool]
    # mkfs and its kin live in sbin, which a plain user's PATH often leaves out.
    path = shutil.which(tool, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"there is no {tool} here; as root: apt-get install {package}")
    return path

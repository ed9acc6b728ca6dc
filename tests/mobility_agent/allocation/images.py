"""File systems in image files, made by their own tools, and what those tools say is free."""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

from mobility_agent.allocation.volumes import FreeSpace, free_space
from tests.support.tools import need

MIB = 1 << 20
Pairs = list[tuple[int, int]]


def run(tool: str, *arguments: str | Path) -> str:
    """Run a tool; what it printed."""
    done = subprocess.run([need(tool), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def blank(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as made:
        made.truncate(size_bytes)
    return path


def noise(path: Path, size_bytes: int, seed: int = 1) -> Path:
    """A file with no zeros to speak of."""
    piece = random.Random(seed).randbytes(MIB)
    with path.open("wb") as made:
        for _ in range(size_bytes // MIB):
            made.write(piece)
    return path


def asked(path: Path) -> FreeSpace:
    """What the agent takes for free there."""
    size = path.stat().st_size
    with path.open("rb") as image:
        return free_space(lambda offset, length: os.pread(image.fileno(), length, offset), size)


def pairs(found: FreeSpace) -> Pairs:
    return [(begin, end) for begin, end in found.ranges.tolist()]


def neighbours_joined(found: Pairs) -> Pairs:
    made: Pairs = []
    for begin, end in sorted(found):
        if made and made[-1][1] == begin:
            made[-1] = (made[-1][0], end)
        else:
            made.append((begin, end))
    return made


def free_by_dumpe2fs(path: Path) -> Pairs:
    """The free ranges in bytes. Of a range of clusters it prints the first block of the last one."""
    said = run("dumpe2fs", path)
    block = _number(said, "Block size")
    cluster = _number(said, "Cluster size") if "Cluster size" in said else block
    found: Pairs = []
    for line in re.findall(r"^  Free blocks: (.+)$", said, re.MULTILINE):
        for item in filter(None, line.split(", ")):
            first, _, last = item.partition("-")
            found.append((int(first) * block, int(last or first) * block + cluster))
    size = _number(said, "Block count") * block
    return neighbours_joined([(begin, min(end, size)) for begin, end in found])


def _number(said: str, what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+)", said, re.MULTILINE)
    assert found is not None, said
    return int(found[1])


def free_by_xfs_db(path: Path) -> tuple[Pairs, Pairs]:
    """The free ranges in bytes: those of the trees, and the blocks of the free lists (AGFL), which are in none."""
    values = dict(re.findall(r"^(\w+) = (\w+)", run("xfs_db", "-r", "-c", "sb 0", "-c", "p", path), re.MULTILINE))
    block, group = int(values["blocksize"]), int(values["agblocks"])
    found: Pairs = []
    listed: Pairs = []
    for number in range(int(values["agcount"])):
        said = run("xfs_db", "-r", "-c", f"agfl {number}", "-c", "p bno", "-c", f"agf {number}", "-c", "p", path)
        header = dict(re.findall(r"^(\w+) = (\w+)", said, re.MULTILINE))
        blocks = dict(re.findall(r"(\d+):(\w+)", said))
        for step in range(int(header["flcount"])):
            place = (number * group + int(blocks[str((int(header["flfirst"]) + step) % len(blocks))])) * block
            listed.append((place, place + block))
    rows = re.findall(r"^\s+(\d+)\s+(\d+)\s+(\d+)$", run("xfs_db", "-r", "-c", "freesp -d", path), re.MULTILINE)
    for number, first, count in ((int(a), int(b), int(c)) for a, b, c in rows):
        found.append(((number * group + first) * block, (number * group + first + count) * block))
    for item in listed:  # `freesp` counts them too
        found.remove(item)
    return neighbours_joined(found), listed

"""Volumes that were altered anywhere: a parser says what is free or that it isn't known, soon, and nothing else."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mobility_agent.allocation import ext4, ntfs, xfs
from mobility_agent.allocation.source import NotKnownError, Ranges, Window
from mobility_agent.allocation.volumes import free_space
from tests.mobility_agent.allocation.images import MIB, blank, run
from tests.mobility_agent.allocation.test_partitions import gpt

#: Of one parse of a volume this small.
PATIENCE_SECONDS = 20.0


class Altered:
    """A volume with some bytes other than they are; reads are noted."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.changes: dict[int, int] = {}
        self.read_at: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.read_at.append((offset, length))
        if not any(offset <= place < offset + length for place in self.changes):
            return self.content[offset : offset + length]
        data = bytearray(self.content[offset : offset + length])
        for place, value in self.changes.items():
            if offset <= place < offset + length:
                data[place - offset] = value
        return bytes(data)


def volumes(directory: Path) -> dict[str, tuple[bytes, Callable[[Window], Ranges]]]:
    made: dict[str, tuple[bytes, Callable[[Window], Ranges]]] = {}
    for name, tool, size, options, parser in (
        ("ext4", "mkfs.ext4", 24, "-b 1024 -O ^metadata_csum,^uninit_bg", ext4.free_ranges),
        ("ext4 with checksums", "mkfs.ext4", 24, "-b 1024", ext4.free_ranges),
        ("XFS", "mkfs.xfs", 320, "-m crc=0", xfs.free_ranges),
        ("XFS with checksums", "mkfs.xfs", 320, "", xfs.free_ranges),
        ("NTFS", "mkntfs", 24, "-Q", ntfs.free_ranges),
    ):
        image = blank(directory / "image", size * MIB)
        run(tool, "-q", "-f" if tool == "mkfs.xfs" else "-F", *options.split(), image)
        made[name] = (image.read_bytes(), parser)
        image.unlink()
    return made


def _try(parser: Callable[[Window], Ranges], altered: Altered) -> bool:
    began = time.monotonic()
    try:
        found = parser(Window(altered.read, 0, len(altered.content)))
    except NotKnownError:
        return False
    finally:
        assert time.monotonic() - began < PATIENCE_SECONDS
    assert (found[:, 0] < found[:, 1]).all()
    assert (found[1:, 0] > found[:-1, 1]).all()
    assert not len(found) or (found[0, 0] >= 0 and found[-1, 1] <= len(altered.content))
    return True


def _alter(parser: Callable[[Window], Ranges], content: bytes, draw: random.Random, rounds: int) -> tuple[int, int]:
    """How many altered volumes were believed, and how many weren't."""
    sound = Altered(content)
    assert _try(parser, sound)
    places = [item for item in sound.read_at if item[1] <= 64 << 10]
    believed = 0
    for _ in range(rounds):
        altered = Altered(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            offset, length = draw.choice(places)
            place = offset + draw.randrange(min(length, 512))
            altered.changes[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, content[place] ^ (1 << draw.randrange(8))))
        believed += _try(parser, altered)
    return believed, rounds - believed


def test_altered_volumes_are_parsed_or_refused_and_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(7)
    for name, (content, parser) in volumes(tmp_path).items():
        _, refused = _alter(parser, content, draw, 15 if name.startswith("XFS") else 120)  # whose log is 64 MiB
        assert refused, name


@pytest.mark.soak
def test_many_altered_volumes_are_parsed_or_refused_and_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(8)
    for name, (content, parser) in volumes(tmp_path).items():
        _, refused = _alter(parser, content, draw, 300)
        assert refused, name


def test_altered_partition_tables_never_fail(tmp_path: Path) -> None:
    draw = random.Random(9)
    content = bytes(gpt([(2048, 4095), (4096, 8191)]))
    for _ in range(500):
        altered = Altered(content)
        for _ in range(draw.randrange(1, 6)):
            place = draw.choice((446 + draw.randrange(66), 512 + draw.randrange(92), 1024 + draw.randrange(256)))
            altered.changes[place] = draw.randrange(256)
        free_space(altered.read, len(content))

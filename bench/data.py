"""What is replicated in the benchmarks: half text, half random bytes, mixed in blocks of 4 KiB, from a seed.

Real disks are neither zeros nor noise. So half of the blocks are real text (the sources of Python's standard library,
as they lie on this machine, and again from the start when they are used up), and half can't be compressed at all. Which
block is which is shuffled, exactly half of either in every run of `RUN_BLOCKS`, so that no part of the data is easier
than another.

Weak: the sources differ a little from one version of Python to the next; the compression ratio is reported with every
result for that reason.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Final

import numpy as np

SEED: Final = 1
BLOCK_BYTES: Final = 4096
RUN_BLOCKS: Final = 256
MIB: Final = 1 << 20
DESCRIPTION: Final = (
    "half text (sources of Python's standard library), half random bytes (not compressible), mixed in blocks of 4 KiB"
)


def mixed(size_bytes: int, *, seed: int = SEED) -> memoryview:
    """`size_bytes` (a multiple of 1 MiB) of the mixture; read-only. The same seed gives the same on the same Python.

    Raises:
        ValueError: another size.
    """
    if size_bytes <= 0 or size_bytes % (RUN_BLOCKS * BLOCK_BYTES):
        raise ValueError(f"{size_bytes} bytes are no whole number of MiB")
    blocks = size_bytes // BLOCK_BYTES
    random = np.random.Generator(np.random.PCG64(seed))
    data = np.frombuffer(random.bytes(size_bytes), np.uint8).reshape(blocks, BLOCK_BYTES).copy()
    order = random.permuted(np.tile(np.arange(RUN_BLOCKS), (blocks // RUN_BLOCKS, 1)), axis=1).reshape(-1)
    is_text = order < RUN_BLOCKS // 2
    text = np.frombuffer(_text(int(is_text.sum()) * BLOCK_BYTES), np.uint8)
    data[is_text] = text.reshape(-1, BLOCK_BYTES)
    return memoryview(data.tobytes())


def _text(size_bytes: int) -> bytes:
    """So much of the standard library's sources, in the order of their names."""
    parts: list[bytes] = []
    there = 0
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        parts.append(file.read_bytes())
        there += len(parts[-1])
        if there >= size_bytes:
            break
    text = b"".join(parts)
    return (text * (1 + size_bytes // len(text)))[:size_bytes]

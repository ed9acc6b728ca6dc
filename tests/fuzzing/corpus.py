"""The corpus: inputs that once reached something new in a parser, or broke it; one archive a target, in `corpus/`.

`make fuzz` begins with it and adds to it, and the tests feed every input of it to the parser as it is today. Archives
are the same bytes for the same inputs, so that a run which finds nothing changes nothing.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

DIRECTORY: Final = Path(__file__).parent / "corpus"
#: Larger inputs reach what smaller ones do, by other numbers; they are left to the golden files.
MOST_BYTES: Final = 16 << 10
#: Of one target, the smallest.
MOST_INPUTS: Final = 400
_TIME: Final = (2026, 1, 1, 0, 0, 0)


def kept(target: str) -> list[bytes]:
    """The inputs of a target, the smallest first; none if there is no archive."""
    path = DIRECTORY / f"{target}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in archive.namelist()]


def keep(target: str, found: Iterable[bytes]) -> int:
    """Add inputs to a target's archive; how many it has then."""
    inputs = {data for data in [*kept(target), *found] if len(data) <= MOST_BYTES}
    chosen = sorted(inputs, key=lambda data: (len(data), data))[:MOST_INPUTS]
    DIRECTORY.mkdir(exist_ok=True)
    with zipfile.ZipFile(DIRECTORY / f"{target}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for data in chosen:
            entry = zipfile.ZipInfo(hashlib.sha256(data).hexdigest()[:16], _TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return len(chosen)

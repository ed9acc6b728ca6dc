"""Where to compress at all: not what does not shrink. (How hard is `level`'s matter.)

zstd finds out by itself that data do not shrink, but has read all of them by then, and the higher its level the more it
tries. So where a machine's last segment held chunks that did not shrink (archives, media, encrypted files come in
runs), the chunks of the next are asked first: a few small samples of each, together one page, a fifth of the cost. As
long as everything shrinks nobody is asked. A chunk that is wrongly passed over is stored as it is, which costs space
and nothing else, and the next segment asks again.

Pure: bytes in, a choice out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

SAMPLES: Final = 4
SAMPLE_BYTES: Final = 1024
#: A sample has to lose this part of itself; zstd's own headers are a tenth of that.
LEAST_GAIN: Final = 1 / 16


class Effort:
    """One machine's memory of what shrank. May be asked by several threads at once: the last segment's word counts."""

    def __init__(self) -> None:
        self.is_doubtful = False

    def choose(self, chunks: Sequence[memoryview], compress: Callable[[bytes], bytes]) -> list[bool]:
        """For every chunk, whether to compress it."""
        if not self.is_doubtful:
            return [True] * len(chunks)
        return [_shrinks(_sample(chunk), compress) for chunk in chunks]

    def learn(self, shrank: Sequence[bool]) -> None:
        """For every chunk, whether it is stored compressed."""
        self.is_doubtful = not all(shrank)


def _sample(chunk: memoryview) -> bytes:
    step = len(chunk) // SAMPLES
    if step <= SAMPLE_BYTES:
        return bytes(chunk)
    return b"".join(chunk[place : place + SAMPLE_BYTES] for place in range(step // 2, len(chunk), step))


def _shrinks(sample: bytes, compress: Callable[[bytes], bytes]) -> bool:
    return len(compress(sample)) <= len(sample) * (1 - LEAST_GAIN)

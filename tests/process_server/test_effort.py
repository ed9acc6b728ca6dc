"""Where to compress at all: what does not shrink is passed over."""

from __future__ import annotations

import random

import zstandard

from process_server.effort import Effort
from replicar.formats import segment

CHUNK_BYTES = segment.DEFAULT_CHUNK_BYTES
NOISE = random.Random(1).randbytes(CHUNK_BYTES)
TEXT = (b"a line of a text that says what many others said before it\n" * CHUNK_BYTES)[:CHUNK_BYTES]
MIXED = b"".join((NOISE if place % 8192 else TEXT)[place : place + 4096] for place in range(0, CHUNK_BYTES, 4096))
compress = zstandard.ZstdCompressor(level=1).compress


def views(*chunks: bytes) -> list[memoryview]:
    return [memoryview(chunk) for chunk in chunks]


def test_while_everything_shrinks_nothing_is_asked() -> None:
    def never(_: bytes) -> bytes:
        raise AssertionError("nobody is asked")

    effort = Effort()
    assert effort.choose(views(TEXT, NOISE), never) == [True, True]
    effort.learn([True, True])
    assert effort.choose(views(TEXT, NOISE), never) == [True, True]


def test_after_a_segment_that_did_not_shrink_each_chunk_is_asked_first() -> None:
    effort = Effort()
    effort.learn([True, False])
    chunks = views(TEXT, NOISE, MIXED, NOISE[:512], TEXT[:512])
    assert effort.choose(chunks, compress) == [True, False, True, False, True]


def test_once_everything_shrinks_again_nobody_is_asked_any_more() -> None:
    effort = Effort()
    effort.learn([False])
    effort.learn([True])
    assert effort.choose(views(NOISE), compress) == [True]

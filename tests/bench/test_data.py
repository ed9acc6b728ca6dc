"""What the benchmarks replicate is what they say it is: half text, half noise, the same again from the same seed."""

from __future__ import annotations

import pytest
import zstandard

from bench import data

MIB = 1 << 20


def _shrinks(block: bytes) -> bool:
    return len(zstandard.ZstdCompressor(level=1).compress(block)) < len(block) * 0.9


def test_exactly_half_of_the_blocks_of_every_mebibyte_can_be_compressed() -> None:
    mixed = data.mixed(3 * MIB)
    for start in range(0, len(mixed), MIB):
        blocks = [bytes(mixed[at : at + data.BLOCK_BYTES]) for at in range(start, start + MIB, data.BLOCK_BYTES)]
        assert sum(map(_shrinks, blocks)) == len(blocks) // 2


def test_text_and_noise_are_shuffled_so_that_no_chunk_is_all_of_one_kind() -> None:
    mixed = data.mixed(4 * MIB)
    chunk = 128 << 10
    sizes = [len(zstandard.ZstdCompressor(level=1).compress(mixed[at : at + chunk])) for at in range(0, 4 * MIB, chunk)]
    assert max(sizes) < 0.95 * chunk
    assert min(sizes) > 0.35 * chunk


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    assert data.mixed(MIB, seed=5) == data.mixed(MIB, seed=5)
    assert data.mixed(MIB, seed=5) != data.mixed(MIB, seed=6)


@pytest.mark.parametrize("size", [0, -MIB, MIB - 4096])
def test_a_size_that_is_no_whole_number_of_mebibytes_is_a_programmers_error(size: int) -> None:
    with pytest.raises(ValueError, match="no whole number"):
        data.mixed(size)

"""Log blobs: names in reading order, headers that belong to them."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import given, strategies as st

from replicar.errors import CorruptionError
from replicar.formats import logblob
from replicar.formats.logblob import BlobHeader, BlobName
from tests.formats.strategies import MACHINE, SEQUENCES
from tests.golden.make_golden import flipped

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
NAMES = st.builds(BlobName, st.uuids(), U32, U32, st.integers(0, logblob.MAX_STRIPES - 1))
HEADERS = st.builds(
    BlobHeader,
    NAMES,
    SEQUENCES,
    SEQUENCES,
    st.binary(min_size=32, max_size=32),
    U64,
    st.binary(min_size=40, max_size=40),
    U64,
)
NAME = BlobName(MACHINE, 1, 2, 3)


@given(name=NAMES)
def test_a_name_comes_back(name: BlobName) -> None:
    assert logblob.read_name(str(name)) == name
    assert str(name).startswith(logblob.log_prefix(name.machine_id))


@given(names=st.lists(st.builds(BlobName, st.just(MACHINE), U32, U32, st.integers(0, 63)), max_size=8))
def test_names_sort_as_text_in_reading_order(names: list[BlobName]) -> None:
    assert [logblob.read_name(text) for text in sorted(map(str, names))] == sorted(names)


@pytest.mark.parametrize(
    "text",
    [
        "",
        str(NAME) + "\n",
        " " + str(NAME),
        str(NAME).upper(),
        str(NAME).replace("-03.", "-40."),
        str(NAME).replace("-03.", "-3."),
        str(NAME).replace("00000001", "0000000\u0661"),
        str(NAME).replace(str(MACHINE), "1-" + str(MACHINE)[1:].replace("-", "", 1)),
        str(NAME).replace(str(MACHINE), "-" * 36),
        str(NAME).replace(str(MACHINE), "../" * 12),
    ],
)
def test_a_name_that_is_only_alike_is_none(text: str) -> None:
    assert logblob.read_name(text) is None


@given(header=HEADERS)
def test_a_header_comes_back(header: BlobHeader) -> None:
    data = header.pack()
    assert len(data) == logblob.HEADER_BYTES
    assert logblob.read_header(data + b"segments") == header


def test_a_blob_that_was_never_written_has_no_header() -> None:
    assert logblob.read_header(bytes(logblob.HEADER_BYTES)) is None


GOOD = BlobHeader(NAME, 1, 1, bytes(32), 1, bytes(range(40)), 5).pack()


def test_any_flipped_bit_of_a_header_is_found() -> None:
    for place in range(160):
        for bit in range(8):
            with pytest.raises(CorruptionError):
                logblob.read_header(flipped(GOOD, place, bit))


@pytest.mark.parametrize(("place", "value"), [(8, 2), (12, 513), (40, 64), (48, 0), (56, 0)])
def test_a_header_that_claims_what_cannot_be_is_refused(place: int, value: int) -> None:
    wide = place >= 48
    changed = bytearray(GOOD)
    struct.pack_into("<Q" if wide else "<I", changed, place, value)
    struct.pack_into("<Q", changed, 152, xxhash.xxh3_64_intdigest(bytes(changed[:152])))
    with pytest.raises(CorruptionError):
        logblob.read_header(changed)


def test_a_short_blob_has_no_header() -> None:
    with pytest.raises(CorruptionError):
        logblob.read_header(GOOD[:-1])

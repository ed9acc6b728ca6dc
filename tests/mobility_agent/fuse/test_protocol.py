"""The FUSE protocol by its bytes: as the kernel's header file says; anything else is a declared error."""

from __future__ import annotations

import errno
import random
import struct

import pytest

from replicar.errors import CorruptionError
from replicar.fuse import protocol
from replicar.fuse.protocol import FILE, ROOT, Opcode, Tree

TREE = Tree("disk", 1 << 20, owner=0, group=0, time_ns=1_700_000_000_000_000_000)


def _request(opcode: int, body: bytes, *, node: int = FILE, unique: int = 9) -> memoryview:
    return memoryview(struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 1, 0, 0) + body)


def test_a_write_is_read_as_the_header_file_lays_it_out() -> None:
    body = bytes.fromhex("0200000000000000 0010000000000000 00020000 00000000 0000000000000000 02800000 00000000")
    found = protocol.read_request(_request(16, body + b"x" * 512))
    assert (found.opcode, found.unique, found.node, found.body, found.end) == (Opcode.WRITE, 9, FILE, 40, 40 + 40 + 512)
    handle, offset, size, *_ = protocol.fields(protocol.WRITE, memoryview(body))
    assert (handle, offset, size) == (2, 4096, 512)


def test_hello_settles_for_what_both_speak() -> None:
    offered = 0xFFFFFFFF
    answer = protocol.init(1, memoryview(struct.pack("=IIII", 7, 45, 131072, offered)))
    length, error, unique, major, minor, readahead, flags, background, _, max_write = struct.unpack_from(
        "=IiQIIIIHHI", answer
    )
    assert (length, error, unique, major, minor) == (len(answer), 0, 1, 7, 31)
    assert len(answer) == 16 + 64  # fuse_out_header, fuse_init_out
    assert (readahead, background, max_write) == (131072, 64, 256 << 10)
    assert flags == 1 | 1 << 5 | 1 << 15 | 1 << 22


def test_another_major_version_is_refused() -> None:
    with pytest.raises(CorruptionError, match="FUSE 8"):
        protocol.init(1, memoryview(struct.pack("=IIII", 8, 0, 0, 0)))


@pytest.mark.parametrize(("name", "size"), [("lookup", 16 + 40 + 88), ("attributes", 16 + 16 + 88), ("space", 16 + 80)])
def test_answers_have_the_sizes_of_the_header_file(name: str, size: int) -> None:
    answers = {"lookup": TREE.lookup(1, memoryview(b"disk\0")), "attributes": TREE.attributes(1, FILE)}
    answer = {**answers, "space": TREE.space(1)}[name]
    assert len(answer) == struct.unpack_from("=I", answer)[0] == size


def test_the_file_has_the_disks_size_and_is_its_owners_alone() -> None:
    fields = struct.unpack_from("=QQQ", TREE.attributes(1, FILE), 16 + 16)
    assert fields == (FILE, 1 << 20, 2048)
    (mode,) = struct.unpack_from("=I", TREE.attributes(1, FILE), 16 + 16 + 48 + 12)
    assert mode == 0o100600


def test_no_other_name_is_found() -> None:
    assert struct.unpack("=IiQ", TREE.lookup(4, memoryview(b"disk2\0"))) == (16, -errno.ENOENT, 4)


def test_the_listing_goes_on_where_it_ended() -> None:
    whole, names, offset = TREE.listing(1, 0, 4096)[16:], [], 0
    while entries := TREE.listing(1, offset, 32)[16:]:
        _, offset, length, _ = struct.unpack_from("=QQII", entries)
        names.append(entries[24 : 24 + length])
        assert whole.startswith(entries, whole.index(entries))
    assert names == [b".", b"..", b"disk"]


def test_having_the_size_asked_for_again_names_the_file_and_none_of_its_bytes() -> None:
    assert protocol.forget_attributes() == struct.pack("=IiQQqq", 40, 2, 0, FILE, -1, 0)


def test_asking_again_is_a_notification_of_its_own() -> None:
    assert protocol.resend() == struct.pack("=IiQ", 16, 7, 0)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_read_is_a_request_or_corrupt(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(3000):
        opcode = draw.choice([*Opcode, draw.randrange(1 << 32)])
        data = bytearray(
            _request(opcode, draw.randbytes(draw.choice((0, 3, 16, 40, 80))), node=draw.choice((ROOT, FILE, 7)))
        )
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        view = memoryview(data)[: draw.choice((len(data), draw.randrange(len(data) + 1)))]
        try:
            found = protocol.read_request(view)
            rest = view[found.body :]
            for layout in (protocol.WRITE, protocol.FALLOCATE, protocol.LSEEK):
                protocol.fields(layout, rest)
            protocol.init(found.unique, rest)
            TREE.lookup(found.unique, rest)
        except CorruptionError:
            pass

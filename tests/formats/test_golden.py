"""Golden files: what was once written can still be read, what was bad is still refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest
import zstandard

from replicar import errors
from replicar.formats import changelog, frame, indexblob, logblob, overlay, segment, vhd, wire
from tests.golden import make_golden, sample

MANIFEST = json.loads(make_golden.MANIFEST.read_text(encoding="utf-8"))
FILES = {entry["file"]: entry for entry in MANIFEST["files"]}


def _read_segment(data: bytes) -> None:
    header = segment.read_header(data)
    assert header is not None
    end = header.table_offset + header.table_bytes
    table = segment.open_table(header, data[header.table_offset : end], sample.DATA_KEY)
    edges = [int(edge) for edge in table.chunk_offsets]
    chunks = range(header.chunk_count)
    run = b"".join(segment.open_chunk(table, i, data[edges[i] : edges[i + 1]], sample.DATA_KEY) for i in chunks)
    segment.check_run(table, run)
    assert run == b"".join(sample.stream().frames[:2])


def _read_changelog(data: bytes) -> None:
    found = changelog.scan(memoryview(bytearray(data)), trust_staging=True)
    count = len(sample.stream().frames)
    assert len(found.frames) - bool(found.recovered) == count - bool(found.torn)
    if found.torn is not None:
        raise _TornError(found.torn)


class _TornError(Exception):
    """The verdict "torn"."""


def _read_whole_log(data: bytes) -> None:
    assert logblob.read_header(data) is not None


def _read_index(data: bytes) -> None:
    about = next(entry["about"] for entry in FILES.values() if make_golden.load(entry) == data)
    name = indexblob.read_name(about)
    assert name is not None
    header = indexblob.read_header(data, name)
    assert header is not None
    root = indexblob.open_root(header, data[header.root_offset :][: header.root_bytes], sample.DATA_KEY)
    for index, entry in enumerate(root.sections):
        sealed = data[int(entry["offset"]) :][: int(entry["sealed_bytes"])]
        assert indexblob.open_section(root, index, sealed, sample.DATA_KEY)


READERS: dict[str, Callable[[bytes], object]] = {
    "frame": frame.read_frame,
    "changelog": _read_changelog,
    "message": wire.read_message,
    "segment": _read_segment,
    "log": _read_whole_log,
    "blob": logblob.read_header,
    "folded": _read_whole_log,
    "index": _read_index,
    "vhd": vhd.read_footer,
    "overlay": overlay.read_header,
}


@pytest.mark.parametrize("name", FILES)
def test_a_golden_file_is_judged_as_it_was(name: str) -> None:
    entry = FILES[name]
    data = make_golden.load(entry)
    assert hashlib.sha256(data).hexdigest() == entry["sha256"], "a golden file was changed"
    read = READERS[entry["format"]]
    if entry["verdict"] == "good":
        found = read(data)
        assert found is not None or entry["format"] not in ("frame", "message"), "taken for an incomplete one"
        return
    kind = _TornError if entry["verdict"] == "torn" else getattr(errors, entry["verdict"])
    with pytest.raises(kind):
        read(data)


def test_every_format_has_good_and_bad_files() -> None:
    for kind in ("frame", "changelog", "message", "segment", "vhd", "overlay"):
        verdicts = {entry["verdict"] for entry in FILES.values() if entry["format"] == kind}
        assert {"good", "CorruptionError"} <= verdicts


def test_every_golden_file_is_in_the_manifest() -> None:
    assert {path.name for path in make_golden.FOLDER.glob("*.bin")} == set(FILES)


def test_todays_code_writes_the_golden_files_again() -> None:
    made = {item.file: item for item in make_golden.make()}
    assert set(made) == set(FILES)
    same_zstd = list(zstandard.ZSTD_VERSION) == MANIFEST["zstd"]  # another zstd may compress to other bytes
    for name, item in made.items():
        if same_zstd or item.format not in ("segment", "log", "blob"):
            assert item.entry() == FILES[name]


def test_the_golden_messages_say_what_they_said() -> None:
    said = [
        wire.read_message(make_golden.load(FILES[f"message-{name}.v1.good.bin"]))
        for name in ("hello", "welcome", "ack", "resend", "error")
    ]
    assert [found[0] for found in said if found is not None] == [
        wire.Hello(sample.MACHINE, 1, 20, (1, 2), "mobility-agent"),
        wire.Welcome(20, 19, 1),
        wire.Ack(1234, 1000),
        wire.Resend(7, "the frame's table fails its checksum"),
        wire.Refusal("FencedError", "replaced", "stop \u2713"),
    ]


def test_the_golden_change_log_gives_back_the_write_that_was_under_way() -> None:
    data = bytearray(make_golden.load(FILES["changelog.v1.staged.bin"]))
    found = changelog.scan(memoryview(data), trust_staging=True)
    assert found.recovered == 1
    rescued = frame.read_frame(data, found.frames[-1].offset)
    assert rescued is not None
    assert bytes(rescued.payload[28:]) == b"open" * 128
    again = changelog.scan(memoryview(data), trust_staging=True)
    assert (again.next_sequence, again.recovered, again.torn) == (found.next_sequence, 0, None)

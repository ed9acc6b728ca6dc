"""docs/formats.md against the code and the golden files: tables, examples and figures that can't rot."""

from __future__ import annotations

import json
import re
import struct
import uuid

import pytest

from recovery import directory
from recovery.replica import journal
from replicar.formats import changelog, cipher, frame, indexblob, logblob, overlay, sections, segment, vhd, wire
from replicar.formats.wire import AGENT_TABLE, State
from tests.golden import layouts, make_golden, sample

TEXT = layouts.DOCUMENT.read_text(encoding="utf-8")
TABLES = layouts.layouts(TEXT)
STORED = {
    entry["file"]: make_golden.load(entry)
    for entry in json.loads(make_golden.MANIFEST.read_text(encoding="utf-8"))["files"]
}

SIZES = {
    "frame-header": frame.HEADER_BYTES,
    "descriptor": frame.DESCRIPTOR_BYTES,
    "changelog-header": changelog.HEADER_BYTES,
    "changelog-staging": changelog.STAGING_TABLE,
    "message-header": wire.HEADER_BYTES,
    "ack-body": 16,
    "segment-header": segment.HEADER_BYTES,
    "position": len(cipher.Position(uuid.UUID(int=1), 1, 1, 1, 1, 1).pack()),
    "chunk-entry": segment.CHUNK_ENTRY.itemsize,
    "frame-entry": segment.FRAME_ENTRY.itemsize,
    "blob-header": logblob.HEADER_BYTES,
    "index-header": indexblob.HEADER_BYTES,
    "index-position": 48,
    "index-section": indexblob.SECTION_ENTRY.itemsize,
    "index-entry": directory.ENTRY.itemsize,
    "vhd-footer": vhd.FOOTER_BYTES,
    "replica-slot": journal.HEAD_BYTES,
    "overlay-header": overlay.FIELDS_BYTES,
    "overlay-session": overlay.SESSION_BYTES,
}


def test_every_layout_has_its_table() -> None:
    assert {name: table.size for name, table in TABLES.items()} == SIZES


@pytest.mark.parametrize("name", SIZES)
def test_a_byte_table_has_no_holes_and_ends_where_it_says(name: str) -> None:
    table = TABLES[name]
    end = 0
    for field in table.fields:
        assert field.offset == end, f"{field.name} of {name}"
        assert field.size > 0
        end += field.size
    assert end == table.size
    assert len({field.name for field in table.fields}) == len(table.fields)


def test_the_examples_are_the_golden_files_explained() -> None:
    assert layouts.examples(TEXT) == make_golden.examples(STORED, TEXT)


def test_the_documents_frame_table_reads_what_the_code_wrote() -> None:
    data = STORED["frame.v1.good.bin"]
    said = TABLES["frame-header"].values(data)
    header = frame.read_header(data)
    assert header is not None
    assert (said["magic"], said["version"], said["codec"], said["flags"]) == ("RPFR", frame.VERSION, 0, 0)
    assert (said["payload_bytes"], said["count"], said["machine_id"]) == (512, 2, sample.MACHINE)
    assert (said["first_sequence"], said["payload_checksum"]) == (header.first_sequence, header.payload_checksum)
    assert said["table_checksum"] == header.table_checksum


def test_the_documents_descriptor_is_numpys_descriptor() -> None:
    said = {
        field.name: (f"<u{field.size}" if field.size > 1 else "|u1", field.offset) for field in _fields("descriptor")
    }
    code = {name: (kind.str, place) for name, (kind, place, *_) in (frame.DESCRIPTOR.fields or {}).items()}
    assert said == code


@pytest.mark.parametrize(
    ("name", "dtype"), [("chunk-entry", segment.CHUNK_ENTRY), ("frame-entry", segment.FRAME_ENTRY)]
)
def test_the_documents_entries_are_numpys_entries(name: str, dtype: object) -> None:
    said = {field.name: (field.offset, field.size) for field in _fields(name)}
    assert dtype in (segment.CHUNK_ENTRY, segment.FRAME_ENTRY)
    fields = segment.CHUNK_ENTRY.fields if dtype == segment.CHUNK_ENTRY else segment.FRAME_ENTRY.fields
    assert said == {key: (place, kind.itemsize) for key, (kind, place, *_) in (fields or {}).items()}


def test_the_documents_change_log_table_reads_what_the_code_wrote() -> None:
    data = STORED["changelog.v1.staged.bin"]
    said = TABLES["changelog-header"].values(data)
    header = changelog.read_header(data)
    assert said["magic"] == changelog.MAGIC
    assert (said["version"], said["header_bytes"]) == (changelog.VERSION, changelog.HEADER_BYTES)
    assert {name: said[name] for name in ("machine_id", "first_sequence", "file_bytes", "created_ns")} == {
        "machine_id": header.machine_id,
        "first_sequence": header.first_sequence,
        "file_bytes": header.file_bytes,
        "created_ns": header.created_ns,
    }
    staging = TABLES["changelog-staging"].values(data[changelog.STAGING_OFFSET :])
    assert staging["count"] == 1
    assert staging["first_sequence"] == sample.stream().next_sequence


def test_the_documents_segment_tables_read_what_the_code_wrote() -> None:
    data = STORED["segment.v1.good.bin"]
    header = segment.read_header(data)
    assert header is not None
    said = TABLES["segment-header"].values(data)
    place = header.position
    wanted = {name: getattr(header, name) for name in _names("segment-header") if hasattr(header, name)}
    wanted |= {name: getattr(place, name) for name in _names("position") if hasattr(place, name)}
    assert len(wanted) == 17
    assert {name: said[name] for name in wanted} == wanted
    assert (said["magic"], said["version"], said["header_bytes"]) == (segment.MAGIC, 1, segment.HEADER_BYTES)
    bound = TABLES["position"].values(place.pack())
    assert bound["magic"] == segment.MAGIC
    assert {name: bound[name] for name in _names("position") if hasattr(place, name)}.items() <= said.items()


def test_the_documents_blob_table_reads_what_the_code_wrote() -> None:
    data = next(data for name, data in STORED.items() if name.startswith("log.v1.00000002"))
    said = TABLES["blob-header"].values(data)
    header = logblob.read_header(data)
    assert header is not None
    wanted = {name: getattr(header, name) for name in _names("blob-header") if hasattr(header, name)}
    wanted |= {name: getattr(header.name, name) for name in ("machine_id", "epoch", "run", "stripe")}
    assert len(wanted) == 10
    assert {name: said[name] for name in wanted} == wanted


def test_the_documents_index_tables_read_what_the_code_wrote() -> None:
    for file, data in STORED.items():
        if not file.startswith("index.v") or "bad" in file:
            continue
        name = indexblob.read_name(next(entry["about"] for entry in _manifest() if entry["file"] == file))
        assert name is not None
        header = indexblob.read_header(data, name)
        assert header is not None
        said = TABLES["index-header"].values(data)
        wanted = {field: getattr(header, field) for field in _names("index-header") if hasattr(header, field)}
        wanted |= {"machine_id": name.machine_id, "kind": name.kind, "first": name.first, "last": name.last}
        assert len(wanted) == 12
        assert {field: said[field] for field in wanted} == wanted
        bound = TABLES["index-position"].values(name.pack())
        assert {field: bound[field] for field in ("machine_id", "kind", "first", "last")}.items() <= wanted.items()


def _manifest() -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(make_golden.MANIFEST.read_text(encoding="utf-8"))["files"]
    return found


def test_the_documents_footer_table_reads_what_the_code_wrote() -> None:
    data = STORED["vhd-footer.v1.good.bin"]
    said = TABLES["vhd-footer"].values(data)
    footer = vhd.read_footer(data)
    assert (said["cookie"], said["creator"], said["disk_type"]) == ("conectix", "win ", 2)
    assert (said["cylinders"], said["heads"], said["sectors"]) == footer.geometry
    assert (said["virtual_bytes"], said["unique_id"]) == (footer.virtual_bytes, footer.unique_id)
    assert said["created"] == footer.created_seconds - vhd.VHD_EPOCH_SECONDS
    assert said["data_offset"] == (1 << 64) - 1


def test_the_documents_overlay_tables_read_what_the_code_wrote() -> None:
    data = STORED["overlay.v1.good.bin"]
    said, header = TABLES["overlay-header"].values(data), overlay.read_header(data)
    base = header.base
    assert (said["magic"], said["version"], said["header_bytes"]) == (overlay.MAGIC, 1, overlay.HEADER_BYTES)
    wanted = {name: getattr(base, name) for name in ("machine_id", "sequence", "time_ns", "disk_bytes", "disk")}
    wanted |= {name: getattr(header, name) for name in ("bitmap_bytes", "data_offset", "created_ns")}
    assert {name: said[name] for name in wanted} == wanted
    assert said["name"] == base.disk_name.encode().ljust(overlay.MAX_NAME_BYTES, b"\0")
    session = data[overlay.SESSION_OFFSET :]
    assert TABLES["overlay-session"].values(session)["boot_id"] == overlay.read_session(session) == sample.MACHINE


def test_the_message_example_is_an_ack_by_the_documents_tables() -> None:
    data = STORED["message-ack.v1.good.bin"]
    head, body = TABLES["message-header"].values(data), TABLES["ack-body"].values(data[wire.HEADER_BYTES :])
    assert (head["magic"], head["version"], head["type"], head["body_bytes"]) == ("RPMS", 1, wire.MessageType.ACK, 16)
    assert wire.read_message(data) == (wire.Ack(*struct.unpack_from("<QQ", data, 20)), len(data))
    assert body == {"received_sequence": 1234, "stored_sequence": 1000}


def test_the_documents_state_table_is_the_codes() -> None:
    rows = dict(re.findall(r"^\| (INTRODUCING|ANSWERING|STREAMING|CLOSED)[^|]*\|(.*)\|$", TEXT, re.MULTILINE))
    assert set(rows) == {state.name for state in State}
    kinds = (wire.Welcome, wire.Ack, wire.Resend, wire.Refusal)
    for state in State:
        cells = [cell.strip() for cell in rows[state.name].split("|")]
        for kind, cell in zip(kinds, cells, strict=True):
            following = AGENT_TABLE.get((state, kind))
            assert cell == (following.name if following else "dropped" if state is State.CLOSED else "-")


def test_the_documents_kinds_and_limits_are_the_codes() -> None:
    kinds = dict(re.findall(r"^\| (\d) \| ([A-Z]+) \|", TEXT.split("## Wire")[0], re.MULTILINE))
    assert {int(number): name for number, name in kinds.items()} == {kind.value: kind.name for kind in frame.Kind}
    types = dict(re.findall(r"^\| (\d) \| ([A-Z]+) \|", TEXT.split("## Wire")[1], re.MULTILINE))
    assert {int(number): name for number, name in types.items()} == {kind.value: kind.name for kind in wire.MessageType}
    for limit in (
        frame.MAX_PAYLOAD_BYTES,
        frame.MAX_DESCRIPTORS,
        frame.MAX_RECORD_BYTES,
        changelog.STAGING_CAPACITY,
        changelog.FRAMES_OFFSET,
        wire.MAX_BODY_BYTES,
        wire.MAX_TEXT_BYTES,
        segment.MAX_RAW_BYTES,
    ):
        assert f"{limit:,}" in TEXT, f"{limit:,}"
    assert "2^62" in TEXT
    assert frame.MAX_DISK_BYTES == 1 << 62
    assert sections.MAX_INDEX_BYTES == segment.MAX_SEGMENT_BYTES == 4 << 20


def _fields(name: str) -> tuple[layouts.Field, ...]:
    return TABLES[name].fields


def _names(name: str) -> list[str]:
    return [field.name for field in _fields(name) if field.type != "zero"]

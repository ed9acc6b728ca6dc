"""Makes the golden files and the document's examples: `python -m tests.golden.make_golden [--write] [--replace]`.

Golden files hold the formats still: once released they are never made again differently. So without options this only
says what differs; `--write` adds what is missing and renews the examples; `--replace` is for formats that nobody has
used yet. Trailing zeros are left off the files (`load` puts them back), for a change log has 4 MiB of them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import struct
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash
import zstandard

from replicar.formats import changelog, cipher, frame, indexblob, overlay, segment, vhd, wire
from replicar.formats.frame import Kind
from tests.golden import folded, layouts, sample

FOLDER = Path(__file__).resolve().parent
MANIFEST = FOLDER / "manifest.json"
CREATED = 1_764_000_000


@dataclass(frozen=True)
class Golden:
    """A golden file: `verdict` is what reading it gives, "good", "torn" or the class of an error."""

    file: str
    format: str
    version: int
    verdict: str
    about: str
    data: bytes

    def entry(self) -> dict[str, object]:
        """What the manifest says of it."""
        entry = {key: value for key, value in asdict(self).items() if key != "data"}
        return {**entry, "bytes": len(self.data), "sha256": hashlib.sha256(self.data).hexdigest()}


def load(entry: dict[str, object]) -> bytes:
    """A golden file's bytes, as they were made."""
    return (FOLDER / str(entry["file"])).read_bytes().ljust(int(str(entry["bytes"])), b"\0")


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def example_frame() -> bytes:
    table = frame.describe(Kind.WRITE, disk=1, offset=4096, length=512, time_ns=sample.TIME, place=0)
    table += frame.describe(Kind.ZERO, disk=1, offset=8192, length=1 << 20, time_ns=sample.TIME + 1)
    return frame.build_frame(sample.MACHINE, 7, table, b"a" * 512)


def _frames() -> list[Golden]:
    good = example_frame()
    wild = frame.describe(Kind.WRITE, offset=4096, length=512, time_ns=1, place=1)
    newer = bytearray(good)
    newer[4] = 2
    newer[56:64] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(newer[:56])))
    rows = [
        ("good", "good", "a WRITE and a ZERO", good),
        ("bad-header", "CorruptionError", "a bit of the header flipped", flipped(good, 13)),
        ("bad-payload", "CorruptionError", "a bit of the payload flipped", flipped(good, 100)),
        ("bad-table", "CorruptionError", "a bit of the table flipped", flipped(good, len(good) - 5)),
        (
            "bad-place",
            "CorruptionError",
            "sound checksums, but a descriptor that points outside the payload",
            frame.build_frame(sample.MACHINE, 7, wild, b"a" * 512),
        ),
        ("bad-version", "CorruptionError", "version 2, which is not known yet", bytes(newer)),
    ]
    return [Golden(f"frame.v1.{name}.bin", "frame", 1, verdict, about, data) for name, verdict, about, data in rows]


def _changelogs() -> list[Golden]:
    stream = sample.stream()
    size = changelog.MIN_FILE_BYTES
    header = changelog.ChangeLogHeader(sample.MACHINE, sample.FIRST, size, sample.TIME).pack()
    whole = bytearray(size)
    whole[: len(header)] = header
    last = end = changelog.FRAMES_OFFSET
    for data in stream.frames:
        whole[end : end + len(data)] = data
        last, end = end, end + len(data)
    staged = bytearray(whole)
    changelog.stage_frame(memoryview(staged), end, stream.next_sequence)
    open_table = frame.describe(Kind.WRITE, length=512, time_ns=sample.TIME + 99, place=28)
    start = changelog.STAGING_OFFSET + changelog.STAGING_TABLE
    staged[start : start + len(open_table)] = open_table
    staged[end + 64 + 28 : end + 64 + 28 + 512] = b"open" * 128
    staged[changelog.STAGED_COUNT] = changelog.PACK_STAGED_COUNT.pack(1)
    rows = [
        ("good", "good", "seven frames and nothing else", bytes(whole)),
        ("staged", "good", "seven frames, and one that was open when the process died", bytes(staged)),
        ("torn", "torn", "the last frame is not whole", flipped(bytes(whole), last + 70)),
        ("bad-header", "CorruptionError", "a bit of the header flipped", flipped(bytes(whole), 33)),
    ]
    return [
        Golden(f"changelog.v1.{name}.bin", "changelog", 1, verdict, about, data) for name, verdict, about, data in rows
    ]


def raw_message(kind: int, body: bytes, *, claimed: int | None = None) -> bytes:
    """A message with a sound checksum around any body."""
    head = struct.pack("<4sBBHI", wire.MAGIC, wire.VERSION, kind, 0, len(body) if claimed is None else claimed)
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + body)) + body


def _messages() -> list[Golden]:
    ack = wire.pack_message(wire.Ack(1234, 1000))
    rows = [
        ("hello.v1.good", "good", "", wire.pack_message(wire.Hello(sample.MACHINE, 1, 20, (1, 2), "mobility-agent"))),
        ("welcome.v1.good", "good", "", wire.pack_message(wire.Welcome(20, 19))),
        ("ack.v1.good", "good", "", ack),
        ("resend.v1.good", "good", "", wire.pack_message(wire.Resend(7, "the frame's table fails its checksum"))),
        ("error.v1.good", "good", "", wire.pack_message(wire.Refusal("FencedError", "replaced", "stop \u2713"))),
        ("ack.v1.bad-checksum", "CorruptionError", "a bit of the body flipped", flipped(ack, 21)),
        ("ack.v1.bad-length", "CorruptionError", "an ACK of 8 bytes", raw_message(3, bytes(8))),
        ("error.v1.bad-text", "CorruptionError", "half a surrogate pair", raw_message(5, _half_pair())),
        ("error.v1.bad-size", "CorruptionError", "a body of 16 KiB and 1", raw_message(5, b"", claimed=16385)),
        ("hello.v1.bad-number", "CorruptionError", "a sequence of 2^64", raw_message(1, _hello(1 << 64))),
    ]
    return [Golden(f"message-{name}.bin", "message", 1, verdict, about, data) for name, verdict, about, data in rows]


def _half_pair() -> bytes:
    return json.dumps({"error": "FencedError", "message": "\ud800", "hint": ""}).encode()


def _hello(following: int) -> bytes:
    return json.dumps(
        {
            "machine_id": str(sample.MACHINE),
            "first_sequence": 1,
            "next_sequence": following,
            "versions": [1],
            "software": "",
        }
    ).encode()


def nonsense_segment() -> bytes:
    """A segment whose table was sealed with the right key and holds nonsense: zstd that claims 2^50 bytes."""
    good, _ = sample.sealed(sample.stream().frames[:1], 1, 1, 1, segment.FIRST_DIGEST)
    header = segment.read_header(good)
    assert header is not None
    packed = bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", 1 << 50) + b"\x01\x00\x00"
    packed = packed.ljust(header.table_bytes - segment.TAG_BYTES, b"\0")
    key = cipher.segment_key(sample.DATA_KEY, header.salt, header.position)
    sealed = key.encrypt(cipher.nonce(0), packed, header.pack())
    return good[: header.table_offset] + sealed + good[header.table_offset + header.table_bytes :]


def _segments_and_logs() -> list[Golden]:
    good, _ = sample.sealed(sample.stream().frames[:2], 1, 1, 1, segment.FIRST_DIGEST)
    header = segment.read_header(good)
    assert header is not None
    blobs, _ = sample.log()
    rows = [
        ("good", "good", "two frames in chunks of 4 KiB", good),
        ("bad-header", "CorruptionError", "a bit of the header flipped", flipped(good, 42)),
        ("bad-table", "CorruptionError", "a bit of the table flipped", flipped(good, header.table_offset + 9)),
        ("bad-chunk", "CorruptionError", "a bit of a chunk flipped", flipped(good, 200)),
        ("bad-claim", "CorruptionError", "an authentic table that claims 2^50 bytes", nonsense_segment()),
    ]
    made = [Golden(f"segment.v1.{name}.bin", "segment", 1, verdict, about, data) for name, verdict, about, data in rows]
    for name, data in blobs.items():
        made.append(Golden(f"log.v1.{name.rsplit('/', 1)[1]}.bin", "log", 1, "good", name, data))
    some = next(iter(blobs.values()))
    made.append(Golden("blob.v1.bad-header.bin", "blob", 1, "CorruptionError", "a bit flipped", flipped(some, 50)))
    return made


def _folded() -> list[Golden]:
    """The log once more, indexed and folded: its first segments are gone but for what one point of them needs."""
    blobs = asyncio.run(folded.log())
    made = []
    for name, data in sorted(blobs.items()):
        kind, version = "index" if "/index/" in name else "folded", indexblob.VERSION
        made.append(Golden(f"{kind}.v{version}.{name.rsplit('/', 1)[1]}.bin", kind, version, "good", name, data))
    checkpoint = next(item for item in made if item.about.endswith(".checkpoint"))
    bad = flipped(checkpoint.data, 41)
    made.append(Golden("index.v2.bad-header.bin", "index", 2, "CorruptionError", checkpoint.about, bad))
    return made


def _kept() -> list[Golden]:
    """A folded log of the version before, which nobody writes any more and everybody reads: as it was made."""
    entries = json.loads(MANIFEST.read_text(encoding="utf-8"))["files"]
    return [
        Golden(entry["file"], entry["format"], entry["version"], entry["verdict"], entry["about"], load(entry))
        for entry in entries
        if entry["format"] in ("index", "folded") and entry["version"] < indexblob.VERSION
    ]


def _footers() -> list[Golden]:
    good = vhd.pack_footer(3 << 20, sample.MACHINE, CREATED)
    dynamic = (
        good[:60] + struct.pack(">I", 3) + struct.pack(">I", struct.unpack_from(">I", good, 64)[0] - 1) + good[68:]
    )
    rows = [
        ("good", "good", "a disk of 3 MiB", good),
        ("bad-checksum", "CorruptionError", "a bit of the size flipped", flipped(good, 52)),
        ("bad-type", "CorruptionError", "a dynamic disk", dynamic),
    ]
    return [Golden(f"vhd-footer.v1.{name}.bin", "vhd", 1, verdict, about, data) for name, verdict, about, data in rows]


def _overlays() -> list[Golden]:
    base = overlay.Base(sample.MACHINE, 8, sample.TIME + 8, 1, "data", 3 << 20)
    header = overlay.OverlayHeader(base, sample.TIME)
    good = bytearray(header.pack().ljust(header.data_offset + base.disk_bytes, b"\0"))
    session = overlay.pack_session(sample.MACHINE)
    good[overlay.SESSION_OFFSET : overlay.SESSION_OFFSET + len(session)] = session
    good[header.volatile_offset] = 0b110  # two sectors: the second was written after the last flush
    good[header.durable_offset] = 0b10
    good[header.data_offset + 512 : header.data_offset + 1536] = b"over" * 256
    rows = [
        ("good", "good", "a disk of 3 MiB with two sectors written over it, one of them flushed", bytes(good)),
        ("bad-header", "CorruptionError", "a bit of the header flipped", flipped(bytes(good[:4096]), 33)),
    ]
    return [Golden(f"overlay.v1.{name}.bin", "overlay", 1, verdict, about, data) for name, verdict, about, data in rows]


def make() -> list[Golden]:
    """Every golden file, made anew."""
    return [
        *_frames(),
        *_changelogs(),
        *_messages(),
        *_segments_and_logs(),
        *_folded(),
        *_kept(),
        *_footers(),
        *_overlays(),
    ]


def examples(files: dict[str, bytes], document: str) -> dict[str, str]:
    """The document's examples: golden files explained by the document's own tables."""
    tables = layouts.layouts(document)
    item = files["frame.v1.good.bin"]
    log = next(data for name, data in files.items() if name.startswith("log.v1."))
    ack, staged = files["message-ack.v1.good.bin"], files["changelog.v1.staged.bin"]
    where, table_at = changelog.STAGING_OFFSET, frame.HEADER_BYTES + 512
    payload = f"{64:6d}  {item[64:80].hex():32s}  payload  (512 bytes)\n"
    texts = {
        "frame": tables["frame-header"].explain(item) + payload,
        "changelog": tables["changelog-header"].explain(staged)
        + tables["changelog-staging"].explain(staged[where:], where),
        "message": tables["message-header"].explain(ack) + tables["ack-body"].explain(ack[20:], 20),
        "segment": tables["segment-header"].explain(log[512:], 512),
        "blob": tables["blob-header"].explain(log),
        "vhd": tables["vhd-footer"].explain(files["vhd-footer.v1.good.bin"]),
    }
    for start in (table_at, table_at + 32):
        texts["frame"] += tables["descriptor"].explain(item[start:], start)
    start = where + changelog.STAGING_TABLE
    texts["changelog"] += tables["descriptor"].explain(staged[start:], start)
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="add what is missing, renew the document's examples")
    parser.add_argument("--replace", action="store_true", help="overwrite files that differ (unreleased formats only)")
    options = parser.parse_args()
    made = make()
    differ = 0
    for item in made:
        path = FOLDER / item.file
        stored = item.data.rstrip(b"\0")
        state = "missing" if not path.exists() else "same" if path.read_bytes() == stored else "different"
        differ += state != "same"
        if (options.write and state == "missing") or (options.replace and state == "different"):
            path.write_bytes(stored)
            state += ", written"
        print(f"{item.file}: {state}")
    if options.write or options.replace:
        manifest = {"zstd": list(zstandard.ZSTD_VERSION), "files": [item.entry() for item in made]}
        MANIFEST.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        document = layouts.DOCUMENT.read_text(encoding="utf-8")
        texts = examples({item.file: item.data for item in made}, document)
        layouts.DOCUMENT.write_text(layouts.with_examples(document, texts), encoding="utf-8")
        return 0
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())

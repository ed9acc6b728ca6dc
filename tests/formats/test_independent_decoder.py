"""The document is enough: a decoder that shares nothing with the product brings the disks back."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.formats import independent_decoder
from tests.golden import folded, make_golden, sample

KEYS = {sample.KEY_ID: sample.DATA_KEY}


def _golden_log() -> dict[str, bytes]:
    manifest = json.loads(make_golden.MANIFEST.read_text(encoding="utf-8"))
    return {entry["about"]: make_golden.load(entry) for entry in manifest["files"] if entry["format"] == "log"}


def test_the_decoder_imports_nothing_of_the_product() -> None:
    tree = ast.parse(Path(independent_decoder.__file__).read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    rooms = {"replicar", "mobility_agent", "process_server", "config_server", "recovery", "simulator", "tests"}
    assert names
    assert not {name.partition(".")[0] for name in names} & rooms


@pytest.mark.parametrize("sequence", range(sample.FIRST, sample.stream().next_sequence))
def test_the_golden_log_decodes_to_the_disks_at_every_sequence(sequence: int) -> None:
    found = independent_decoder.decode(_golden_log(), sample.MACHINE, KEYS, sequence)
    stream = sample.stream()
    assert found.sequence == sequence
    assert {index: bytes(data) for index, data in found.disks.items()} == stream.states[sequence]
    assert found.in_gap == stream.in_gap[sequence]


def test_the_end_of_the_golden_log_has_its_points_and_its_audit() -> None:
    found = independent_decoder.decode(_golden_log(), sample.MACHINE, KEYS)
    stream = sample.stream()
    assert found.sequence == stream.next_sequence - 1
    assert found.points == stream.marks
    assert found.audits == 1
    assert found.names[1] == "data"


def _folded_log(version: int) -> dict[str, bytes]:
    manifest = json.loads(make_golden.MANIFEST.read_text(encoding="utf-8"))
    kinds = ("folded", "index")
    entries = [entry for entry in manifest["files"] if entry["format"] in kinds and entry["verdict"] == "good"]
    return {entry["about"]: make_golden.load(entry) for entry in entries if entry["version"] == version}


@pytest.mark.parametrize("version", [1, 2])
def test_a_folded_log_decodes_to_what_is_kept_and_to_everything_behind_its_floor(version: int) -> None:
    blobs, stream = _folded_log(version), sample.stream()
    kept = next(iter(stream.marks.values()))
    last = stream.next_sequence - 1
    for sequence in (kept, *range(folded.FLOOR_SEQUENCE, last + 1)):
        found = independent_decoder.decode(blobs, sample.MACHINE, KEYS, sequence)
        assert found.sequence == sequence
        assert {index: bytes(data) for index, data in found.disks.items()} == stream.states[sequence]
    for sequence in range(1, folded.FLOOR_SEQUENCE):
        if sequence != kept:
            with pytest.raises(ValueError, match="was given up"):
                independent_decoder.decode(blobs, sample.MACHINE, KEYS, sequence)
    first = next(name for name in blobs if name.endswith("00000001-00000001-00.rlog"))
    assert blobs[first].count(0) > _golden_log()[first].count(0), "something was cleared"


def test_the_decoder_notices_when_segments_of_two_runs_are_exchanged() -> None:
    blobs = _golden_log()
    old, new = (name for name in blobs if name.endswith("-00.rlog"))
    blobs[old], blobs[new] = blobs[new], blobs[old]
    with pytest.raises(ValueError, match="place"):
        independent_decoder.decode(blobs, sample.MACHINE, KEYS)

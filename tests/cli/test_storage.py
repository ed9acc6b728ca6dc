"""`replicar fold` and `replicar storage`: a real container, indexed and folded, and what they say of it."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Operator, Stored


async def test_a_log_is_indexed_and_folded_and_still_recovers(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    before = await operator("storage", "db1", "--json")
    assert before.status == 0
    assert before.json["log_bytes"] > 0
    assert (before.json["generation"], before.json["kept"]) == (0, [])
    folded = await operator("fold", "db1", "--window", "1m", "--thin", "15d:4h", "--json")
    assert folded.status == 0, folded.errors
    assert folded.json["index"]["segments"] == stored.builder.number - 1
    target = tmp_path / "disk"
    done = await operator("recover", "db1", "--latest", "--disk", "disk0", "--raw", target, "--json")
    assert done.status == 0, done.errors
    assert target.read_bytes() == bytes(stored.builder.disks[0])
    shown = await operator("storage", "db1")
    assert "log" in shown.output


async def test_a_policy_that_contradicts_itself_is_refused_with_how_to_write_one(
    operator: Operator, stored: Stored
) -> None:
    for words, text in ((("--window", "2"), "no length of time"), (("--thin", "1d"), "no rule")):
        refused = await operator("fold", "db1", *words)
        assert refused.status == 1
        assert text in refused.errors
    contrary = await operator("fold", "db1", "--window", "2d", "--thin", "1d:1h")
    assert contrary.status == 1
    assert "does not follow" in contrary.errors.replace("\n", " ")

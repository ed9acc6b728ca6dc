"""The log's lines: the same words in both forms, facts beside them in JSON, and the last net for secrets."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from replicar.errors import PermanentError, TransientError
from replicar.observe import logs
from replicar.observe.logs import LogFormat

_log = logging.getLogger("tests.observe.some_part")


@pytest.fixture
def json_log() -> Iterator[None]:
    before = logging.getLogger().level
    logs.set_up("tested", LogFormat.JSON)
    yield
    logs.set_up("tested", LogFormat.TEXT)
    root = logging.getLogger()
    root.removeHandler(root.handlers[-1])
    root.setLevel(before)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_has_time_level_part_logger_message_and_its_facts(
    json_log: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.always(machine="shop")
    _log.warning("disk %s: %d bytes", "data", 5, extra=logs.fields(disk="data", sequence=7))
    [line] = lines(capsys)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "part": "tested",
        "logger": "tests.observe.some_part",
        "message": "disk data: 5 bytes",
        "disk": "data",
        "sequence": 7,
        "machine": "shop",
    }


def test_an_error_that_is_logged_brings_its_class_hint_and_fields(
    json_log: None, capsys: pytest.CaptureFixture[str]
) -> None:
    error = PermanentError("no such blob", hint="look for it", blob="machines/x", level="not the line's")
    _log.error("it failed: %s", error)
    try:
        raise TransientError("away", machine="db1")
    except TransientError:
        _log.exception("and again\nin two lines")
    first, second = lines(capsys)
    assert (first["error"], first["hint"], first["blob"]) == ("PermanentError", "look for it", "machines/x")
    assert first["level"] == "error", "a field never hides what a line has anyway"
    assert first["message"] == "it failed: no such blob; look for it"
    assert (second["error"], second["machine"]) == ("TransientError", "db1")
    assert second["trace"].startswith("Traceback")
    assert second["message"] == "and again\nin two lines"


@pytest.mark.parametrize(
    "text",
    [
        "GET https://x.blob.example/c/b?sv=1&sig=c2VjcmV0c2VjcmV0&x=1",
        "DefaultEndpointsProtocol=https;AccountKey=c2VjcmV0c2VjcmV0;x",
        "Authorization: Bearer c2VjcmV0c2VjcmV0",
        "Authorization: SharedKey name:c2VjcmV0c2VjcmV0",
        "passphrase=c2VjcmV0c2VjcmV0",
        "sig%3Dc2VjcmV0c2VjcmV0",
    ],
)
@pytest.mark.parametrize("form", list(LogFormat))
def test_what_looks_like_a_credential_is_blotted_out(
    text: str, form: LogFormat, json_log: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("tested", form)
    _log.error("a library says: %s", text, extra=logs.fields(key=b"c2VjcmV0c2VjcmV0", text=text))
    written = capsys.readouterr().err
    assert "c2VjcmV0c2VjcmV0" not in written
    assert "a library says: " in written
    assert "***" in written


def test_keys_and_signs_in_ordinary_lines_are_left_alone() -> None:
    text = "machine shop: the log ends at segment 4, sequence=281474976710657; see `replicar status`, design=good"
    assert logs.blotted(text) == text


def test_a_long_message_is_cut(json_log: None, capsys: pytest.CaptureFixture[str]) -> None:
    _log.info("x" * 100_000)
    assert len(lines(capsys)[0]["message"]) == logs.MAX_MESSAGE_CHARS


def test_a_process_that_ends_by_a_programmers_error_says_so_in_one_line_of_json() -> None:
    program = (
        "from replicar.observe import logs\n"
        "logs.set_up('tested', logs.LogFormat.JSON)\n"
        "logs.announce('up')\n"
        "import warnings; warnings.warn('odd')\n"
        "raise ValueError('a bug')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    up, odd, last = (json.loads(line) for line in ended.stderr.splitlines())
    assert up["message"] == "up"
    assert "odd" in odd["message"]
    assert last["level"] == "critical"
    assert "ValueError: a bug" in last["trace"]


def test_without_json_a_part_says_what_it_said_before(capsys: pytest.CaptureFixture[str]) -> None:
    logs.announce("listening on 5")
    assert capsys.readouterr().out == "listening on 5\n"
    assert not logs.told(PermanentError("x"))

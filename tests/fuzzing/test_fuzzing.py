"""A sample of `make fuzz`, and everything that once broke a parser."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing import corpus
from tests.fuzzing.targets import TARGETS, feed, seeds

RUNS = 3000


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_golden_files_and_kept_inputs_are_taken_or_refused(name: str) -> None:
    assert seeds(name)
    assert corpus.kept(name)
    for data in [*seeds(name), *corpus.kept(name), b"", b"\0", b"\1"]:
        feed(name, data)


def test_a_corpus_keeps_small_inputs_once_and_is_the_same_for_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "DIRECTORY", tmp_path)
    assert corpus.keep("frame", [b"two", b"1", b"two", bytes(corpus.MOST_BYTES + 1)]) == 2
    before = (tmp_path / "frame.zip").read_bytes()
    assert corpus.keep("frame", [b"1"]) == 2
    assert (tmp_path / "frame.zip").read_bytes() == before
    assert corpus.kept("frame") == [b"1", b"two"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="atheris has no wheel for this machine")
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_coverage_guided_inputs_give_nothing_but_declared_errors(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="`make setup` installs it")
    command = [sys.executable, "-m", "tests.fuzzing", "--target", name, "--runs", str(RUNS), "--fresh", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"Done {RUNS} runs" in done.stderr

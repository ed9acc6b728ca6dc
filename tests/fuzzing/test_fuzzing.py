"""A sample of `make fuzz`, and everything that once broke a parser."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing.targets import TARGETS, feed, seeds

CORPUS = Path(__file__).parent / "corpus"
RUNS = 3000


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_golden_files_and_kept_inputs_are_taken_or_refused(name: str) -> None:
    kept = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    assert seeds(name)
    for data in [*seeds(name), *kept, b"", b"\0", b"\1"]:
        feed(name, data)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="atheris has no wheel for this machine")
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_coverage_guided_inputs_give_nothing_but_declared_errors(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="`make setup` installs it")
    command = [sys.executable, "-m", "tests.fuzzing", "--target", name, "--runs", str(RUNS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"Done {RUNS} runs" in done.stderr

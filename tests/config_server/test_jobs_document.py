"""docs/jobs.md against the tables that it describes: nothing missing, nothing made up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config_server.jobs.plan import PLANS
from config_server.lifecycle import MOVES, REPLICATING, after, end
from replicar.control.messages import LEASE_SECONDS, MAX_CLAIMS, MAX_OPTIONS, JobKind, LifeState

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "jobs.md").read_text()
SECTIONS = dict(
    re.findall(r"^### `([a-z-]+)`[^\n]*\n(.*?)(?=^### |\Z)", TEXT.partition("<!-- steps -->")[2], re.M | re.S)
)


def test_every_kind_has_its_section_and_no_other() -> None:
    assert list(SECTIONS) == [str(kind) for kind in JobKind]


@pytest.mark.parametrize("kind", JobKind)
def test_a_kinds_steps_and_parameters_are_those_of_its_plan(kind: JobKind) -> None:
    section = SECTIONS[kind]
    assert re.findall(r"^\| `([a-z-]+)` \|", section, re.M) == [step.name for step in PLANS[kind].steps]
    said = re.search(r"Parameters: (.*?)\.\s", section, re.S)
    names = set(re.findall(r"`([a-z_]+)`", said[1])) - {"latest"} if said is not None else set()
    assert names == PLANS[kind].parameters
    own = f"### `{kind}` (the config server)" in TEXT
    assert own == (not PLANS[kind].by_worker)


@pytest.mark.parametrize("kind", JobKind)
def test_a_kinds_row_says_where_it_begins_and_ends(kind: JobKind) -> None:
    row = re.search(rf"^\| `{kind}` \| (.*?) \| (.*?) \| (.*?) ?\|$", TEXT, re.M)
    assert row is not None
    begins = {state for state in LifeState if after(state, MOVES[kind].begin) is not None}
    if kind is JobKind.DISABLE:
        assert begins - REPLICATING - {LifeState.DISABLED} == set(row[1].split(", ")[1:])
        return
    if kind is JobKind.FINALIZE:
        assert begins == set(LifeState)
        return
    assert {str(state) for state in begins} == set(row[1].split(", "))
    for begun in begins:
        following = after(begun, MOVES[kind].begin)
        assert following is not None
        assert end("m", following, kind, succeeded=False) == row[3]
        if kind is not JobKind.ENABLE:
            assert end("m", following, kind, succeeded=True) == row[2]


def test_its_figures_are_those_of_the_code() -> None:
    assert f"lease of {LEASE_SECONDS:.0f} s" in TEXT
    assert f"After {MAX_CLAIMS} claims" in TEXT
    assert f"at most {MAX_OPTIONS} values of 512 characters" in TEXT

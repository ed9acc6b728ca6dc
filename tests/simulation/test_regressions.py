"""Stories that failed once, cut short and kept as files: they break nothing, and would with the mistake put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicar.errors import PermanentError
from simulator.planted import planted
from simulator.simulation import simulate
from simulator.stories import Kept, load, save
from simulator.story import story_of

STORIES = sorted((Path(__file__).parent / "regressions").glob("*.json"))


def test_there_are_stories() -> None:
    assert STORIES


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_a_story_that_failed_once_breaks_no_promise_now(path: Path) -> None:
    assert not simulate(load(path).story).violations


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_it_would_with_the_mistake_put_back(path: Path) -> None:
    kept = load(path)
    with planted(kept.bug):
        assert simulate(kept.story).violations, kept.what


@pytest.mark.parametrize("seed", range(20))
def test_a_story_is_the_same_after_being_written_down(seed: int, tmp_path: Path) -> None:
    kept = Kept(story_of(seed), "what it found", "gap_ends_early")
    save(kept, tmp_path / "story.json")
    assert load(tmp_path / "story.json") == kept


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"story": {}, "what": "", "bug": ""}'])
def test_a_file_that_holds_no_story_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "story.json").write_text(text, encoding="utf-8")
    with pytest.raises(PermanentError, match="holds no story"):
        load(tmp_path / "story.json")

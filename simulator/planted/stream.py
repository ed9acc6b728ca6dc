"""Bugs of what agent and process server say to each other."""

from __future__ import annotations

from typing import Any

from replicar.errors import CorruptionError
from replicar.formats import wire
from replicar.formats.fields import Fields

Names = tuple[tuple[Any, str, Any], ...]


def news_are_refused() -> Names:
    """A message with a field that is not known counts as damaged, so no part can be upgraded before the other."""

    class Strict(Fields):
        def __init__(self, data: Any, what: str) -> None:
            super().__init__(data, what)
            if "news" in self._fields:
                raise CorruptionError(f"{what} has a field 'news'")

    return ((wire, "Fields", Strict),)

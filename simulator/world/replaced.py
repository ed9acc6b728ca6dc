"""Names that stand for something else while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(*names: tuple[Any, str, Any]) -> Iterator[None]:
    """Have each `owner.name` be `value`, until the block ends; for (owner, name, value)."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in names]
    try:
        for owner, name, value in names:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)

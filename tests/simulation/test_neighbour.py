"""Points of two machines: what is not one instant is seen, in either direction."""

from __future__ import annotations

from itertools import count

from simulator.neighbour import inconsistencies
from simulator.world.truth import Truth


def _two() -> dict[str, dict[str, Truth]]:
    """On both machines a write at sequence 10, then one at 20; each takes a second, and taking turns."""
    seconds = count()
    truths = {name: Truth(1, bytes(4 * 512), lambda: float(next(seconds))) for name in ("shop", "books")}
    for number, sequence in ((1, 10), (2, 20)):
        for truth in truths.values():
            truth.acknowledge(truth.issue(0, 1, number, sequence), sequence + 1)
    return {name: {"root": truth} for name, truth in truths.items()}


def test_a_point_of_one_instant_is_one() -> None:
    for shop, books in ((9, 9), (10, 9), (10, 10), (20, 10), (20, 20)):
        assert not list(inconsistencies({"shop": shop, "books": books}, _two()))


def test_a_write_that_followed_one_that_is_missing_is_seen() -> None:
    [wrong] = inconsistencies({"shop": 9, "books": 10}, _two())
    assert wrong == "books has a write that was issued at 2.000 s, and shop lacks one that was acknowledged at 1.000 s"
    [wrong] = inconsistencies({"shop": 20, "books": 9}, _two())
    assert "shop has a write" in wrong

"""Metrics as Prometheus reads them: the text exposition format 0.0.4, from values that are handed in; pure.

A page is made for one scrape, of what the parts count anyway, and thrown away. So nothing is registered anywhere, there
is no global state, and a counter on the hot path stays a plain attribute. That is also why this is sixty lines of ours
and not the `prometheus_client` library, which wants to own its counters: the agent's archive is carried to every
machine, and it would grow by a library of which only this text would be used. The tests hold what is written here to
that library's own parser.

What a page refuses is a programmer's mistake (`ValueError`): a name against Prometheus's conventions, one name for two
kinds, the same series twice. A value of None is not known just now, and left out.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ and /docs/practices/naming/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from replicar.observe.histogram import Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
#: Series of one page. A process server of 4,096 machines has a fifth of that; more is a label that should be none.
MAX_SERIES: Final = 500_000

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LABEL: Final = re.compile(r"[a-z][a-z0-9_]*")
_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n"})

Number = float | int


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(slots=True)
class Family:
    """All series of one name, as lines."""

    name: str
    kind: Kind
    help: str
    lines: dict[str, str] = field(default_factory=dict)  # the series, and its value


class Page:
    """What one scrape is answered.

    Args:
        common: labels that every series has.
    """

    def __init__(self, **common: str) -> None:
        self._common = common
        self._families: dict[str, Family] = {}
        self._series = 0

    def counter(self, name: str, text: str, value: Number | None, **labels: str) -> None:
        """Something that only grows while the process lives; `name` ends in `_total`, `text` says what it counts."""
        if not name.endswith("_total"):
            raise ValueError(f"{name} counts, so its name should end in _total")
        self._add(self._family(name, Kind.COUNTER, text), name, value, labels)

    def gauge(self, name: str, text: str, value: Number | None, **labels: str) -> None:
        """Something that is as it is now."""
        if name.endswith("_total"):
            raise ValueError(f"{name} is named as a counter")
        self._add(self._family(name, Kind.GAUGE, text), name, value, labels)

    def one_of(self, name: str, text: str, states: type[StrEnum], now: str, label: str, **labels: str) -> None:
        """Which of a few states something is in: 1 for that, 0 for each other."""
        for state in states:
            self.gauge(name, text, int(state == now), **labels, **{label: str(state)})

    def histogram(self, name: str, text: str, values: Histogram, **labels: str) -> None:
        """How many values were of which size."""
        family = self._family(name, Kind.HISTOGRAM, text)
        for bound, count in values.cumulative():
            self._add(family, f"{name}_bucket", count, {**labels, "le": _number(bound)})
        self._add(family, f"{name}_sum", values.sum, labels)
        self._add(family, f"{name}_count", values.count, labels)

    def render(self) -> str:
        """The page as text; families in the order in which they were first named."""
        parts: list[str] = []
        for family in self._families.values():
            parts.append(f"# HELP {family.name} {family.help.translate(_HELP_ESCAPES)}\n")
            parts.append(f"# TYPE {family.name} {family.kind}\n")
            parts += [f"{series} {value}\n" for series, value in family.lines.items()]
        return "".join(parts)

    def _family(self, name: str, kind: Kind, text: str) -> Family:
        family = self._families.get(name)
        if family is None:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name for a metric")
            family = self._families[name] = Family(name, kind, text)
        if family.kind is not kind or family.help != text:
            raise ValueError(f"{name} is two different metrics")
        return family

    def _add(self, family: Family, name: str, value: Number | None, labels: dict[str, str]) -> None:
        if value is None:
            return
        series = name + _labels({**self._common, **labels})
        if series in family.lines:
            raise ValueError(f"{series} is there twice")
        self._series += 1
        if self._series > MAX_SERIES:
            raise ValueError(f"more than {MAX_SERIES} series: a label of {name} has too many values")
        family.lines[series] = _number(value)


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    for name in labels:
        if not _LABEL.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a label")
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"


def _number(value: Number) -> str:
    if isinstance(value, int):
        return str(int(value))  # a bool, too
    if value == float("inf"):
        return "+Inf"
    if value == float("-inf"):
        return "-Inf"
    return "NaN" if value != value else repr(value)

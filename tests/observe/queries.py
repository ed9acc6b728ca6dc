"""What dashboard and alert rules ask of Prometheus, read from the files that are shipped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docs/grafana/replicar.json"
RULES = ROOT / "docs/grafana/alerts.yml"
DOCUMENT = ROOT / "docs/metrics.md"

_METRIC = re.compile(r"\b(?:replicar|process)_[a-z0-9_]+")
_SELECTOR = re.compile(r"\b((?:replicar|process)_[a-z0-9_]+)\{([^}]*)\}")
_MATCHER = re.compile(r'([a-z_]+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_SUFFIX = re.compile(r"_(?:bucket|sum|count)$")


def dashboard_queries() -> dict[str, str]:
    """Panel and place to its query; the dashboard's own variables are in it."""
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    found = {
        f"panel {panel['title']!r} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", ())
    }
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["query"]["query"]
    return found


def rule_queries() -> dict[str, str]:
    """Alert to its expression; each is on one line of its own."""
    return dict(re.findall(r"- alert: (\w+)\n\s+expr: (.+)\n", RULES.read_text()))


def metrics_of(query: str) -> set[str]:
    """The families that a query names."""
    return {_SUFFIX.sub("", name) for name in _METRIC.findall(query)}


def label_values_of(query: str) -> set[tuple[str, str, str]]:
    """Every (family, label, value) that a query asks for by name; a variable is none."""
    found = set()
    for metric, matchers in _SELECTOR.findall(query):
        for label, _, value in _MATCHER.findall(matchers):
            if "$" not in value:
                found |= {(_SUFFIX.sub("", metric), label, each) for each in value.split("|")}
    return found

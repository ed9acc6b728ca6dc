"""Dashboard and alert rules as files: what Prometheus's own tool says of the rules, and when they fire.

That what they ask for is there at all is tried on started parts, in tests/end_to_end/test_metrics.py.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.observe.queries import DASHBOARD, RULES, dashboard_queries, label_values_of, metrics_of, rule_queries
from tests.support.tools import need


def promtool(*words: str | Path) -> str:
    need("promtool")
    ended = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_prometheus_takes_the_rules() -> None:
    assert f"SUCCESS: {len(rule_queries())} rules found" in promtool("check", "rules", RULES)


def test_the_rules_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", Path(__file__).with_name("alerts_test.yml"))


def test_prometheus_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    lines = ["groups:", "  - name: dashboard", "    rules:"]
    for number, (place, query) in enumerate(dashboard_queries().items()):
        if place.startswith("panel"):
            expression = query.replace("$__rate_interval", "5m").replace("$machine", ".*")
            lines += [f"      - record: panel:{number}", f"        expr: {json.dumps(expression)}"]
    (tmp_path / "dashboard.yml").write_text("\n".join(lines) + "\n")
    promtool("check", "rules", tmp_path / "dashboard.yml")


def test_panels_do_not_lie_on_each_other_and_each_says_what_it_shows() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert panel["title"]
        taken |= cells


def test_queries_are_read_as_they_are_meant() -> None:
    query = 'rate(replicar_a_seconds_bucket{stage="cache", machine=~"$machine"}[5m]) / replicar_b_total{x=~"p|q"}'
    assert metrics_of(query) == {"replicar_a_seconds", "replicar_b_total"}
    assert label_values_of(query) == {
        ("replicar_a_seconds", "stage", "cache"),
        ("replicar_b_total", "x", "p"),
        ("replicar_b_total", "x", "q"),
    }

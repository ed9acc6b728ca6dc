"""All parts, really started, asked as Prometheus asks them; document, dashboard and alert rules held against that."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from simulator.cluster import free_port
from simulator.recovery_host import RecoveryHost
from tests.end_to_end.stage import stage
from tests.observe.queries import DOCUMENT, dashboard_queries, label_values_of, metrics_of, rule_queries

PARTS = ("config-server", "process-server", "mobility-agent", "recovery-worker")
Families: TypeAlias = dict[str, Any]

#: A label's values are names of machines and servers, or words of short lists.
LABELS = {
    *("machine", "machine_id", "process_server", "part", "version", "state", "life", "stage", "level", "queue"),
    *("cause", "signal", "kind", "code", "le"),
}


def parsed(text: str) -> Families:
    """Family by name as it is exported: a counter ends in `_total`."""
    families = text_string_to_metric_families(text)
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in families}


def value(families: Families, name: str, **labels: str) -> float:
    """The one sample of that name with those labels."""
    samples = [s for s in families[name].samples if labels.items() <= s.labels.items() and s.name == name]
    assert len(samples) == 1, f"{name} {labels}: {samples}"
    return float(samples[0].value)


async def scraped(ports: dict[str, int]) -> dict[str, Families]:
    found = {}
    async with aiohttp.ClientSession() as session:
        for part, port in ports.items():
            async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                assert response.status == 200
                found[part] = parsed(await response.text())
    return found


async def story(directory: Path) -> dict[str, Families]:
    """A protected machine that was written to, has a point, was audited and verified; what all of that shows."""
    ports = {part: free_port() for part in PARTS}
    listen = {part: {"metrics_listen": str(port)} for part, port in ports.items()}
    textfile = directory / "verify.prom"
    async with stage(
        directory,
        process_server_settings=listen["process-server"],
        agent_settings=listen["mobility-agent"] | {"audit_bytes_per_second": 64 << 20},
        config_server_settings=listen["config-server"],
    ) as it:
        cluster = it.cluster
        async with RecoveryHost(cluster, listen["recovery-worker"]) as host:
            async with it.writing():
                await asyncio.sleep(1.0)
            await it.settle("a-point")
            async with asyncio.timeout(120):
                while (cluster.agent_status().get("audit") or {}).get("last_ended_ns") is None:
                    await asyncio.sleep(0.1)
            await host.child.until("at work", lambda: "metrics are at" in host.child.said(), 120.0)
            verify = await cluster.replicar("verify", cluster.machine, "--metrics-file", textfile, "--json")
            verified = verify.require().json()
            async with asyncio.timeout(120):  # heartbeats bring what the config server knows
                while True:
                    found = await scraped(ports)
                    config = found["config-server"]
                    if (
                        config["replicar_config_server_machine_audit_age_seconds"].samples
                        and value(config, "replicar_config_server_recovery_workers_online")
                        and value(config, "replicar_config_server_machine_points")
                    ):
                        break
                    await asyncio.sleep(0.2)
            found["verify"] = parsed(textfile.read_text())
            assert value(found["verify"], "replicar_verify_audits") == verified["audits"]
            return found


@pytest.mark.timeout(600)
async def test_started_parts_export_what_document_dashboard_and_alert_rules_speak_of(tmp_path: Path) -> None:
    found = await story(tmp_path)
    families = {name: family for part in found.values() for name, family in part.items()}
    check_the_document(families)
    for place, query in {**dashboard_queries(), **rule_queries()}.items():
        assert metrics_of(query) <= families.keys(), f"{place} asks for what nobody exports: {query}"
        for metric, label, wanted in label_values_of(query):
            values = {sample.labels.get(label) for sample in families[metric].samples}
            assert wanted in values, f"{place}: no {metric} has {label}={wanted!r}, but {values}"
    check_the_labels(families)
    check_the_figures(found)


def check_the_document(families: Families) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]+) \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    told = {name: (kind, meaning) for name, kind, _, meaning in rows}
    assert told == {name: (family.type, family.documentation) for name, family in families.items()}
    for name, _, labels, _ in rows:
        seen = {label for sample in families[name].samples for label in sample.labels} - {"le"}
        if seen:
            assert set(labels.replace("-", "").replace(" ", "").split(",")) - {""} == seen, name


def check_the_labels(families: Families) -> None:
    for name, family in families.items():
        for sample in family.samples:
            assert sample.labels.keys() <= LABELS, f"{name} has another label: {sample.labels}"


def check_the_figures(found: dict[str, Families]) -> None:
    """What was just done shows, and the parts agree on it."""
    server, agent, config = found["process-server"], found["mobility-agent"], found["config-server"]
    received = value(server, "replicar_process_server_machine_received_bytes_total")
    assert 0 < received <= value(agent, "replicar_agent_sent_bytes_total")
    segments = value(server, "replicar_process_server_machine_segments_total")
    for name in ("upload_seconds", "capture_to_stored_seconds"):
        family = server[f"replicar_process_server_{name}"]
        counts = [sample.value for sample in family.samples if sample.name.endswith("_count")]
        assert counts[0] > 0
        assert abs(counts[0] - segments) <= 8, f"{name}: {counts} of {segments}; some are under way"
    assert value(server, "replicar_process_server_machine_state", state="running") == 1
    assert value(server, "replicar_process_server_agents_connected") == 1
    assert value(server, "replicar_process_server_machine_compression_ratio") > 1
    assert value(agent, "replicar_agent_state", state="protected") == 1
    assert value(config, "replicar_config_server_machine_life", life="protected") == 1
    assert 0 <= value(config, "replicar_config_server_machine_point_age_seconds") < 3600
    assert value(config, "replicar_config_server_machine_gaps_open") == 0
    assert value(found["verify"], "replicar_verify_sound") == 1
    assert value(found["verify"], "replicar_verify_mismatches") == 0

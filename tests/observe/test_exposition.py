"""Metrics as text, read back by the parser of Prometheus's own Python library."""

from __future__ import annotations

import math
import random
from enum import StrEnum
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from replicar.observe.exposition import Page
from replicar.observe.histogram import Histogram
from replicar.observe.process import page_of


def parsed(page: Page) -> dict[str, Any]:
    """Family by name, with its samples."""
    return {family.name: family for family in text_string_to_metric_families(page.render())}


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


def test_what_is_written_is_read_back_by_prometheuss_own_parser() -> None:
    page = Page(part="tested")
    page.counter("replicar_bytes_total", "Bytes.", 12345678901234567)
    page.gauge("replicar_rpo_seconds", "RPO.", 0.25, machine="shop")
    page.gauge("replicar_rpo_seconds", "RPO.", math.inf, machine="db")
    page.one_of("replicar_colour", "Colour.", Colour, "blue", "colour")
    found = parsed(page)
    assert found["replicar_bytes"].type == "counter"
    assert [(s.labels, s.value) for s in found["replicar_rpo_seconds"].samples] == [
        ({"part": "tested", "machine": "shop"}, 0.25),
        ({"part": "tested", "machine": "db"}, math.inf),
    ]
    assert {s.labels["colour"]: s.value for s in found["replicar_colour"].samples} == {"red": 0, "blue": 1}


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "ä", "a,b}", ""])
def test_a_name_with_any_sign_in_it_is_read_back_as_it_is(name: str) -> None:
    page = Page()
    page.gauge("replicar_x", 'Help with "quotes",\nlines and \\.', 1, machine=name)
    [sample] = parsed(page)["replicar_x"].samples
    assert sample.labels == {"machine": name}


def test_what_is_not_known_is_left_out_and_its_name_stays() -> None:
    page = Page()
    page.gauge("replicar_age_seconds", "Age.", None)
    assert parsed(page)["replicar_age_seconds"].samples == []


def test_a_histogram_counts_every_value_once_and_cumulates() -> None:
    values, numbers = Histogram(), [random.Random(3).expovariate(1.0) for _ in range(500)]
    for number in [*numbers, 0.001, 1000.0]:
        values.observe(number)
    page = Page()
    page.histogram("replicar_upload_seconds", "Uploads.", values, stage="one")
    samples = parsed(page)["replicar_upload_seconds"].samples
    buckets = {float(s.labels["le"]): s.value for s in samples if s.name.endswith("_bucket")}
    for bound, count in buckets.items():
        assert count == sum(number <= bound for number in [*numbers, 0.001, 1000.0])
    assert buckets[math.inf] == 502
    assert [s.value for s in samples if s.name.endswith("_sum")] == [pytest.approx(sum(numbers) + 1000.001)]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda page: page.counter("replicar_bytes", "A counter without its ending.", 1),
        lambda page: page.gauge("replicar_bytes_total", "A gauge with it.", 1),
        lambda page: page.gauge("Replicar-x", "No name.", 1),
        lambda page: page.gauge("replicar_x", "No label.", 1, **{"0": "1"}),
        lambda page: page.gauge("replicar_twice", "Twice.", 1),
        lambda page: page.gauge("replicar_twice", "Other words.", 1, machine="b"),
        lambda page: page.counter("replicar_twice_total", "x", 1) or page.counter("replicar_twice_total", "x", 2),
    ],
)
def test_a_page_refuses_what_prometheus_would_take_amiss(wrong: Any) -> None:
    page = Page()
    page.gauge("replicar_twice", "Twice.", 1)
    with pytest.raises(ValueError, match=r"."):
        wrong(page)


def test_every_part_says_what_it_is_and_what_it_takes() -> None:
    found = parsed(page_of("tested"))
    assert found["replicar_build_info"].samples[0].labels["part"] == "tested"
    assert found["process_resident_memory_bytes"].samples[0].value > 1 << 20
    assert found["process_cpu_seconds"].samples[0].value > 0
    assert found["process_start_time_seconds"].samples[0].value > 1.7e9

"""What a process server shows to Prometheus: its health, and what its parts count anyway, as one page; pure.

Labels are few on purpose: a machine's id and name, and words of short lists (a stage, a state, a cause). A server of a
few hundred machines has some ten thousand series, and no more with every disk, blob or error text that there ever is.
docs/metrics.md says what each means and what to do about it; a test holds it to what a started server exports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from process_server.health import MachineHealth, ServerHealth
from process_server.machine import MachineState, Workshop
from process_server.watermarks import Level
from replicar.observe.exposition import Page
from replicar.observe.process import page_of
from replicar.signals import rank

PART: Final = "process-server"
_PREFIX: Final = "replicar_process_server"
_MACHINE: Final = "replicar_process_server_machine"


def page(health: ServerHealth, workshop: Workshop, *, connections: int, retries: Mapping[str, int]) -> Page:
    """The page of one scrape.

    Args:
        connections: of agents, that stand now.
        retries: failed requests to storage so far, by cause.
    """
    page = page_of(PART)
    _server(page, health, workshop, connections, retries)
    for machine in health.machines:
        _machine(page, machine)
    return page


def _server(page: Page, health: ServerHealth, workshop: Workshop, connections: int, retries: Mapping[str, int]) -> None:
    slots, gate, tallies = workshop.slots, workshop.sealer.gate, workshop.tallies
    page.gauge(f"{_PREFIX}_cache_bytes", "Size of the cache.", health.cache_bytes)
    page.gauge(f"{_PREFIX}_cache_free_bytes", "What of the cache is free.", health.cache_bytes_free)
    page.one_of(f"{_PREFIX}_cache_level", "How full the cache is: 1 for the level.", Level, health.cache_level, "level")
    page.gauge(f"{_PREFIX}_buffers", "Receive buffers in use.", slots.buffers_in_use)
    page.gauge(f"{_PREFIX}_buffers_limit", "Receive buffers that there may be.", slots.buffers_limit)
    text = "Machines that wait for a slot of the cache, and segments that wait for their turn to be sealed."
    page.gauge(f"{_PREFIX}_queue_length", text, slots.waiting, queue="slots")
    page.gauge(f"{_PREFIX}_queue_length", text, gate.waiting, queue="gate")
    text = "Bytes between cache and storage now, before compression."
    page.gauge(f"{_PREFIX}_under_way_bytes", text, gate.under_way_bytes)
    text = "What may be uploaded at this hour, in bytes a second; 0 for no limit."
    page.gauge(f"{_PREFIX}_upload_limit_bytes_per_second", text, health.upload_limit or 0)
    text = "Time for which the hour's limit held uploads up."
    page.counter(f"{_PREFIX}_upload_throttled_seconds_total", text, gate.paced_seconds)
    page.gauge(f"{_PREFIX}_connections", "Agents' connections that stand now.", connections)
    connected = sum(machine.connected for machine in health.machines)
    page.gauge(f"{_PREFIX}_agents_connected", "Machines whose agents are connected.", connected)
    page.gauge(f"{_PREFIX}_machines", "Machines that are assigned to this server.", len(health.machines))
    text = "Requests to storage that failed for now, by cause; each was tried again, or given up for a while."
    for cause in sorted({"http_500", "http_503", "no_answer", *retries}):
        page.counter(f"{_PREFIX}_storage_failures_total", text, retries.get(cause, 0), cause=cause)
    text = "From handing a segment to storage until storage has it, all tries included."
    page.histogram(f"{_PREFIX}_upload_seconds", text, tallies.upload_seconds)
    text = "From the capture of a segment's oldest change until it and all before it are in storage."
    page.histogram(f"{_PREFIX}_capture_to_stored_seconds", text, tallies.stored_seconds)
    text = "What group commits to the cache took, with their sync."
    page.histogram(f"{_PREFIX}_cache_commit_seconds", text, workshop.committer.seconds)
    text = "Health by signal: 0 healthy, 1 warning, 2 critical."
    for signal in health.signals:
        page.gauge(f"{_PREFIX}_signal_level", text, rank(signal.level), signal=signal.name)
    text = "1 while a part of the server has an error that it waits out."
    for part in ("config server", "storage", "status file", "cache"):
        page.gauge(f"{_PREFIX}_trouble", text, int(part in health.errors), part=part)


def _machine(page: Page, machine: MachineHealth) -> None:
    who = {"machine": machine.name, "machine_id": str(machine.machine_id)}
    counters = machine.counters
    page.one_of(f"{_MACHINE}_state", "1 for the state that it is in.", MachineState, machine.state, "state", **who)
    page.gauge(f"{_MACHINE}_connected", "1 while its agent is connected.", int(machine.connected), **who)
    page.gauge(f"{_MACHINE}_trouble", "1 while something is in its way.", int(machine.error is not None), **who)
    text = "Age of the oldest change that was received and is not in storage; 0 when all is."
    page.gauge(f"{_MACHINE}_rpo_seconds", text, machine.rpo_seconds, **who)
    text = "Bytes received and not in storage, before compression, by where they are."
    cached = machine.pending_bytes - machine.sealing_bytes - machine.uploading_bytes
    page.gauge(f"{_MACHINE}_transit_bytes", text, max(cached, 0), **who, stage="cache")
    page.gauge(f"{_MACHINE}_transit_bytes", text, machine.sealing_bytes, **who, stage="sealing")
    page.gauge(f"{_MACHINE}_transit_bytes", text, machine.uploading_bytes, **who, stage="uploading")
    for name, text, value in (
        ("received_bytes", "Bytes of whole, verified frames.", counters.bytes_received),
        ("stored_bytes", "Bytes of frames that are in storage, before compression.", counters.bytes_stored),
        ("uploaded_bytes", "What those came to, compressed and sealed.", counters.bytes_uploaded),
        ("frames", "Whole, verified frames.", counters.frames),
        ("segments", "Segments stored.", counters.segments),
        ("connections", "Times that its agent connected.", counters.connections),
        ("resends", "Times that its agent was asked to send again.", counters.resends),
        ("dropped_bytes", "Bytes that were not what should have come.", counters.bytes_dropped),
        ("waits", "Times that reading from its agent was stopped, for want of room.", counters.waits),
        ("waited_seconds", "How long that took.", counters.waited_seconds),
        ("upload_failures", "Times that a segment could not be stored and was kept.", counters.upload_failures),
        ("leases_lost", "Times that storage refused this server as its log's writer.", counters.leases_lost),
    ):
        page.counter(f"{_MACHINE}_{name}_total", text, value, **who)
    if counters.bytes_uploaded:
        ratio = counters.bytes_stored / counters.bytes_uploaded
        page.gauge(f"{_MACHINE}_compression_ratio", "Stored bytes over uploaded bytes.", ratio, **who)

"""What the agent shows to Prometheus: its status, as one page; pure.

It is made of the same facts as `mobility-agent status` shows, so the two can't disagree. There is one machine here, and
its id and name are the labels; disks are added up.
"""

from __future__ import annotations

from typing import Any, Final

from mobility_agent.sender import SenderState
from replicar.control.messages import MachineState
from replicar.observe.exposition import Page
from replicar.observe.process import page_of

PART: Final = "mobility-agent"
_PREFIX: Final = "replicar_agent"


def page(facts: dict[str, Any]) -> Page:
    """The page of one scrape.

    Args:
        facts: as the status file has them.
    """
    page = page_of(PART)
    who = {"machine": facts["machine"], "machine_id": facts["machine_id"]}
    sender, audit = facts["sender"], facts["audit"]
    page.one_of(f"{_PREFIX}_state", "1 for what it is doing.", MachineState, facts["state"], "state", **who)
    page.one_of(f"{_PREFIX}_sender_state", "1 for how sending stands.", SenderState, sender["state"], "state", **who)
    text = "1 while something keeps it from the process server, or from the config server."
    page.gauge(f"{_PREFIX}_trouble", text, int(sender["error"] is not None), **who, part="sender")
    control = facts["config_server"]["error"] is not None
    page.gauge(f"{_PREFIX}_trouble", text, int(control), **who, part="config server")
    for name, text, value in (
        ("captured_bytes", "Bytes of changes since the agent started.", facts["bytes_captured"]),
        ("sent_bytes", "Bytes sent; those sent again count again.", facts["bytes_sent"]),
        ("connections", "Times that it connected to a process server.", facts["connections"]),
        ("resends", "Times that it was asked to send again.", facts["resends"]),
        ("gaps", "Times that the order of changes was lost since the agent started.", facts["gaps_begun"]),
        ("resync_read_bytes", "Bytes read to find what differs from the replica.", facts["resync_read_bytes"]),
        ("resync_sent_bytes", "What of those differed, and was sent.", facts["resync_sent_bytes"]),
    ):
        page.counter(f"{_PREFIX}_{name}_total", text, value, **who)
    for name, text, value in (
        ("rpo_seconds", "Age of the oldest change that is not in storage: the RPO, as measured.", facts["rpo_seconds"]),
        ("rpo_p50_seconds", "Half of the last ten minutes the RPO was at most that.", facts["rpo_p50_seconds"]),
        ("rpo_p99_seconds", "99 % of the last ten minutes the RPO was at most that.", facts["rpo_p99_seconds"]),
        ("lag_p50_seconds", "From capture to stored, median of the last frames.", facts["lag_p50_seconds"]),
        ("lag_p99_seconds", "From capture to stored, 99th percentile of the last frames.", facts["lag_p99_seconds"]),
        ("log_bytes", "Bytes in the change log that are not in storage.", facts["journal_used_bytes"]),
        ("log_limit_bytes", "What the change log may take.", facts["journal_limit_bytes"]),
        ("log_full_seconds", "When the change log is full, if it goes on so.", facts["journal_full_seconds"]),
        ("dirty_bytes", "Bytes that are to be copied from the disks.", facts["dirty_bytes"]),
        ("copy_remaining_seconds", "When all is copied, if it goes on so.", facts["copy_remaining_seconds"]),
        ("in_gap", "1 while the order of changes is not kept.", int(facts["in_gap"])),
        ("disk_bytes", "Size of all disks.", sum(disk["size_bytes"] for disk in facts["disks"])),
        ("marks", "Recovery points that it remembers.", facts["marks"]),
    ):
        page.gauge(f"{_PREFIX}_{name}", text, value, **who)
    if audit is not None:
        ended_ns, total = audit["last_ended_ns"], audit["total_bytes"]
        text = "Time since the last whole round of audits ended."
        age = None if ended_ns is None else max(facts["time_ns"] - ended_ns, 0) / 1e9
        page.gauge(f"{_PREFIX}_audit_age_seconds", text, age, **who)
        text = "How much of the present round of audits is done, 0 to 1."
        page.gauge(f"{_PREFIX}_audit_round_ratio", text, audit["done_bytes"] / total if total else None, **who)
        text = "Bytes that the last whole round left out, since they were written all the time or could not be read."
        page.gauge(f"{_PREFIX}_audit_skipped_bytes", text, audit["last_skipped_bytes"], **who)
    return page

"""Whatever an operator can set reaches the part that keeps it, or is refused at the start; no setting goes without.

Each part's own stories show that it keeps to what it is given. Here a running agent shows that it is given what was
set; of what needs a device of its own, a story is named that sets it and looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from mobility_agent import core, scanned, service, traced
from mobility_agent.capture.trace.choice import Choice, Method
from mobility_agent.settings import AgentSettings, CaptureKind, load_settings
from replicar.clock import SystemClock
from replicar.errors import PermanentError
from tests.mobility_agent.core import MIB
from tests.mobility_agent.test_service import Site, founded, site
from tests.mobility_agent.test_service_settings import DISK, written

__all__ = ["founded", "site"]  # fixtures

TESTS: Final = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Reaches:
    """A setting, a value that is no default, and which argument of which part it has to be."""

    setting: str
    value: float
    module: Any
    part: str
    argument: str


INLINE: Final = (
    Reaches("journal_bytes", 40 * MIB, core, "RecordedLog", "limit_bytes"),
    Reaches("journal_file_bytes", 8 * MIB, core, "RecordedLog", "file_bytes"),
    Reaches("rate_limit_bytes_per_second", 7 * MIB, service, "Sender", "rate_limit_bytes_per_second"),
    Reaches("seal_delay_seconds", 0.02, service, "Sender", "seal_delay_seconds"),
    Reaches("seed_bytes_per_second", 9 * MIB, service, "Seeder", "bytes_per_second"),
    Reaches("heartbeat_seconds", 0.4, service, "Control", "heartbeat_seconds"),
    Reaches("mark_every_seconds", 77, service, "Schedule", "every_seconds"),
    Reaches("audit_bytes_per_second", 3 * MIB, service, "Auditor", "bytes_per_second"),
)
FOLLOWED: Final = {
    CaptureKind.TRACE: (
        Reaches("freeze_budget_seconds", 1.5, traced, "TraceCapture", "freeze_budget_seconds"),
        Reaches("seed_bytes_per_second", 9 * MIB, traced, "TraceCapture", "bytes_per_second"),
    ),
    CaptureKind.SCAN: (
        Reaches("scan_every_seconds", 33.0, scanned, "ScanCapture", "every_seconds"),
        Reaches("seed_bytes_per_second", 9 * MIB, scanned, "ScanCapture", "bytes_per_second"),
    ),
}
#: Settings that a story sets and looks at from outside.
SHOWN: Final = {
    "directory": ("mobility_agent/test_cli.py", "test_from_enrolment_to_a_replicated_disk_and_through_a_kill"),
    "disks": ("end_to_end/test_disks.py", "test_two_disks_of_a_machine_agree_at_every_instant"),
    "capture": ("end_to_end/test_scan.py", "test_a_scanned_disk_comes_back_as_it_was_at_every_tag"),
    "nbd_tls": ("mobility_agent/test_nbd.py", "test_a_client_without_a_certificate_gets_nothing"),
    "copy_free_space": (
        "mobility_agent/allocation/test_skipping.py",
        "test_free_space_is_copied_unless_the_operator_says_otherwise",
    ),
    "application": (
        "mobility_agent/test_hooks.py",
        "test_an_application_consistent_mark_lies_between_freeze_and_thaw_and_says_how_long_that_was",
    ),
    "log_format": ("end_to_end/test_json_logs.py", "log_format"),
    "metrics_listen": ("end_to_end/test_metrics.py", "metrics_listen"),
}


class _BuiltError(Exception):
    """Ends a start that has shown what it was to show."""


async def test_what_is_set_reaches_the_part_that_keeps_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[tuple[str, str], list[Any]] = {}

    def watch(module: Any, part: str) -> None:
        real = getattr(module, part)

        def made(*arguments: Any, **named: Any) -> Any:
            for name, value in named.items():
                given.setdefault((part, name), []).append(value)
            return real(*arguments, **named)

        monkeypatch.setattr(module, part, made)
        if part == "Auditor":
            monkeypatch.setitem(service._AUDITORS, CaptureKind.INLINE, made)

    for module, part in dict.fromkeys((row.module, row.part) for row in INLINE):
        watch(module, part)
    async with site.agent(**{row.setting: row.value for row in INLINE}):
        pass
    for row in INLINE:
        assert row.value in given[row.part, row.argument], row.setting


@pytest.mark.parametrize(("kind", "rows"), FOLLOWED.items())
async def test_what_is_set_reaches_a_capture_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: CaptureKind, rows: tuple[Reaches, ...]
) -> None:
    """In the place of the capture itself, which takes devices, stands a mock that keeps what it is given."""
    given: dict[str, Any] = {}

    def made(*_: Any, **named: Any) -> Any:
        given.update(named)
        raise _BuiltError

    monkeypatch.setattr(traced, "choose_method", lambda: Choice(Method.NONE, ""))
    monkeypatch.setattr(traced, "open_source", lambda *_, **__: None)
    for row in rows:
        monkeypatch.setattr(row.module, row.part, made)
    fields = "".join(f"{row.setting} = {row.value}\n" for row in rows)
    settings = load_settings(written(tmp_path, f'directory = "s"\ncapture = "{kind}"\n{fields}{DISK}'))
    nothing: Any = SimpleNamespace(disks={}, carry_out=None)
    machine = service._FOLLOWERS[kind](nothing, nothing, nothing, settings, SystemClock())
    with pytest.raises(_BuiltError):
        await machine.__aenter__()
    for row in rows:
        assert given[row.argument] == row.value, row.setting


@pytest.mark.parametrize(
    ("capture", "setting"),
    [
        ("inline", "freeze_budget_seconds = 1.0"),
        ("inline", "scan_every_seconds = 30"),
        ("trace", "scan_every_seconds = 30"),
        ("scan", "freeze_budget_seconds = 1.0"),
        ("trace", 'nbd_tls = { certificate = "c", key = "k", authority = "a" }'),
        ("scan", 'nbd_tls = { certificate = "c", key = "k", authority = "a" }'),
    ],
)
def test_what_this_capture_does_not_keep_is_refused(tmp_path: Path, capture: str, setting: str) -> None:
    name = setting.partition(" ")[0]
    path = written(tmp_path, f'directory = "s"\ncapture = "{capture}"\n{setting}\n{DISK}')
    with pytest.raises(PermanentError, match=f'{name} is of capture = .* means nothing with "{capture}": remove it'):
        load_settings(path)


def test_no_setting_goes_without() -> None:
    rows = [*INLINE, *(row for rows in FOLLOWED.values() for row in rows)]
    assert {row.setting for row in rows} | SHOWN.keys() == AgentSettings.model_fields.keys()
    for file, words in SHOWN.values():
        assert words in (TESTS / file).read_text(), file

"""What jobs make is named after them, so that a job that goes on, and the one that cleans up, find it again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from recovery.compute.machine import Bus, DiskSource, Firmware, MachineSpec, Wanted
from recovery.view import Progress
from replicar.control.messages import Job, JobKind
from replicar.errors import PermanentError

_PREFIX: Final = {JobKind.TEST_FAILOVER: "drill", JobKind.FAILOVER: "over", JobKind.CHANGE_POINT: "over"}
#: What options say about how a machine proves that it runs.
SEEING: Final = frozenset({"banner", "banner_seconds", "check", "check_seconds"})


def made_name(job: Job) -> str:
    """What the machine is called that this job makes."""
    machine = re.sub(r"[^a-z0-9]+", "-", job.machine.lower()).strip("-")[:40].strip("-")
    return f"{_PREFIX[job.kind]}-{machine}-{job.id[:8]}"


def makers(jobs: Iterable[Job]) -> list[Job]:
    """Those of some jobs that made a machine, newest first."""
    return [job for job in jobs if job.kind in _PREFIX]


def check_options(options: Mapping[str, str], known: frozenset[str]) -> None:
    """Raises PermanentError: an option that nobody here reads: it is refused, never ignored."""
    for name in options:
        if name not in known:
            hint = f"known are: {', '.join(sorted(known))}"
            raise PermanentError(f"the option {name!r} is not known", hint=hint, option=name)


def shifted(progress: Progress, before: int, total: int) -> Progress:
    """Progress of one disk of several."""
    return lambda done, _: progress(before + done, total)


def spec_of(
    name: str, job: Job, disks: tuple[DiskSource, ...], *, isolated: bool, options: Mapping[str, str]
) -> MachineSpec:
    """The machine to be made.

    Raises:
        PermanentError: an option's value can't be used.
    """
    try:
        return MachineSpec(
            name,
            disks,
            memory_mib=int(options.get("memory_mib", "1024")),
            processors=int(options.get("processors", "1")),
            firmware=Firmware(options.get("firmware", "bios")),
            bus=Bus(options.get("bus", "virtio")),
            isolated=isolated,
            ports=tuple(int(port) for port in options.get("ports", "").split(",") if port),
            tags={"replicar-job": job.id, "replicar-source": job.machine},
        )
    except ValueError as error:
        raise PermanentError(f"an option of the job can't be used: {error}", hint="see docs/jobs.md, options") from None


def wanted_of(evidence: Path, options: Mapping[str, str]) -> Wanted:
    """What is to prove that it runs. Raises PermanentError: an option's value can't be used."""
    try:
        return Wanted(
            evidence,
            banner=options.get("banner", ""),
            banner_seconds=float(options.get("banner_seconds", "300")),
            check=Path(options["check"]) if "check" in options else None,
            check_seconds=float(options.get("check_seconds", "300")),
        )
    except ValueError as error:
        raise PermanentError(f"an option of the job can't be used: {error}", hint="see docs/jobs.md, options") from None

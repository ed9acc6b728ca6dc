"""Policies, which say how machines are protected, and target settings: what each is to be made of elsewhere."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from replicar.control.message import Count, Message, Name, Text

#: What applies to a machine that was given no policy; it can be changed like any other.
DEFAULT_POLICY: Final = "default"
HOUR: Final = 3600
DAY: Final = 86_400
MAX_TIERS: Final = 8
MAX_RETENTION_DAYS: Final = 366
#: Versions of a policy that are kept.
MAX_POLICY_VERSIONS: Final = 20

Every = Annotated[int, Field(ge=10, le=7 * DAY)]
ResourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._()-]{0,89}$|^$")]


class RetentionTier(Message):
    """Points older than the tier before are thinned to one every so often, up to an age."""

    until_seconds: Annotated[int, Field(ge=HOUR, le=MAX_RETENTION_DAYS * DAY)]
    every_seconds: Annotated[int, Field(ge=60, le=31 * DAY)]


class Policy(Message):
    """How machines are protected. By default points are kept for three days: all of two hours, then one an hour for a
    day, then one every two hours.

    rpo_threshold_seconds: an alert is raised while a machine's RPO is above it; replication does not change.
    every_point_seconds: how long any instant can be chosen; `tiers` thin what is older, in order, and the end of the
        last one is the end of retention.
    crash_point_seconds, application_point_seconds: how often the agent makes a point by the clock; 0: never, None: as
        its own settings say. Application-consistent points need hooks on the machine.
    replica: whether storage has only the sealed log, or a page blob besides that is kept close behind it.
    replica_point_seconds: how far apart the warm replica's own points, snapshots, are; 0: none. Tiers thin them, too.
    drill_days: a drill is begun this many days after the last one; 0: by hand only. It waits for its clean-up.
    """

    name: Name
    version: Count = 0
    rpo_threshold_seconds: Annotated[int, Field(ge=1, le=7 * DAY)] = HOUR
    every_point_seconds: Annotated[int, Field(ge=HOUR, le=MAX_RETENTION_DAYS * DAY)] = 2 * HOUR
    tiers: Annotated[tuple[RetentionTier, ...], Field(max_length=MAX_TIERS)] = (
        RetentionTier(until_seconds=DAY, every_seconds=HOUR),
        RetentionTier(until_seconds=3 * DAY, every_seconds=2 * HOUR),
    )
    crash_point_seconds: Every | Literal[0] | None = None
    application_point_seconds: Every | Literal[0] | None = None
    replica: Literal["sealed", "warm"] = "sealed"
    replica_point_seconds: Every | Literal[0] = HOUR
    drill_days: Annotated[int, Field(ge=0, le=366)] = 0

    @property
    def retention_seconds(self) -> int:
        """How long points are kept at all."""
        return self.tiers[-1].until_seconds if self.tiers else self.every_point_seconds

    def fault(self) -> str:
        """What is wrong with the tiers, in words; empty: nothing."""
        until, every = self.every_point_seconds, 0
        for number, tier in enumerate(self.tiers, 1):
            if tier.until_seconds <= until:
                return f"tier {number} ends at {tier.until_seconds} s, where the one before it does or later"
            if tier.every_seconds <= every:
                return f"tier {number} keeps a point every {tier.every_seconds} s, no fewer than the one before it"
            until, every = tier.until_seconds, tier.every_seconds
        return ""


class PolicyList(Message):
    policies: tuple[Policy, ...]


class PolicyChange(Message):
    """PUT /v1/policies/{name}: the whole policy, and the version that it was made from (0: there was none)."""

    policy: Policy
    base_version: Count = 0


class PolicyAssignment(Message):
    """PUT /v1/machines/{name}/policy."""

    policy: Name


class TargetSettings(Message):
    """What a machine is to be made of on the other side. Empty: not decided; `qemu` needs none of the rest.

    `subnet` is a subnet of `network`; `drill_network` is where drills go. `storage_account` takes the disks.
    """

    version: Count = 0
    compute: Literal["", "qemu", "azure"] = ""
    storage_account: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]{3,24}$|^$")] = ""
    resource_group: ResourceName = ""
    location: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]{1,40}$|^$")] = ""
    size: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}$|^$")] = ""
    network: ResourceName = ""
    subnet: ResourceName = ""
    drill_network: ResourceName = ""
    availability_set: ResourceName = ""
    disk_kind: Literal["", "Standard_LRS", "StandardSSD_LRS", "Premium_LRS"] = ""

    def missing(self) -> tuple[str, ...]:
        """What has to be decided before a machine can be made."""
        wanted = {"": ("compute",), "qemu": (), "azure": AZURE_NEEDS}[self.compute]
        return tuple(name for name in wanted if not getattr(self, name))


#: What no machine in Azure can be made without.
AZURE_NEEDS: Final = ("storage_account", "resource_group", "location", "size", "network", "subnet", "disk_kind")


class TargetChange(Message):
    """PUT /v1/machines/{name}/target: all of it, and the version that it was made from."""

    target: TargetSettings
    base_version: Count = 0


class PointSchedule(Message):
    """How often an agent makes points by the clock, seconds; 0: never, None: as its own settings say."""

    crash_seconds: Count | None = None
    application_seconds: Count | None = None


class Alert(Message):
    """Something that an operator should know of a machine, since when, and until when (None: still).

    `code` is stable: `rpo-exceeded`; `fold-failing`, `fold-overdue`, `replica-failing`, `replica-overdue`,
    `replica-removal-failing`, `replica-removal-overdue` of upkeep.
    """

    number: Count
    machine: Text
    code: Text
    message: Text
    hint: Text = ""
    raised_ns: Count
    cleared_ns: Count | None = None


class AlertList(Message):
    """GET /v1/alerts, newest first; the newest `MAX_ALERTS` are kept."""

    alerts: tuple[Alert, ...]

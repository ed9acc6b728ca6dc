"""What the operator sets for an agent: one TOML file, each key of which an environment variable may replace.

    directory = "/var/lib/replicar"          # state: identity, change log
    journal_bytes = "4 GiB"

    [[disks]]
    name = "root"
    path = "/srv/vm/root.img"
    nbd = "/run/replicar/root.sock"          # or "127.0.0.1:10809"

How disks are captured is set for the machine as a whole: `capture = "inline"` serves them over NBD, or, with `file =
"/run/replicar/root/disk"`, as a file to put a loop device on; `"trace"` follows
block devices that stay as they are; `"scan"` reads whatever can be read again and again. More than one at once is
refused: a recovery point would be of two moments.

`REPLICAR_AGENT_JOURNAL_BYTES=8GiB` wins over the file; `disks` is JSON there. A key that is not known is refused, in
the file and in the environment: a misspelt limit that is silently ignored is worse than an agent that does not start.
What can be judged from the text alone is judged here; what takes a look at the machine is `preflight`'s.

Relative paths in the file are meant from its own directory.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from replicar.errors import PermanentError
from replicar.formats.changelog import MAX_FILE_BYTES, MIN_FILE_BYTES
from replicar.nbd.protocol import LOOPBACK
from replicar.observe.endpoint import MetricsListen
from replicar.observe.logs import LogFormat, LogFormatSetting

ENVIRONMENT_PREFIX: Final = "REPLICAR_AGENT_"
#: Names the settings file itself; the one variable of that prefix that is no setting.
SETTINGS_VARIABLE: Final = f"{ENVIRONMENT_PREFIX}SETTINGS"
MAX_DISKS: Final = 64
#: What `sockaddr_un` holds, less the closing zero.
MAX_SOCKET_PATH_BYTES: Final = 107


class CaptureKind(StrEnum):
    INLINE = "inline"
    TRACE = "trace"
    SCAN = "scan"


#: What only one kind of capture honours is refused with the others.
_ONLY_WITH: Final = {
    "freeze_budget_seconds": CaptureKind.TRACE,
    "scan_every_seconds": CaptureKind.SCAN,
    "nbd_tls": CaptureKind.INLINE,
}


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where a disk is served: a Unix socket's `path`, or `host` and `port`."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> NbdAddress:
        """`/path`, `unix:/path`, `host:port` or `[ipv6]:port`.

        Raises:
            ValueError: it is none of these.
        """
        if text.startswith("unix:"):
            text = text.removeprefix("unix:")
            return cls(path=Path(text))
        host, separator, port = text.rpartition(":")
        if not separator or "/" in text:
            return cls(path=Path(text))
        host = host.removeprefix("[").removesuffix("]")
        if not port.isascii() or not port.isdecimal() or not 0 < int(port) <= 65535:
            raise ValueError(f"{text!r} is neither a socket path nor host:port")
        return cls(host=host, port=int(port))

    @property
    def is_local(self) -> bool:
        """Whether it leads to this machine alone."""
        return self.path is not None or self.host in LOOPBACK

    @property
    def listen(self) -> Path | tuple[str, int]:
        """As what serves it wants it."""
        return self.path if self.path is not None else (self.host, self.port)

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class NbdTls(BaseModel):
    """TLS for NBD clients on other machines: PEM files of the operator's own authority."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path
    key: Path
    authority: Path


class Application(BaseModel):
    """Application-consistent points: the directory of hooks that hold applications still, and when to make some."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hooks: Path
    hook_timeout_seconds: float = Field(default=30.0, ge=0.1, le=600.0, description="of each call of a hook")
    mark_every_seconds: int = Field(default=0, ge=0, le=86_400 * 7, description="how often by the clock; 0: never")


class DiskSettings(BaseModel):
    """One protected disk. `name` is what the operator calls it, and its name as an NBD export."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    path: Path
    nbd: str = Field(default="", description="socket path or host:port; default <directory>/nbd/<name>.sock")
    file: Path | None = Field(default=None, description="show it as this file too, for a loop device on this machine")

    @model_validator(mode="before")
    @classmethod
    def _same_capture(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "capture" in fields:
            raise ValueError(
                "capture is set for the whole machine, not for a disk: a recovery point of disks that are captured"
                " differently would be of two moments"
            )
        return fields

    @model_validator(mode="after")
    def _address(self) -> Self:
        if self.nbd:
            NbdAddress.parse(self.nbd)
        return self


class AgentSettings(BaseSettings):
    """All of it, with the defaults. Sizes are bytes, or text such as "4 GiB"; rates are bytes a second."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True)

    directory: Path = Field(description="state directory: identity and change log")
    disks: Annotated[tuple[DiskSettings, ...], Field(min_length=1, max_length=MAX_DISKS)]
    capture: CaptureKind = Field(
        default=CaptureKind.INLINE,
        description="inline: serve the disks; trace: follow them where they are; scan: read them again",
    )
    nbd_tls: NbdTls | None = Field(
        default=None, description="certificate, key and authority: lets nbd addresses lead off this machine"
    )
    freeze_budget_seconds: float = Field(
        default=0.5, ge=0.05, le=30.0, description="how long writers may be held at a point (trace capture)"
    )
    journal_bytes: ByteSize = Field(
        default=ByteSize(4 << 30), description="what the change log may take; at 20 MB/s, 4 GiB is three minutes"
    )
    journal_file_bytes: ByteSize = Field(default=ByteSize(64 << 20), ge=MIN_FILE_BYTES, le=MAX_FILE_BYTES)
    seed_bytes_per_second: ByteSize | None = Field(
        default=None, gt=0, description="how fast initial replication reads; default: as fast as it is taken"
    )
    rate_limit_bytes_per_second: ByteSize | None = Field(
        default=None, ge=64 << 10, description="what the sender may send; default: as fast as the network"
    )
    seal_delay_seconds: float = Field(
        default=0.005, ge=0.0, le=10.0, description="how long changes gather when the sender has caught up"
    )
    scan_every_seconds: float = Field(
        default=60.0, ge=1.0, le=86_400.0, description="from the begin of one pass to the next (scan capture)"
    )
    copy_free_space: bool = Field(
        default=True,
        description="false: what file systems have free comes back as zeros, and is not sent (inline capture)",
    )
    audit_bytes_per_second: ByteSize = Field(
        default=ByteSize(4 << 20), ge=0, description="how fast the disks are read for audits; 0: none are made"
    )
    mark_every_seconds: int = Field(
        default=300, ge=0, le=86_400, description="how often a recovery point is named by itself; 0: never"
    )
    application: Application | None = Field(
        default=None, description="hooks, hook_timeout_seconds, mark_every_seconds: application-consistent points"
    )
    heartbeat_seconds: float | None = Field(
        default=None, ge=0.1, le=30.0, description="how often to report when nothing happens; default: as told"
    )

    metrics_listen: MetricsListen = ""
    log_format: LogFormatSetting = LogFormat.TEXT

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in sorted(self.model_fields_set & _ONLY_WITH.keys()):
            kind = _ONLY_WITH[name]
            if self.capture is not kind:
                raise ValueError(f'{name} is of capture = "{kind}", and means nothing with "{self.capture}": remove it')
        if self.journal_bytes < 2 * self.journal_file_bytes:
            raise ValueError("journal_bytes must be at least twice journal_file_bytes")
        for what, values in (
            ("name", [disk.name for disk in self.disks]),
            ("path", [os.path.realpath(disk.path) for disk in self.disks]),
            ("nbd address", [str(address) for address in self.addresses.values()]),
            ("directory of its file", [str(file.parent) for file in self.files.values()]),
        ):
            twice = {value for value in values if values.count(value) > 1}
            if twice:
                raise ValueError(f"two disks have the {what} {min(twice)}")
        for disk in self.disks:
            if self.capture is not CaptureKind.INLINE:
                kind = self.capture
                if not self.copy_free_space:
                    raise ValueError(f'copy_free_space = false can\'t be had with capture = "{kind}": remove it')
                if disk.nbd or disk.file is not None:
                    what = "an nbd address" if disk.nbd else "a file"
                    raise ValueError(
                        f'disk {disk.name} has {what}, but with capture = "{kind}" no disk is served: remove'
                        ' it; or, to serve all of this machine\'s disks, set capture = "inline"'
                    )
                continue
            _check_file(disk, self.directory)
            address = self.addresses.get(disk.name)
            if address is None:
                continue
            if not address.is_local and self.nbd_tls is None:
                raise ValueError(
                    f"{address.host} is not this machine alone, and NBD without TLS has neither encryption nor"
                    f" password: set nbd_tls, or use a socket path or one of {', '.join(LOOPBACK)}"
                )
            path = address.path
            if path is not None and len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
                raise ValueError(
                    f"the socket path {path} is longer than the {MAX_SOCKET_PATH_BYTES} bytes the system allows"
                )
        return self

    @property
    def addresses(self) -> dict[str, NbdAddress]:
        """Where disks are served over NBD, by name: those that say so, and those that say nothing."""
        return {
            disk.name: NbdAddress.parse(disk.nbd)
            if disk.nbd
            else NbdAddress(path=self.directory / "nbd" / f"{disk.name}.sock")
            for disk in self.disks
            if disk.nbd or disk.file is None
        }

    @property
    def files(self) -> dict[str, Path]:
        """The files that disks are shown as, by name."""
        return {disk.name: disk.file for disk in self.disks if disk.file is not None}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over what `load_settings` read from the file."""
        return env_settings, init_settings


def _check_file(disk: DiskSettings, directory: Path) -> None:
    """A file's directory is mounted over: it has to be one of its own."""
    if disk.file is None:
        return
    if not disk.file.is_absolute() or len(disk.file.parts) < 3 or ".." in disk.file.parts:
        raise ValueError(f"file {disk.file} of disk {disk.name} has to be a path like /run/replicar/{disk.name}/disk")
    if len(os.fsencode(keeper_path(directory, disk.name))) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"the directory {directory} has too long a name for the sockets of files' keepers")


def keeper_path(directory: Path, disk: str) -> Path:
    """The socket of whoever keeps the file of `disk` while no agent runs."""
    return directory / "files" / disk


def load_settings(path: Path) -> AgentSettings:
    """Read a settings file, with what the environment replaces.

    Raises:
        PermanentError: the file can't be read, or a key or value is not right; it is named.
    """
    path = path.absolute()
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PermanentError(
            f"can't read the settings {path}: {error.strerror}", hint="give their path with --settings", path=str(path)
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PermanentError(f"the settings {path} are not valid TOML: {error}", path=str(path)) from None
    _refuse_unknown_variables()
    try:
        return AgentSettings(**_from_directory(fields, path.parent))
    except ValidationError as error:
        raise _refusal(path, error) from None
    except SettingsError as error:
        raise PermanentError(f"an environment variable is not right: {error}", hint=_HINT) from None


_HINT: Final = "see `mobility-agent run --help` for what can be set"


def _from_directory(fields: dict[str, Any], base: Path) -> dict[str, Any]:
    """The file's fields with its relative paths made absolute; what is no path is left for validation to refuse."""
    fields = dict(fields)
    if isinstance(fields.get("directory"), str):
        fields["directory"] = str(base / fields["directory"])
    tls = fields.get("nbd_tls")
    if isinstance(tls, dict):
        fields["nbd_tls"] = {key: str(base / path) if isinstance(path, str) else path for key, path in tls.items()}
    application = fields.get("application")
    if isinstance(application, dict) and isinstance(application.get("hooks"), str):
        fields["application"] = {**application, "hooks": str(base / application["hooks"])}
    disks = fields.get("disks")
    if isinstance(disks, list):
        fields["disks"] = [_disk_from_directory(disk, base) if isinstance(disk, dict) else disk for disk in disks]
    return fields


def _disk_from_directory(disk: dict[str, Any], base: Path) -> dict[str, Any]:
    disk = dict(disk)
    for key in ("path", "file"):
        if isinstance(disk.get(key), str):
            disk[key] = str(base / disk[key])
    nbd = disk.get("nbd")
    if isinstance(nbd, str) and nbd and (nbd.startswith("unix:") or "/" in nbd or ":" not in nbd):
        disk["nbd"] = str(base / nbd.removeprefix("unix:"))
    return disk


def _refuse_unknown_variables() -> None:
    known = {f"{ENVIRONMENT_PREFIX}{name}".upper() for name in AgentSettings.model_fields} | {SETTINGS_VARIABLE}
    for name in os.environ:
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in known:
            raise PermanentError(f"the environment variable {name} is no setting of the agent", hint=_HINT, name=name)


def _refusal(path: Path, error: ValidationError) -> PermanentError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is no setting of the agent"
    elif first["type"] == "missing":
        message = "is missing"
    subject: dict[str, Any] = {"key": where} if where else {}
    return PermanentError(
        f"the settings {path}: {f'{where}: ' if where else ''}{message}", hint=_HINT, path=str(path), **subject
    )

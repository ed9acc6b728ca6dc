"""What the operator sets for an agent: one TOML file, each key of which an environment variable may replace.

    directory = "/var/lib/replicar"          # state: identity, change log
    journal_bytes = "4 GiB"

    [[disks]]
    name = "root"
    path = "/srv/vm/root.img"
    nbd = "/run/replicar/root.sock"          # or "127.0.0.1:10809"

`REPLICAR_AGENT_JOURNAL_BYTES=8GiB` wins over the file; `disks` is JSON there. A key that is not known is refused, in
the file and in the environment: a misspelt limit that is silently ignored is worse than an agent that does not start.
What can be judged from the text alone is judged here; what takes a look at the machine is `preflight`'s.

Relative paths in the file are meant from its own directory.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from replicar.errors import PermanentError
from replicar.formats.changelog import MAX_FILE_BYTES, MIN_FILE_BYTES

ENVIRONMENT_PREFIX: Final = "REPLICAR_AGENT_"
#: Names the settings file itself; the one variable of that prefix that is no setting.
SETTINGS_VARIABLE: Final = f"{ENVIRONMENT_PREFIX}SETTINGS"
MAX_DISKS: Final = 64
#: What `sockaddr_un` holds, less the closing zero.
MAX_SOCKET_PATH_BYTES: Final = 107
#: An NBD socket has neither a password nor TLS yet: whoever reaches it owns the disk.
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


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
            ValueError: it is none of these, or leads off this machine.
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
        if host not in LOOPBACK:
            raise ValueError(
                f"{host} is not this machine alone, and NBD is served without encryption or password;"
                f" use a socket path or one of {', '.join(LOOPBACK)}"
            )
        return cls(host=host, port=int(port))

    @property
    def listen(self) -> Path | tuple[str, int]:
        """As what serves it wants it."""
        return self.path if self.path is not None else (self.host, self.port)

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class DiskSettings(BaseModel):
    """One protected disk. `name` is what the operator calls it, and its name as an NBD export."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    path: Path
    nbd: str = Field(default="", description="socket path or host:port; default <directory>/nbd/<name>.sock")

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
    audit_bytes_per_second: ByteSize = Field(
        default=ByteSize(4 << 20), ge=0, description="how fast the disks are read for audits; 0: none are made"
    )
    mark_every_seconds: int = Field(
        default=300, ge=0, le=86_400, description="how often a recovery point is named by itself; 0: never"
    )
    heartbeat_seconds: float | None = Field(
        default=None, ge=0.1, le=30.0, description="how often to report when nothing happens; default: as told"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.journal_bytes < 2 * self.journal_file_bytes:
            raise ValueError("journal_bytes must be at least twice journal_file_bytes")
        for what, values in (
            ("name", [disk.name for disk in self.disks]),
            ("path", [os.path.realpath(disk.path) for disk in self.disks]),
            ("nbd address", [str(self.address(disk)) for disk in self.disks]),
        ):
            twice = {value for value in values if values.count(value) > 1}
            if twice:
                raise ValueError(f"two disks have the {what} {min(twice)}")
        for disk in self.disks:
            path = self.address(disk).path
            if path is not None and len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
                raise ValueError(
                    f"the socket path {path} is longer than the {MAX_SOCKET_PATH_BYTES} bytes the system allows"
                )
        return self

    def address(self, disk: DiskSettings) -> NbdAddress:
        """Where `disk` is served."""
        if disk.nbd:
            return NbdAddress.parse(disk.nbd)
        return NbdAddress(path=self.directory / "nbd" / f"{disk.name}.sock")

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
    disks = fields.get("disks")
    if isinstance(disks, list):
        fields["disks"] = [_disk_from_directory(disk, base) if isinstance(disk, dict) else disk for disk in disks]
    return fields


def _disk_from_directory(disk: dict[str, Any], base: Path) -> dict[str, Any]:
    disk = dict(disk)
    if isinstance(disk.get("path"), str):
        disk["path"] = str(base / disk["path"])
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

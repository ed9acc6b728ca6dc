"""The process server's settings: environment over the TOML file over defaults.

The environment's names are the fields' in capitals behind `REPLICAR_PS_`, and `__` goes inside
(`REPLICAR_PS_STORAGE__ACCOUNT_KEY_FILE`). A name that is not known is refused, never ignored: a setting that can't be
honoured is worse than none.

    directory = "/var/lib/replicar/process-server"
    cache_bytes = 107374182400

    [storage]
    endpoint = "https://NAME.blob.core.windows.net"
    account_name = "NAME"
    account_key_file = "/etc/replicar/account.key"
    container = "replicar"
"""

from __future__ import annotations

import os
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from process_server.cache import MIN_SLOTS, PAYLOAD_BYTES, SLOT_BYTES
from process_server.logwriter import MIN_BLOB_BYTES, LogLimits
from process_server.machine import Tuning
from replicar.errors import PermanentError
from replicar.formats.logblob import MAX_STRIPES
from replicar.formats.wire import DEFAULT_PORT
from replicar.storage.target import StorageTarget

ENVIRONMENT_PREFIX: Final = "REPLICAR_PS_"
DEFAULT_DIRECTORY: Final = Path("/var/lib/replicar/process-server")
MAX_BLOB_BYTES: Final = 8 << 40

Bytes = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """What `process-server run` needs to know; `storage` has no default."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    directory: Annotated[Path, Field(description="identity, cache and state")] = DEFAULT_DIRECTORY
    listen_host: Annotated[str, Field(description="local address to listen on")] = "0.0.0.0"  # noqa: S104 - mutual TLS
    port: Annotated[int, Field(ge=0, le=65535, description="0 takes a free one")] = DEFAULT_PORT
    advertise_host: Annotated[str, Field(description="where agents reach it; empty: this host's name")] = ""
    cache_bytes: Annotated[Bytes, Field(ge=MIN_SLOTS * SLOT_BYTES)] = 16 << 30
    buffers_bytes: Annotated[Bytes, Field(ge=PAYLOAD_BYTES, description="memory to receive into")] = 256 << 20
    compression_level: Annotated[int, Field(ge=-7, le=19, description="zstd's; 0 stores as it is")] = 1
    segment_age_seconds: Annotated[float, Field(gt=0, le=60)] = 0.2
    uploads_per_machine: Annotated[int, Field(ge=1, le=32)] = 4
    log_stripes: Annotated[int, Field(ge=1, le=MAX_STRIPES)] = 8
    log_blob_bytes: Annotated[int, Field(ge=MIN_BLOB_BYTES, le=MAX_BLOB_BYTES, multiple_of=512)] = 64 << 30
    heartbeat_seconds: Annotated[float, Field(gt=0, le=30, description="how often it reports")] = 10.0
    storage: StorageTarget

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def tuning(self) -> Tuning:
        """The part of it that concerns a machine's stream."""
        return Tuning(
            segment_age_seconds=self.segment_age_seconds,
            uploads=self.uploads_per_machine,
            log=LogLimits(stripes=self.log_stripes, blob_bytes=self.log_blob_bytes),
        )

    def advertised_host(self) -> str:
        """Where agents are told to connect."""
        if self.advertise_host:
            return self.advertise_host
        everywhere = ("", "0.0.0.0", "::")  # noqa: S104 - compared, not listened on
        return socket.getfqdn() if self.listen_host in everywhere else self.listen_host


def load_settings(file: Path | None) -> Settings:
    """Settings from the environment and, if one is named, the file.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value out of bounds.
    """
    if file is not None and not file.is_file():
        raise PermanentError(f"no settings file at {file}", hint="check the path given to --settings", path=str(file))
    _refuse_unknown_environment()

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        loaded: dict[str, Any] = {name: value for name, value in FromFile()}  # noqa: C416 - fields, not a dump
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise PermanentError(
            f"the setting {name!r} of the process server can't be used: {first['msg']}",
            hint=f"look in {file or 'the settings file'} and at {_variable(name)}; see `process-server run --help`",
            setting=name,
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise PermanentError(f"the settings file {file} is no TOML: {error}", hint="look at that line") from None
    return Settings.model_construct(**loaded)


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper().replace(".", "__")


def _refuse_unknown_environment() -> None:
    """A misspelt variable would be ignored otherwise."""
    for variable in os.environ:
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")[0]
        if variable.startswith(ENVIRONMENT_PREFIX) and name not in Settings.model_fields:
            raise PermanentError(
                f"the environment sets {variable}, which the process server does not know",
                hint="known are: " + ", ".join(_variable(field) for field in Settings.model_fields),
                setting=variable,
            )

"""A recovery worker's settings: environment over the TOML file over defaults.

    identity = "/var/lib/replicar/worker"            # where `recovery-worker enrol` put it, or an operator's
    directory = "/var/lib/replicar/recovered"        # machines, overlays, evidence; a short path
    accelerator = "tcg"                              # "kvm" where this host has it
    fold_seconds = 900                               # how often each machine's log is indexed and thinned; 0: not here

    [storage]                                        # as a process server's
    endpoint = "https://NAME.blob.core.windows.net"
    account_name = "NAME"
    account_key_file = "/etc/replicar/account.key"
    container = "replicar"

The environment's names are the fields' in capitals behind `REPLICAR_WORKER_`. A name that is not known is refused.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from replicar.errors import PermanentError
from replicar.storage.target import StorageTarget

ENVIRONMENT_PREFIX: Final = "REPLICAR_WORKER_"
DEFAULT_IDENTITY: Final = Path("/var/lib/replicar/worker")


class WorkerSettings(BaseSettings):
    """See the module."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    identity: Annotated[Path, Field(description="this worker's identity, or an operator's")] = DEFAULT_IDENTITY
    config_server: Annotated[str | None, Field(description="if it differs from what the identity says")] = None
    directory: Annotated[Path, Field(description="machines, overlays and evidence")] = Path(
        "/var/lib/replicar/recovered"
    )
    accelerator: Annotated[Literal["tcg", "kvm"], Field(description="what runs machines on this host")] = "tcg"
    fold_seconds: Annotated[
        float, Field(ge=0, le=86_400, description="how often each log is indexed and thinned; 0: never")
    ] = 900.0
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


def load_settings(file: Path | None) -> WorkerSettings:
    """Settings from the environment and, if one is named, the file.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value that can't be used.
    """
    if file is not None and not file.is_file():
        raise PermanentError(f"no settings file at {file}", hint="check the path given to --settings", path=str(file))

    class FromFile(WorkerSettings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        loaded: dict[str, Any] = {name: value for name, value in FromFile()}  # noqa: C416 - fields, not a dump
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise PermanentError(
            f"the setting {name!r} of the recovery worker can't be used: {first['msg']}",
            hint=f"look in {file or 'the settings file'}; see `recovery-worker run --help`",
            setting=name,
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise PermanentError(f"the settings file {file} is no TOML: {error}", hint="look at that line") from None
    return WorkerSettings.model_construct(**loaded)

"""The operator's settings: who asks, and where the logs are.

    identity = "/var/lib/replicar/vault/operator"   # made by `config-server init`
    config_server = "config.example.org:443"        # only if it differs from what the identity says

    [storage]                                       # only for what reads storage: recover, verify
    endpoint = "https://NAME.blob.core.windows.net"
    account_name = "NAME"
    account_key_file = "/etc/replicar/account.key"
    container = "replicar"

The environment beats the file: `REPLICAR_IDENTITY`, `REPLICAR_CONFIG_SERVER`, `REPLICAR_STORAGE__CONTAINER`... An
unknown name in the file is refused, never ignored.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.errors import PermanentError
from replicar.storage.target import StorageTarget

ENVIRONMENT_PREFIX: Final = "REPLICAR_"
SETTINGS_VARIABLE: Final = "REPLICAR_SETTINGS"


def default_file() -> Path:
    """Where the settings are unless somebody says otherwise."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "replicar" / "replicar.toml"


class OperatorSettings(BaseSettings):
    """See the module. What a sub-command needs and nobody set is refused when it is asked for."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    identity: Path | None = None
    config_server: str | None = None
    storage: StorageTarget | None = None

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

    def control(self) -> ControlClient:
        """A client of the config server with the operator's identity; an asynchronous context manager.

        Raises:
            PermanentError: the identity is not set, missing or damaged.
        """
        if self.identity is None:
            raise PermanentError(
                "the settings do not say which identity to use",
                hint=f"set `identity` in {default_file()} or REPLICAR_IDENTITY to the operator's directory that "
                "`config-server init` made",
                setting="identity",
            )
        return ControlClient(Identity.load(self.identity), address=self.config_server)

    def target(self, container: str | None = None) -> StorageTarget:
        """The storage account, with another container if one is named.

        Raises:
            PermanentError: it is not set, or the name is no container's.
        """
        if self.storage is None:
            raise PermanentError(
                "the settings do not say where the storage account is",
                hint=f"add a [storage] section to {default_file()}; see `replicar recover --help`",
                setting="storage",
            )
        if container is None:
            return self.storage
        fields: dict[str, Any] = {name: getattr(self.storage, name) for name in StorageTarget.model_fields}
        return StorageTarget(**{**fields, "container": container})


def load_settings(file: Path | None) -> OperatorSettings:
    """Settings from the environment and a file: the one that is named, or the default one if it is there.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value that can't be used.
    """
    if file is not None and not file.is_file():
        raise PermanentError(f"no settings file at {file}", hint="check the path given to --settings", path=str(file))
    found = file or (default_file() if default_file().is_file() else None)

    class FromFile(OperatorSettings):
        model_config = SettingsConfigDict(toml_file=found)

    try:
        loaded: dict[str, Any] = {name: value for name, value in FromFile()}  # noqa: C416 - fields, not a dump
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        variable = ENVIRONMENT_PREFIX + name.upper().replace(".", "__")
        raise PermanentError(
            f"the setting {name!r} can't be used: {first['msg']}",
            hint=f"look in {found or 'the settings file'} and at {variable}",
            setting=name,
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise PermanentError(f"the settings file {found} is no TOML: {error}", hint="look at that line") from None
    except OSError as error:
        raise PermanentError(f"can't read {found}: {error.strerror}", hint="check its owner and mode") from error
    return OperatorSettings.model_construct(**loaded)

"""How the parts read their settings: what was given over the environment over the TOML file over defaults.

A name that is not known is refused, never ignored, in the file and in the environment alike: a setting that can't be
honoured is worse than none. What a file holds is not repeated in errors, since it may be a secret in the wrong place.
"""

from __future__ import annotations

import os
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from replicar.errors import PermanentError


class FileSettings(BaseSettings):
    """Settings that come from a file and the environment; a part derives its own, with its `env_prefix`."""

    model_config = SettingsConfigDict(
        env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True, toml_file=None
    )

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


SomeSettings = TypeVar("SomeSettings", bound=FileSettings)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one part's settings.

    Attributes:
        part: what errors call it, such as "process server"; empty for the operator's command.
        command: the one whose help lists the settings.
        owns_prefix: whether no other program's variables begin with its prefix, so that an unknown one is refused.
    """

    part: str
    command: str
    owns_prefix: bool = True

    def read(
        self, model: type[SomeSettings], file: Path | None, given: Mapping[str, Any] | None = None
    ) -> SomeSettings:
        """Settings of all sources.

        Args:
            file: the TOML file; None: there is none.
            given: what beats all else, such as a command's options.

        Raises:
            PermanentError: a file that is missing, unreadable or no TOML; an unknown name, a value that can't be used.
        """
        if file is not None and not file.is_file():
            raise PermanentError(
                f"no settings file at {file}", hint="check the path given to --settings", path=str(file)
            )
        if self.owns_prefix:
            self._refuse_unknown_environment(model)
        members = {"model_config": SettingsConfigDict(toml_file=file)}
        from_file = types.new_class("FromFile", (model,), exec_body=lambda body: body.update(members))
        try:
            loaded: dict[str, Any] = {name: value for name, value in from_file(**given or {})}  # noqa: C416 - no dump
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            raise PermanentError(
                f"the setting {name!r}{self._whose} can't be used: {first['msg']}",
                hint=f"look in {file or 'the settings file'} and at {_variable(model, name)}; "
                f"see `{self.command} --help`",
                setting=name,
            ) from None
        except tomllib.TOMLDecodeError as error:
            raise PermanentError(f"the settings file {file} is no TOML: {error}", hint="look at that line") from None
        except (OSError, UnicodeDecodeError) as error:
            raise PermanentError(
                f"can't read {file}: {error}", hint="check its owner and mode, and its encoding"
            ) from None
        return cast("SomeSettings", model.model_construct(**loaded))

    @property
    def _whose(self) -> str:
        return f" of the {self.part}" if self.part else ""

    def _refuse_unknown_environment(self, model: type[FileSettings]) -> None:
        """A misspelt variable would be ignored otherwise."""
        prefix = model.model_config.get("env_prefix", "")
        for variable in os.environ:
            name = variable.removeprefix(prefix).lower().split("__")[0]
            if variable.startswith(prefix) and name not in model.model_fields:
                raise PermanentError(
                    f"the environment sets {variable}, which the {self.part} does not know",
                    hint="known are: " + ", ".join(_variable(model, field) for field in model.model_fields),
                    setting=variable,
                )


def _variable(model: type[FileSettings], name: str) -> str:
    return model.model_config.get("env_prefix", "") + name.upper().replace(".", "__")

"""What all messages of the config server's API are made of: the base class, bounded types, and errors as reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, SecretStr, StringConstraints, ValidationError

from replicar.errors import PermanentError

MAX_TEXT: Final = 512
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"

#: Registry integers are signed 64-bit.
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Digest = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){0,64}$")]
Pem = Annotated[str, StringConstraints(max_length=16 << 10)]
Secret = Annotated[SecretStr, PlainSerializer(SecretStr.get_secret_value, return_type=str, when_used="json")]


class Message(BaseModel):
    """What all messages share. Validation errors never quote the input: it may hold a key."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    def to_json(self) -> bytes:
        """The message as it goes over the wire, keys included."""
        return self.model_dump_json().encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read a message strictly.

        Raises:
            PermanentError: it is no JSON, or not this message; the first offending field is named.
        """
        try:
            return cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the message"
            raise PermanentError(
                f"not a valid {cls.__name__}: {where}: {first['msg']}",
                hint="the two parts may be of different versions: compare `--version` on both",
                status=400,
                field=where,
            ) from None


class ErrorReport(Message):
    """What stands in the way of a part now: an error of the common tree, by class name; long texts are cut.

    `part` says where: in a heartbeat the part of the sender that has it, in an overview who reported it.
    """

    part: Text = ""
    error: Text
    message: Text
    hint: Text = ""

    @classmethod
    def of(cls, part: str, error: Mapping[str, Any]) -> Self:
        """The report of an error as `ReplicarError.as_dict` gave it."""
        texts = {name: _cut(str(error.get(name, ""))) for name in ("error", "message", "hint")}
        return cls(part=_cut(part), **texts)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"

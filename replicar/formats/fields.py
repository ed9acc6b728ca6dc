"""A small JSON object, read strictly: what records and wire messages are made of.

Unknown fields are ignored, so that an older part understands a newer one; known ones are what they are said to be or
the whole is corrupt. A bool is no number here, a number no text, and text is text that every terminal and file can be
given: JSON can spell half a surrogate pair, which Python takes and then fails to encode wherever it is used first.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any, Final

from replicar.errors import CorruptionError
from replicar.formats.frame import Buffer

#: Sequences, sizes and counts all fit.
MAX_INTEGER: Final = (1 << 64) - 1


class Fields:
    """The object in `data`; `what` names it in errors.

    Raises:
        CorruptionError: here and in every method, when the bytes are not what they should be.
    """

    def __init__(self, data: Buffer, what: str) -> None:
        self._what = what
        try:
            fields = json.loads(bytes(data).decode())
        except (ValueError, RecursionError) as error:
            raise CorruptionError(f"{what} is no JSON: {type(error).__name__}") from None
        if not isinstance(fields, dict):
            raise CorruptionError(f"{what} is no JSON object")
        self._fields: dict[str, Any] = fields

    def text(self, name: str, default: str | None = None) -> str:
        value = self._fields.get(name, default)
        if not isinstance(value, str) or not is_text(value):
            raise CorruptionError(f"{self._what} has no text field {name!r}")
        return value

    def integer(self, name: str, most: int = MAX_INTEGER) -> int:
        """A whole number from 0 to `most`."""
        value: Any = self._fields.get(name)
        if not is_integer(value, most):
            raise CorruptionError(f"{self._what} has no number {name!r} from 0 to {most}")
        return int(value)

    def integers(self, name: str, *, most: int, count: int) -> tuple[int, ...]:
        """A list of 1 to `count` whole numbers from 0 to `most`."""
        values = self._fields.get(name)
        if not isinstance(values, list) or not 0 < len(values) <= count:
            raise CorruptionError(f"{self._what} has no list {name!r} of 1 to {count} numbers")
        if not all(is_integer(value, most) for value in values):
            raise CorruptionError(f"{self._what} has more than numbers from 0 to {most} in {name!r}")
        return tuple(values)

    def has(self, name: str) -> bool:
        """Whether there is a field of that name, and it is not null."""
        return self._fields.get(name) is not None

    def names(self) -> list[str]:
        """The names of all fields, as they stand."""
        return [name for name in self._fields if is_text(name)]

    def flag(self, name: str) -> bool:
        value = self._fields.get(name)
        if not isinstance(value, bool):
            raise CorruptionError(f"{self._what} has no flag {name!r}")
        return value

    def rows(self, name: str, columns: int) -> list[tuple[int, ...]]:
        """A list of lists of `columns` whole numbers, maybe an empty one."""
        values = self._fields.get(name)
        if not isinstance(values, list):
            raise CorruptionError(f"{self._what} has no list {name!r}")
        for row in values:
            if not isinstance(row, list) or len(row) != columns or not all(is_integer(n, MAX_INTEGER) for n in row):
                raise CorruptionError(f"{self._what} has more than rows of {columns} numbers in {name!r}")
        return [tuple(row) for row in values]

    def texts(self, name: str) -> list[str]:
        """A list of texts, maybe an empty one."""
        values = self._fields.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) and is_text(value) for value in values):
            raise CorruptionError(f"{self._what} has no list {name!r} of texts")
        return list(values)

    def binary(self, name: str, length: int) -> bytes:
        """So many bytes, in hexadecimal."""
        try:
            value = bytes.fromhex(self.text(name))
        except ValueError:
            value = b""
        if len(value) != length:
            raise CorruptionError(f"{self._what} has no {length} bytes {name!r}")
        return value

    def inner(self, name: str) -> Fields:
        """The object of that name."""
        return Fields.of(self._fields.get(name), f"{name!r} of {self._what}")

    def each(self, name: str) -> list[Fields]:
        """A list of objects, maybe an empty one."""
        values = self._fields.get(name)
        if not isinstance(values, list):
            raise CorruptionError(f"{self._what} has no list {name!r}")
        return [Fields.of(value, f"{name!r} of {self._what}") for value in values]

    @classmethod
    def of(cls, fields: object, what: str) -> Fields:
        """What was decoded already."""
        if not isinstance(fields, dict):
            raise CorruptionError(f"{what} is no JSON object")
        made = cls.__new__(cls)
        made._what, made._fields = what, fields
        return made

    def uuid(self, name: str) -> uuid.UUID:
        """A UUID in its one usual spelling."""
        text = self.text(name)
        try:
            value = uuid.UUID(text)
        except ValueError:
            value = None
        if value is None or str(value) != text:
            raise CorruptionError(f"{self._what} has no UUID {name!r}")
        return value


def is_integer(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_text(value: str) -> bool:
    """Whether every character can be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def pack(fields: Mapping[str, Any]) -> bytes:
    """The object as compact UTF-8. Its texts must satisfy `is_text`."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

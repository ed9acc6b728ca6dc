"""Reads the byte tables of docs/formats.md, explains bytes by them, and keeps the examples between its markers."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
_TABLE = re.compile(r"<!-- layout: (?P<name>[a-z-]+) (?P<size>\d+) -->\n\n(?P<rows>(?:\|.*\n)+)")
_EXAMPLE = re.compile(r"<!-- example: (?P<name>[a-z]+) -->\n(?:\n```text\n(?P<text>.*?)```\n)?", re.DOTALL)


@dataclass(frozen=True)
class Field:
    offset: int
    size: int
    name: str
    type: str

    def value(self, data: bytes) -> object:
        raw = data[self.offset : self.offset + self.size]
        if self.type.startswith("u") and self.type != "uuid":
            big = self.type.endswith("be")
            assert int(self.type[1:].removesuffix("be")) == 8 * self.size, f"{self.name}: {self.type}"
            return int.from_bytes(raw, "big" if big else "little")
        match self.type:
            case "uuid":
                return uuid.UUID(bytes=raw)
            case "ascii":
                return raw.decode("ascii")
            case "bytes":
                return raw
            case "zero":
                assert not any(raw), f"{self.name} is not zero"
                return None
        raise AssertionError(f"the document has a type {self.type}")

    def shown(self, data: bytes) -> str:
        value = self.value(data)
        if isinstance(value, int):
            return f"{value}"
        return repr(value) if isinstance(value, str) else "" if isinstance(value, bytes) else str(value or "")


@dataclass(frozen=True)
class Layout:
    name: str
    size: int
    fields: tuple[Field, ...]

    def values(self, data: bytes) -> dict[str, object]:
        """The fields' values, without those that are only zeros."""
        return {field.name: field.value(data) for field in self.fields if field.type != "zero"}

    def explain(self, data: bytes, base: int = 0) -> str:
        """`offset  hex  field  value`, a line (or more, for long fields) each."""
        lines = []
        for field in self.fields:
            raw = data[field.offset : field.offset + field.size]
            first, rest = raw[:16], raw[16:] if any(raw[16:]) else b""
            more = f"  ({field.size} bytes)" if field.size > 32 and not rest else ""
            line = f"{base + field.offset:6d}  {first.hex():32s}  {field.name} {field.shown(data)}"
            lines.append(line.rstrip() + more)
            lines += [f"{'':6s}  {rest[start : start + 16].hex()}" for start in range(0, len(rest), 16)]
        return "".join(line + "\n" for line in lines)


def layouts(document: str) -> dict[str, Layout]:
    """Every byte table of the document, by name."""
    found = {}
    for match in _TABLE.finditer(document):
        fields = []
        for row in match["rows"].splitlines()[2:]:
            offset, size, name, kind = (cell.strip() for cell in row.strip("|").split("|")[:4])
            fields.append(Field(int(offset), int(size), name, kind))
        found[match["name"]] = Layout(match["name"], int(match["size"]), tuple(fields))
    return found


def examples(document: str) -> dict[str, str]:
    """The text of every example, by name; empty where it has not been written yet."""
    return {match["name"]: match["text"] or "" for match in _EXAMPLE.finditer(document)}


def with_examples(document: str, texts: Mapping[str, str]) -> str:
    """The document with these examples instead of its own."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- example: {match['name']} -->\n\n```text\n{texts[match['name']]}```\n"

    return _EXAMPLE.sub(block, document)

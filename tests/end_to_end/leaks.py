"""What must never be written down: every secret of a cluster, however it could slip out, and a search for it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

#: Shorter than this nothing is a secret, and much would be found by chance.
_LEAST: Final = 12


@dataclass
class Secrets:
    """Secrets by what they are."""

    found: dict[str, set[bytes]] = field(default_factory=dict, repr=False)

    def add(self, what: str, secret: bytes | str) -> None:
        """A secret, as text or bytes, and the ways to write it."""
        raw = secret.encode() if isinstance(secret, str) else secret
        assert len(raw) >= _LEAST, f"{what} is short"
        self.found.setdefault(what, set()).update(_forms(raw))

    def add_private_key(self, what: str, pem: Path) -> None:
        """A private key's file: each of its lines is one."""
        body = [line for line in pem.read_bytes().splitlines() if line and not line.startswith(b"-----")]
        assert body, f"{pem} holds no key"
        self.found.setdefault(what, set()).update(line for line in body if len(line) >= _LEAST)

    def leaks(self, texts: Iterable[tuple[str, bytes]]) -> list[str]:
        """What was found where."""
        return [
            f"{what} in {place}"
            for place, text in texts
            for what, forms in self.found.items()
            if any(form in text for form in forms)
        ]


def _forms(raw: bytes) -> Iterator[bytes]:
    yield raw
    yield raw.hex().encode()
    yield base64.b64encode(raw).rstrip(b"=")
    yield base64.urlsafe_b64encode(raw).rstrip(b"=")
    yield repr(raw)[2:-1].encode()
    try:
        decoded = base64.b64decode(raw, validate=True)
    except ValueError:
        return
    if len(decoded) >= _LEAST:
        yield decoded
        yield decoded.hex().encode()

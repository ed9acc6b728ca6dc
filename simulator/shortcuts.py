"""What is not done again and again while a story is told, since nothing that a story is about would come of it.

- Keys, certificates and authorities that were found to fit together still do.
- Contexts of TLS are made once: nobody uses them, connections of the world carry bytes as they are.
- Status files, gauges and idle looks come less often than in the product. They wake somebody who finds nothing to do,
  ten times a second of every part; whoever has something to do is woken by that.
- While a story is judged, what was opened once is remembered: the walks to five points read the same segments, sealed
  with the same keys, so decrypting and checking the same bytes gives the same tables.

Sizes that only a large disk would show are small: regions are 64 KiB and 128 KiB instead of 1 MiB and 16 MiB, and
checkpoints come three times as often, so that much is retired within a minute.

Each of them is a name of the product's that stands for something else (`world.replaced`).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

from config_server import bells
from mobility_agent import checkpoint, control as agent_control, seeding, sender, service as agent_service, touched
from mobility_agent.regions import DirtyRegions
from process_server import service as server_service
from replicar.control import client
from replicar.control.identity import Identity
from replicar.formats import segment
from simulator.world.replaced import replaced

#: Virtual seconds between status files, gauges of the agent, and idle looks of its seeder; the product's: 1, 0.1, 0.1.
STATUS_SECONDS: Final = 5.0
SAMPLE_SECONDS: Final = 2.0
IDLE_SECONDS: Final = 0.25
#: The same between reports while an operator waits for a point, and while the agent is in a gap; the product's:
#: 0.25 and 2.
HURRY_SECONDS: Final = 1.0
PROGRESS_SECONDS: Final = 4.0
#: Bytes of a dirty region, the shift of a touched one, and seconds between checkpoints; the product's: 1 MiB, 24, 15.
REGION_BYTES: Final = 1 << 16
TOUCHED_SHIFT: Final = 17
CHECKPOINT_SECONDS: Final = 5.0

#: Whether key, certificate and authority fit together, for identities that were looked at; few, and all of the cast.
_FITTING: Final[dict[tuple[object, ...], bool]] = {}


@contextmanager
def shortcuts() -> Iterator[None]:
    """While a story is told."""
    tls = [(client, "client_context"), (sender, "client_context"), (server_service, "server_context")]
    with replaced(
        *((module, name, _any_context) for module, name in tls),
        *((module, "reload_certificate", _reload) for module in (client, sender, server_service)),
        (agent_service, "SAMPLE_SECONDS", SAMPLE_SECONDS),
        (agent_service, "STATUS_SECONDS", STATUS_SECONDS),
        (Identity, "_fits", _remembered_fits(Identity._fits)),
        (agent_control, "PROGRESS_SECONDS", PROGRESS_SECONDS),
        (bells, "HURRY_SECONDS", HURRY_SECONDS),
        (seeding, "IDLE_SECONDS", IDLE_SECONDS),
        (server_service, "STATUS_SECONDS", STATUS_SECONDS),
        (checkpoint, "CHECKPOINT_SECONDS", CHECKPOINT_SECONDS),
        (touched, "REGION_SHIFT", TOUCHED_SHIFT),
        (touched, "REGION_BYTES", 1 << TOUCHED_SHIFT),
        (seeding, "REGION_BYTES", 1 << TOUCHED_SHIFT),
        (DirtyRegions.__init__, "__defaults__", (REGION_BYTES,)),
    ):
        yield


@contextmanager
def remembering() -> Iterator[None]:
    """While one story is judged, and its storage holds still."""
    with replaced(
        (segment, "open_table", _remembered(segment.open_table)),
        (segment, "open_chunk", _remembered_chunk(segment.open_chunk)),
        (segment, "read_header", _remembered_header(segment.read_header)),
    ):
        yield


def _remembered(open_table: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def remembered(header: Any, sealed_table: Any, data_key: bytes) -> Any:
        key = (header, bytes(sealed_table), data_key)
        if key not in known:
            known[key] = open_table(header, sealed_table, data_key)
        return known[key]

    return remembered


def _remembered_chunk(open_chunk: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def remembered(table: Any, index: int, sealed_chunk: Any, data_key: bytes) -> Any:
        key = (table.digest, index, bytes(sealed_chunk), data_key)  # the digest is of all that the table says
        if key not in known:
            known[key] = open_chunk(table, index, sealed_chunk, data_key)
        return known[key]

    return remembered


def _remembered_header(read_header: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[bytes, Any] = {}

    def remembered(data: Any, offset: int = 0) -> Any:
        raw = bytes(data[offset : offset + segment.HEADER_BYTES])
        if raw not in known:
            known[raw] = read_header(data, offset)
        return known[raw]

    return remembered


def _remembered_fits(fits: Callable[[Identity], bool]) -> Callable[[Identity], bool]:
    def remembered(identity: Identity) -> bool:
        key = (identity.id, identity.role, identity.key_pem, identity.certificate_pem, identity.authority_pem)
        if key not in _FITTING:
            _FITTING[key] = fits(identity)
        return _FITTING[key]

    return remembered


@lru_cache(maxsize=1)
def _context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _any_context(*_: Any, **__: Any) -> ssl.SSLContext:
    return _context()


def _reload(*_: Any) -> None:
    """Nobody uses it."""

"""What agent and process server say to each other on port 9443, as bytes and as states; no socket anywhere.

The agent says HELLO, the server WELCOME; from then on the agent's direction is frames and nothing else, end to end,
so that the server receives them into the very buffer it caches and seals. The server's direction is messages:

    agent                                   server
    HELLO machine, versions, log range  ->
                                        <-  WELCOME next_sequence, stored_sequence      (or ERROR, and it hangs up)
    frame, frame, frame ...             ->
                                        <-  ACK received, stored        (at every group commit, and as a sign of life)
                                        <-  RESEND next_sequence        (a frame came damaged or out of order)
                                        <-  ERROR code, text, hint      (and it hangs up)

Either end may be older: a reader ignores fields it does not know, the agent offers the stream versions it speaks, the
server picks one. Texts that are too long are cut by whoever sends them.

After RESEND the server drops what was under way until the frame it asked for arrives; the agent goes back to it. Both
ends bound what they accept before it is authenticated: a message body has at most 16 KiB.

Weak: the agent has no word for "I am alive"; an idle agent is told from a dead one by TCP keepalive and by its
heartbeat to the config server.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import Final, TypeAlias

import xxhash

from replicar.errors import (
    ConflictError,
    CorruptionError,
    FencedError,
    LimitError,
    PermanentError,
    ReplicarError,
    TransientError,
)
from replicar.formats import fields
from replicar.formats.fields import Fields
from replicar.formats.frame import Buffer

MAGIC: Final = b"RPMS"
VERSION: Final = 1
HEADER_BYTES: Final = 20
MAX_BODY_BYTES: Final = 16 << 10
DEFAULT_PORT: Final = 9443
#: The server says ACK at least this often, so that silence means something.
ACK_INTERVAL_SECONDS: Final = 5.0
#: Silence that makes an agent hang up and connect again.
SILENCE_SECONDS: Final = 20.0
#: What the texts of a message may take of its body, in bytes; two of the longest and some numbers fit.
MAX_TEXT_BYTES: Final = 4 << 10
MAX_VERSIONS: Final = 16
MAX_VERSION: Final = (1 << 16) - 1

_HEADER = struct.Struct("<4sBBHIQ")
_ACK = struct.Struct("<QQ")


class MessageType(IntEnum):
    HELLO = 1
    WELCOME = 2
    ACK = 3
    RESEND = 4
    ERROR = 5


@dataclass(frozen=True, slots=True)
class Hello:
    """The agent introduces its stream: which sequences its change log still holds.

    `first_sequence` is the oldest it can send, `next_sequence` the first it has not captured yet. `versions` are those
    of the stream that follows (1: frames, as they are).
    """

    machine_id: uuid.UUID
    first_sequence: int
    next_sequence: int
    versions: tuple[int, ...] = (VERSION,)
    software: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """Where the server wants the stream to go on; everything up to `stored_sequence` is in storage."""

    next_sequence: int
    stored_sequence: int
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Ack:
    """`received`: durable in the server's cache. `stored`: durable in storage, and so is all before it."""

    received_sequence: int
    stored_sequence: int


@dataclass(frozen=True, slots=True)
class Resend:
    """Send again from here; why the last frame was not taken."""

    next_sequence: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server hangs up: an error of the common tree, by class name."""

    error: str
    message: str
    hint: str

    def as_error(self) -> ReplicarError:
        """The refusal as the exception it stands for (an unknown class becomes a PermanentError)."""
        return _ERRORS.get(self.error, PermanentError)(self.message, hint=self.hint)


Message: TypeAlias = Hello | Welcome | Ack | Resend | Refusal

_ERRORS: Final[Mapping[str, type[ReplicarError]]] = {
    kind.__name__: kind
    for kind in (TransientError, PermanentError, CorruptionError, FencedError, ConflictError, LimitError)
}


def pack_message(message: Message) -> bytes:
    """A message as bytes, header and body; texts that are too long are cut."""
    kind, body = _body(message)
    head = _HEADER.pack(MAGIC, VERSION, kind, 0, len(body), 0)[:-8]
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + body)) + body


def read_message(data: Buffer, offset: int = 0) -> tuple[Message, int] | None:
    """Decode the message at `offset`.

    Returns:
        The message and where the next one begins, or None when it is not all there yet.

    Raises:
        CorruptionError: for anything that is no message of this version.
    """
    if len(data) - offset < HEADER_BYTES:
        return None
    magic, version, kind, flags, body_bytes, checksum = _HEADER.unpack_from(data, offset)
    if magic != MAGIC or version != VERSION or flags or body_bytes > MAX_BODY_BYTES:
        raise CorruptionError("no message of this protocol", hint="is the other end a Replicar process server?")
    end = offset + HEADER_BYTES + body_bytes
    if len(data) < end:
        return None
    head, body = bytes(data[offset : offset + HEADER_BYTES - 8]), bytes(data[offset + HEADER_BYTES : end])
    if xxhash.xxh3_64_intdigest(head + body) != checksum:
        raise CorruptionError("a message fails its checksum")
    return _message(kind, body), end


def _body(message: Message) -> tuple[MessageType, bytes]:
    match message:
        case Ack(received, stored):
            return MessageType.ACK, _ACK.pack(received, stored)
        case Hello():
            return MessageType.HELLO, fields.pack(
                {
                    "machine_id": str(message.machine_id),
                    "first_sequence": message.first_sequence,
                    "next_sequence": message.next_sequence,
                    "versions": message.versions,
                    "software": _cut(message.software),
                }
            )
        case Welcome(next_sequence, stored, version):
            return MessageType.WELCOME, fields.pack(
                {"next_sequence": next_sequence, "stored_sequence": stored, "version": version}
            )
        case Resend(next_sequence, reason):
            return MessageType.RESEND, fields.pack({"next_sequence": next_sequence, "reason": _cut(reason)})
        case Refusal(error, text, hint):
            texts = {"error": _cut(error), "message": _cut(text), "hint": _cut(hint)}
            return MessageType.ERROR, fields.pack(texts)


def _cut(text: str) -> str:
    """What fits of a text, with a question mark for whatever can't be encoded."""
    text = text.encode(errors="replace").decode()
    while len(fields.pack({"": text})) > MAX_TEXT_BYTES:
        text = text[: len(text) * 3 // 4]
    return text


def _message(kind: int, body: bytes) -> Message:
    if kind == MessageType.ACK:
        if len(body) != _ACK.size:
            raise CorruptionError(f"an ACK of {len(body)} bytes")
        return Ack(*_ACK.unpack(body))
    if kind not in tuple(MessageType):
        raise CorruptionError(f"message type {kind} is not known here", hint="upgrade the older of the two parts")
    found = Fields(body, f"a message of type {MessageType(kind).name}")
    if kind == MessageType.HELLO:
        first, following = found.integer("first_sequence"), found.integer("next_sequence")
        if first > following:
            raise CorruptionError(f"a HELLO whose log ends at {following}, before its beginning at {first}")
        versions = found.integers("versions", most=MAX_VERSION, count=MAX_VERSIONS)
        return Hello(found.uuid("machine_id"), first, following, versions, found.text("software"))
    if kind == MessageType.WELCOME:
        following, stored = found.integer("next_sequence"), found.integer("stored_sequence")
        return Welcome(following, stored, found.integer("version", MAX_VERSION))
    if kind == MessageType.RESEND:
        return Resend(found.integer("next_sequence"), found.text("reason"))
    return Refusal(found.text("error"), found.text("message"), found.text("hint"))


class State(Enum):
    """Where a conversation stands, seen from either end."""

    INTRODUCING = auto()  # HELLO is to come
    ANSWERING = auto()  # HELLO was said; WELCOME is to come
    STREAMING = auto()
    CLOSED = auto()


#: Which message may arrive in which state, at which end, and where it leads. Anything else is a protocol error.
AGENT_TABLE: Final[Mapping[tuple[State, type[Message]], State]] = {
    (State.ANSWERING, Welcome): State.STREAMING,
    (State.ANSWERING, Refusal): State.CLOSED,
    (State.STREAMING, Ack): State.STREAMING,
    (State.STREAMING, Resend): State.STREAMING,
    (State.STREAMING, Refusal): State.CLOSED,
}


class AgentSession:
    """The agent's end of one connection: `hello()` once, then `receive(bytes)` gives messages in order.

    Frames go out beside it, once `state` is STREAMING. It holds at most one unfinished message, and after the end
    (a Refusal, or anything that is no message) nothing.
    """

    def __init__(self) -> None:
        self.state = State.INTRODUCING
        self._data = bytearray()
        self._versions: tuple[int, ...] = ()

    def hello(self, message: Hello) -> bytes:
        """The bytes that open the conversation."""
        if self.state is not State.INTRODUCING:
            raise ValueError(f"HELLO in state {self.state.name}")
        self.state, self._versions = State.ANSWERING, message.versions
        return pack_message(message)

    def receive(self, data: Buffer) -> list[Message]:
        """Take what arrived; give the messages that are complete. Once CLOSED, whatever arrives is dropped.

        Raises:
            CorruptionError: what arrived is no message, or none that may come now. The session is CLOSED with it.
        """
        if self.state is State.CLOSED:
            return []
        self._data += data
        messages: list[Message] = []
        offset = 0
        try:
            while (found := read_message(self._data, offset)) is not None:
                message, offset = found
                messages.append(message)
                self.state = self._after(message)
                if self.state is State.CLOSED:
                    break
        except CorruptionError:
            self.state = State.CLOSED
            raise
        finally:
            del self._data[: len(self._data) if self.state is State.CLOSED else offset]
        return messages

    def _after(self, message: Message) -> State:
        following = AGENT_TABLE.get((self.state, type(message)))
        if following is None:
            raise CorruptionError(f"{type(message).__name__} came in state {self.state.name}")
        if isinstance(message, Welcome) and message.version not in self._versions:
            raise CorruptionError(
                f"the server chose stream version {message.version}, which was not offered",
                hint="upgrade the older of the two parts",
            )
        return following

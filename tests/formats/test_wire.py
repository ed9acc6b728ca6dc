"""The wire protocol: messages come back whole, states pair by pair, and nothing a server says can hurt an agent."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, strategies as st

from replicar import errors
from replicar.errors import CorruptionError, PermanentError
from replicar.formats import wire
from replicar.formats.wire import Ack, AgentSession, Hello, Message, Refusal, Resend, State, Welcome
from tests.formats.strategies import MACHINE, TEXTS
from tests.golden.make_golden import flipped, raw_message

U64 = st.integers(0, (1 << 64) - 1)
VERSIONS = st.lists(st.integers(0, wire.MAX_VERSION), min_size=1, max_size=wire.MAX_VERSIONS).map(tuple)
PAIRS = st.tuples(U64, U64).map(sorted)
HELLOS = st.builds(
    lambda machine, pair, versions, software: Hello(machine, pair[0], pair[1], versions, software),
    st.uuids(),
    PAIRS,
    VERSIONS,
    TEXTS,
)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    HELLOS,
    st.builds(Welcome, U64, U64, st.integers(0, wire.MAX_VERSION)),
    st.builds(Ack, U64, U64),
    st.builds(Resend, U64, TEXTS),
    st.builds(Refusal, TEXTS, TEXTS, TEXTS),
)
HELLO = Hello(MACHINE, 1, 5)
FROM_SERVER: list[Message] = [Welcome(1, 0), Ack(1, 0), Resend(1, "again"), Refusal("FencedError", "gone", "stop")]


@given(message=MESSAGES, before=st.binary(max_size=5), behind=st.binary(max_size=30))
def test_a_message_comes_back(message: Message, before: bytes, behind: bytes) -> None:
    data = wire.pack_message(message)
    assert wire.read_message(before + data + behind, len(before)) == (message, len(before) + len(data))


@given(message=MESSAGES)
def test_a_message_that_is_not_all_there_yet_is_none(message: Message) -> None:
    data = wire.pack_message(message)
    assert all(wire.read_message(data[:length]) is None for length in range(len(data)))


@pytest.mark.parametrize("message", [HELLO, *FROM_SERVER], ids=lambda message: type(message).__name__)
def test_any_flipped_bit_of_a_message_is_found_or_waits_for_bytes_that_never_come(message: Message) -> None:
    good = wire.pack_message(message)
    for place in range(len(good)):
        for bit in range(8):
            changed = flipped(good, place, bit) + bytes(wire.MAX_BODY_BYTES)
            with pytest.raises(CorruptionError):
                wire.read_message(changed)


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "\u2713" * 50_000, "\x00" * 20_000, "\U0001f600" * 20_000, "\ud800\udfff"]
)
def test_texts_that_are_too_long_or_no_unicode_are_cut_to_what_every_reader_takes(text: str) -> None:
    for message in (Refusal(text, text, text), Resend(1, text), Hello(MACHINE, 1, 1, (1,), text)):
        data = wire.pack_message(message)
        assert len(data) <= wire.HEADER_BYTES + wire.MAX_BODY_BYTES
        assert wire.read_message(data) is not None


HELLO_FIELDS = {
    "machine_id": str(MACHINE),
    "first_sequence": 1,
    "next_sequence": 5,
    "versions": [1],
    "software": "x",
}


@pytest.mark.parametrize(
    "changed",
    [
        {"machine_id": 7},
        {"machine_id": "7"},
        {"machine_id": "{" + str(MACHINE) + "}"},
        {"machine_id": str(MACHINE).upper().replace("1", "A")},
        {"first_sequence": True},
        {"first_sequence": -1},
        {"first_sequence": 1.5},
        {"first_sequence": "1"},
        {"first_sequence": 6},
        {"next_sequence": 1 << 64},
        {"next_sequence": 10**400},
        {"next_sequence": float("nan")},
        {"next_sequence": float("inf")},
        {"next_sequence": None},
        {"versions": []},
        {"versions": "123"},
        {"versions": {"1": 1}},
        {"versions": [1] * 17},
        {"versions": [65536]},
        {"versions": [1.0]},
        {"versions": [[1]]},
        {"software": None},
        {"software": "\udc80"},
    ],
)
def test_a_hello_with_a_wrong_field_is_corrupt(changed: dict[str, object]) -> None:
    with pytest.raises(CorruptionError):
        wire.read_message(raw_message(1, json.dumps(HELLO_FIELDS | changed).encode()))


def test_fields_of_a_newer_part_are_ignored() -> None:
    body = json.dumps(HELLO_FIELDS | {"mood": {"deep": [1]}}).encode()
    assert wire.read_message(raw_message(1, body)) == (Hello(MACHINE, 1, 5, (1,), "x"), 20 + len(body))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (0, b"{}"),
        (6, b"{}"),
        (255, b""),
        (1, b""),
        (2, b"null"),
        (2, b'{"next_sequence":1}'),
        (3, b""),
        (3, bytes(17)),
        (4, b"[" * 16000),
        (4, b'{"next_sequence":' + b"9" * 16000 + b"}"),
        (5, b'{"error":"\xff"}'),
        (5, b'{"error":["x"],"message":"","hint":""}'),
    ],
)
def test_a_body_that_is_none_is_corrupt_and_nothing_else(kind: int, body: bytes) -> None:
    with pytest.raises(CorruptionError):
        wire.read_message(raw_message(kind, body))


def test_a_body_that_is_too_large_is_refused_before_it_arrives() -> None:
    for claimed in (wire.MAX_BODY_BYTES + 1, (1 << 32) - 1):
        with pytest.raises(CorruptionError):
            wire.read_message(raw_message(5, b"", claimed=claimed))


# -- states ---------------------------------------------------------------------------------------------------------


def _session(state: State) -> AgentSession:
    """A session that came to `state` by the messages that lead there."""
    session = AgentSession()
    if state is not State.INTRODUCING:
        session.hello(HELLO)
    if state is State.STREAMING:
        session.receive(wire.pack_message(Welcome(1, 0)))
    if state is State.CLOSED:
        session.receive(wire.pack_message(Refusal("PermanentError", "no", "")))
    assert session.state is state
    return session


ALLOWED = {
    (State.ANSWERING, Welcome): State.STREAMING,
    (State.ANSWERING, Refusal): State.CLOSED,
    (State.STREAMING, Ack): State.STREAMING,
    (State.STREAMING, Resend): State.STREAMING,
    (State.STREAMING, Refusal): State.CLOSED,
}


@pytest.mark.parametrize(
    ("state", "message"),
    list(itertools.product(State, [HELLO, *FROM_SERVER])),
    ids=lambda value: value.name if isinstance(value, State) else type(value).__name__,
)
def test_every_message_in_every_state_is_taken_dropped_or_a_protocol_error(state: State, message: Message) -> None:
    session = _session(state)
    data = wire.pack_message(message)
    if state is State.CLOSED:
        assert session.receive(data) == []
        assert session.state is State.CLOSED
    elif (state, type(message)) in ALLOWED:
        assert session.receive(data) == [message]
        assert session.state is ALLOWED[state, type(message)]
    else:
        with pytest.raises(CorruptionError, match=f"{type(message).__name__} came in state {state.name}"):
            session.receive(data)
        assert session.state is State.CLOSED


@pytest.mark.parametrize("state", [state for state in State if state is not State.INTRODUCING])
def test_hello_is_said_once(state: State) -> None:
    with pytest.raises(ValueError, match="HELLO in state"):
        _session(state).hello(HELLO)


@given(
    messages=st.lists(st.one_of(st.builds(Ack, U64, U64), st.builds(Resend, U64, TEXTS)), max_size=8),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=20),
)
def test_messages_arrive_whole_however_the_bytes_are_cut(messages: list[Message], cuts: list[int]) -> None:
    session = AgentSession()
    opening = wire.read_message(session.hello(HELLO))
    assert opening is not None
    assert opening[0] == HELLO
    data = wire.pack_message(Welcome(1, 0)) + b"".join(wire.pack_message(message) for message in messages)
    found: list[Message] = []
    sizes = itertools.cycle(cuts)
    while data:
        size = next(sizes)
        found += session.receive(data[:size])
        data = data[size:]
    assert found == [Welcome(1, 0), *messages]


def test_a_stream_version_that_was_not_offered_is_refused() -> None:
    session = AgentSession()
    session.hello(Hello(MACHINE, 1, 5, (1, 3)))
    with pytest.raises(CorruptionError, match="version 2"):
        session.receive(wire.pack_message(Welcome(1, 0, 2)))


def test_a_session_that_has_ended_keeps_nothing_of_what_still_arrives() -> None:
    session = _session(State.STREAMING)
    goodbye = wire.pack_message(Refusal("FencedError", "gone", "stop"))
    assert session.receive(goodbye + wire.pack_message(Ack(1, 1)) * 1000) == [Refusal("FencedError", "gone", "stop")]
    for _ in range(1000):
        assert session.receive(bytes(1000)) == []
    broken = _session(State.STREAMING)
    with pytest.raises(CorruptionError):
        broken.receive(b"HTTP/1.1 400 Bad Request\r\n")
    assert broken.receive(bytes(1000)) == []
    assert [len(one._data) for one in (session, broken)] == [0, 0]


@pytest.mark.parametrize("name", sorted(wire._ERRORS))
def test_a_refusal_is_raised_as_the_error_it_names(name: str) -> None:
    error = Refusal(name, "what", "next").as_error()
    assert type(error) is getattr(errors, name)
    assert (error.message, error.hint) == ("what", "next")


def test_a_refusal_of_a_kind_nobody_knows_is_permanent() -> None:
    assert type(Refusal("SystemExit", "what", "").as_error()) is PermanentError

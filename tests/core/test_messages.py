"""Every message survives its encoding; whatever else arrives is a ProtocolError and nothing worse."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core import messages
from cachetier.core.codec import PATH_OF, REPLY_OF, decode, encode
from cachetier.core.document_messages import DocumentInfo, DocumentRun
from cachetier.core.engine_messages import EngineInfo
from cachetier.core.errors import ProtocolError
from cachetier.core.event_messages import Change
from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import KVLayout, Shard
from cachetier.core.message_base import Message
from cachetier.core.pool_messages import PoolPart
from cachetier.core.wait_messages import ChunkNews

KEYS = st.binary(min_size=16, max_size=16)
COUNTS = st.integers(0, 1 << 62)
TILINGS = st.lists(st.builds(Shard, *[st.integers(0, 64)] * 4), max_size=3)
IDENTITIES = st.builds(
    ModelIdentity,
    **{name: st.text() for name in ("model", "weights", "kv_dtype", "attention", "rotary", "adapter")},
    **{name: st.integers(0, 1 << 20) for name in ("num_layers", "num_kv_heads", "k_head_size", "v_head_size")},
)
LAYOUTS = st.builds(KVLayout, num_layers=COUNTS, num_kv_heads=COUNTS, row_bytes=COUNTS, group=COUNTS)
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: COUNTS,
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(),
    bytes: st.binary(max_size=64),
    ModelIdentity: IDENTITIES,
    list[KVLayout]: st.lists(LAYOUTS, max_size=2),
    list[Shard]: TILINGS,
    list[list[Shard]]: st.lists(TILINGS, max_size=2),
    list[str]: st.lists(st.text(), max_size=3),
    list[int]: st.lists(COUNTS, max_size=5),
    list[float]: st.lists(st.floats(allow_nan=False), max_size=5),
    list[int | None]: st.lists(st.none() | COUNTS, max_size=5),
    list[tuple[int, bytes]]: st.lists(st.tuples(COUNTS, KEYS), max_size=3),
    list[messages.LeaseUse]: st.lists(
        st.builds(messages.LeaseUse, lease=COUNTS, host_tokens=COUNTS, disk_tokens=COUNTS), max_size=3
    ),
    list[messages.Pool]: st.lists(
        st.builds(
            messages.Pool,
            id=COUNTS,
            engine=st.text(),
            parts=st.lists(st.builds(PoolPart, device=st.text(), handle=st.binary(max_size=64)), max_size=3),
        ),
        max_size=3,
    ),
    bytes | None: st.none() | st.binary(max_size=64),
    list[tuple[int, int]]: st.lists(st.tuples(COUNTS, st.integers(0, (1 << 64) - 1)), max_size=5),
}


def any_message(kind: type[Message]) -> st.SearchStrategy[Message]:
    fields = msgspec.structs.fields(kind)
    return st.builds(kind, **{field.name: BY_TYPE[field.type] for field in fields})


BY_TYPE[messages.MatchReply] = any_message(messages.MatchReply)
BY_TYPE[list[DocumentRun]] = st.lists(any_message(DocumentRun), max_size=2)
BY_TYPE[list[DocumentInfo]] = st.lists(any_message(DocumentInfo), max_size=2)
BY_TYPE[list[Change]] = st.lists(st.builds(Change, key=KEYS, tier=COUNTS, tokens=KEYS, parent=KEYS), max_size=2)
BY_TYPE[list[EngineInfo]] = st.lists(any_message(EngineInfo), max_size=2)
BY_TYPE[messages.Wait | None] = st.none() | any_message(messages.Wait)
BY_TYPE[list[ChunkNews]] = st.lists(any_message(ChunkNews), max_size=2)
KINDS = [*REPLY_OF, *sorted(set(REPLY_OF.values()), key=lambda kind: kind.__name__)]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_message_arrives_as_it_was_sent(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(any_message(kind))
    assert decode(kind, encode(message)) == message


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_and_missing_fields_and_wrong_types_are_refused(kind: type[Message]) -> None:
    fields = msgspec.structs.fields(kind)
    with pytest.raises(ProtocolError, match=kind.__name__):
        decode(kind, msgspec.msgpack.encode({"surprise": 1}))
    for field in fields:
        if field.required:
            with pytest.raises(ProtocolError, match=kind.__name__):
                decode(kind, msgspec.msgpack.encode({}))
        with pytest.raises(ProtocolError, match=kind.__name__):
            decode(kind, msgspec.msgpack.encode({field.name: {"wrong": "type"}}))


@given(st.sampled_from(KINDS), st.binary(max_size=100))
def test_random_bytes_are_a_message_or_a_protocol_error(kind: type[Message], body: bytes) -> None:
    try:
        assert isinstance(decode(kind, body), kind)
    except ProtocolError as error:
        assert error.status == 400  # noqa: PT017


def test_damaged_bodies_are_a_message_or_a_protocol_error() -> None:
    numbers = random.Random(7)
    match = messages.Match(session=3, namespace=bytes(16), tokens=bytes(64), salt="s", extras=[(1, b"x")])
    body = encode(match)
    num_refused = 0
    for _ in range(5000):
        damaged = bytearray(body)
        for _ in range(numbers.randint(1, 4)):
            damaged[numbers.randrange(len(body))] = numbers.randrange(256)
        try:
            decode(messages.Match, bytes(damaged[: numbers.randint(0, len(body))]))
        except ProtocolError:
            num_refused += 1
    assert num_refused > 4000


@pytest.mark.parametrize(
    "body", [b"\x91" * 100_000, b"\x81\xa1a" * 50_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_bodies_that_promise_too_much_are_refused(body: bytes) -> None:
    for kind in KINDS:
        with pytest.raises(ProtocolError):
            decode(kind, body)


def test_every_request_has_a_reply_and_a_versioned_path_of_its_own() -> None:
    assert PATH_OF.keys() == REPLY_OF.keys()
    assert len(set(PATH_OF.values())) == len(PATH_OF)
    assert all(path.startswith("/v1/") for path in PATH_OF.values())

"""What the service answers: every bad request a 4xx with a text, whatever the bytes, and the server lives."""

import http.client
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from cachetier.core.codec import PATH_OF, encode
from cachetier.core.document_messages import (
    ListDocuments,
    MatchDocuments,
    RegisterDocument,
    RemoveDocument,
    SyncDocuments,
)
from cachetier.core.engine_messages import AnnounceEngine, ListEngines, SetRole
from cachetier.core.event_messages import FollowChanges
from cachetier.core.message_base import Message
from cachetier.core.messages import (
    MAX_BODY_BYTES,
    Commit,
    Invalidate,
    LeaseUse,
    Match,
    OpenSession,
    RegisterNamespace,
    Release,
    Renew,
    Report,
)
from cachetier.core.pool_messages import CheckPools, CommitPool, OfferPool
from tests.service.running import LAYOUT, OBJECT_BYTES, RunningServer, TinyEngine, identity, tokens_of

MSGPACK = {"Content-Type": "application/msgpack"}


class UnixConnection(http.client.HTTPConnection):
    """The standard library's client over a Unix socket: independent of the client under test elsewhere."""

    def __init__(self, path: str) -> None:
        super().__init__("cachetier", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self.path)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Send a request and return status and body."""
        self.request(method, path, body, headers or {})
        reply = self.getresponse()
        return reply.status, reply.read()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Send a msgpack body."""
        return self.ask("POST", path, body, MSGPACK)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("app") / "data") as running:
        yield running


@pytest.fixture
def connection(server: RunningServer) -> Iterator[UnixConnection]:
    made = UnixConnection(server.socket_path)
    yield made
    made.close()


@pytest.fixture
def engine(server: RunningServer) -> Iterator[TinyEngine]:
    made = TinyEngine(server.socket_path)
    yield made
    made.close()


def error_of(body: bytes) -> str:
    return str(json.loads(body)["error"])


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/matchx", "/v1/session/x/watch", "/v1/%00", "/../x"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_path_is_404(connection: UnixConnection, method: str, path: str) -> None:
    status, body = connection.ask(method, path)
    assert status == 404
    assert error_of(body)


@pytest.mark.parametrize("path", ["/v2/match", "/v0/match", "/v1.1/match"])
def test_other_version_is_404_that_names_the_supported_one(connection: UnixConnection, path: str) -> None:
    status, body = connection.post(path, b"")
    assert status == 404
    assert "/v1/" in error_of(body)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_wrong_method_is_405(connection: UnixConnection, method: str) -> None:
    status, body = connection.ask(method, "/v1/match")
    assert status == 405
    assert error_of(body)


def test_body_of_another_type_is_415(connection: UnixConnection) -> None:
    status, body = connection.ask("POST", "/v1/reserve", b"{}", {"Content-Type": "application/json"})
    assert status == 415
    assert "application/msgpack" in error_of(body)


def test_oversized_body_is_413_before_it_is_sent(connection: UnixConnection) -> None:
    connection.putrequest("POST", "/v1/match")
    connection.putheader("Content-Type", "application/msgpack")
    connection.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
    connection.endheaders()
    reply = connection.getresponse()
    assert reply.status == 413
    assert error_of(reply.read())


def test_oversized_body_without_length_is_413(connection: UnixConnection) -> None:
    piece = bytes(1 << 20)
    try:
        status, _ = connection.ask("POST", "/v1/match", iter([piece] * (MAX_BODY_BYTES // len(piece) + 2)), MSGPACK)
    except BrokenPipeError:  # the answer came, and the connection went, before all was sent
        status = 413
    assert status == 413


def test_truncated_bodies_are_400(connection: UnixConnection, engine: TinyEngine) -> None:
    for message in valid_messages(engine):
        body = encode(message)
        for end in {0, 1, len(body) // 2, len(body) - 1} - {len(body)}:  # without fields it is one byte
            status, reply = connection.post(PATH_OF[type(message)], body[:end])
            assert status == 400
            assert type(message).__name__ in error_of(reply)


def test_request_cut_in_its_body_leaves_the_server_alive(server: RunningServer, connection: UnixConnection) -> None:
    for cut in (
        b"POST /v1/match HTTP/1.1\r\nHost: x\r\nContent-Le",
        b"POST /v1/match HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab",
    ):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(server.socket_path)
            peer.sendall(cut)
    assert connection.ask("GET", "/healthz")[0] == 200


@pytest.mark.parametrize(
    "raw", [b"\0" * 64 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_http_gets_4xx_or_is_hung_up_on(
    server: RunningServer, connection: UnixConnection, raw: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        peer.connect(server.socket_path)
        peer.sendall(raw)
        assert peer.recv(100)[:10] in (b"", b"HTTP/1.1 4", b"HTTP/1.0 4")
    assert connection.ask("GET", "/healthz")[0] == 200


@pytest.mark.parametrize(
    "value",
    [None, True, -1, 2**64 - 1, 1.5, "text", b"bytes", [], {}, [[]], {"session": 1}],
    ids=lambda value: type(value).__name__,
)
def test_wrong_types_are_4xx_with_a_text(connection: UnixConnection, engine: TinyEngine, value: Any) -> None:
    for message in valid_messages(engine):
        fields = msgspec.to_builtins(message, builtin_types=(bytes,))
        for name in fields:
            if type(value) is type(fields[name]):
                continue
            body = msgspec.msgpack.encode(fields | {name: value})
            status, reply = connection.post(PATH_OF[type(message)], body)
            assert 400 <= status < 500 or (status == 200 and value is not None)
            assert status == 200 or error_of(reply)


def test_unknown_fields_are_400(connection: UnixConnection, engine: TinyEngine) -> None:
    for message in valid_messages(engine):
        fields = msgspec.to_builtins(message, builtin_types=(bytes,))
        assert connection.post(PATH_OF[type(message)], msgspec.msgpack.encode(fields | {"more": 1}))[0] == 400


def test_deeply_nested_body_is_400(connection: UnixConnection) -> None:
    assert connection.post("/v1/reserve", b"\x81\xa6tiling" + b"\x91" * 200_000)[0] == 400


def test_unknown_session_is_404(connection: UnixConnection) -> None:
    for message in (Renew(session=2**62, leases=[]), Release(session=2**62, uses=[]), Report(session=2**62)):
        assert connection.post(PATH_OF[type(message)], encode(message))[0] == 404
    assert connection.ask("GET", f"/v1/session/{2**62}/watch")[0] == 404
    assert connection.ask("GET", f"/v1/session/{'9' * 20}/watch")[0] == 404


def test_second_watch_of_a_session_is_409(connection: UnixConnection, engine: TinyEngine) -> None:
    assert connection.ask("GET", f"/v1/session/{engine.session.id}/watch")[0] == 409


def test_10_000_fuzzed_bodies_get_2xx_or_4xx_and_the_server_lives(
    server: RunningServer, connection: UnixConnection, engine: TinyEngine
) -> None:
    rng = random.Random(20_26)
    tokens = tokens_of(1, 5)
    engine.store(tokens)
    valid = valid_messages(engine)
    statuses = {200: 0, 400: 0}
    for number in range(10_000):
        message = rng.choice(valid)
        body = (fuzz_random, fuzz_bytes, fuzz_fields)[number % 3](rng, message)
        status, reply = connection.post(PATH_OF[type(message)], body)
        assert status == 200 or 400 <= status < 500, (number, status, type(message), body[:200], reply)
        statuses[status] = statuses.get(status, 0) + 1
    assert statuses[200] > 500, "fuzzing must reach the store, not only the decoder"
    assert statuses[400] > 5_000
    assert server.process.poll() is None
    assert "Traceback" not in server.log_path.read_text()
    fresh = TinyEngine(server.socket_path, weights="after")
    assert fresh.store(tokens) == 5
    assert fresh.holds_right_bytes(fresh.match(tokens))
    fresh.close()


def valid_messages(engine: TinyEngine) -> list[Message]:
    """Return one valid message of each kind, cheap to send again and again."""
    session, tokens = engine.session.id, tokens_of(1, 3)
    return [
        OpenSession(client="fuzz", engine="e", pid=1),
        RegisterNamespace(session=session, identity=identity(), layouts=[LAYOUT]),
        Match(session=session, namespace=engine.namespace, tokens=tokens, extras=[(1, b"image")], reads_pools=True),
        engine.reserve(tokens),
        Release(session=session, uses=[LeaseUse(lease=1, host_tokens=64)]),
        Renew(session=session, leases=[1, 2]),
        Commit(session=session, lease=1, checksums=[1, None]),
        Invalidate(session=session, keys=bytes(16)),
        Report(session=session, stores_dropped=1),
        OfferPool(
            session=session,
            tiling=[LAYOUT.whole()],
            shard=0,
            object_bytes=OBJECT_BYTES,
            num_frames=2,
            device="gpu 0",
            handle=bytes(64),
        ),
        CommitPool(session=session, fill=1, frames=[0, 1]),
        CheckPools(session=session, pools=[1, 2]),
        RegisterDocument(
            session=session, namespace=engine.namespace, document="fuzz", tokens=tokens, fingerprint=2**64 - 1
        ),
        SyncDocuments(session=session, namespace=engine.namespace, version=1),
        MatchDocuments(
            session=session, namespace=engine.namespace, tokens=tokens, candidates=[(0, 2**64 - 1), (9, 2)], start=1
        ),
        ListDocuments(skip=1),
        RemoveDocument(document="another"),
        AnnounceEngine(
            session=session,
            name="e",
            role="both",
            namespace=engine.namespace,
            tensor_parallel=1,
            pipeline_parallel=1,
            block_tokens=16,
        ),
        ListEngines(),
        SetRole(name="e", role="consumer"),
        FollowChanges(session=session, namespace=engine.namespace),
    ]


def fuzz_random(rng: random.Random, _: Message) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 5, 50, 500)))


def fuzz_bytes(rng: random.Random, message: Message) -> bytes:
    body = bytearray(encode(message))
    for _ in range(rng.choice((1, 1, 2, 8))):
        where = rng.randrange(len(body))
        match rng.randrange(4):
            case 0:
                body[where] ^= 1 << rng.randrange(8)
            case 1:
                body[where] = rng.choice((0, 0x7F, 0x80, 0xC0, 0xCF, 0xDD, 0xDF, 0xFF))
            case 2:
                del body[where : where + rng.randrange(1, 9)]
            case 3:
                body[where:where] = rng.randbytes(rng.randrange(1, 9))
        body = body or bytearray(1)
    return bytes(body)


def fuzz_fields(rng: random.Random, message: Message) -> bytes:
    """Replace one value, at any depth, by an extreme one of the same or another type."""
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    if not fields:
        return fuzz_random(rng, message)
    holder, name = fields, rng.choice(list(fields))
    while isinstance(holder[name], dict | list | tuple) and holder[name] and rng.random() < 0.8:
        if isinstance(holder[name], tuple):
            holder[name] = list(holder[name])
        holder = holder[name]
        name = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    extremes = {
        int: (0, 1, -1, 2**15, 2**16, 2**31, 2**32, 2**63 - 1, 2**64 - 1, -(2**63)),
        bytes: (b"", b"x", bytes(3), bytes(4), bytes(16), bytes(255), bytes(100_000), b"\xff" * 4096),
        str: ("", "\0", "x" * 100_000, "é" * 300, "../../etc", "\ud7ff"),
        list: (
            *([], [0], [[0, 0, 0, 0]], [[0, 2**63 - 1, 0, 2**63 - 1]]),
            *([[0, 1, 0, 1]] * 5_000, [(0, b"x")] * 3, list(range(5_000))),
        ),
    }
    kind = type(holder[name]) if rng.random() < 0.8 else rng.choice((int, bytes, str, list))
    holder[name] = rng.choice(extremes.get(kind, (None, True, 1.5, {})))
    return msgspec.msgpack.encode(fields)

"""`POST /v1/match` in JSON: what routers without a session learn of a prompt, and what they are told when they err."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from cachetier.core.messages import RegisterNamespace
from tests.service.running import CHUNK_TOKENS, LAYOUT, TIMEOUT_S, RunningServer, TinyEngine, identity, tokens_of
from tests.service.test_app import UnixConnection, error_of

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("json") / "data") as running:
        yield running


@pytest.fixture
def connection(server: RunningServer) -> Iterator[UnixConnection]:
    made = UnixConnection(server.socket_path)
    yield made
    made.close()


@pytest.fixture
def engine(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[TinyEngine]:
    made = TinyEngine(server.socket_path, weights=request.node.name)
    yield made
    made.close()


def ask(connection: UnixConnection, **question: Any) -> dict[str, Any]:
    """Ask, and return the answer to a question that has one."""
    status, body = connection.ask("POST", "/v1/match", json.dumps(question), JSON)
    assert status == 200, body
    answer: dict[str, Any] = json.loads(body)
    return answer


def ids(tokens: bytes) -> list[int]:
    return list(memoryview(tokens).cast("i"))


def test_says_how_much_is_held_and_where(connection: UnixConnection, engine: TinyEngine) -> None:
    tokens = tokens_of(1, 5)
    engine.store(tokens[: 3 * CHUNK_TOKENS * 4])
    answer = ask(connection, model="tiny", token_ids=ids(tokens))
    assert answer == {
        "namespace": engine.namespace.hex(),
        "tokens": {"held": 192, "gpu": 0, "host": 192, "disk": 0, "remote": 0, "pending": 0},
        "chunk_tokens": CHUNK_TOKENS,
    }
    assert ask(connection, namespace=engine.namespace.hex(), token_ids=ids(tokens)) == answer
    assert ask(connection, model="tiny", token_ids=[])["tokens"]["held"] == 0


def test_what_an_engine_is_storing_is_pending(connection: UnixConnection, engine: TinyEngine) -> None:
    tokens = tokens_of(2, 3)
    engine.store(tokens[: CHUNK_TOKENS * 4])
    engine.client.call(engine.reserve(tokens), TIMEOUT_S)
    counts = ask(connection, model="tiny", token_ids=ids(tokens))["tokens"]
    assert (counts["held"], counts["pending"]) == (64, 128)


def test_salts_separate_tenants(connection: UnixConnection, engine: TinyEngine) -> None:
    engine.salt = "tenant"
    tokens = tokens_of(3, 1)
    engine.store(tokens)
    held = [
        ask(connection, model="tiny", token_ids=ids(tokens), salt=salt)["tokens"]["held"] for salt in ("", "tenant")
    ]
    assert held == [0, 64]


def test_of_several_models_of_one_name_the_newest_without_an_adapter_is_meant(
    connection: UnixConnection, engine: TinyEngine
) -> None:
    newer = TinyEngine(engine.client.socket_path, weights="newer")
    with_adapter = msgspec.structs.replace(identity("newer"), adapter="sql|1234")
    register = RegisterNamespace(session=newer.session.id, identity=with_adapter, layouts=[LAYOUT])
    newer.client.call(register, TIMEOUT_S)
    assert ask(connection, model="tiny", token_ids=[1])["namespace"] == newer.namespace.hex()
    again = RegisterNamespace(session=engine.session.id, identity=identity(engine_weights(engine)), layouts=[LAYOUT])
    engine.client.call(again, TIMEOUT_S)
    assert ask(connection, model="tiny", token_ids=[1])["namespace"] == engine.namespace.hex()
    newer.close()


def engine_weights(engine: TinyEngine) -> str:
    """Return the weights that the engine of the test above was made with."""
    infos = json.loads(engine.client.get("/v1/namespaces", TIMEOUT_S))
    return next(str(info["identity"]["weights"]) for info in infos if info["namespace"] == engine.namespace.hex())


def test_asking_leases_and_counts_nothing(connection: UnixConnection, engine: TinyEngine) -> None:
    tokens = tokens_of(4, 2)
    engine.store(tokens)
    before = json.loads(engine.client.get("/v1/stats", TIMEOUT_S))
    ask(connection, model="tiny", token_ids=ids(tokens))
    after = json.loads(engine.client.get("/v1/stats", TIMEOUT_S))
    assert (before["leases"], before["tokens"]["queried"]) == (after["leases"], after["tokens"]["queried"])


@pytest.mark.parametrize("question", [{"model": "unknown"}, {"namespace": "00" * 16}])
def test_an_unknown_model_is_404(connection: UnixConnection, question: dict[str, str]) -> None:
    body = json.dumps(question | {"token_ids": [1]})
    status, reply = connection.ask("POST", "/v1/match", body, JSON)
    assert status == 404
    assert error_of(reply)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"token_ids": [1]}',
        '{"model": "tiny"}',
        '{"model": "tiny", "namespace": "00", "token_ids": [1]}',
        '{"namespace": "xyz", "token_ids": [1]}',
        '{"model": "tiny", "token_ids": [-1]}',
        '{"model": "tiny", "token_ids": [2147483648]}',
        '{"model": "tiny", "token_ids": [1.5]}',
        '{"model": "tiny", "token_ids": "text"}',
        '{"model": "tiny", "token_ids": [1], "lease": true}',
        '{"model": "tiny", "token_ids": [1], "salt": "' + "x" * 2000 + '"}',
        b'{"model": "\xff", "token_ids": [1]}',
    ],
)
def test_what_is_no_question_is_400_with_the_reason(
    connection: UnixConnection, engine: TinyEngine, body: str | bytes
) -> None:
    status, reply = connection.ask("POST", "/v1/match", body, JSON)
    assert status == 400, reply
    assert error_of(reply)


def test_messages_of_engines_are_answered_as_before(connection: UnixConnection, engine: TinyEngine) -> None:
    tokens = tokens_of(5, 2)
    engine.store(tokens)
    assert engine.match(tokens, lease=False).num_chunks == 2
    status, _ = connection.ask("POST", "/v1/match", b"{}", {"Content-Type": "text/plain"})
    assert status == 415

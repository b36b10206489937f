"""The table of engines: names are one engine's at a time, roles are people's, and who is gone is not listed."""

import pytest

from cachetier.core.engine_messages import ENGINE_NAME_MAX, ENGINE_URL_MAX, AnnounceEngine, SetRole
from cachetier.core.errors import ProtocolError
from cachetier.core.keys import NamespaceId
from cachetier.store.engine_table import EngineTable

NAMESPACE = b"n" * 16


def announced(session: int, name: str = "e", role: str = "both", **changes) -> AnnounceEngine:
    numbers = {"tensor_parallel": 2, "pipeline_parallel": 1, "block_tokens": 16} | changes
    return AnnounceEngine(session=session, name=name, role=role, namespace=NAMESPACE, **numbers)


def model_of(namespace: NamespaceId) -> str:
    return f"model of {namespace[:1].decode()}"


def test_engines_are_listed_by_name_with_what_they_said():
    table = EngineTable()
    table.announce(announced(1, "b"), pid=7, now=10.0)
    table.announce(announced(2, "a", "producer", url="http://here:8000"), pid=8, now=11.0)
    first, second = table.infos(model_of, now=12.5)
    assert (first.name, first.role, first.pid, first.silent_s) == ("a", "producer", 8, 1.5)
    assert (first.url, second.url) == ("http://here:8000", "")
    assert (second.name, second.model, second.namespace) == ("b", "model of n", NAMESPACE)
    assert (second.tensor_parallel, second.pipeline_parallel, second.block_tokens) == (2, 1, 16)


def test_a_role_that_was_given_stays_until_the_engine_ends():
    table = EngineTable()
    assert table.announce(announced(1), 7, 0.0) == "both"
    assert table.set_role(SetRole(name="e", role="consumer"))
    assert not table.set_role(SetRole(name="other", role="consumer"))
    assert table.announce(announced(1), 7, 1.0) == "consumer"
    table.end_session(1)
    assert table.infos(model_of, 2.0) == []
    assert table.announce(announced(2), 7, 3.0) == "both"


def test_a_name_is_one_engines_until_its_session_ends():
    table = EngineTable()
    table.announce(announced(1), 7, 0.0)
    with pytest.raises(ProtocolError, match="set another name") as refused:
        table.announce(announced(2), 8, 0.0)
    assert refused.value.status == 409
    table.expire(lambda session: session != 1)
    table.announce(announced(2), 8, 0.0)
    assert [engine.pid for engine in table.infos(model_of, 0.0)] == [8]


@pytest.mark.parametrize(
    "message",
    [
        announced(1, name=""),
        announced(1, name="x" * (ENGINE_NAME_MAX + 1)),
        announced(1, name="a\nb"),
        announced(1, role="reader"),
        announced(1, tensor_parallel=0),
        announced(1, block_tokens=0),
        announced(1, url="http://" + "x" * ENGINE_URL_MAX),
    ],
)
def test_what_cannot_be_is_refused(message):
    with pytest.raises(ProtocolError) as refused:
        EngineTable().announce(message, 1, 0.0)
    assert refused.value.status == 400


def test_a_role_that_there_is_not_is_refused():
    with pytest.raises(ProtocolError, match="only producer, consumer, both"):
        EngineTable().set_role(SetRole(name="e", role="reader"))

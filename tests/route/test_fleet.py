"""The table of engines: what people say, what the server says, and who stays when neither does."""

import pytest

from cachetier.core.engine_messages import EngineInfo
from cachetier.core.errors import ConfigError
from cachetier.route.engine import Registration
from cachetier.route.fleet import Fleet

URL = "http://host:8000"


def info(name: str, role: str = "both", url: str = URL, namespace: bytes = b"n") -> EngineInfo:
    numbers = {"tensor_parallel": 1, "pipeline_parallel": 1, "block_tokens": 16, "pid": 1, "silent_s": 0.0}
    return EngineInfo(name=name, role=role, model="m", namespace=namespace, url=url, **numbers)


def seen(fleet: Fleet) -> list[tuple[str, str, str, bytes]]:
    return [(engine.name, engine.role, engine.url, engine.namespace) for engine in fleet.engines]


def test_listed_engines_are_there_with_the_roles_that_the_server_says() -> None:
    fleet = Fleet()
    fleet.update([info("a", "producer", URL + "/v1"), info("b", "consumer", ""), info("c", url="file:///x")])
    assert seen(fleet) == [("a", "producer", URL, b"n")]
    [engine] = fleet.engines
    fleet.update([info("a", "consumer", URL + "/v1")])
    assert fleet.engines == [engine], "the same address written otherwise is no other engine"
    assert engine.role == "consumer"


def test_a_registered_engine_gets_weights_and_role_from_the_server_and_keeps_its_address() -> None:
    fleet = Fleet([Registration("a", "both", URL)])
    assert seen(fleet) == [("a", "both", URL, b"")]
    fleet.update([info("a", "producer", "http://elsewhere:1")])
    assert seen(fleet) == [("a", "producer", URL, b"n")]
    fleet.put(Registration("a", "consumer", URL))
    assert fleet.engines[0].role == "producer"


def test_an_unlisted_engine_stays_for_as_long_as_it_answers() -> None:
    fleet = Fleet([Registration("given", "both", URL)])
    fleet.update([info("given"), info("listed", url="http://b:1")])
    for engine in fleet.engines:
        engine.trouble = ""
    fleet.update([])
    assert [each[0] for each in seen(fleet)] == ["given", "listed"]
    assert {each[3] for each in seen(fleet)} == {b"n"}
    for engine in fleet.engines:
        engine.trouble = "it is down"
    fleet.update([])
    assert seen(fleet) == [("given", "both", URL, b"")], "what comes back may have other weights"


def test_a_removed_engine_comes_back_by_people_and_not_by_the_server() -> None:
    fleet = Fleet()
    fleet.update([info("a")])
    assert fleet.remove("a")
    assert not fleet.remove("a")
    fleet.update([info("a")])
    assert fleet.engines == []
    fleet.put(Registration("a", "both", URL))
    fleet.update([info("a", "producer")])
    assert seen(fleet) == [("a", "producer", URL, b"n")]


def test_an_engine_that_moved_is_another_one() -> None:
    fleet = Fleet([Registration("given", "both", URL)])
    fleet.update([info("listed")])
    for engine in fleet.engines:
        engine.trouble = ""
    fleet.update([info("listed", url="http://new:1")])
    fleet.put(Registration("given", "both", "http://new:2"))
    assert [engine.is_up for engine in fleet.engines] == [False, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "NAME=ROLE@"),
        ("a=producer", "NAME=ROLE@"),
        ("a=reader@http://h:1", "only producer, consumer, both"),
        ("=both@http://h:1", "printable"),
        ("a/b=both@http://h:1", "no slash"),
        ("a=both@h:1", "no address"),
        ("a=both@ftp://h:1", "no address"),
        ("a=both@http://", "no address"),
        ("a=both@http://h:99999", "no address"),
        ("a=both@http://h:1/v1?x=1", "no address"),
    ],
)
def test_a_registration_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Registration.parse(text)


def test_a_registration_is_read() -> None:
    assert Registration.parse("a=producer@http://[::1]:8000/v1/") == Registration("a", "producer", "http://[::1]:8000")

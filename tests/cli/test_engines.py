"""The engines of a real server: listed as a table and as JSON, and given other roles."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachetier.cli.main import main
from cachetier.core.engine_messages import AnnounceEngine
from tests.service.running import TIMEOUT_S, RunningServer, TinyEngine


def announce(engine: TinyEngine, name: str, role: str = "both") -> str:
    message = AnnounceEngine(
        session=engine.session.id,
        name=name,
        role=role,
        namespace=engine.namespace,
        tensor_parallel=2,
        pipeline_parallel=1,
        block_tokens=16,
        url="http://here:8000",
    )
    return engine.client.call(message, TIMEOUT_S).role


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(tmp_path / "data") as running:
        yield running


@pytest.fixture
def engine(server: RunningServer) -> Iterator[TinyEngine]:
    engine = TinyEngine(server.socket_path, "weights")
    yield engine
    engine.close()


def test_engines_are_listed_until_they_end(
    server: RunningServer, engine: TinyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["engines", "--socket", server.socket_path]
    assert main(arguments) == 0
    assert "no engine uses this server" in capsys.readouterr().out
    announce(engine, "prefill-1", "producer")
    assert main(arguments) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["ENGINE", "ROLE", "MODEL"]
    assert row.split()[:2] == ["prefill-1", "producer"]
    assert row.endswith(" http://here:8000")
    assert main([*arguments, "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["role"], listed["tensor_parallel"]) == ("prefill-1", "producer", 2)
    assert listed["namespace"] == engine.namespace.hex()
    engine.close()
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_role_is_changed_and_the_engine_is_told(
    server: RunningServer, engine: TinyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    socket = ["--socket", server.socket_path]
    assert announce(engine, "e", "producer") == "producer"
    assert main(["role", "e", "consumer", *socket]) == 0
    assert "e is told within a second: consumer" in capsys.readouterr().out
    assert announce(engine, "e", "producer") == "consumer"
    assert main(["role", "nobody", "both", *socket]) == 1
    assert "there is no engine 'nobody'; `cachetier engines` lists" in capsys.readouterr().out


def test_a_role_that_there_is_not_is_a_mistake_in_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["role", "e", "reader"])
    assert ended.value.code == 2
    assert "producer" in capsys.readouterr().err

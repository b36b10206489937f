"""Statistics of a real server, as JSON with the public names and as text."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachetier.cli.main import main
from cachetier.cli.stats import as_text
from tests.service.running import RunningServer, TinyEngine, environment, tokens_of

PUBLIC_NAMES = (
    *(
        "tokens.queried",
        "tokens.hit.gpu",
        "tokens.hit.host",
        "tokens.hit.disk",
        "tokens.stored",
        "bytes.host.used",
        "bytes.host.limit",
    ),
    *("tokens.blend.loaded", "tokens.blend.computed", "requests.blended", "documents"),
    *("blend.checked", "blend.agreed"),
    *("tokens.hit.remote", "bytes.remote.put", "bytes.remote.got", "remote_failures", "remote_puts_dropped"),
    *("bytes.disk.used", "bytes.disk.limit", "chunks", "leases", "checksum_failures", "stores_dropped"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("stats") / "data") as running:
        engine = TinyEngine(running.socket_path)
        engine.store(tokens_of(1, 4))
        engine.release(engine.match(tokens_of(1, 4)), host_tokens=64)
        yield running
        engine.close()


def value_at(stats: dict[str, Any], path: str) -> Any:
    value: Any = stats
    for part in path.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("prefix", ["", "unix:"])
def test_json_has_the_public_names_and_the_right_counts(
    server: RunningServer, capsys: pytest.CaptureFixture[str], prefix: str
) -> None:
    assert main(["stats", "--socket", prefix + server.socket_path, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert all(isinstance(value_at(stats, path), int) for path in PUBLIC_NAMES)
    wanted = {"tokens.stored": 256, "tokens.queried": 256, "tokens.hit.host": 64, "chunks": 4, "leases": 0}
    assert {path: value_at(stats, path) for path in wanted} == wanted


def test_text_tells_the_hit_rate(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--socket", server.socket_path]) == 0
    out = capsys.readouterr().out
    assert "host 64 (25.0%)" in out
    assert "of 16.0 MiB" in out


def empty_stats() -> dict[str, Any]:
    tier = {"used": 0, "limit": 0}
    counts = dict.fromkeys(("chunks", "chunks_gpu", "chunks_host", "chunks_durable", "leases", "sessions"), 0)
    counts |= dict.fromkeys(("stores_dropped", "loads_failed", "matches_late", "checksum_failures"), 0)
    counts |= dict.fromkeys(("hits_cut", "tokens_cut"), 0)
    counts |= {"requests": {"blended": 0}, "documents": 0, "blend": {"checked": 0, "agreed": 0, "kl": 0.0}}
    counts |= {"tokens_per_s": {"prefill": 0, "load": 0}, "disk_bytes_per_s": 0, "remote_bytes_per_s": 0}
    counts |= dict.fromkeys(("remote_available", "remote_failures", "remote_puts_dropped"), 0)
    hit, blend = dict.fromkeys(("gpu", "host", "disk", "remote"), 0), {"loaded": 0, "computed": 0}
    return {
        "tokens": {"queried": 0, "stored": 0, "waited": 0, "hit": hit, "blend": blend},
        "bytes": {"gpu": tier, "host": tier, "disk": tier, "remote": {"put": 0, "got": 0}},
        **counts,
    }


def test_text_of_a_server_without_disk_and_without_queries() -> None:
    assert "off" in as_text(empty_stats())


def test_text_tells_what_the_remote_store_is_good_for() -> None:
    assert "none that answers" in as_text(empty_stats())
    stats = empty_stats() | {"remote_available": 1, "remote_failures": 3, "remote_bytes_per_s": 2e6}
    stats["bytes"]["remote"] = {"put": 1 << 20, "got": 3 << 20}
    assert "in use  put 1.0 MiB  got 3.0 MiB  failures 3" in as_text(stats)
    assert "remote 1.9 MiB/s" in as_text(stats)


def test_text_tells_what_checks_of_blended_requests_found() -> None:
    assert "none yet" in as_text(empty_stats())
    checks = {"checked": 40, "agreed": 37, "kl": 1.0}
    assert "40: 92% agree on the next token, mean KL 0.025" in as_text(empty_stats() | {"blend": checks})


def test_no_server_is_exit_code_1_with_the_socket_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--socket", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_closed_output_ends_watching_without_a_traceback(server: RunningServer) -> None:
    command = [sys.executable, "-m", "cachetier.cli.main", "stats", "--socket", server.socket_path, "--watch"]
    watching = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    assert watching.stdout.readline()
    watching.stdout.close()
    assert watching.wait(10) == 141
    assert watching.stderr is not None
    assert watching.stderr.read() == ""
    watching.stderr.close()

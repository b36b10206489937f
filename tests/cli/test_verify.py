"""`cachetier verify` on what a real server left: good, damaged, repaired, in use."""

import json
from pathlib import Path

import pytest

from cachetier.cli.main import EXIT_USAGE, main
from cachetier.client.private_server import EXIT_IN_USE
from tests.service.running import OBJECT_BYTES, RunningServer, TinyEngine, tokens_of

NUM_CHUNKS = 12


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Make a data directory with some chunks, whose server has stopped."""
    with RunningServer(tmp_path / "data") as server:
        engine = TinyEngine(server.socket_path)
        assert engine.store(tokens_of(1, NUM_CHUNKS)) == NUM_CHUNKS
        engine.close()
        assert server.stop() == 0
    return tmp_path / "data"


def verify(data_dir: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, object]]:
    code = main(["verify", "--data-dir", str(data_dir), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def damage(data_dir: Path) -> None:
    """Flip a bit in the payload of one record."""
    path = min((data_dir / "segments").iterdir())
    content = bytearray(path.read_bytes())
    used = max(index for index, byte in enumerate(content) if byte)
    content[used - OBJECT_BYTES] ^= 1
    path.write_bytes(content)


def test_damage_is_found_dropped_and_gone(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = verify(data_dir, capsys)
    assert (code, report["records"], report["bad"]) == (0, NUM_CHUNKS, 0)
    assert isinstance(report["bytes"], int)
    assert report["bytes"] >= NUM_CHUNKS * OBJECT_BYTES
    damage(data_dir)
    code, report = verify(data_dir, capsys)
    assert (code, report["records"], report["bad"]) == (1, NUM_CHUNKS, 1)
    assert main(["verify", "--data-dir", str(data_dir)]) == 1
    assert "1 bad (run again with --repair" in capsys.readouterr().out
    assert verify(data_dir, capsys, "--repair")[0] == 1
    code, report = verify(data_dir, capsys)
    assert (code, report["records"], report["bad"]) == (0, NUM_CHUNKS - 1, 0)


def test_directory_of_a_running_server_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunningServer(tmp_path / "data") as server:
        assert main(["verify", "--data-dir", str(tmp_path / "data")]) == EXIT_IN_USE
        assert str(server.process.pid) in capsys.readouterr().err


def test_what_is_no_data_directory_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--data-dir", str(tmp_path / "none")]) == EXIT_USAGE
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

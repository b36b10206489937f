"""Properties of the data directory."""

import json
import os
import stat
from pathlib import Path

import pytest

from cachetier.core.config import MIB, ServerConfig
from cachetier.core.errors import ConfigError, FormatError, InUseError, StorageError
from cachetier.storage.data_dir import DataDir, disk_shape, documents_bytes


def config(tmp_path: Path, **settings: int | str) -> ServerConfig:
    return ServerConfig(data_dir=str(tmp_path / "tier"), socket="/tmp/unused", **{"disk_bytes": 32 * MIB, **settings})


def test_everything_in_it_is_private(tmp_path: Path) -> None:
    data_dir = DataDir.open(config(tmp_path))
    data_dir.publish("instance", "/tmp/socket")
    assert stat.S_IMODE(os.stat(data_dir.path).st_mode) == 0o700
    for path in Path(data_dir.path).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    data_dir.close()


def test_a_directory_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    DataDir.open(config(tmp_path)).close()
    os.chmod(tmp_path / "tier", 0o750)
    with pytest.raises(StorageError, match="chmod 700"):
        DataDir.open(config(tmp_path))


def test_only_one_process_has_it_and_the_other_learns_which(tmp_path: Path) -> None:
    first = DataDir.open(config(tmp_path))
    with pytest.raises(InUseError, match=str(os.getpid())):
        DataDir.open(config(tmp_path))
    first.close()
    DataDir.open(config(tmp_path)).close()


def test_the_secret_stays_and_differs_between_directories(tmp_path: Path) -> None:
    secrets = []
    for name in ("one", "one", "other"):
        data_dir = DataDir.open(config(tmp_path / name))
        secrets.append(data_dir.secret)
        data_dir.close()
    assert secrets[0] == secrets[1] != secrets[2]
    assert len(secrets[0]) == 32


def test_server_json_stands_while_the_server_answers(tmp_path: Path) -> None:
    data_dir = DataDir.open(config(tmp_path))
    path = Path(data_dir.path, "server.json")
    assert not path.exists()
    data_dir.publish("abc", "/run/s.sock")
    assert json.loads(path.read_text()) == {"pid": os.getpid(), "socket": "/run/s.sock", "instance": "abc"}
    data_dir.close()
    assert not path.exists()


def test_another_chunk_size_is_refused(tmp_path: Path) -> None:
    DataDir.open(config(tmp_path)).close()
    with pytest.raises(FormatError, match=r"chunk_tokens=64, not\s*128"):
        DataDir.open(config(tmp_path, chunk_tokens=128))
    DataDir.open(config(tmp_path)).close()


def test_another_format_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    import xxhash

    DataDir.open(config(tmp_path)).close()
    path = tmp_path / "tier" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["check"]
    meta["format"] = 2
    meta["check"] = xxhash.xxh64_hexdigest(json.dumps(meta, sort_keys=True).encode())
    path.write_text(json.dumps(meta))
    with pytest.raises(FormatError, match=r"version 2.*version 1"):
        DataDir.open(config(tmp_path))
    assert json.loads(path.read_text()) == meta


def test_the_segment_size_is_that_of_the_directory(tmp_path: Path) -> None:
    DataDir.open(config(tmp_path)).close()
    assert disk_shape(config(tmp_path, disk_bytes=64 * MIB)).segment_bytes == 2 * MIB


@pytest.mark.parametrize("disk_mib", [16, 17, 64, 1024, 65536])
def test_the_parts_stay_within_the_limit(tmp_path: Path, disk_mib: int) -> None:
    DataDir.open(config(tmp_path, disk_bytes=disk_mib * MIB)).close()
    shape = disk_shape(config(tmp_path, disk_bytes=disk_mib * MIB))
    documents = 2 * documents_bytes(config(tmp_path, disk_bytes=disk_mib * MIB))
    used = shape.limit_bytes + shape.num_segments * shape.segment_bytes + documents
    assert disk_mib * MIB - shape.segment_bytes - MIB < used <= disk_mib * MIB - MIB


def test_the_index_takes_no_more_than_a_start_has_time_to_fill(tmp_path: Path) -> None:
    DataDir.open(config(tmp_path, disk_bytes=1 << 30)).close()
    assert disk_shape(config(tmp_path, disk_bytes=127 << 30)).limit_bytes < 4 << 30
    assert disk_shape(config(tmp_path, disk_bytes=1 << 40)).limit_bytes == 4 << 30


def test_a_limit_below_two_segments_of_the_directory_is_refused(tmp_path: Path) -> None:
    DataDir.open(config(tmp_path, disk_bytes=1024 * MIB)).close()
    with pytest.raises(ConfigError, match="disk_bytes"):
        disk_shape(config(tmp_path, disk_bytes=64 * MIB))


def test_the_arena_is_named_after_the_directory(tmp_path: Path) -> None:
    one, other = DataDir.open(config(tmp_path / "1")), DataDir.open(config(tmp_path / "2"))
    assert one.arena_path() != other.arena_path()
    assert one.arena_path().startswith(f"/dev/shm/cachetier-{os.getuid()}-")
    one.close()
    other.close()


def test_a_given_secret_is_taken_at_first_kept_without_the_file_and_another_one_is_refused(tmp_path: Path) -> None:
    given, other = tmp_path / "given", tmp_path / "other"
    given.write_text("0a" * 32 + "\n")
    other.write_text("0b" * 32)
    for settings in ({"secret_file": str(given)}, {"secret_file": str(given)}, {}):
        data_dir = DataDir.open(config(tmp_path, **settings))
        assert data_dir.secret == b"\n" * 32
        data_dir.close()
    with pytest.raises(ConfigError, match="was made with another secret than that in secret_file"):
        DataDir.open(config(tmp_path, secret_file=str(other)))


@pytest.mark.parametrize("text", ["", "0a" * 31, "0a" * 33, "no digits at all"])
def test_a_secret_file_that_holds_no_secret_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "given").write_text(text)
    with pytest.raises(ConfigError, match="secret_file"):
        DataDir.open(config(tmp_path, secret_file=str(tmp_path / "given")))
    with pytest.raises(ConfigError, match="secret_file"):
        DataDir.open(config(tmp_path, secret_file=str(tmp_path / "missing")))

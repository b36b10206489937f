"""What was answered is remembered across any end of the process; what is damaged is forgotten, not misread."""

import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.cli.warm_journal import Journal
from cachetier.core.errors import ConfigError, StorageError

DIGESTS = [bytes([number]) * 16 for number in range(20)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    journal = Journal(str(tmp_path / "deep" / "er" / "j"), resume=True)
    for digest in DIGESTS:
        journal.add(digest)
    journal.close(remove=False)
    return str(tmp_path / "deep" / "er" / "j")


def remembered(path: str, *, resume: bool = True) -> list[bytes]:
    journal = Journal(path, resume=resume)
    found = [digest for digest in DIGESTS if digest in journal]
    assert journal.num_resumed == len(found)
    journal.close(remove=False)
    return found


def test_digests_are_remembered_and_others_are_not(path: str) -> None:
    assert remembered(path) == DIGESTS
    journal = Journal(path, resume=True)
    assert b"\xff" * 16 not in journal
    journal.close(remove=False)


def test_a_digest_is_in_the_file_before_add_returns(path: str) -> None:
    journal = Journal(path, resume=True)
    journal.add(b"\xfe" * 16)
    assert Path(path).read_bytes().endswith(b"fe" * 16 + b"\n")
    journal.close(remove=False)


@pytest.mark.parametrize("cut", [1, 5, 32, 33, 34, 40])
def test_a_torn_tail_costs_only_the_torn_lines_and_the_next_ones_are_kept(path: str, cut: int) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:-cut])
    num_lost = -(-cut // 33)
    assert remembered(path) == DIGESTS[:-num_lost]
    journal = Journal(path, resume=True)
    journal.add(DIGESTS[-1])
    journal.close(remove=False)
    assert remembered(path) == [*DIGESTS[:-num_lost], DIGESTS[-1]]


@pytest.mark.parametrize("size", range(26))
def test_a_torn_title_is_an_empty_journal(path: str, size: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:size])
    assert remembered(path) == []
    journal = Journal(path, resume=True)
    journal.add(DIGESTS[3])
    journal.close(remove=False)
    assert remembered(path) == [DIGESTS[3]]


@given(position=st.integers(25, 24 + 33 * 20), byte=st.integers(0, 255))
def test_a_damaged_byte_loses_at_most_two_digests_and_invents_none(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    data = bytearray(b"cachetier warm journal 1\n" + b"".join(digest.hex().encode() + b"\n" for digest in DIGESTS))
    data[position] = byte
    path.write_bytes(data)
    journal = Journal(str(path), resume=True)
    assert sum(digest in journal for digest in DIGESTS) >= len(DIGESTS) - 2
    assert journal.num_resumed <= len(DIGESTS)
    journal.close(remove=False)


def test_without_resume_everything_is_forgotten_for_good(path: str) -> None:
    assert remembered(path, resume=False) == []
    assert remembered(path) == []


def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "precious"}')
    for resume in (True, False):
        with pytest.raises(ConfigError, match="something else"):
            Journal(str(file), resume=resume)
    assert file.read_text() == '{"prompt": "precious"}'


def test_two_runs_cannot_share_a_journal(path: str) -> None:
    first = Journal(path, resume=True)
    with pytest.raises(ConfigError, match="another warm-up"):
        Journal(path, resume=True)
    first.close(remove=True)
    assert not Path(path).exists()
    Journal(path, resume=True).close(remove=False)


def test_an_unusable_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="journal"):
        Journal(str(tmp_path / "file" / "j"), resume=True)
    with pytest.raises(ConfigError, match="journal"):
        Journal(str(tmp_path), resume=True)
    with pytest.raises(ConfigError, match="something else"):
        Journal("/dev/zero", resume=True)


def test_a_file_that_cannot_grow_is_named(path: str) -> None:
    journal = Journal(path, resume=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(path).stat().st_size, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(StorageError, match="journal"):
            journal.add(b"\xfe" * 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        journal.close(remove=False)


def test_others_cannot_read_it(path: str) -> None:
    assert Path(path).stat().st_mode & 0o777 == 0o600

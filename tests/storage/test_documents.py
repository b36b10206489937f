"""The file of registered documents: what was written comes back, whatever happened to the rest of it."""

import contextlib
import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.storage.documents import FILE_NAME, DocumentFile, StoredDocument, record_bytes
from cachetier.storage.file_layer import FileLayer, replace_file
from tests.storage.fault_files import FaultFiles, SimulatedCrashError

FOLDER = "/data"
PATH = f"{FOLDER}/{FILE_NAME}"
LIMIT_BYTES = 1 << 20


def document(name: str, *, seed: int = 0, num_chunks: int = 3, tenant: bytes = b"tenant") -> StoredDocument:
    rng = random.Random(f"{name} {seed}")
    return StoredDocument(
        tenant=ChainKey(tenant.ljust(16)),
        namespace=NamespaceId(rng.randbytes(16)),
        id=name,
        num_tokens=64 * num_chunks + rng.randrange(64),
        keys=rng.randbytes(16 * num_chunks),
        fingerprint=rng.getrandbits(64),
        first_tokens=rng.randbytes(16),
        registered_at_s=rng.random() * 2e9,
    )


def open_file(files: FileLayer, limit_bytes: int = LIMIT_BYTES) -> tuple[DocumentFile, list[StoredDocument]]:
    file = DocumentFile(FOLDER, files, limit_bytes)
    return file, file.open()


def documents_in(files: FileLayer) -> list[StoredDocument]:
    return open_file(files)[1]


def write(files: FaultFiles, data: bytes) -> None:
    replace_file(files, PATH, data)


@pytest.fixture
def files() -> FaultFiles:
    return FaultFiles(1)


@pytest.fixture
def file(files: FaultFiles) -> DocumentFile:
    return open_file(files)[0]


def test_documents_come_back_in_the_order_of_their_registration(tmp_path: Path) -> None:
    documents = [document(name, num_chunks=number + 1) for number, name in enumerate(("b", "a", "ü" * 256))]
    file = DocumentFile(str(tmp_path), FileLayer(), LIMIT_BYTES)
    assert file.open() == []
    assert file.append(documents[:1])
    assert file.append(documents[1:])
    assert DocumentFile(str(tmp_path), FileLayer(), LIMIT_BYTES).open() == documents
    assert os.stat(tmp_path / FILE_NAME).st_mode & 0o077 == 0


def test_the_newest_record_of_a_tenant_and_id_counts(files: FaultFiles, file: DocumentFile) -> None:
    first, second, other = document("a"), document("b"), document("a", tenant=b"other")
    file.append([first, second, other])
    newer = document("a", seed=1)
    file.append([newer, second.removed()])
    assert documents_in(files) == [other, newer]


def test_a_tail_torn_anywhere_is_cut_off_and_what_follows_is_kept(files: FaultFiles, file: DocumentFile) -> None:
    documents = [document(name) for name in "abc"]
    file.append(documents)
    whole = bytes(files.contents()[PATH])
    start = len(whole) - record_bytes(documents[2])
    for end in range(start, len(whole)):
        write(files, whole[:end])
        reopened, known = open_file(files)
        assert known == documents[:2]
        reopened.append([document("d")])
        assert documents_in(files) == [*documents[:2], document("d")]


def test_any_flipped_bit_costs_exactly_the_registration_that_it_hits(files: FaultFiles, file: DocumentFile) -> None:
    documents = [document(name) for name in "abcd"]
    file.append(documents)
    whole = bytes(files.contents()[PATH])
    ends = [sum(map(record_bytes, documents[: number + 1])) for number in range(4)]
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        write(files, bytes(damaged))
        hit = next(number for number, end in enumerate(ends) if bit // 8 < end)
        wanted = [*documents[:hit], *documents[hit + 1 :]]
        assert documents_in(files) == wanted
        assert len(files.contents()[PATH]) == sum(map(record_bytes, wanted)), "the damage stayed in the file"
        assert documents_in(files) == wanted, "what was repaired differs from what was read"


@given(st.binary(max_size=400), st.integers(0, 3))
def test_any_bytes_can_be_opened(garbage: bytes, num_records: int) -> None:
    files = FaultFiles(2)
    documents = [document(f"{number}") for number in range(num_records)]
    open_file(files)[0].append(documents)
    before = bytes(files.contents().get(PATH, b""))
    write(files, garbage + before + garbage)
    assert documents_in(files) == documents


def test_what_is_mostly_dead_is_left_behind_at_open_and_only_then(files: FaultFiles, file: DocumentFile) -> None:
    documents = [document(f"{number}") for number in range(10)]
    file.append(documents)
    size = len(files.contents()[PATH])
    file.append([each.removed() for each in documents[:3]])
    assert documents_in(files) == documents[3:]
    assert len(files.contents()[PATH]) > size
    file = open_file(files)[0]
    file.append([each.removed() for each in documents[3:8]])
    assert documents_in(files) == documents[8:]
    assert len(files.contents()[PATH]) == size // 5
    assert list(files.contents()) == [PATH]


@pytest.mark.parametrize("crash_in", [0, 1, -1], ids=["write", "sync", "afterwards"])
def test_a_power_failure_while_it_is_written_anew_costs_nothing(crash_in: int) -> None:
    sizes = set()
    for seed in range(50):
        files = FaultFiles(seed)
        file, _ = open_file(files)
        documents = [document(f"{number}") for number in range(10)]
        file.append(documents)
        file.append([each.removed() for each in documents[:8]])
        files.crash_in = crash_in
        with contextlib.suppress(SimulatedCrashError):
            documents_in(files)
        files.crash()
        sizes.add(len(files.contents()[PATH]))
        assert documents_in(files) == documents[8:]
    (size,) = sizes
    assert (size == 2 * record_bytes(documents[0])) == (crash_in == -1)


def test_a_full_file_says_so_and_written_anew_it_has_room(files: FaultFiles) -> None:
    file, _ = open_file(files, 4 * record_bytes(document("a")))
    assert file.append([document("a", seed=number) for number in range(4)])
    newest = document("a", seed=4)
    assert not file.append([newest])
    file.rewrite([newest])
    assert file.append([document("b")])
    assert documents_in(files) == [newest, document("b")]


def test_a_smaller_limit_forgets_what_was_registered_longest_ago(files: FaultFiles, file: DocumentFile) -> None:
    documents = [document(f"{number}") for number in range(8)]
    file.append(documents)
    limit_bytes = 4 * record_bytes(documents[0])
    small, known = open_file(files, limit_bytes)
    assert known == documents[5:]
    assert len(files.contents()[PATH]) <= small.living_bytes_max
    assert small.append([document("new")])


def test_what_a_failed_write_left_behind_does_not_come_back(files: FaultFiles, file: DocumentFile) -> None:
    file.append([document("a")])
    files.fail_in = 1  # the sync: all bytes have reached the file
    with pytest.raises(OSError, match="injected"):
        file.append([document("x").removed(), document("b")])
    file.append([document("b").removed()])
    assert documents_in(files) == [document("a")]


def test_a_disk_without_room_for_the_new_file_keeps_the_old_one(files: FaultFiles, file: DocumentFile) -> None:
    documents = [document(f"{number}") for number in range(10)]
    file.append(documents)
    file.append([each.removed() for each in documents[:8]])
    size = len(files.contents()[PATH])
    files.fail_in, files.error = 0, errno.ENOSPC
    assert documents_in(files) == documents[8:]
    assert len(files.contents()[PATH]) == size


@pytest.mark.parametrize("seed", range(150))
def test_what_was_written_survives_any_fault_and_power_failure(seed: int) -> None:
    """Each id is as its last successful change left it, or as a later change that failed or was under way wanted it."""
    rng, files = random.Random(seed), FaultFiles(seed)
    file, _ = open_file(files, 40 * 200)
    possible: dict[str, list[StoredDocument | None]] = {name: [None] for name in "abcd"}
    latest: dict[str, StoredDocument | None] = dict.fromkeys("abcd")
    for step in range(60):
        names = rng.sample("abcd", rng.randrange(1, 4))
        changes = [document(name, seed=step, num_chunks=rng.randrange(1, 4)) for name in names]
        changes = [each.removed() if rng.random() < 0.3 else each for each in changes]
        wanted = {each.id: each if each.keys else None for each in changes}
        latest |= wanted
        if rng.random() < 0.2:
            files.fail_in = rng.randrange(4)
        if rng.random() < 0.1:
            files.crash_in = rng.randrange(4)
        try:
            is_whole = not file.append(changes)
            if is_whole:
                file.rewrite(each for each in latest.values() if each)
            possible |= {name: [latest[name]] for name in (latest if is_whole else wanted)}
        except SimulatedCrashError:
            for name, each in latest.items():
                possible[name].append(each)
            files.crash()
            file, known = open_file(files, 40 * 200)
            found = {each.id: each for each in known}
            assert all(found.get(name) in possible[name] for name in "abcd"), step
            latest = {name: found.get(name) for name in "abcd"}
            possible = {name: [each] for name, each in latest.items()}
        except OSError:
            for name, each in latest.items():
                possible[name].append(each)
        files.fail_in = files.crash_in = -1
    found = {each.id: each for each in documents_in(files)}
    assert all(found.get(name) in possible[name] for name in "abcd")

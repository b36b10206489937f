"""Direct reads without a GPU: a stand-in for `kvikio.CuFile` reads real files to the same addresses of host memory."""

import ctypes
import os
import random

import pytest

from cachetier.core.errors import StorageError
from cachetier_connector.cuda import direct_reads
from cachetier_connector.cuda.direct_reads import DirectReader, FileRead
from cachetier_connector.cuda.probe_disk import MODE_DIRECT, MODE_HOST, choose
from tests.connector.cuda.host_file import HostFile


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(HostFile, "num_opened", 0)
    monkeypatch.setattr(HostFile, "under_way", 0)
    return DirectReader(HostFile)


@pytest.fixture
def files(tmp_path):
    made = {}
    for number in range(3):
        path = tmp_path / f"{number}.seg"
        path.write_bytes(random.Random(number).randbytes(40_000))
        made[str(path)] = path.read_bytes()
    return made


def memory(size):
    buffer = ctypes.create_string_buffer(size)
    return buffer, ctypes.addressof(buffer)


def test_each_read_gets_its_bytes_wherever_they_lie(reader, files):
    buffer, address = memory(30_000)
    reads, expected = [], b""
    for number, (path, data) in enumerate(files.items()):
        reads.append(FileRead(path, 4096 * number, address + 10_000 * number, 10_000))
        expected += data[4096 * number : 4096 * number + 10_000]
    reader.read("i", reads)
    assert buffer.raw[:30_000] == expected


def test_files_stay_open_until_others_are_used_more_or_the_server_is_another(reader, files, monkeypatch):
    buffer, address = memory(4096)
    first, second, third = files
    for path in (first, second, first, second):
        reader.read("i", [FileRead(path, 0, address, 4096)])
    assert HostFile.num_opened == 2
    monkeypatch.setattr(direct_reads, "MAX_FILES", 2)
    for path in (first, third, first):
        reader.read("i", [FileRead(path, 0, address, 4096)])
    assert HostFile.num_opened == 3
    reader.read("i", [FileRead(second, 0, address, 4096)])
    assert HostFile.num_opened == 4
    os.replace(third, first)
    reader.read("another", [FileRead(first, 0, address, 4096)])
    assert buffer.raw == files[third][:4096]


@pytest.mark.parametrize("bad", ["missing", "short"])
def test_a_read_that_fails_leaves_none_under_way(reader, files, bad):
    _, address = memory(8192)
    path = next(iter(files))
    wrong = FileRead(path + "x", 0, address, 4096) if bad == "missing" else FileRead(path, 39_000, address, 4096)
    with pytest.raises(StorageError, match="cannot be read directly"):
        reader.read("i", [FileRead(path, 0, address, 4096), wrong, FileRead(path, 0, address + 4096, 4096)])
    assert HostFile.under_way == 0


def test_direct_reads_are_chosen_only_where_they_are_clearly_faster():
    assert choose(3e9, 3.2e9, "").mode == MODE_HOST
    assert choose(3e9, 6e9, "").mode == MODE_DIRECT
    found = choose(1.7e9, 1.5e9, "no nvidia-fs")
    assert found.mode == MODE_HOST
    assert all(part in found.why for part in ("compatibility mode (no nvidia-fs)", "1.50 GB/s", "1.70 GB/s"))
    assert found.advice
    assert "GPUDirect Storage" in choose(3e9, 6e9, "").why

"""Direct reads with kvikio into device memory; on a machine without GPUDirect Storage in its compatibility mode."""

import os
import random
import sys
import threading

import pytest
import torch

from cachetier.core.errors import StorageError

kvikio = pytest.importorskip("kvikio")

from cachetier_connector.cuda.direct_reads import (  # noqa: E402
    MAX_IN_FLIGHT,
    TASK_BYTES,
    DirectReader,
    FileRead,
    gds_problem,
)
from cachetier_connector.cuda.probe_disk import MODE_DIRECT, MODE_HOST, measure, probe  # noqa: E402

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.fixture
def reader():
    made = DirectReader()
    yield made
    made.close()


@pytest.fixture
def segment(tmp_path):
    path = tmp_path / "00000001.seg"
    path.write_bytes(random.Random(1).randbytes(40 * MIB))
    return path


def test_the_bytes_are_those_of_the_file_at_any_offset_and_size(reader, segment):
    data = segment.read_bytes()
    target = torch.zeros(32 * MIB, dtype=torch.uint8, device="cuda")
    reads, expected, at = [], bytearray(32 * MIB), 0
    for offset, size in ((0, 8 * MIB), (4096, 5 * MIB + 4096), (12 * MIB + 8192, 3 * MIB + 160), (39 * MIB, MIB)):
        reads.append(FileRead(str(segment), offset, target.data_ptr() + at, size))
        expected[at : at + size] = data[offset : offset + size]
        at += 9 * MIB - 4096
    reader.read("i", reads)
    assert target.cpu().numpy().tobytes() == bytes(expected)


def test_threads_that_read_at_once_get_their_own_bytes(reader, segment):
    data, wrong = segment.read_bytes(), []

    def read(number):
        torch.cuda.set_device(0)
        target = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        for turn in range(20):
            offset = (number * 7 + turn) % 8 * 4 * MIB
            reader.read("i", [FileRead(str(segment), offset, target.data_ptr(), 8 * MIB)])
            if target.cpu().numpy().tobytes() != data[offset : offset + 8 * MIB]:
                wrong.append((number, turn))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_more_reads_can_be_in_flight_than_the_limit(reader):
    assert kvikio.defaults.get("num_threads") == MAX_IN_FLIGHT < 256
    assert kvikio.defaults.get("task_size") == TASK_BYTES >= MIB


def test_a_missing_or_short_file_is_an_error_and_the_reader_goes_on(reader, segment):
    target = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
    good = FileRead(str(segment), 0, target.data_ptr(), MIB)
    with pytest.raises(StorageError):
        reader.read("i", [good, FileRead(str(segment) + "x", 0, target.data_ptr() + MIB, MIB)])
    with pytest.raises(StorageError):
        reader.read("i", [FileRead(str(segment), 39 * MIB, target.data_ptr(), 2 * MIB)])
    os.truncate(segment, 4 * MIB)
    reader.read("i", [good])
    assert target[:MIB].cpu().numpy().tobytes() == segment.read_bytes()[:MIB]


def test_the_probe_measures_both_ways_and_leaves_nothing_behind(reader, tmp_path, capsys):
    host, direct = measure(str(tmp_path), reader, 256 * MIB)
    found = probe(str(tmp_path), 64 * MIB)
    with capsys.disabled():
        sys.stdout.write(
            f"\nfrom disk: host path {host / 1e9:.2f} GB/s, kvikio {direct / 1e9:.2f} GB/s; GDS: {gds_problem()!r}\n"
        )
        sys.stdout.write(f"{found}\n")
    assert host > 0
    assert direct > 0
    assert found.mode in {MODE_HOST, MODE_DIRECT}
    assert found.host_bytes_per_s > 0, found.why
    assert list(tmp_path.iterdir()) == []

"""Which way from this disk to this GPU is faster: kvikio into device memory, or O_DIRECT into pinned memory and a copy?

Each worker asks once, in the background, and `cachetier doctor` asks in a process of its own:

    python -m cachetier_connector.cuda.probe_disk --dir DIR

which prints a `DiskProbe` as JSON. The file that is read has no name, so nothing is left behind whatever happens.
"""

import argparse
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import msgspec
import torch

from cachetier.core.errors import StorageError
from cachetier_connector.cuda.device import CudaStream
from cachetier_connector.cuda.direct_reads import DirectReader, FileRead, gds_problem
from cachetier_connector.cuda.driver import Driver, DriverError

SCRATCH_BYTES = 256 << 20
READ_BYTES = 4 << 20
HOST_THREADS = 4  # as many as the server has for promotions
ROUNDS = 3
MARGIN = 1.1  # direct reads must be faster by so much: they keep nothing in host memory for the next reader

MODE_HOST, MODE_DIRECT = "host", "direct"


class DiskProbe(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        mode: MODE_HOST or MODE_DIRECT: what an engine on this machine does.
        why: the reason, for people.
        advice: what could be done about it; empty: nothing.
        host_bytes_per_s: by O_DIRECT into pinned memory, and a copy; 0: not measured.
        direct_bytes_per_s: by kvikio into device memory; 0: not measured.
    """

    mode: str
    why: str
    advice: str = ""
    host_bytes_per_s: float = 0.0
    direct_bytes_per_s: float = 0.0


def probe(folder: str, scratch_bytes: int = SCRATCH_BYTES) -> DiskProbe:
    """Find out, with the calling thread's CUDA device. Takes some seconds of the disk; never raises."""
    if not torch.cuda.is_available():
        return DiskProbe(mode=MODE_HOST, why="no CUDA device")
    try:
        reader = DirectReader()
        problem = gds_problem()
    except (StorageError, ImportError) as error:
        return DiskProbe(mode=MODE_HOST, why=str(error), advice="pip install cachetier[gds]")
    try:
        host, direct = measure(folder, reader, scratch_bytes)
    except (StorageError, DriverError, OSError, RuntimeError) as error:
        return DiskProbe(mode=MODE_HOST, why=f"direct reads do not work in {folder}: {error}")
    finally:
        reader.close()
    return choose(host, direct, problem)


def choose(host_bytes_per_s: float, direct_bytes_per_s: float, problem: str) -> DiskProbe:
    """Decide by what was measured; `problem` says why kvikio does without GPUDirect Storage, empty: it does not."""
    way = f"kvikio in compatibility mode ({problem})" if problem else "GPUDirect Storage"
    mode = MODE_DIRECT if direct_bytes_per_s > MARGIN * host_bytes_per_s else MODE_HOST
    speeds = f"{way} {direct_bytes_per_s / 1e9:.2f} GB/s, O_DIRECT into pinned memory {host_bytes_per_s / 1e9:.2f} GB/s"
    return DiskProbe(
        mode=mode,
        why=f"{speeds}: {'read directly' if mode == MODE_DIRECT else 'not clearly faster'}",
        advice="load nvidia-fs and use a local NVMe drive with ext4 or xfs" if problem and mode == MODE_HOST else "",
        host_bytes_per_s=host_bytes_per_s,
        direct_bytes_per_s=direct_bytes_per_s,
    )


def measure(folder: str, reader: DirectReader, scratch_bytes: int) -> tuple[float, float]:
    """Return bytes/s through pinned host memory, and by `reader`; medians of rounds that take turns.

    Raises:
        OSError, StorageError, DriverError, RuntimeError: one of the ways does not work.
    """
    num_bytes = scratch_bytes // READ_BYTES * READ_BYTES
    driver, target = Driver(torch.cuda.current_device()), 0
    driver.bind_thread()
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        _fill(descriptor, num_bytes)
        pinned = torch.empty(HOST_THREADS * READ_BYTES, dtype=torch.uint8, pin_memory=True)
        target = driver.allocate(HOST_THREADS * READ_BYTES)  # not torch's, which would keep it
        ways: list[Callable[[], None]] = [
            lambda: _read_through_host(descriptor, num_bytes, driver, pinned, target),
            lambda: _read_directly(descriptor, num_bytes, driver, reader, target),
        ]
        seconds: list[list[float]] = [[], []]
        for number in range(ROUNDS + 1):
            for way, taken in zip(ways, seconds, strict=True):
                start = time.perf_counter()
                way()
                if number:  # the first round opens, compiles and pins
                    taken.append(time.perf_counter() - start)
        return num_bytes / median(seconds[0]), num_bytes / median(seconds[1])
    finally:
        os.close(descriptor)
        if target:
            driver.free(target)


def _fill(descriptor: int, num_bytes: int) -> None:
    with mmap.mmap(-1, READ_BYTES) as block:
        block.write(os.urandom(READ_BYTES))
        for offset in range(0, num_bytes, READ_BYTES):
            if os.pwritev(descriptor, [block], offset) != READ_BYTES:
                raise OSError(f"no room for {num_bytes} bytes")
    os.fdatasync(descriptor)


def _read_through_host(descriptor: int, num_bytes: int, driver: Driver, pinned: Any, target: int) -> None:
    memory, address = memoryview(pinned.numpy()), int(pinned.data_ptr())
    streams = [CudaStream(driver, 0) for _ in range(HOST_THREADS)]  # torch would keep 32 and their memory

    def read(part: int, offset: int) -> None:
        driver.bind_thread()
        start = part * READ_BYTES
        if os.preadv(descriptor, [memory[start : start + READ_BYTES]], offset) != READ_BYTES:
            raise OSError("short read")
        driver.copy_in(target + start, address + start, READ_BYTES, streams[part].handle, may_wait=False)
        streams[part].synchronize()

    _in_threads(read, num_bytes)


def _read_directly(descriptor: int, num_bytes: int, driver: Driver, reader: DirectReader, target: int) -> None:
    path = f"/proc/self/fd/{descriptor}"

    def read(part: int, offset: int) -> None:
        driver.bind_thread()
        reader.read("", [FileRead(path, offset, target + part * READ_BYTES, READ_BYTES)])

    _in_threads(read, num_bytes)


def _in_threads(read: Callable[[int, int], None], num_bytes: int) -> None:
    """Have HOST_THREADS threads call `read` with their number and the offsets that nobody has taken yet."""
    offsets: SimpleQueue[int] = SimpleQueue()
    for offset in range(0, num_bytes, READ_BYTES):
        offsets.put(offset)
    errors: list[Exception] = []

    def run(part: int) -> None:
        try:
            while not errors:
                read(part, offsets.get_nowait())
        except Empty:
            pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in range(HOST_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def main() -> None:
    """Print a probe as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="folder on the disk")
    args = parser.parse_args()
    sys.stdout.write(msgspec.json.encode(probe(args.dir)).decode() + "\n")


if __name__ == "__main__":
    main()

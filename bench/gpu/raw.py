"""What the hardware itself can do: pinned copies over the bus, O_DIRECT reads from the disk."""

import json
import mmap
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COPY_BYTES = 1 << 30
READ_BYTES = 4 << 20
REPEATS = 8


def make_room_in_shared_memory(num_bytes: int) -> None:
    """Raise the limit of /dev/shm, which arenas lie in; half of the machine's memory is its default."""
    found = os.statvfs("/dev/shm")
    if found.f_blocks * found.f_frsize < num_bytes:
        command = ["mount", "-o", f"remount,size={num_bytes}", "/dev/shm"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        print(f"-- {' '.join(command)}: {done.stderr or 'done'}", file=sys.stderr)


def measure_copies() -> dict[str, float]:
    """Return bytes a second of pinned copies `h2d`, `d2h` and `both` at once; another process has the GPU for it."""
    done = subprocess.run([sys.executable, "-m", "bench.gpu.raw"], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def copies() -> dict[str, float]:
    """Measure in this process."""
    import torch

    host = [torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def rate(*directions: int) -> float:
        best = 0.0
        for _ in range(3):
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            for number in range(REPEATS * len(directions)):
                way = directions[number % len(directions)]
                source, target = (host[0], device[0]) if way == 0 else (device[1], host[1])
                with torch.cuda.stream(streams[way]):
                    target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            best = max(best, REPEATS * len(directions) * COPY_BYTES / (time.perf_counter() - start_s))
        return best

    return {"h2d": rate(0), "d2h": rate(1), "both": rate(0, 1)}


def read_rate(files: list[Path], threads: int, limit_bytes: int) -> float:
    """Return bytes a second of O_DIRECT reads by `threads` threads, of `limit_bytes` of `files` at most."""
    pieces = [
        (file, offset)
        for file in files
        for offset in range(0, file.stat().st_size // READ_BYTES * READ_BYTES, READ_BYTES)
    ][: limit_bytes // READ_BYTES]

    def read(share: list[tuple[Path, int]]) -> int:
        buffer, done = mmap.mmap(-1, READ_BYTES), 0
        handles = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file, _ in share}
        try:
            for file, offset in share:
                done += os.preadv(handles[file], [buffer], offset)
        finally:
            for handle in handles.values():
                os.close(handle)
        return done

    start_s = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, [pieces[number::threads] for number in range(threads)]))
    return total / (time.perf_counter() - start_s)


if __name__ == "__main__":
    print(json.dumps(copies()))

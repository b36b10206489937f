"""How fast does the copy engine move KV between paged blocks and the arena, without vLLM, and what does it cost?

The shape is Llama 3.1 8B's on one GPU (32 layers, 8 KV heads of 128, bf16, blocks of 16 tokens, chunks of 64: 8 MiB an
object) and on one of eight (1 head, 1 MiB an object). The arena is a real one in /dev/shm. Beside it, in the same run:
plain copies by the driver between the same frames and device memory. The bytes of each round are compared or verified
by the engine itself; medians over the rounds. Ends with the table; the rows are written after every group of them, so
that a run that ends early keeps what it has measured. Takes half a minute; `--diagnose` adds ten seconds.

    python bench/gpu_copy.py [--json PATH] [--diagnose] [--rehearse]
        (--diagnose: also find out what the host's threads do to each other; --rehearse: tiny, without a GPU)
"""

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_copy_diagnosis import diagnosed, memory_steps
from record import record, row, write

from cachetier.client import ArenaView
from cachetier.core.layout import KVLayout, frame_bytes
from cachetier.storage.arena import Arena
from cachetier_connector.cuda import staged_load, staged_store
from cachetier_connector.cuda.copy_cuda import CudaCopyEngine, StagedCopyEngine
from cachetier_connector.cuda.device import Device
from cachetier_connector.cuda.registration import Registration
from cachetier_connector.cuda.stage_plan import StagePlan
from cachetier_connector.cuda.transfers import plan_transfers
from cachetier_connector.plan import ChunkSource, HeldChunks, LoadOp

ROOT = Path(__file__).parent.parent
STAGING_BYTES = 48 << 20
GROUP_CHUNKS = 16
RAW_AHEAD = 64  # plain copies under way, twice as many
GIB = 1 << 30
SPEED, COST = "gpu copy: bytes of KV a second", "gpu copy: what it costs"


@dataclass(frozen=True)
class Shape:
    """What is measured; half of the blocks and chunks is loaded and half is stored."""

    name: str
    num_heads: int = 8
    num_layers: int = 32
    head_size: int = 128
    block_tokens: int = 16
    chunk_tokens: int = 64
    num_chunks: int = 256
    staging_bytes: int = STAGING_BYTES
    num_rounds: int = 3
    window_s: float = 0.2

    @property
    def layout(self) -> KVLayout:
        """All of the model that this GPU holds."""
        return KVLayout(num_layers=self.num_layers, num_kv_heads=self.num_heads, row_bytes=4 * self.head_size)

    @property
    def object_bytes(self) -> int:
        """Bytes of a chunk."""
        return self.layout.object_bytes(self.layout.whole(), self.chunk_tokens)


SHAPES = [Shape("8 heads, 8 MiB"), Shape("1 head, 1 MiB", num_heads=1, num_chunks=1024)]
TINY = [Shape("tiny", 2, 2, 16, 8, 16, 8, 6 * 16384, 2, 0.02)]


class Bench:
    """Paged blocks with an engine, an arena, and chunks in it."""

    def __init__(self, shape: Shape, make: Callable[..., StagedCopyEngine], where: torch.device, folder: Path) -> None:
        self.shape, self.where = shape, where
        self.blocks_a_chunk = shape.chunk_tokens // shape.block_tokens
        num_blocks = 2 * shape.num_chunks * self.blocks_a_chunk
        generator = torch.Generator(where).manual_seed(1)
        size = (num_blocks, shape.block_tokens, shape.num_heads, 2 * shape.head_size)
        self.caches = [
            torch.randint(-(1 << 15), 1 << 15, size, dtype=torch.int16, device=where, generator=generator)
            .transpose(1, 2)
            .view(torch.bfloat16)
            for _ in range(shape.num_layers)
        ]
        table = random.Random(1).sample(range(num_blocks), num_blocks)
        self.to_load, self.to_store = table[: num_blocks // 2], table[num_blocks // 2 :]
        free = self.free_bytes()
        self.steps: list[tuple[str, int]] = []
        with memory_steps(self.free_bytes, self.steps):
            self.engine = make(self.caches, shape.layout, shape.layout.whole(), staging_bytes=shape.staging_bytes)
        self.device: Device = self.engine._device
        self._free_before = free
        # A slab wastes a little at its end; all of the file is registered, so that it is not made larger than needed.
        file_bytes = int(2 * shape.num_chunks * frame_bytes(shape.object_bytes) * 1.1) + (64 << 20)
        self.arena = Arena.create(str(folder / "arena"), file_bytes, b"i" * 16)
        self.view = ArenaView.attach(str(folder / "arena"))
        self.frames, self.targets = self._allocate(), self._allocate()
        self.chunks: list[ChunkSource] = []
        self._memory: list[torch.Tensor] = []  # that plain copies go to and come from

    def _allocate(self) -> list[int]:
        found = [self.arena.allocate(frame_bytes(self.shape.object_bytes)) for _ in range(self.shape.num_chunks)]
        assert None not in found
        return [offset for offset in found if offset is not None]

    def free_bytes(self) -> int:
        """Return the device's free memory."""
        if self.where.type == "cpu":
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.where)[0])

    def used_bytes(self) -> int:
        """Return the device memory that was taken since the caches were there."""
        return self._free_before - self.free_bytes()

    def prepare(self) -> None:
        """Store the chunks that are loaded from now on, and see that they arrive."""
        checksums = self._fill(self.to_load, self.frames)
        self.chunks = [
            ChunkSource(b"key", 0, [frame], [checksum]) for frame, checksum in zip(self.frames, checksums, strict=True)
        ]
        blocks = torch.tensor(self.to_load, device=self.where)
        before = [cache[blocks].clone() for cache in self.caches[:2]]
        for cache in self.caches:
            cache[blocks] = 0
        self.load()
        assert all(
            torch.equal(a.view(torch.int16), c[blocks].view(torch.int16))
            for a, c in zip(before, self.caches, strict=False)
        )

    def load(self) -> None:
        """Load all chunks as one load of one thread."""
        shape, count = self.shape, len(self.chunks)
        op = LoadOp(
            request_id="r", start=0, end=count * shape.chunk_tokens, chunk_tokens=shape.chunk_tokens, first_chunk=0,
            chunks=HeldChunks(b"", b"", [], []), tilings=[[shape.layout.whole()]], block_ids=self.to_load,
            arena_path="", instance="",
        )  # fmt: skip
        run = self.engine.open_load(self.view, op, self.engine.fence())
        for first in range(0, count, GROUP_CHUNKS):
            run.push(self.chunks[first : first + GROUP_CHUNKS])
        assert run.finish() == count

    def store(self) -> None:
        """Store as many chunks, in ops as the steps of a prefill make them: 128 chunks are 8192 tokens."""
        for first in range(0, self.shape.num_chunks, 128):
            blocks = self.to_store[first * self.blocks_a_chunk : (first + 128) * self.blocks_a_chunk]
            self._fill(blocks, self.targets[first : first + 128])

    def _fill(self, blocks: list[int], frames: list[int]) -> list[int]:
        snapshot = self.engine.snapshot(blocks, 0, len(frames), self.shape.chunk_tokens)
        found = self.engine.fill(snapshot, range(len(frames)), self.view, frames, lambda: True)
        checksums = [checksum for checksum in found if checksum is not None]
        assert len(checksums) == len(frames)
        return checksums

    def raw(self, is_load: bool) -> Callable[[], None]:
        """Return plain copies of as many bytes between the same frames and two places in device memory."""
        stream, size = self.device.new_stream(is_urgent=False), self.shape.object_bytes
        memory, origin = self.device.empty(2 * size), self.view.address
        self._memory.append(memory)
        frames = self.frames if is_load else self.targets
        copy = self.device.copy_in if is_load else self.device.copy_out
        events = [self.device.new_event(), self.device.new_event()]
        places = [memory.data_ptr() + number % 2 * size for number in range(len(frames))]
        transfers = [  # the driver refuses a copy across the border between two cells
            part
            for frame, place in zip(frames, places, strict=True)
            for part in plan_transfers([(origin + frame, place, size)], origin)
        ]

        def run() -> None:
            self.device.bind_thread()
            for number, transfer in enumerate(transfers):
                if number % RAW_AHEAD == 0:  # a stream that has too much to do would block us, and with us the others
                    event = events[number // RAW_AHEAD % 2]
                    event.synchronize()
                    event.record(stream)
                copy(transfer, stream)
            stream.synchronize()

        return run

    def gb_per_round(self) -> float:
        """Return GB of KV that a load or a store moves."""
        return self.shape.num_chunks * self.shape.object_bytes / 1e9

    def speed(self, work: Callable[[], None]) -> float:
        """Return GB/s of `work` alone."""
        work()
        times = []
        for _ in range(self.shape.num_rounds):
            since = time.perf_counter()
            work()
            times.append(time.perf_counter() - since)
        return self.gb_per_round() / statistics.median(times)

    def speed_together(self, *works: Callable[[], None]) -> float:
        """Return GB/s of all `works` together, each on a thread of its own, repeated for a while."""
        return statistics.median(self._window(works) for _ in range(self.shape.num_rounds))

    def _window(self, works: tuple[Callable[[], None], ...]) -> float:
        speeds, errors = [0.0] * len(works), []
        barrier = threading.Barrier(len(works))

        def repeat(number: int) -> None:
            try:
                barrier.wait()
                since, count = time.perf_counter(), 0
                while time.perf_counter() - since < self.shape.window_s:
                    works[number]()
                    count += 1
                speeds[number] = count * self.gb_per_round() / (time.perf_counter() - since)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return sum(speeds)

    def host_us(self, work: Callable[[], None]) -> float:
        """Return microseconds of this thread's CPU time a chunk."""
        times = []
        for _ in range(self.shape.num_rounds):
            since = time.thread_time()
            work()
            times.append(time.thread_time() - since)
        return statistics.median(times) / self.shape.num_chunks * 1e6


def _skip(*_: Any) -> None:
    """Compute nothing."""


def _trust(*_: Any) -> bool:
    """Believe everything."""
    return True


@contextmanager
def without_checksums() -> Iterator[None]:
    """Leave out the digests and believe everything."""
    scatter = staged_load.scatter

    def scattering(*args: Any, digests: Any = None, **kwargs: Any) -> None:
        scatter(*args, **kwargs)

    with (
        mock.patch.multiple(staged_load, digest_pages=_skip, scatter=scattering),
        mock.patch.multiple(staged_store, digest_pages=_skip, digest_paged=_skip),
        mock.patch.object(StagePlan, "matches", _trust),
    ):
        yield


class Report:
    """The rows that were found so far."""

    def __init__(self, path: Path | None, gpu: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path, self._gpu, self._start_s = path, gpu, time.perf_counter()

    def add(self, shape: Shape, question: str, contender: str, value: float, unit: str) -> None:
        """Take down one value, and say it."""
        self.rows.append(row(question, contender, round(value, 3), unit, shape=shape.name))
        seconds = time.perf_counter() - self._start_s
        print(f"{seconds:5.1f} s  {contender}: {value:.3f} {unit}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """Write all that was found so far."""
        write("gpu_copy", self.rows, path=self._path, gpu=self._gpu)

    def end(self) -> None:
        """Write and print everything."""
        record("gpu_copy", self.rows, path=self._path, gpu=self._gpu)


def measured(bench: Bench, report: Report, diagnosis: list[str] | None) -> None:
    """Measure one shape; append to `diagnosis` what holds it back."""

    def note(question: str, contender: str, value: float, unit: str) -> None:
        report.add(bench.shape, question, contender, value, unit)

    def speed(works: tuple[Callable[[], None], ...]) -> float:
        return bench.speed(*works) if len(works) == 1 else bench.speed_together(*works)

    note(COST, "device memory taken at the start", bench.used_bytes() / (1 << 20), "MiB")
    for step, taken in bench.steps:
        note(COST, f"of it: {step}", taken / (1 << 20), "MiB")
    registration = prepared(bench, note)
    raw_in, raw_out = bench.raw(is_load=True), bench.raw(is_load=False)
    kinds: dict[str, tuple[tuple[Callable[[], None], ...], tuple[Callable[[], None], ...]]] = {
        "load": ((bench.load,), (raw_in,)),
        "store": ((bench.store,), (raw_out,)),
        "load and store": ((bench.load, bench.store), (raw_in, raw_out)),
        "two loads": ((bench.load, bench.load), (raw_in,)),
    }
    for name, (works, plain) in kinds.items():
        note(SPEED, name, speed(works), "GB/s")
        note(SPEED, f"{name}, plain copies", speed(plain), "GB/s")
        report.save()
    with without_checksums():
        for name, (works, _) in kinds.items():
            note(SPEED, f"{name}, no checksums", speed(works), "GB/s")
    note(COST, "load: host CPU a chunk", bench.host_us(bench.load), "us")
    note(COST, "store: host CPU a chunk", bench.host_us(bench.store), "us")
    note(COST, "plain copies in: host CPU a chunk", bench.host_us(raw_in), "us")
    report.save()
    if diagnosis is not None:
        diagnosis += diagnosed(bench)
    registration.end()
    bench.engine.stop()


def prepared(bench: Bench, note: Callable[[str, str, float, str], None]) -> Registration:
    """Store what is loaded from now on, and register the arena; note what that takes."""
    bench.prepare()
    note(COST, "the same after a store and a load (and a comparison)", bench.used_bytes() / (1 << 20), "MiB")
    since = time.perf_counter()
    bench.load()
    note(SPEED, "load, not registered", bench.gb_per_round() / (time.perf_counter() - since), "GB/s")
    since = time.perf_counter()
    registration = Registration(bench.device, bench.view)
    num_cells = registration.join()
    seconds = time.perf_counter() - since
    gib = bench.view.geometry.data_bytes / GIB
    note(COST, f"register the arena ({num_cells} cells)", seconds / gib, "s/GiB")
    return registration


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there instead of bench/results/gpu_copy.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny, without a GPU; records only to --json")
    parser.add_argument("--diagnose", action="store_true", help="say also what the host's threads do to each other")
    arguments = parser.parse_args()
    diagnosis: list[str] | None = [] if arguments.diagnose else None
    with contextlib.ExitStack() as stack:
        if arguments.rehearse:
            make, where = stack.enter_context(rehearsing()), torch.device("cpu")
            report = Report(arguments.json or Path(os.devnull), "no GPU")
        else:
            make, where = CudaCopyEngine, torch.device("cuda", 0)
            report = Report(arguments.json, torch.cuda.get_device_name(0))
        for shape in TINY if arguments.rehearse else SHAPES:
            with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachetier-bench-") as folder:
                measured(Bench(shape, make, where, Path(folder)), report, diagnosis)
            if not arguments.rehearse:
                torch.cuda.empty_cache()
    report.end()
    print(*(diagnosis or []), sep="\n")


@contextmanager
def rehearsing() -> Iterator[Callable[..., StagedCopyEngine]]:
    """Yield what makes engines on the tests' device."""
    sys.path.insert(0, str(ROOT))
    from cachetier_connector.cuda import copy_cuda
    from tests.connector.cuda import plain_kernels
    from tests.connector.cuda.host_device import HostDevice

    with (
        mock.patch.multiple(copy_cuda, **plain_kernels.of(copy_cuda)),
        mock.patch.multiple(staged_load, **plain_kernels.of(staged_load)),
        mock.patch.multiple(staged_store, **plain_kernels.of(staged_store)),
    ):
        yield lambda *args, **settings: StagedCopyEngine(HostDevice(), *args, **settings)


if __name__ == "__main__":
    main()

"""How fast do the kernels move and digest KV on the device, and what does a launch cost the host?

The shape is Llama 3.1 8B's: 32 layers, 8 KV heads of 128, bf16, blocks of 16 tokens, chunks of 64 (8 MiB). Each launch
takes other blocks and other staging memory than the one before, so that little of it is in the L2 cache; bytes are
counted once. The yardstick is a plain copy of as many bytes within the device. All launches of a round are enqueued
while the device is kept busy, so that neither time contains the other; medians over the rounds.

    python bench/gpu_kernels.py [--json PATH] [--rehearse]     (--rehearse: tiny, on the CPU, interpreted)
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    import triton  # noqa: F401 # only our kernels are to be interpreted

    os.environ["TRITON_INTERPRET"] = "1"

import torch
from record import record, row

from cachetier.core.layout import PAGE_BYTES
from cachetier_connector.cuda.kernels import Digests, digest_pages, gather, scatter
from cachetier_connector.cuda.paged_layers import PagedLayers

SLEEP_CYCLES = 20_000_000  # about 10 ms: longer than enqueueing a round takes, or a round is taken again
OWN_LAUNCH = "gather, Triton's launch"
SPEED, COST = "gpu kernels: bytes of KV a second", "gpu kernels: host time a launch"


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    num_layers: int = 32
    num_heads: int = 8
    row: int = 256
    block_tokens: int = 16
    chunk_tokens: int = 64
    num_blocks: int = 2048
    chunk_counts: tuple[int, ...] = (1, 2, 4, 16)
    ring_chunks: int = 64
    num_launches: int = 64
    num_rounds: int = 9


TINY = Shape(2, 2, 16, 16, 64, 64, (1, 2), 4, 2, 2)


class Bench:
    """Paged caches, a ring of staging memory and the launches that go over them."""

    def __init__(self, shape: Shape, device: torch.device, is_heads_first: bool) -> None:
        self.shape, self.device, self.sleep_cycles = shape, device, SLEEP_CYCLES
        sizes = (shape.num_blocks, shape.block_tokens, shape.num_heads, shape.row)
        if is_heads_first:
            sizes = (shape.num_blocks, shape.num_heads, shape.block_tokens, shape.row)
        caches = [torch.ones(sizes, dtype=torch.bfloat16, device=device) for _ in range(shape.num_layers)]
        self.layers = PagedLayers.of(caches if is_heads_first else [cache.transpose(1, 2) for cache in caches])
        self.chunk_bytes = self.layers.shard_bytes(shape.chunk_tokens)
        self.ring = torch.ones(shape.ring_chunks, self.chunk_bytes, dtype=torch.uint8, device=device)
        self.num_pages = self.chunk_bytes // PAGE_BYTES
        self.page_bytes = torch.full((self.num_pages,), PAGE_BYTES, dtype=torch.int32, device=device)
        self.digests = torch.zeros(max(shape.chunk_counts), self.num_pages, dtype=torch.int64, device=device)
        unit_bytes = shape.chunk_tokens * self.layers.row_bytes
        self.offsets = torch.arange(0, self.chunk_bytes, unit_bytes, device=device)
        self.addresses = torch.arange(shape.ring_chunks, device=device) * self.chunk_bytes + self.ring.data_ptr()
        self.permutation = torch.randperm(shape.num_blocks, device=device)

    def turns(self, num_chunks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield blocks and addresses for one launch after the other, without end."""
        shape = self.shape
        num_blocks = num_chunks * shape.chunk_tokens // shape.block_tokens
        blocks = [part for part in self.permutation.split(num_blocks) if len(part) == num_blocks]
        places = self.addresses.split(num_chunks)
        number = 0
        while True:
            yield blocks[number % len(blocks)], places[number % len(places)]
            number += 1

    def work(self, num_chunks: int) -> dict[str, Callable[[], Any]]:
        """Return what is measured by name; each call is one launch."""
        turns, layers, chunk_tokens = self.turns(num_chunks), self.layers, self.shape.chunk_tokens
        num_tokens, digests = num_chunks * chunk_tokens, Digests(self.page_bytes, self.digests[:num_chunks])
        rings = self.ring.view(2, -1, num_chunks * self.chunk_bytes)
        numbers = iter(range(sys.maxsize))

        def run_gather() -> None:
            blocks, targets = next(turns)
            gather(layers, blocks, 0, num_chunks, chunk_tokens, targets)

        def run_scatter() -> None:
            blocks, sources = next(turns)
            scatter(layers, blocks, 0, num_tokens, 0, chunk_tokens, sources, self.offsets)

        def run_digests() -> None:
            digest_pages(next(turns)[1], digests)

        def run_scatter_and_digests() -> None:
            blocks, sources = next(turns)
            scatter(layers, blocks, 0, num_tokens, 0, chunk_tokens, sources, self.offsets, digests=digests)

        def run_gather_through_triton() -> None:
            layers.launches.clear()
            run_gather()

        def run_copy() -> None:
            number = next(numbers) % rings.shape[1]
            rings[0, number].copy_(rings[1, number])

        return {
            "gather": run_gather,
            "scatter": run_scatter,
            "digest_pages": run_digests,
            "scatter and digest": run_scatter_and_digests,
            OWN_LAUNCH: run_gather_through_triton,
            "torch copy_": run_copy,
        }

    def measure(self, launch: Callable[[], Any]) -> tuple[float, float]:
        """Return seconds of the device and of the host, a launch."""
        launch()
        rounds = [self._round(launch) for _ in range(self.shape.num_rounds)]
        device_s, host_s = (statistics.median(times) / self.shape.num_launches for times in zip(*rounds, strict=True))
        return device_s, host_s

    def _round(self, launch: Callable[[], Any]) -> tuple[float, float]:
        if self.device.type == "cpu":
            host_s = self._enqueue(launch)
            return host_s, host_s
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(self.sleep_cycles)
        start.record()
        host_s = self._enqueue(launch)
        end.record()
        was_late = start.query()
        end.synchronize()
        if was_late:
            self.sleep_cycles *= 2
            return self._round(launch)
        return start.elapsed_time(end) / 1e3, host_s

    def _enqueue(self, launch: Callable[[], Any]) -> float:
        before = time.perf_counter()
        for _ in range(self.shape.num_launches):
            launch()
        return time.perf_counter() - before


def measured(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows: speeds, then what a launch of one chunk costs (it does not depend on the chunks)."""
    speeds, costs = [], []
    for memory in ("tokens first", "heads first"):
        bench = Bench(shape, device, is_heads_first=memory == "heads first")
        for num_chunks in shape.chunk_counts:
            for name, launch in bench.work(num_chunks).items():
                if memory == "heads first" and name not in ("gather", "scatter"):
                    continue  # the same as before
                device_s, host_s = bench.measure(launch)
                gigabytes = num_chunks * bench.chunk_bytes / 1e9
                if name != OWN_LAUNCH:
                    parameters = {"chunks": num_chunks, "blocks": memory}
                    speeds.append(row(SPEED, name, round(gigabytes / device_s, 1), "GB/s", **parameters))
                if num_chunks == 1 and memory == "tokens first":
                    costs.append(row(COST, name, round(host_s * 1e6, 2), "us"))
    return speeds + costs


def main() -> None:
    """Measure, record and print."""
    parser = argparse.ArgumentParser(description="Measure the kernels on the device.")
    parser.add_argument("--json", type=Path, help="write the rows there instead of bench/results/gpu_kernels.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, interpreted; records only to --json")
    arguments = parser.parse_args()
    if not arguments.rehearse:
        device = torch.device("cuda", 0)
        rows = measured(Shape(), device)
        record("gpu_kernels", rows, path=arguments.json, gpu=torch.cuda.get_device_name(device))
    else:
        rows = measured(TINY, torch.device("cpu"))
        record("gpu_kernels", rows, path=arguments.json or Path(os.devnull), gpu="interpreter")


if __name__ == "__main__":
    main()

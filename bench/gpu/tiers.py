"""The questions to cachetier alone: its GPU tier, its disk, and what verifying every byte costs."""

import statistics
import threading
import time
from collections import defaultdict
from typing import Any, Self

from bench.gpu.contenders import Cachetier, Contender, MissError
from bench.gpu.lab import Lab
from bench.gpu.questions import LOOSE_TOKENS, asked_with_hit, counted
from bench.gpu.raw import read_rate
from bench.gpu.setting import token_bytes
from tests.e2e.harness import Server

MAX_WARM_ASKS = 5
RAW_THREADS = (4, 8, 16)
DISK_ROUNDS = 3


def ttft_gpu_tier(lab: Lab) -> None:
    """First token of a prompt in cachetier's GPU tier, beside a hit in vLLM's own prefix cache."""
    length, names = lab.setting.tier_length, ("none", "cachetier-gpu")
    part = (lab.seed(), length)
    times: dict[str, list[float]] = defaultdict(list)

    def warm_up(contender: Contender) -> None:
        contender.reset()
        contender.ask(part)
        contender.settle()
        for _ in range(MAX_WARM_ASKS):
            if contender.name == "none" or hit_in_gpu_tier(contender, part) >= length - LOOSE_TOKENS:
                return
        raise MissError(f"{contender.name}: the prompt did not get into the GPU tier")

    def ask(contender: Contender) -> None:
        if contender.name != "none":
            contender.reset()
        times[contender.name].append(1000 * asked_with_hit(contender, part)["first_token_s"])

    lab.each(warm_up, *names)
    before = {name: lab.live[name].counters() for name in names if name in lab.live}
    for _ in range(lab.setting.rounds):
        lab.each(ask, *names)
    for name, samples in times.items():
        lab.add("ttft_gpu_tier", name.removesuffix("-gpu"), samples, "ms", counted(lab, name, before), tokens=length)


def hit_in_gpu_tier(contender: Contender, part: tuple[int, int]) -> int:
    """Ask a prompt; return how many tokens of it came from the GPU tier."""
    before = contender.counters()["tokens"]["hit"].get("gpu", 0)
    contender.reset()
    contender.ask(part)
    contender.settle()
    return int(contender.counters()["tokens"]["hit"].get("gpu", 0) - before)


def checksum_cost(lab: Lab) -> None:
    """First token from host memory with every byte verified on the GPU, and without."""
    length, names = lab.setting.tier_length, ("cachetier", "cachetier-unverified")
    part = (lab.seed(), length)
    times: dict[str, list[float]] = defaultdict(list)

    def store(contender: Contender) -> None:
        contender.reset()
        contender.ask(part)
        contender.settle()

    def ask(contender: Contender) -> None:
        contender.reset()
        times[contender.name].append(1000 * asked_with_hit(contender, part)["first_token_s"])

    lab.each(store, "cachetier")
    lab.each(ask, *names)  # the first load of an engine finds pages that are not pinned yet
    times.clear()
    for _ in range(2 * lab.setting.rounds):
        lab.each(ask, *names)
    verified, unverified = (times[name] for name in names)
    lab.add("checksum_cost", "cachetier", verified, "ms", tokens=length, checksums="on")
    lab.add("checksum_cost", "cachetier", unverified, "ms", tokens=length, checksums="off")
    if verified and unverified:
        cost = 100 * (statistics.median(verified) / statistics.median(unverified) - 1)
        lab.add("checksum_cost", "cachetier", [cost], "%", tokens=length, checksums="on against off")


def disk_read(lab: Lab) -> None:
    """First token of prompts that only the disk holds, beside the prefill; and bytes a second, beside raw reads."""
    contender = lab.live.get("cachetier")
    if not isinstance(contender, Cachetier):
        return
    server, length = contender.server, lab.setting.tier_length
    parts = [(lab.seed(), length) for _ in range(DISK_ROUNDS)]
    for part in parts:
        contender.reset()
        contender.ask(part)
        contender.settle()
    server.wait_for(lambda stats: stats["chunks"] and stats["chunks_durable"] >= stats["chunks"], 60)
    segments = sorted((server.data_dir / "segments").iterdir())
    size = min(2 << 30, sum(segment.stat().st_size for segment in segments) // 4)
    raw = [max(read_rate(segments, threads, size) for threads in RAW_THREADS)]
    server.stop()
    server.start()
    num_engines = sum(isinstance(each, Cachetier) for each in lab.live.values())
    server.wait_for(lambda stats: stats["sessions"] >= 2 * num_engines, 30)
    lab.warm_up()

    times, rates, cached = defaultdict(list), [], []
    before = {"cachetier": contender.counters()}
    for part in parts:
        answer, found = asked_of_disk(contender, lab, part)
        times["cachetier"].append(1000 * answer["first_token_s"])
        cached.append(answer["cached"])
        rates += found
        if none := lab.live.get("none"):
            times["none"].append(1000 * none.ask((lab.seed(), length))["first_token_s"])
    loading = lab.live.get("cachetier-loading")
    if not rates and isinstance(loading, Cachetier):  # computing was faster than such a disk
        for part in parts:
            rates += asked_of_disk(loading, lab, part)[1]
    raw.append(max(read_rate(segments[::-1], threads, size) for threads in RAW_THREADS))
    notes = {"cached_tokens": str(cached)} | counted(lab, "cachetier", before)
    for name, samples in times.items():
        lab.add("disk_read", name, samples, "ms", notes if name == "cachetier" else None, tokens=length)
    lab.add("disk_read", "cachetier", [rate / 1e9 for rate in rates], "GB/s", measure="bandwidth")
    lab.add("disk_read", "limit", [rate / 1e9 for rate in raw], "GB/s", measure="bandwidth")


def asked_of_disk(contender: Cachetier, lab: Lab, part: tuple[int, int]) -> tuple[dict[str, Any], list[float]]:
    """Ask a prompt that only the disk holds; return the answer and `Promotions.rates` meanwhile."""
    contender.reset()
    with Promotions(contender.server, token_bytes(lab.setting.model)) as promotions:
        answer = contender.ask(part)
        contender.settle()
    return answer, promotions.rates()


class Promotions:
    """Watches a server read from its disk, on a thread of its own."""

    def __init__(self, server: Server, token_bytes: int) -> None:
        self._server, self._chunk_bytes = server, 64 * token_bytes
        self._seen: list[tuple[float, int]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._is_over.set()
        self._thread.join()

    def rates(self) -> list[float]:
        """Return bytes a second from the first to the last chunk that was read, as a list of one, or of none."""
        moving = [
            (now_s, count)
            for (now_s, count), (_, before) in zip(self._seen[1:], self._seen, strict=False)
            if count > before
        ]
        if len(moving) < 3:
            return []
        (start_s, start), (end_s, end) = moving[0], moving[-1]
        return [(end - start) * self._chunk_bytes / (end_s - start_s)]

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            count = self._server.peek()["promoted"]
            self._seen.append((time.monotonic(), count))

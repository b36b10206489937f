"""The questions to engines with the 8B model: first tokens, cold prefills, long documents, device memory."""

import random
import statistics
import time
from collections import defaultdict
from typing import Any

from bench.gpu.contenders import Contender, MissError
from bench.gpu.lab import Lab
from bench.gpu.setting import GIB, token_bytes

# Nobody holds the last few tokens: blocks have 16, chunks 64 (cachetier) or 256 (LMCache), and the last is computed.
LOOSE_TOKENS = 256
QUESTION_TOKENS, ANSWER_TOKENS = 100, 64
DOCUMENTS_AT_ONCE = 4


def ttft_host(lab: Lab) -> None:
    """First token of a prompt that host memory holds and the GPU's prefix cache has lost; `none`: has not lost."""
    for length in lab.setting.lengths:
        seed, times, cached = lab.seed(), defaultdict(list), {}

        def store(contender: Contender, part: tuple[int, int] = (seed, length)) -> None:
            contender.reset()
            contender.ask(part)
            contender.settle()

        def ask(
            contender: Contender,
            part: tuple[int, int] = (seed, length),
            times: dict[str, list[float]] = times,
            cached: dict[str, int] = cached,
        ) -> None:
            if contender.name != "none":
                contender.reset()
            answer = asked_with_hit(contender, part)
            times[contender.name].append(1000 * answer["first_token_s"])
            cached[contender.name] = answer["cached"]

        lab.each(store)
        lab.each(ask)  # the first hit finds pages, kernels and pins that are not ready yet
        times.clear()
        before = {name: contender.counters() for name, contender in lab.live.items()}
        for _ in range(lab.setting.rounds):
            lab.each(ask)
        for name, samples in times.items():
            notes = {"cached_tokens": cached[name]} | counted(lab, name, before)
            lab.add("ttft_host", name, samples, "ms", notes, tokens=length)
        add_floor(lab, length, times["none"])


def add_floor(lab: Lab, length: int, gpu_hits_ms: list[float]) -> None:
    """Add what no load can be faster than: the bytes over the bus, and a hit in the GPU's own prefix cache."""
    if gpu_hits_ms and "h2d" in lab.limits:
        copy_ms = length * token_bytes(lab.setting.model) / lab.limits["h2d"] * 1000
        notes = {"copy_ms": round(copy_ms, 1), "pinned_gb_s": round(lab.limits["h2d"] / 1e9, 2)}
        lab.add("ttft_host", "limit", [statistics.median(gpu_hits_ms) + copy_ms], "ms", notes, tokens=length)


def counted(lab: Lab, name: str, before: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return what the contender itself counted since `before`: tokens by tier, and what went wrong."""
    if name not in lab.live or not (now := lab.live[name].counters()):
        return {}
    then = before[name]
    hits = {f"hit_{tier}": count - then["tokens"]["hit"][tier] for tier, count in now["tokens"]["hit"].items()}
    return hits | {key: now[key] - then[key] for key in ("checksum_failures", "loads_failed", "stores_dropped")}


def asked_with_hit(contender: Contender, part: tuple[int, int], tries: int = 3) -> dict[str, Any]:
    """Ask a prompt that is held.

    Raises:
        MissError: it was computed instead, again and again.
    """
    for _ in range(tries):
        answer = contender.ask(part)
        if answer["cached"] >= part[1] - LOOSE_TOKENS:
            return answer
        contender.settle()
        contender.reset()
    raise MissError(f"{contender.name} found only {answer['cached']} of {part[1]} tokens")


def cold_prefill(lab: Lab) -> None:
    """First token of a prompt that nobody holds; all store it but `none`, and rounds alternate."""
    shortest = min(lab.setting.cold_lengths)
    for length in lab.setting.cold_lengths:
        times: dict[str, list[float]] = defaultdict(list)

        def ask(contender: Contender, length: int = length, times: dict[str, list[float]] = times) -> None:
            answer = contender.ask((lab.seed(), length))
            assert answer["cached"] < LOOSE_TOKENS, answer
            times[contender.name].append(1000 * answer["first_token_s"])
            if contender.name != "none":
                contender.settle()

        if length == shortest:
            lab.each(ask)
            times.clear()
        for _ in range(lab.setting.rounds * (2 if length == shortest else 1)):
            lab.each(ask)
        for name, samples in times.items():
            lab.add("cold_prefill", name, samples, "ms", tokens=length)
            pairs = list(zip(samples, times["none"], strict=False))
            if name != "none" and pairs:
                cost = [100 * (each / none - 1) for each, none in pairs]
                lab.add("cold_prefill_cost", name, cost, "%", tokens=length)


def long_documents(lab: Lab) -> None:
    """LMCache's workload: documents that do not fit on the GPU, and many questions about them at once.

    What the questions before this one left in host memory stays there, as in service; the rows say how much it was.
    """
    setting = lab.setting
    documents = [(lab.seed(), setting.document_tokens) for _ in range(setting.documents)]
    rng = random.Random(1)
    prompts = [
        {"parts": [rng.choice(documents), (lab.seed(), QUESTION_TOKENS)]} for _ in range(setting.questions)
    ]  # the same for all

    def measure(contender: Contender) -> None:
        shape = {"tokens": setting.document_tokens, "documents": setting.documents, "requests": setting.questions}
        before_notes = held_before(lab, contender)
        start_s = time.monotonic()
        read = [{"parts": [document]} for document in documents]
        contender.call("ask", prompts=read, concurrency=DOCUMENTS_AT_ONCE)
        rate = setting.documents * setting.document_tokens / (time.monotonic() - start_s)
        lab.add("long_documents", contender.name, [rate], "tokens/s", before_notes, measure="first read", **shape)
        contender.settle()
        contender.reset()
        before = {contender.name: contender.counters()}
        start_s = time.monotonic()
        answers = contender.call("ask", prompts=prompts, max_tokens=ANSWER_TOKENS, concurrency=setting.questions)
        seconds = time.monotonic() - start_s
        prompt_tokens = setting.questions * (setting.document_tokens + QUESTION_TOKENS)
        num_tokens = prompt_tokens + sum(answer["output"] for answer in answers)
        cached = sum(answer["cached"] for answer in answers) / prompt_tokens
        notes = {"cached_share": round(cached, 3)} | counted(lab, contender.name, before) | before_notes
        first_ms = sorted(1000 * answer["first_token_s"] for answer in answers)
        lab.add("long_documents", contender.name, [num_tokens / seconds], "tokens/s", notes, measure="all", **shape)
        for measure, at in (("p50 first token", 0.5), ("p99 first token", 0.99)):
            value = first_ms[min(len(first_ms) - 1, int(at * len(first_ms)))]
            lab.add("long_documents", contender.name, [value], "ms", measure=measure, **shape)
        lab.save()

    lab.each(measure)


def held_before(lab: Lab, contender: Contender) -> dict[str, float]:
    """Return how much KV a contender was given to store so far, and what its host memory holds, if it says so."""
    if contender.name == "none":
        return {}
    notes = {"offered_before_gib": contender.computed_tokens() * token_bytes(lab.setting.model) / GIB}
    if now := contender.counters():
        notes["held_before_gib"] = now["bytes"]["host"]["used"] / GIB
    return {name: round(value, 2) for name, value in notes.items()}


def device_bytes(lab: Lab) -> None:
    """GPU memory of all processes of a contender, beyond what those of `none` take; after loads and stores."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    used = {each.pid: each.usedGpuMemory or 0 for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    if not any(used.values()):
        raise RuntimeError("the driver does not say which process takes how much")
    taken: dict[str, int] = {}

    def sum_up(contender: Contender) -> None:
        taken[contender.name] = sum(used.get(pid, 0) for pid in contender.process_ids())

    lab.each(sum_up)
    for name, size in taken.items():
        notes = {"all_mib": size >> 20}
        lab.add("device_bytes", name, [(size - taken.get("none", 0)) / (1 << 20)], "MiB", notes)

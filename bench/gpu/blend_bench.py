"""One run that measures blending beside prefix caching and full prefills, on one GPU.

A prompt is 16 registered documents of 2,048 tokens in an order that nobody has asked for yet, and a question of 100
tokens. Two engines are up at the same time: one without a connector (`full-prefill`), and one with cachetier that is
asked for exact prefixes (`prefix-only`), and to blend with the selectors `link` and `query`. KV of documents is in host
memory, the GPU's own prefix cache is emptied before each prompt. Results go to bench/results/blend.json. About three
minutes on an H200:

    python -m bench.gpu.blend_bench
    python -m bench.gpu.blend_bench --rehearse       on the CPU with a tiny model: does it run?
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu.contenders import Cachetier, Contender, start_server
from bench.gpu.lab import Lab, hardware_name, timed
from bench.gpu.raw import make_room_in_shared_memory
from bench.gpu.setting import GIB, Setting, kv_memory, rehearsal
from bench.record import RESULTS_DIR

QUESTION_TOKENS, ANSWER_TOKENS = 100, 64
KV_TOKENS = 300_000  # nine prompts at a time
# Which engine answers for whom, and what it is asked for.
WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "cachetier-link": ("cachetier", {"blend": True, "select": "link", "store": False}),
    "cachetier-query": ("cachetier", {"blend": True, "select": "query", "budget": 0.15, "store": False}),
    "prefix-only": ("cachetier", {"store": False}),
    "full-prefill": ("none", None),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """How much is asked: documents a prompt, their tokens, and prompts at the same time."""

    documents: int = 16
    document_tokens: int = 2048
    requests: int = 32

    @property
    def tokens(self) -> int:
        """Tokens of a prompt that stand in documents."""
        return self.documents * self.document_tokens


class Blends:
    """Documents, and prompts made of them."""

    def __init__(self, lab: Lab, shape: Shape) -> None:
        self._lab, self._shape = lab, shape
        self._documents = [(lab.seed(), shape.document_tokens) for _ in range(shape.documents)]

    def register(self) -> None:
        """Have the documents computed alone, stored and registered."""
        engine = self._lab.live["cachetier"]
        for number, part in enumerate(self._documents):
            engine.ask(part, cachetier={"document": f"document {number}"})
        engine.settle()

    def prompt(self) -> list[tuple[int, int]]:
        """Return the parts of a prompt that nobody has asked: another order and another question."""
        order = self._lab.random.sample(self._documents, len(self._documents))
        return [*order, (self._lab.seed(), QUESTION_TOKENS)]

    def ttft(self) -> None:
        """First token of one prompt at a time; every way is asked the same ones."""
        times: dict[str, list[float]] = defaultdict(list)
        cached: dict[str, int] = {}
        for number in range(self._lab.setting.rounds + 1):  # the first finds kernels that are not ready yet
            prompt = self.prompt()

            def ask(way: str, prompt: list[tuple[int, int]] = prompt) -> None:
                answer = self._ask(way, [prompt])[0]
                times[way].append(1000 * answer["first_token_s"])
                cached[way] = answer["cached"]

            self._each_way(ask)
            if not number:
                times.clear()
        for way, samples in times.items():
            self._lab.add("ttft_blend", way, samples, "ms", {"cached_tokens": cached[way]}, tokens=self._shape.tokens)
        for way in set(times) - {"full-prefill"}:
            shares = [100 * each / full for each, full in zip(times[way], times["full-prefill"], strict=True)]
            self._lab.add("ttft_blend", way, shares, "% of full", tokens=self._shape.tokens, measure="share")

    def throughput(self) -> None:
        """Many prompts at once."""
        prompts = [self.prompt() for _ in range(self._shape.requests)]

        def ask(way: str) -> None:
            start_s = time.monotonic()
            answers = self._ask(way, prompts, ANSWER_TOKENS)
            seconds = time.monotonic() - start_s
            prompt_tokens = len(prompts) * (self._shape.tokens + QUESTION_TOKENS)
            num_tokens = prompt_tokens + sum(answer["output"] for answer in answers)
            notes = {"cached_share": round(sum(answer["cached"] for answer in answers) / prompt_tokens, 3)}
            shape = {"tokens": self._shape.tokens, "requests": len(prompts)}
            self._lab.add("throughput_blend", way, [num_tokens / seconds], "tokens/s", notes, **shape)
            firsts = sorted(1000 * answer["first_token_s"] for answer in answers)
            self._lab.add("throughput_blend", way, [firsts[len(firsts) // 2]], "ms", measure="p50 first token", **shape)

        self._each_way(ask)

    def _each_way(self, do: Callable[[str], None]) -> None:
        for way in self._lab.random.sample(list(WAYS), len(WAYS)):
            do(way)

    def _ask(self, way: str, prompts: list[Any], max_tokens: int = 1) -> list[dict[str, Any]]:
        name, params = WAYS[way]
        engine = self._lab.live[name]
        engine.reset()
        asked = [{"parts": prompt, "params": {"cachetier": params} if params else None} for prompt in prompts]
        before = engine.counters()
        answers = engine.call("ask", prompts=asked, max_tokens=max_tokens, concurrency=len(asked))
        if params and params.get("blend"):
            engine.settle()
            wanted = before["requests"]["blended"] + len(prompts)  # told after the answers
            engine.server.wait_for(lambda stats: stats["requests"]["blended"] >= wanted)
        return answers


def main() -> int:
    """Measure; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "blend.json")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--compile", action="store_true", help="with torch.compile and CUDA graphs")
    parser.add_argument("--logs", type=Path, help="folder that gets the ends of all logs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cachetier-bench-") as name:
        folder, shape = Path(name), Shape()
        setting = Setting(folder=folder, is_eager=not options.compile, host_bytes=12 * GIB, lengths=(shape.tokens,))
        if options.rehearse:
            setting, shape = rehearsal(folder), Shape(documents=4, document_tokens=200, requests=4)
        else:
            make_room_in_shared_memory(2 * setting.host_bytes)
        lab = Lab(setting, options.out, hardware_name(), "bench.gpu.blend_bench")
        run(lab, shape)
        lab.save()
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
            for log in folder.rglob("*.log"):
                (options.logs / log.name).write_bytes(log.read_bytes()[-200_000:])
        print(lab.table(), flush=True)
    return 1 if lab.errors else 0


def run(lab: Lab, shape: Shape) -> None:
    """Start both engines and ask both questions; what fails is noted."""
    setting = lab.setting
    more = {} if setting.is_rehearsal else kv_memory(setting.model, KV_TOKENS) | {"gpu_memory_utilization": 0.45}
    server = start_server(setting, "blend", 0)
    try:
        began_s = time.monotonic()
        engines = [
            Contender("none", setting, None, **more),
            Cachetier(setting, server, extra={"blend": "request", "blend_guard": 0.0}, **more),
        ]
        for batch in [[each] for each in engines] if setting.is_rehearsal else [engines]:
            with ThreadPoolExecutor() as pool:
                list(pool.map(started, batch))
        lab.live = {each.name: each for each in engines}
        timed("starting", began_s)
        lab.warm_up()
        blends = Blends(lab, shape)
        blends.register()
        for question in (blends.ttft, blends.throughput):
            began_s = time.monotonic()
            question()
            lab.save()
            timed(question.__name__, began_s)
    except Exception as error:
        lab.note(f"{type(error).__name__}: {error}")
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Contender.stop, lab.live.values()))
        server.kill()
        server.clear()


def started(contender: Contender) -> None:
    """Start a contender, and wait until it is ready."""
    contender.start()
    contender.wait_until_ready()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    sys.exit(main())

"""How soon does a consumer answer a prompt that a producer computes? Time to first token, by kind of hand-over.

Two real vLLM engines on the CPU, a producer and a consumer, each on a core of its own, and a server between them. In
every round, in random order, each with a new prompt: the producer alone (`prefill`), the producer and, when it has
ended, the consumer (`one after the other`), and both at once, the consumer told who computes the prompt (`streaming`).
Counted from the moment when the first engine gets the prompt until the first token is there; medians over the rounds.
Hits are proven by counters.

    python bench/handover.py
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from prefill import CHUNK_TOKENS, LARGER, fresh
from record import record, row

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.e2e.harness import PATIENT, Engine, Server, running  # noqa: E402

PRODUCER = "producer"
STEP_TOKENS = 512
STREAMING = {"cachetier": {"prefill": PRODUCER}}


def main() -> None:
    """Measure and record the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cachetier-bench-") as name:
        (Path(name) / "config.json").write_text(json.dumps(LARGER))
        times = measure(Path(name), options.tokens, options.rounds)
    parameters = {
        "tokens": options.tokens, "step_tokens": STEP_TOKENS, "model": "0.15G parameters, 24 KiB a token",
        "rounds": options.rounds,
    }  # fmt: skip
    medians_s = {kind: statistics.median(values) for kind, values in times.items()}
    record(
        "handover",
        [
            row("ttft_handover", kind, round(1000 * value_s, 1), "ms", **parameters)
            for kind, value_s in medians_s.items()
        ],
    )


class Hands:
    """A producer, a consumer and their server."""

    def __init__(self, folder: Path) -> None:
        self.server = Server(folder, host="2GiB", disk="4GiB")
        self.parts: list[Engine | Server] = [self.server]
        self.producer = self._start(folder, PRODUCER, max_num_batched_tokens=STEP_TOKENS)
        self.consumer = self._start(folder, "consumer")

    def _start(self, folder: Path, name: str, **arguments: object) -> Engine:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(len(self.parts) - 1)
        engine = Engine(
            folder / f"{name}.log",
            {"server": f"unix:{self.server.socket}", "name": name, "wait_deadline_ms": 60_000} | PATIENT,
            kv_role=f"kv_{name}",
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            **arguments,
        )
        self.parts.append(engine)
        return engine

    def seconds(self, kind: str, tokens: list[int]) -> float:
        """Return how long it takes to the first token."""
        start_s = time.monotonic()
        begin(self.producer, tokens)
        if kind == "streaming":
            begin(self.consumer, tokens, STREAMING)
        else:
            self.producer.finish()
            if kind == "one after the other":
                begin(self.consumer, tokens)
        if kind != "prefill":
            [answer] = self.consumer.finish()
            assert answer["cached"] == len(tokens) // CHUNK_TOKENS * CHUNK_TOKENS or kind != "streaming", answer[
                "cached"
            ]
        seconds = time.monotonic() - start_s
        if kind == "streaming":
            self.producer.finish()
        self.server.wait_for(lambda stats: stats["leases"] == stats["chunks_pending"] == 0)
        return seconds


def begin(engine: Engine, tokens: list[int], params: dict[str, object] | None = None) -> None:
    """Have an engine begin to make one token."""
    prompt = {"id": f"r{random.getrandbits(48):x}", "tokens": tokens, "params": params}
    engine.start("generate", prompts=[prompt], max_tokens=1)


def measure(folder: Path, num_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return the times to the first token, in seconds, by kind."""
    hands, rng = Hands(folder), random.Random(0)
    times: dict[str, list[float]] = defaultdict(list)
    kinds = ["prefill", "one after the other", "streaming"]
    with running(*hands.parts):
        for kind in kinds:  # shapes seen for the first time are slow for other reasons
            hands.seconds(kind, fresh(rng, num_tokens))
        for _ in range(rounds):
            for kind in rng.sample(kinds, len(kinds)):
                times[kind].append(hands.seconds(kind, fresh(rng, num_tokens)))
        stats = hands.server.stats()
        assert stats["tokens"]["waited"] >= rounds * (num_tokens - 2 * CHUNK_TOKENS)
        assert stats["loads_failed"] == 0
    return {kind: times[kind] for kind in kinds}


if __name__ == "__main__":
    main()

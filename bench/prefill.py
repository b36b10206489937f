"""What does the tier cost a prefill, and what does a hit save? On the CPU engine, time to first token.

One real vLLM engine with the connector and one server. In every round, for every prompt length, in random order: a new
prompt with the cache switched off for the request (`none`), another new one that is stored (`cachetier`, question
`cold_prefill`), that one again after vLLM's own prefix cache was emptied (`cachetier`, question `ttft_hit`), and once
more from vLLM's own prefix cache (`vllm-native`). Medians over the rounds; hits are proven by counters.

    python bench/prefill.py
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from record import record, row

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.e2e.harness import Engine, Server, running  # noqa: E402

CHUNK_TOKENS = 64
# 0.15 G parameters, 24 KiB of KV a token: what a hit saves depends on how much is computed for each byte kept.
LARGER = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OFF = {"cachetier": {"load": False, "store": False}}
Times = dict[tuple[str, int], list[float]]


def main() -> None:
    """Measure both models and record the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="cachetier-bench-") as name:
        folder = Path(name)
        (folder / "larger").mkdir()
        (folder / "larger" / "config.json").write_text(json.dumps(LARGER))
        dummy = {"model": str(folder / "larger"), "load_format": "dummy", "skip_tokenizer_init": True}
        for model, arguments, lengths in (
            ("3M parameters, 2 KiB a token", {}, [512, 2048, 3584]),
            ("0.15G parameters, 24 KiB a token", dummy, [512, 2048]),
        ):
            work = folder / model[:2].strip()
            work.mkdir()
            times = measure(work, arguments, lengths, options.rounds)
            rows += list(rows_of(times, model))
    record("prefill", rows)


def measure(folder: Path, arguments: dict[str, object], lengths: list[int], rounds: int) -> Times:
    """Return the first-token times, in seconds, by contender and prompt length."""
    server = Server(folder, host="2GiB", disk="4GiB")
    engine = Engine(folder / "engine.log", {"server": f"unix:{server.socket}"}, **arguments)
    rng, times = random.Random(0), defaultdict(list)
    with running(server, engine):
        for length in [*lengths, *lengths]:  # shapes seen for the first time are slow for other reasons
            ask(engine, fresh(rng, length), None)
        for _ in range(rounds):
            for length in rng.sample(lengths, len(lengths)):
                turns = ["none", "cachetier"]
                rng.shuffle(turns)
                for turn in turns:
                    prompt = fresh(rng, length)
                    if turn == "none":
                        times["none", length].append(ask(engine, prompt, OFF)["first_token_s"])
                        continue
                    times["cold", length].append(ask(engine, prompt, None)["first_token_s"])
                    server.wait_for(lambda stats: stats["chunks_pending"] == 0)
                    engine.reset()
                    hit = ask(engine, prompt, None)
                    assert hit["cached"] == min(length // CHUNK_TOKENS * CHUNK_TOKENS, length - 1), hit["cached"]
                    times["host", length].append(hit["first_token_s"])
                    native = ask(engine, prompt, None)
                    assert native["cached"] > length - 130
                    times["native", length].append(native["first_token_s"])
        stats = server.stats()
        assert stats["tokens"]["hit"]["host"] >= rounds * sum(lengths) - rounds * len(lengths)
        assert stats["stores_dropped"] == 0
        engine.stop()
    return times


def fresh(rng: random.Random, length: int) -> list[int]:
    """Return a prompt that nobody has seen."""
    return [rng.randrange(20, 4000) for _ in range(length)]


def ask(engine: Engine, tokens: list[int], params: dict[str, object] | None) -> dict[str, float]:
    """Ask for one token."""
    prompt = {"id": f"r{random.getrandbits(48):x}", "tokens": tokens, "params": params}
    return engine.generate([prompt], max_tokens=1)[0]


def rows_of(times: Times, model: str) -> Iterator[dict[str, object]]:
    """Return the medians and the cost of storing."""
    names = {"none": "none", "cold": "cachetier", "host": "cachetier", "native": "vllm-native"}
    for (kind, length), values in sorted(times.items(), key=lambda item: item[0][1]):
        question = "cold_prefill" if kind in ("none", "cold") else "ttft_hit"
        median_ms = round(1000 * statistics.median(values), 2)
        yield row(question, names[kind], median_ms, "ms", tokens=length, model=model, rounds=len(values))
    for length in sorted({length for _, length in times}):
        ratio = statistics.median(
            cold / none for cold, none in zip(times["cold", length], times["none", length], strict=True)
        )
        yield row("cold_prefill_ratio", "cachetier", round(ratio, 4), "x", tokens=length, model=model)


if __name__ == "__main__":
    main()

"""What it takes to show that a hit gives the plain engine's answer and the stored KV, on whichever device."""

from pathlib import Path

import numpy as np

from tests.e2e.harness import (
    PATIENT,
    Engine,
    Server,
    as_float,
    assert_same_answers,
    dumped_kv,
    logprob_distance,
    prompts_with_shared_prefixes,
    running,
)
from tests.e2e.stand import CHUNK

PROMPTS = prompts_with_shared_prefixes(24)
BF16_ROW_BYTES = 128


def loadable(prompt: dict) -> int:
    """Return how many tokens of a prompt can come from the tier when all of it was stored."""
    return min(len(prompt["tokens"]) // CHUNK * CHUNK, len(prompt["tokens"]) - 1)


def hit(stats: dict, tier: str) -> int:
    return stats["tokens"]["hit"][tier]


def kv_of_all(folder: Path, suffix: str, row_bytes: int) -> dict[str, np.ndarray]:
    return {p["id"]: dumped_kv(folder, p["id"] + suffix, row=row_bytes) for p in PROMPTS if len(p["tokens"]) >= 32}


def plain_answers(log: Path, noise_min: float = 0.02, **arguments) -> tuple[list[dict], float]:
    """Return the plain engine's answers, and the noise between its own prefill and its own prefix-cache hits."""
    engine = Engine(log, **arguments)
    with running(engine):
        warm_up = [{"id": "w", "tokens": list(range(50, 90))}]
        engine.generate(warm_up)
        cold = []
        for prompt in PROMPTS:
            engine.reset()
            cold += engine.generate([prompt])
        engine.reset()
        engine.generate([dict(prompt, id=prompt["id"] + "x") for prompt in PROMPTS])
        warm = engine.generate([dict(prompt, id=prompt["id"] + "y") for prompt in PROMPTS])
        assert sum(answer["cached"] for answer in warm) > sum(len(p["tokens"]) for p in PROMPTS) / 2
        engine.stop()
    return cold, max(logprob_distance(warm, cold), noise_min)


def assert_hits(answers: list[dict], before: dict, after: dict, tier: str) -> None:
    """Every prompt was loaded as far as it can be, and from `tier`."""
    assert [answer["cached"] for answer in answers] == [loadable(prompt) for prompt in PROMPTS]
    assert hit(after, tier) - hit(before, tier) == sum(loadable(prompt) for prompt in PROMPTS)


def ask(engine: Engine, suffix: str) -> list[dict]:
    """Ask everything, each prompt with an empty prefix cache of vLLM's own."""
    answers = []
    for prompt in PROMPTS:
        engine.reset()
        answers += engine.generate([dict(prompt, id=prompt["id"] + suffix)])
    return answers


def kv_equal(found: dict[str, np.ndarray], stored: dict[str, np.ndarray]) -> None:
    """Loaded tokens have the stored bytes; those computed after them agree within bf16 rounding."""
    for prompt in PROMPTS:
        name, end = prompt["id"], loadable(prompt)
        if name in stored:
            assert np.array_equal(found[name][:end], stored[name][:end]), f"{name}: not the stored KV"
            if found[name].shape[-1] * 2 != BF16_ROW_BYTES:
                continue
            prompt_end = len(prompt["tokens"]) // 16 * 16
            rest, plain_rest = as_float(found[name][end:prompt_end]), as_float(stored[name][end:prompt_end])
            assert np.allclose(rest, plain_rest, rtol=0.05, atol=0.1)


def assert_same_from_everywhere(
    tmp_path: Path, plain: tuple[list[dict], float], row_bytes: int = BF16_ROW_BYTES, **arguments
) -> None:
    """Store all prompts, and ask them again from memory, from disk after a restart, and after a kill of both sides.

    Args:
        tmp_path: an empty folder.
        plain: from `plain_answers`.
        row_bytes: K and V of one token, head and layer.
        arguments: for the engine, those that the plain one was given.
    """
    expected, noise = plain
    connector = {"server": f"unix:{tmp_path / 'server.sock'}"} | PATIENT
    dumps = tmp_path / "kv"
    dumps.mkdir()
    server = Server(tmp_path)
    engine = Engine(tmp_path / "engine.log", connector, probe_dir=dumps, **arguments)
    with running(server, engine):
        engine.generate([{"id": "warm", "tokens": list(range(50, 90))}])

        # Cold: nothing is held but what earlier prompts with the same prefix stored.
        cold = [answer for prompt in PROMPTS for answer in fresh(engine, server, prompt)]
        assert_same_answers(cold, expected, noise)
        stored_stats = server.wait_until_durable()
        assert stored_stats["tokens"]["stored"] >= len({tuple(p["tokens"][:CHUNK]) for p in PROMPTS}) * CHUNK

        kv = kv_of_all(dumps, "cold", row_bytes)
        from_host = ask(engine, "host")
        after = server.wait_for(lambda stats: stats["leases"] == 0)
        assert_same_answers(from_host, expected, noise)
        assert_hits(from_host, stored_stats, after, "host")
        kv_equal(kv_of_all(dumps, "host", row_bytes), kv)

        # The server restarts: the same engine finds it again and hits on disk.
        server.stop()
        server.start()
        wait_until_connected(engine, server)
        before = server.stats()
        assert hit(before, "disk") == 0
        from_disk = ask(engine, "disk")
        after = server.wait_for(lambda stats: stats["leases"] == 0)
        assert_same_answers(from_disk, expected, noise)
        assert hit(after, "disk") > 0
        assert [answer["cached"] for answer in from_disk] == [loadable(prompt) for prompt in PROMPTS]
        kv_equal(kv_of_all(dumps, "disk", row_bytes), kv)

        # Both are killed; new ones find it all on disk.
        engine.kill()
        server.kill()
    server.start()
    engine = Engine(tmp_path / "engine2.log", connector, probe_dir=dumps, **arguments)
    with running(server, engine):
        engine.generate([{"id": "warm", "tokens": list(range(50, 90))}])
        after_kill = ask(engine, "kill")
        after = server.wait_for(lambda stats: stats["leases"] == 0)
        assert_same_answers(after_kill, expected, noise)
        assert hit(after, "disk") > 0
        assert [answer["cached"] for answer in after_kill] == [loadable(prompt) for prompt in PROMPTS]
        kv_equal(kv_of_all(dumps, "kill", row_bytes), kv)
        assert after["checksum_failures"] == after["loads_failed"] == after["leases"] == 0
        engine.stop()


def fresh(engine: Engine, server: Server, prompt: dict) -> list[dict]:
    engine.reset()
    answer = engine.generate([dict(prompt, id=prompt["id"] + "cold")])
    server.wait_for(lambda stats: stats["chunks_pending"] == 0)
    return answer


def wait_until_connected(engine: Engine, server: Server) -> None:
    """The engine's scheduler and its worker probe once a second, while it steps or not."""
    server.wait_for(lambda stats: stats["sessions"] >= 2)

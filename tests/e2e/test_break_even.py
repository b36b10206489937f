"""A slow disk makes hits smaller, not requests slower; when it is fast again, hits grow again. With a real engine."""

import random
import statistics
import time
from pathlib import Path

import pytest

from tests.e2e.harness import Engine, Server, assert_same_answers, running
from tests.e2e.traffic import NOISE_MIN, WITHOUT_CACHE, ask, hit_tokens, loadable

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NUM_MEASURED = 5
NUM_LATER = 12
SLOW_BYTES_PER_S = 250_000  # 7 MB of KV in 28 s; computing takes a second at most
SLOWER_MAX = 1.25


def prompts(count: int) -> list[dict]:
    rng = random.Random(5)
    return [{"tokens": [rng.randrange(20, 4000) for _ in range(3500)]} for _ in range(count)]


class Disk:
    """How fast the server's disk is."""

    def __init__(self, folder: Path) -> None:
        self.limit_file = folder / "disk_bytes_per_s"
        self.limit(0)

    def limit(self, bytes_per_s: int) -> None:
        """Let it give so much, 0: as much as it can."""
        new = self.limit_file.with_suffix(".new")
        new.write_text(str(bytes_per_s))
        new.rename(self.limit_file)


def ask_timed(engine: Engine, prompt: dict, **more) -> tuple[dict, float]:
    [answer] = ask(engine, [prompt], **more)
    return answer, answer["first_token_s"]


def restart(server: Server) -> None:
    """Empty its memory."""
    server.wait_until_durable()
    server.stop()
    server.start()
    server.wait_for(lambda stats: stats["sessions"] >= 2)


def test_a_slow_disk_makes_hits_smaller_and_not_requests_slower_until_it_is_fast_again(tmp_path):
    first, *others = prompts(1 + NUM_MEASURED + NUM_LATER)
    measured, later = others[:NUM_MEASURED], others[NUM_MEASURED:]
    disk = Disk(tmp_path)
    server = Server(tmp_path, program=("tests.e2e.slow_server", str(disk.limit_file)))
    with running(server):
        engine = Engine(tmp_path / "engine.log", {"server": f"unix:{server.socket}"})
        with running(engine):
            for prompt in [first, *others]:
                ask(engine, [prompt])
            restart(server)
            disk.limit(SLOW_BYTES_PER_S)
            ask(engine, [first])  # nobody knows yet how slow the disk is; this load gives up what does not come in time
            assert_hits_shrink(engine, server, measured)
            disk.limit(0)
            assert_hits_grow(engine, server, later)


def assert_hits_shrink(engine: Engine, server: Server, measured: list[dict]) -> None:
    before = server.wait_for(lambda stats: stats["leases"] == 0)
    plain_s, cached_s = [], []
    for prompt in measured:
        plain, seconds = ask_timed(engine, prompt, params=WITHOUT_CACHE)
        plain_s.append(seconds)
        answer, seconds = ask_timed(engine, prompt)
        cached_s.append(seconds)
        assert_same_answers([answer], [plain], NOISE_MIN)
        assert answer["cached"] < loadable(prompt) / 2
    after = server.wait_for(lambda stats: stats["leases"] == 0)
    assert after["hits_cut"] - before["hits_cut"] == len(measured)
    held = sum(loadable(prompt) for prompt in measured)
    assert after["tokens_cut"] - before["tokens_cut"] + hit_tokens(after) - hit_tokens(before) == pytest.approx(
        held, 0.01
    )
    assert after["loads_failed"] == before["loads_failed"], "a cut hit is no failed load"
    assert after["tokens"]["stored"] == before["tokens"]["stored"], "what was cut is held and not stored again"
    # Before the first read has ended, the estimate is what it would be if it ended now: it falls with time.
    server.wait_for(lambda stats: stats["disk_bytes_per_s"] < 4 * SLOW_BYTES_PER_S, timeout_s=60)
    assert after["tokens_per_s"]["prefill"] > 1000
    assert statistics.median(cached_s) <= SLOWER_MAX * statistics.median(plain_s), f"{cached_s} against {plain_s}"


def assert_hits_grow(engine: Engine, server: Server, later: list[dict]) -> None:
    """Each prompt is on disk alone, none was asked for since it became slow."""
    for prompt in later:
        answer, _ = ask_timed(engine, prompt)
        if answer["cached"] == loadable(prompt):
            return
        time.sleep(1)
    raise AssertionError(f"the disk is as fast as ever and nobody uses it: {server.peek()}")

"""How much of the engine's scheduler thread does a request cost? Processor time in the scheduler half, per request.

The real scheduler half and a real server; vLLM's own scheduler is replaced by the calls that it makes for a request,
in its order: a prompt of 512 chunks that is held (matched, planned as a load, loaded, ended), and one of 512 chunks
that is not (matched, computed in steps of 2,048 tokens, stored, ended). Counts the processor time of the calling
thread, and beside it what that thread would see on a clock. Waiting for the reply is not in it: vLLM serves other
requests meanwhile.

    python bench/scheduler_thread.py
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from match import IDENTITY, LAYOUT, Prober
from record import record, row

from cachetier.core.config import ConnectorConfig
from cachetier_connector.facts import EngineFacts
from cachetier_connector.plan import tokens_to_bytes
from cachetier_connector.scheduler_half import SchedulerHalf

NUM_CHUNKS, CHUNK_TOKENS, BLOCK_TOKENS, STEP_TOKENS = 512, 64, 16, 2048
STEP_S = 0.005


class Meter:
    """Adds up what calls cost this thread."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` and count it."""
        cpu, wall = time.thread_time(), time.perf_counter()
        result = function(*arguments)
        self.cpu_s += time.thread_time() - cpu
        self.wall_s += time.perf_counter() - wall
        return result


def request_of(tokens: list[int]) -> Any:
    """Return what the scheduler half reads of vLLM's Request."""
    return SimpleNamespace(
        request_id=f"r{random.getrandbits(40):x}",
        prompt_token_ids=tokens,
        all_token_ids=tokens,
        output_token_ids=[],
        num_tokens=len(tokens),
        kv_transfer_params=None,
        sampling_params=None,
        lora_request=None,
        cache_salt=None,
        mm_features=[],
    )


def output_of(request: Any, start: int, count: int, blocks: list[int]) -> Any:
    """Return a scheduler output in which one request is scheduled."""
    new = SimpleNamespace(req_id=request.request_id, block_ids=(blocks,), num_computed_tokens=start)
    cached = SimpleNamespace(
        req_ids=[] if not start else [request.request_id],
        new_block_ids=[] if not start else [None],
        num_computed_tokens=[] if not start else [start],
        resumed_req_ids=set(),
    )
    return SimpleNamespace(
        num_scheduled_tokens={request.request_id: count},
        preempted_req_ids=set(),
        scheduled_new_reqs=[] if start else [new],
        scheduled_cached_reqs=cached,
    )


def wait_for_match(half: SchedulerHalf, request: Any, meter: Meter) -> tuple[int | None, bool]:
    """Ask for the match once a step, as vLLM does while other requests run."""
    while (found := meter(half.get_num_new_matched_tokens, request, 0)) == (None, False):
        time.sleep(STEP_S)
    return found


def serve_held(half: SchedulerHalf, tokens: list[int]) -> Meter:
    """Take a held prompt through the scheduler half."""
    meter, request = Meter(), request_of(tokens)
    meter(half.on_new_request, request)
    found = wait_for_match(half, request, meter)
    assert found == (len(tokens) - 1, True), found
    blocks = list(range(len(tokens) // BLOCK_TOKENS))
    meter(half.update_state_after_alloc, request, blocks, found[0])
    idle = SimpleNamespace(
        num_scheduled_tokens={},
        preempted_req_ids=set(),
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[]),
    )
    assert meter(half.build_plan, idle).loads
    meter(half.update_from_workers, [request.request_id], set())
    meter(half.build_plan, output_of(request, len(tokens) - 1, 1, blocks))
    meter(half.request_finished, request)
    return meter


def serve_new(half: SchedulerHalf, tokens: list[int]) -> Meter:
    """Take a prompt that is not held through the scheduler half."""
    meter, request = Meter(), request_of(tokens)
    meter(half.on_new_request, request)
    found = wait_for_match(half, request, meter)
    assert found == (0, False), found
    blocks = list(range(len(tokens) // BLOCK_TOKENS))
    meter(half.update_state_after_alloc, request, blocks, 0)
    stored = 0
    for start in range(0, len(tokens), STEP_TOKENS):
        plan = meter(half.build_plan, output_of(request, start, STEP_TOKENS, blocks))
        stored += sum(len(store.tokens) // 4 // CHUNK_TOKENS for store in plan.stores_after)
    assert stored == NUM_CHUNKS
    meter(half.request_finished, request)
    return meter


def main() -> None:
    """Measure both kinds of request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="requests of each kind (default 200)")
    repeats = parser.parse_args().repeats
    rng, rows = random.Random(0), []
    with tempfile.TemporaryDirectory(prefix="cachetier-bench-") as folder:
        command = [sys.executable, "-m", "cachetier.cli.main", "serve", "--data-dir", f"{folder}/data"]
        with subprocess.Popen([*command, "--host-bytes", "64MiB"], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline(), "the server did not start"
            socket_path = f"{folder}/data/cachetier.sock"
            try:
                held = [rng.randrange(128_000) for _ in range(NUM_CHUNKS * CHUNK_TOKENS)]
                Prober(socket_path).store(tokens_to_bytes(held))
                facts = EngineFacts(
                    engine="bench",
                    config=ConnectorConfig(server=f"unix:{socket_path}", match_deadline_ms=5000),
                    loads=True,
                    stores=True,
                    block_tokens=BLOCK_TOKENS,
                    layout=LAYOUT,
                    tiling=[LAYOUT.whole()],
                    device="cpu",
                    num_workers=1,
                    pass_tokens_max=16_384,
                    pass_runs_max=256,
                    blend_refusal="",
                )
                half = SchedulerHalf(facts, IDENTITY, lambda: socket_path)
                hits = [serve_held(half, held) for _ in range(repeats)]
                misses = [serve_new(half, [rng.randrange(128_000) for _ in held]) for _ in range(repeats)]
                half.stop()
            finally:
                server.terminate()
    for kind, meters in (("held", hits), ("not held", misses)):
        for clock in ("cpu", "wall"):
            median = statistics.median(getattr(meter, f"{clock}_s") for meter in meters)
            parameters = {"chunks": NUM_CHUNKS, "prompt": kind, "clock": clock, "requests": repeats}
            rows.append(row("scheduler_thread", "cachetier", round(median * 1e6, 1), "us", **parameters))
    record("scheduler_thread", rows)


if __name__ == "__main__":
    main()

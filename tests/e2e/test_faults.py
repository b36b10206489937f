"""A server that stops, dies, runs out of disk or hands out flipped bits costs a real engine time, and nothing else."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachetier.client import Client
from cachetier.core.errors import UnavailableError
from tests.e2e.harm import SharedArena, flip_bits_on_disk, no_file_grows
from tests.e2e.harness import Engine, Server, assert_same_answers, running
from tests.e2e.traffic import (
    NOISE_MIN,
    WITHOUT_CACHE,
    Traffic,
    ask,
    assert_hits_come_back,
    hit_tokens,
    loadable,
    prompts_in_pairs,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

PACED = "tests.e2e.paced_connector.PacedConnector"
PACED_STEP_S = 0.03


class Bench:
    """The module's engine, which outlives the servers that the tests start at its socket."""

    def __init__(
        self, folder: Path, noise: float = NOISE_MIN, verified: tuple[str, str] = ("object", "digests"), **arguments
    ) -> None:
        """Start nothing yet.

        Args:
            folder: for the socket and the log.
            noise: how far the engine's answers to one prompt may differ.
            verified: parts of a frame of which a load notices every flipped bit.
            arguments: vLLM's.
        """
        self.socket, self.noise, self.verified = folder / "server.sock", noise, verified
        self._log, self._arguments = folder / "engine.log", arguments
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine; a new one if a test has killed it."""
        if self._engine is None or self._engine.process.poll() is not None:
            self._engine = Engine(self._log, {"server": f"unix:{self.socket}"}, **self._arguments)
            self._engine.generate([{"id": "warm", "tokens": list(range(50, 90)), "params": WITHOUT_CACHE}])
        return self._engine

    def start_server(self, folder: Path, *options: str, **sizes: str) -> Server:
        """Start a server with data of its own and wait until the engine's scheduler and worker have found it."""
        server = Server(folder, *options, socket=self.socket, **sizes)
        self.wait_until_connected(server)
        return server

    def wait_until_connected(self, server: Server) -> None:
        """The engine looks for a server once a second."""
        assert self.engine
        server.wait_for(lambda stats: stats["sessions"] >= 2)

    def forget_calls(self) -> None:
        """Kill the engine if it owes a reply: the next test would take it for its own."""
        if self._engine is not None and self._engine.is_busy:
            self._engine.kill()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.kill()


@pytest.fixture(scope="module")
def bench_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("engine"), connector_class=PACED)
    yield bench
    bench.close()


@pytest.fixture
def bench(bench_of_all: Bench) -> Iterator[Bench]:
    yield bench_of_all
    bench_of_all.forget_calls()


def wait_for_lease(server: Server) -> None:
    """Return in the middle of a load, if there is one to be caught."""
    server.wait_for(lambda stats: stats["leases"], timeout_s=20)


def test_a_server_that_is_stopped_for_ten_seconds_keeps_nobody_waiting(bench, tmp_path):
    pairs = prompts_in_pairs(4, seed=1)
    server = bench.start_server(tmp_path)
    with running(server):
        with Traffic(bench.engine, pairs) as traffic:
            wait_for_lease(server)
            start = time.monotonic()
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(10)
            server.process.send_signal(signal.SIGCONT)
            end = time.monotonic()
        assert traffic.num_asked_between(start, end) >= 8
        traffic.assert_all_is_well()
        assert_hits_come_back(server, traffic)


def test_a_server_that_is_killed_keeps_nobody_waiting_and_is_used_again_when_it_is_back(bench, tmp_path):
    pairs = prompts_in_pairs(4, seed=2)
    server = bench.start_server(tmp_path)
    with running(server):
        with Traffic(bench.engine, pairs) as traffic:
            wait_for_lease(server)
            server.wait_until_durable()
            wait_for_lease(server)
            server.kill()
            start = time.monotonic()
            time.sleep(4)
            end = time.monotonic()
            server.start()
            bench.wait_until_connected(server)
        assert traffic.num_asked_between(start, end) >= 4
        traffic.assert_all_is_well()
        assert_hits_come_back(server, traffic)
        assert server.peek()["tokens"]["hit"]["disk"] > 0


def test_a_full_disk_costs_no_hits_from_memory_and_disk_is_used_again_when_it_has_room(bench, tmp_path):
    before_pairs, full_pairs = prompts_in_pairs(2, seed=3), prompts_in_pairs(2, seed=4)
    server = bench.start_server(tmp_path)
    with running(server):
        with Traffic(bench.engine, before_pairs):
            pass
        durable = server.wait_until_durable()["chunks_durable"]
        with Traffic(bench.engine, before_pairs + full_pairs) as traffic, no_file_grows(server):
            stats = server.wait_for(lambda stats: stats["flushes_failed"] > 0 and stats["disk"]["write_errors"] > 0)
        assert stats["chunks_durable"] == durable
        traffic.assert_all_is_well()
        assert_hits_come_back(server, traffic)
        server.wait_until_durable()
        server.kill()
        server.start()
        bench.wait_until_connected(server)
        assert_hits_come_back(server, traffic)
        assert server.peek()["tokens"]["hit"]["disk"] > 0


def one_prompt(length: int, seed: int) -> dict:
    rng = random.Random(seed)
    return {"tokens": [rng.randrange(20, 4000) for _ in range(length)]}


def store(bench: Bench, server: Server, prompt: dict) -> dict:
    """Have `prompt` stored; return what it is answered without the cache."""
    num_chunks = server.peek()["chunks"] + len(prompt["tokens"]) // 64
    ask(bench.engine, [prompt])
    server.wait_for(lambda stats: stats["chunks"] == num_chunks and not stats["chunks_pending"])
    return ask(bench.engine, [prompt], params=WITHOUT_CACHE)[0]


def assert_all_is_hit(bench: Bench, server: Server, prompt: dict, plain: dict) -> None:
    """All of `prompt` is loaded, nothing of it is damaged, and nothing stays leased."""
    before = server.peek()
    [answer] = ask(bench.engine, [prompt])
    assert answer["cached"] == loadable(prompt)
    assert_same_answers([answer], [plain], bench.noise)
    after = server.wait_for(lambda stats: stats["leases"] == 0)
    assert hit_tokens(after) - hit_tokens(before) == loadable(prompt)
    assert after["checksum_failures"] == before["checksum_failures"]


def ask_for_damaged(bench: Bench, server: Server, prompt: dict, plain: dict) -> dict:
    """A prompt of which a part may be damaged is answered rightly; return the stats then."""
    before = server.peek()
    [answer] = ask(bench.engine, [prompt])
    assert_same_answers([answer], [plain], bench.noise)
    after = server.wait_for(lambda stats: stats["leases"] == stats["chunks_pending"] == 0)
    is_whole = after["loads_failed"] == before["loads_failed"]
    assert (hit_tokens(after) - hit_tokens(before) == loadable(prompt)) == is_whole
    return after


def test_bits_flipped_in_memory_are_recomputed_and_counted_and_the_chunk_is_stored_again(bench, tmp_path):
    rng, prompt = random.Random(5), one_prompt(1000, seed=5)
    server = bench.start_server(tmp_path)
    with running(server):
        plain = store(bench, server, prompt)
        arena = SharedArena(server)
        assert len(arena.ready_frames()) == 15
        for where in bench.verified * 2:
            before = server.peek()
            arena.flip_bit(rng, rng.choice(arena.ready_frames()), where)
            after = ask_for_damaged(bench, server, prompt, plain)
            assert after["checksum_failures"] == before["checksum_failures"] + 1
            assert after["loads_failed"] == before["loads_failed"] + 1
            assert after["tokens"]["stored"] == before["tokens"]["stored"] + 64
            assert_all_is_hit(bench, server, prompt, plain)


def test_bits_flipped_between_match_and_load_are_recomputed_and_counted(bench, tmp_path):
    rng, prompt = random.Random(11), one_prompt(1000, seed=11)
    server = bench.start_server(tmp_path)
    with running(server):
        plain = store(bench, server, prompt)
        arena, before = SharedArena(server), server.peek()
        frames = arena.ready_frames()
        bench.engine.reset()
        with arena.held(frames):
            bench.engine.start("generate", prompts=[{**prompt, "id": "damaged"}])
            wait_for_lease(server)
            arena.flip_bit(rng, rng.choice(frames), "object")
        assert_same_answers(bench.engine.finish(), [plain], bench.noise)
        after = server.wait_for(lambda stats: stats["leases"] == stats["chunks_pending"] == 0)
        assert after["checksum_failures"] == before["checksum_failures"] + 1
        assert after["loads_failed"] == before["loads_failed"] + 1
        assert_all_is_hit(bench, server, prompt, plain)


def test_bits_flipped_on_disk_are_recomputed_and_counted_and_the_chunk_is_stored_again(bench, tmp_path):
    rng, prompt = random.Random(6), one_prompt(1000, seed=6)
    server = bench.start_server(tmp_path)
    with running(server):
        plain = store(bench, server, prompt)
        server.wait_until_durable()
        server.stop()
        flip_bits_on_disk(rng, server.data_dir, ["header", *bench.verified])
        server.start()
        bench.wait_until_connected(server)
        damaged_asks = 0
        while (stats := ask_for_damaged(bench, server, prompt, plain))["loads_failed"] > damaged_asks:
            damaged_asks += 1  # a load ends at the first damaged chunk
        assert 2 <= damaged_asks <= 3
        assert stats["checksum_failures"] == 2, "a damaged header is found before anybody looks at the payload"
        assert stats["tokens"]["stored"] == 3 * 64
        assert_all_is_hit(bench, server, prompt, plain)
        server.wait_until_durable()
        server.stop()
        server.start()
        bench.wait_until_connected(server)
        assert_all_is_hit(bench, server, prompt, plain)
        assert server.peek()["tokens"]["hit"]["disk"] == loadable(prompt)


def test_a_request_aborted_while_it_loads_leaves_no_lease_and_no_blocks_behind(bench, tmp_path):
    prompt = one_prompt(2000, seed=7)
    server = bench.start_server(tmp_path)
    with running(server):
        plain = store(bench, server, prompt)
        arena = SharedArena(server)
        for number in range(10):
            bench.engine.call("abort_after", prompt={**prompt, "id": f"abort{number}"}, seconds=number * 0.005)
            bench.engine.reset()  # fails while a block is in use
        server.wait_for(lambda stats: stats["leases"] == 0, timeout_s=3)
        with arena.held(arena.ready_frames()):
            bench.engine.start("abort_after", prompt={**prompt, "id": "held"}, seconds=0.3)
            wait_for_lease(server)
            bench.engine.finish()
        server.wait_for(lambda stats: stats["leases"] == 0, timeout_s=3)
        assert_all_is_hit(bench, server, prompt, plain)


def test_a_server_replaced_by_one_with_other_data_and_other_chunks_is_used_like_the_first(bench, tmp_path):
    for chunk_tokens in (32, 128):  # they get to know the model, and would take chunks that were cut for another server
        server = start_with_chunks(bench, tmp_path, chunk_tokens)
        with running(server):
            ask(bench.engine, [one_prompt(300, seed=8)])
            wait_for_stores(server)
            server.stop()
    decoding = one_prompt(500, seed=9) | {"max_tokens": 900}
    server = start_with_chunks(bench, tmp_path, 64)
    with running(server):
        start = time.monotonic()
        bench.engine.start("generate", prompts=[decoding | {"id": "paced"}])  # 900 slow steps
        wait_for_stores(server)
        server.stop()
    for chunk_tokens in (32, 128):  # while the request that began with the first server is being decoded
        server = start_with_chunks(bench, tmp_path, chunk_tokens)
        with running(server):
            stats = server.wait_for(lambda stats: stats["stores_dropped"])
            assert stats["tokens"]["stored"] == stats["leases"] == stats["chunks_pending"] == 0
            server.stop()
    last_stop_s = time.monotonic() - start
    [answer] = bench.engine.finish()
    assert answer["seconds"] > 900 * PACED_STEP_S, "it was not paced"
    assert answer["seconds"] > last_stop_s, "it ended before the last server came"
    assert_same_answers([answer], ask(bench.engine, [decoding], params=WITHOUT_CACHE), NOISE_MIN)
    pairs = prompts_in_pairs(2, seed=20)
    server = start_with_chunks(bench, tmp_path, 128)
    with running(server):
        with Traffic(bench.engine, pairs) as traffic:
            pass
        traffic.assert_all_is_well()
        assert_hits_come_back(server, traffic, chunk_tokens=128)
        stats = server.wait_for(lambda stats: stats["leases"] == stats["chunks_pending"] == 0)
        assert stats["checksum_failures"] == stats["loads_failed"] == 0


def start_with_chunks(bench: Bench, folder: Path, chunk_tokens: int) -> Server:
    (folder / str(chunk_tokens)).mkdir(exist_ok=True)
    return bench.start_server(folder / str(chunk_tokens), "--chunk-tokens", str(chunk_tokens))


def wait_for_stores(server: Server) -> None:
    server.wait_for(lambda stats: stats["tokens"]["stored"])


def test_an_engine_killed_while_it_loads_and_stores_leaves_no_leases_and_no_pending_chunks(bench, tmp_path):
    held, others = one_prompt(1000, seed=10), [one_prompt(2000, seed=11 + number) for number in range(20)]
    server = bench.start_server(tmp_path)
    with running(server):
        plain = store(bench, server, held)
        arena, engine = SharedArena(server), bench.engine
        engine.reset()
        prompts = [
            {**prompt, "id": f"k{number}"} for number, prompt in enumerate([held] * 40 + others)
        ]  # 10 s of loads
        with arena.held(arena.ready_frames()):
            engine.start("generate", prompts=prompts)
            frozen: dict = {}
            while not (frozen.get("leases", 0) >= 3 and frozen["chunks_pending"]):
                os.killpg(engine.process.pid, signal.SIGCONT)
                server.wait_for(lambda stats: stats["leases"] >= 3 and stats["chunks_pending"])
                os.killpg(engine.process.pid, signal.SIGSTOP)
                frozen = server.peek()
            engine.kill()
            server.wait_for(lambda stats: not (stats["leases"] or stats["chunks_pending"] or stats["sessions"]), 3)
        bench.wait_until_connected(server)
        assert_all_is_hit(bench, server, held, plain)


class PrivateTier:
    """The private server that holds a data directory, whichever engine has started it."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.settings = {"data_dir": str(data_dir), "host_bytes": "256MiB", "disk_bytes": "1GiB"}

    @property
    def pid(self) -> int:
        return int(self._named()["pid"])

    def peek(self) -> dict:
        client = Client(self._named()["socket"])
        try:
            return json.loads(client.get("/v1/stats", 5))
        finally:
            client.close()

    def wait_for(self, condition, timeout_s: float = 20) -> dict:
        """Return the first stats of a live server for which `condition` holds."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError, ValueError, UnavailableError):
                if condition(stats := self.peek()):
                    return stats
            assert time.monotonic() < deadline, "there is no such server"
            time.sleep(0.05)

    def wait_until_gone(self, pid: int) -> None:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline, "the private server outlives its engine"
            time.sleep(0.05)

    def _named(self) -> dict:
        return json.loads((self.data_dir / "server.json").read_text())


def test_engines_without_a_server_share_a_private_one_that_is_started_again_when_it_is_killed(tmp_path):
    tier, prompt = PrivateTier(tmp_path / "data"), one_prompt(1000, seed=40)
    first = Engine(tmp_path / "first.log", tier.settings)
    with running(first):
        [plain] = ask(first, [prompt], params=WITHOUT_CACHE)
        ask(first, [prompt])
        tier.wait_for(lambda stats: stats["chunks_durable"] == 15)
        assert_private_hit(first, tier, prompt, plain, "host")

        killed = tier.pid
        os.kill(killed, signal.SIGKILL)
        [answer] = ask(first, [prompt])
        assert_same_answers([answer], [plain], NOISE_MIN)
        tier.wait_for(lambda stats: stats["sessions"] >= 2)
        assert tier.pid != killed
        assert_private_hit(first, tier, prompt, plain, "disk")

        pid = tier.pid
        second = Engine(tmp_path / "second.log", tier.settings)
        with running(second):
            second.generate([{"id": "warm", "tokens": list(range(50, 90))}])
            assert tier.pid == pid, "the second engine did not join the first one's server"
            tier.wait_for(lambda stats: stats["sessions"] >= 4)
            assert_private_hit(second, tier, prompt, plain, "host")

            first.kill()
            tier.wait_until_gone(pid)
            [answer] = ask(second, [prompt])
            assert_same_answers([answer], [plain], NOISE_MIN)
            tier.wait_for(lambda stats: stats["sessions"] >= 2)
            assert tier.pid != pid
            assert_private_hit(second, tier, prompt, plain, "disk")
            pid = tier.pid
            second.kill()
            tier.wait_until_gone(pid)


def assert_private_hit(engine: Engine, tier: PrivateTier, prompt: dict, plain: dict, where: str) -> None:
    before = tier.peek()["tokens"]["hit"][where]
    [answer] = ask(engine, [prompt])
    assert_same_answers([answer], [plain], NOISE_MIN)
    assert answer["cached"] == loadable(prompt)
    tier.wait_for(lambda stats: stats["tokens"]["hit"][where] == before + loadable(prompt) and not stats["leases"])

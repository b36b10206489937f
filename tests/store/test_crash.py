"""kill -9 of a store under load, again and again: what was durable is there, whole, and the disk stays in its limit."""

import os
import random
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachetier.storage.verify import verify
from cachetier.store.store import Store
from tests.store.engines import MIB, Engine, make_config, tokens_of

NUM_KILLS = 60
SAMPLE = 25
Steps = tuple[int, ...]


def prompt_of(path: Steps) -> bytes:
    return tokens_of(*(step + 10 * depth for depth, step in enumerate(path)))


def work_until_killed(open_store: Callable[[], Store], seed: int, base: int, pipe: int) -> None:
    """Store prompts and write every prompt whose chunks `flush` and `stats` reported durable, one a line."""
    chance, store = random.Random(seed), open_store()
    engine = Engine(store)
    pending: list[Steps] = []
    while True:
        path = tuple(base + chance.randrange(3) for _ in range(chance.randrange(1, 7)))
        engine.put(prompt_of(path))
        pending.append(path)
        if chance.random() < 0.2:
            engine.load(prompt_of(path[: chance.randrange(1, 7)]))
        if chance.random() < 0.1:
            store.flush()
            stats = store.stats()
            if stats.flushes_dropped or stats.flushes_failed or stats.chunks != stats.chunks_durable:
                pending = []  # not all of them are on disk, and the store says so
            os.write(pipe, "".join(" ".join(map(str, path)) + "\n" for path in pending).encode())
            pending = []


def run_and_kill(open_store: Callable[[], Store], seed: int, base: int) -> set[Steps]:
    """Run a process with a store, kill it at a random moment, and return what it reported durable."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read_end)
            work_until_killed(open_store, seed, base, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    deadline = time.monotonic() + random.Random(seed).uniform(0.02, 0.6)
    text = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([read_end], [], [], left)[0]:
            part = os.read(read_end, 1 << 16)
            assert part, "the store died by itself"
            text += part
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    while part := os.read(read_end, 1 << 16):
        text += part
    os.close(read_end)
    lines = text.decode().splitlines(keepends=True)
    return {tuple(map(int, line.split())) for line in lines if line.endswith("\n")}


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("disk_bytes", [128 * MIB, 16 * MIB], ids=["roomy", "wrapping"])
def test_what_was_durable_survives_kill_9_at_random_moments(tmp_path, disk_bytes):
    config = make_config(tmp_path, disk_bytes=disk_bytes)
    is_roomy = disk_bytes > 100 * MIB
    durable: set[Steps] = set()
    chance = random.Random(7)
    for kill in range(NUM_KILLS if is_roomy else NUM_KILLS // 3):
        durable |= run_and_kill(lambda: Store(config), kill, 0 if is_roomy else 100 * kill)
        store = Store(config)
        engine = Engine(store)
        if is_roomy:
            lost = [path for path in durable if engine.match(prompt_of(path), lease=False).num_chunks < len(path)]
            assert not lost, f"kill {kill}: {len(lost)} of {len(durable)} durable prompts are not held"
        for path in chance.sample(sorted(durable), min(SAMPLE, len(durable))):
            arrived = engine.load(prompt_of(path))  # compares every byte
            assert arrived == len(path) or not is_roomy
        assert store.stats().promotions_failed == 0
        assert bytes_on_disk(tmp_path / "data") <= disk_bytes
        store.check_integrity()
        store.close()
    assert len(durable) > 100
    report = verify(config.data_dir)
    assert report.bad == 0
    assert report.records > 100

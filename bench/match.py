"""How long does an engine wait for the match of a long prompt? One client, and 16 at once.

Starts a server of its own on a temporary data directory, stores a prompt of 512 chunks (32,768 tokens), and times
`Match` with a lease, end to end in the client; the lease is released outside of the time. Payloads do not matter to a
match, so the frames stay unfilled. Prints a table and writes bench/results/match.json:

    python bench/match.py
"""

import argparse
import random
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from record import record, row

from cachetier.client import Client, Session
from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import KVLayout
from cachetier.core.messages import Commit, LeaseUse, Match, RegisterNamespace, Release, Reserve

CHUNK_TOKENS = 64
TIMEOUT_S = 30.0
LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, row_bytes=32)
IDENTITY = ModelIdentity(
    model="bench",
    weights="bench",
    kv_dtype="bfloat16",
    attention="full",
    num_layers=2,
    num_kv_heads=1,
    k_head_size=8,
    v_head_size=8,
)
QUESTION = "How long does an engine wait for a match?"


def prompt(num_chunks: int) -> bytes:
    """Return the tokens of the prompt, the same for everyone."""
    rng = random.Random(num_chunks)
    return struct.pack(f"<{num_chunks * CHUNK_TOKENS}i", *(rng.randrange(128_000) for _ in range(num_chunks * 64)))


class Prober:
    """A client with a session, ready to match."""

    def __init__(self, socket_path: str) -> None:
        self.client = Client(socket_path)
        self.session = Session(self.client, "bench", "bench", TIMEOUT_S)
        message = RegisterNamespace(session=self.session.id, identity=IDENTITY, layouts=[LAYOUT])
        self.namespace = self.client.call(message, TIMEOUT_S).namespace

    def store(self, tokens: bytes) -> None:
        """Store all chunks of `tokens`, whatever their payload."""
        session = self.session.id
        message = Reserve(session=session, namespace=self.namespace, tokens=tokens, tiling=[LAYOUT.whole()], shard=0)
        reply = self.client.call(message, TIMEOUT_S)
        self.client.call(Commit(session=session, lease=reply.lease, checksums=[0] * len(reply.frames)), TIMEOUT_S)

    def match(self, tokens: bytes, repeats: int, pause_s: float) -> list[tuple[float, float]]:
        """Return for each of `repeats` matches the time it took and the processor time of this thread, in ms."""
        message = Match(session=self.session.id, namespace=self.namespace, tokens=tokens)
        times = []
        for number in range(repeats + 10):
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            start, start_cpu = time.perf_counter(), time.thread_time()
            reply = self.client.call(message, TIMEOUT_S)
            took, took_cpu = time.perf_counter() - start, time.thread_time() - start_cpu
            assert reply.num_chunks == len(tokens) // 4 // CHUNK_TOKENS
            self.client.call(Release(session=self.session.id, uses=[LeaseUse(lease=reply.lease)]), TIMEOUT_S)
            if number >= 10:
                times.append((took * 1e3, took_cpu * 1e3))
        return times


def probe(socket_path: str, num_chunks: int, repeats: int, pause_s: float) -> list[tuple[float, float]]:
    """Match as one of several client processes."""
    return Prober(socket_path).match(prompt(num_chunks), repeats, pause_s)


def measure(socket_path: str, num_chunks: int, clients: int, pause_s: float, repeats: int) -> dict[str, float]:
    """Return median, 99th percentile and the client's processor time of a match in ms, and matches a second."""
    with ProcessPoolExecutor(clients) as pool:
        list(pool.map(time.sleep, [0.3] * clients))  # so that all processes stand before the clock runs
        start = time.perf_counter()
        runs = [pool.submit(probe, socket_path, num_chunks, repeats, pause_s) for _ in range(clients)]
        samples = [sample for run in runs for sample in run.result()]
        took = time.perf_counter() - start
    times, cpu = sorted(sample[0] for sample in samples), sorted(sample[1] for sample in samples)
    return {
        "median": times[len(times) // 2],
        "p99": times[len(times) * 99 // 100],
        "client cpu": cpu[len(cpu) // 2],
        "matches/s": len(samples) / took,
    }


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300, help="matches a client (default 300)")
    repeats = parser.parse_args().repeats
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cachetier-bench-") as folder:
        command = [sys.executable, "-m", "cachetier.cli.main", "serve", "--data-dir", f"{folder}/data"]
        command += ["--host-bytes", "64MiB", "--disk-bytes", "64MiB"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline(), "the server did not start"
            socket_path = f"{folder}/data/cachetier.sock"
            try:
                for num_chunks, clients, pause_s in ((1, 1, 0), (64, 1, 0), (512, 1, 0), (512, 16, 0), (512, 16, 0.2)):
                    Prober(socket_path).store(prompt(num_chunks))
                    values = measure(socket_path, num_chunks, clients, pause_s, repeats if not pause_s else 50)
                    rows += [
                        row(
                            QUESTION,
                            "cachetier",
                            round(value, 4),
                            "1/s" if name == "matches/s" else "ms",
                            chunks=num_chunks,
                            clients=clients,
                            pause_ms=round(pause_s * 1e3),
                            measure=name,
                        )
                        for name, value in values.items()
                    ]
            finally:
                server.terminate()
    record("match", rows)


if __name__ == "__main__":
    main()

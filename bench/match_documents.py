"""How long does it take to find registered documents in a prompt of 32,768 tokens?

Starts a server of its own, registers documents (100,000 by default, of 2,048 tokens each) and stores the KV of 16 of
them. A prompt holds these in a random order at odd offsets; an engine's link thread looks for them as it does for every
request that may be blended: asks whether its copy of the fingerprints is the newest, hashes every window of the prompt,
and has the server compare, and lease, what may be a document. vLLM's scheduler thread does none of that. Beside it a
prompt without documents. Prints a table and writes the question `match_documents` of bench/results/blend.json:

    python bench/match_documents.py
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from match import IDENTITY, LAYOUT, Prober
from record import record, row

from cachetier.core.document_messages import RegisterDocument
from cachetier.core.messages import LeaseUse, Release
from cachetier_blend.finding import FingerprintSet, fingerprints
from cachetier_connector.documents import Documents
from cachetier_connector.link import ServerLink

CHUNK_TOKENS, DOCUMENT_TOKENS, NUM_IN_PROMPT, GAP_TOKENS = 64, 2048, 16, 7
TIMEOUT_S = 30.0


def document(number: int) -> np.ndarray:
    """Return the tokens of a document."""
    return np.random.default_rng(number).integers(0, 128_000, DOCUMENT_TOKENS, dtype=np.int32)


def register(prober: Prober, number: int) -> None:
    """Register a document."""
    tokens = document(number)
    message = RegisterDocument(
        session=prober.session.id,
        namespace=prober.namespace,
        document=f"document {number}",
        tokens=tokens.tobytes(),
        fingerprint=int(fingerprints(tokens[:CHUNK_TOKENS], CHUNK_TOKENS)[0]),
    )
    prober.client.call(message, TIMEOUT_S)


def prompt_of(numbers: list[int], seed: int) -> bytes:
    """Return a prompt of 32,768 tokens that holds documents with a few tokens before each."""
    rng = np.random.default_rng(10**12 + seed)  # not those of a document
    parts = [part for number in numbers for part in (rng.integers(0, 128_000, GAP_TOKENS), document(number))]
    tokens = np.concatenate([*parts, rng.integers(0, 128_000, DOCUMENT_TOKENS * NUM_IN_PROMPT)])
    return tokens[: DOCUMENT_TOKENS * NUM_IN_PROMPT].astype(np.int32).tobytes()


class Finder:
    """An engine's link thread, as far as it looks for documents."""

    def __init__(self, socket_path: str) -> None:
        self._link = ServerLink("bench", "bench", lambda: socket_path)
        self._link.connect()
        namespace = self._link.namespace(IDENTITY, [LAYOUT], TIMEOUT_S)
        assert namespace is not None
        self._namespace = namespace
        self._documents = Documents(self._link, TIMEOUT_S, reads_pools=False)

    def find(self, prompt: bytes, num_expected: int) -> float:
        """Look for documents; return the milliseconds it took. What was leased is given back outside of them."""
        start = time.perf_counter()
        runs = self._documents.find(self._namespace, "", prompt, 0, CHUNK_TOKENS, "bench")
        took_ms = 1e3 * (time.perf_counter() - start)
        assert len(runs) == num_expected, f"{len(runs)} documents"
        uses = [LeaseUse(lease=run.match.lease) for run in runs]
        self._link.call(lambda session: Release(session=session, uses=uses), TIMEOUT_S)
        return took_ms


def hashing_ms(prompt: bytes, num_documents: int) -> float:
    """Return what hashing the prompt and looking its windows up takes alone."""
    hashes = np.sort(np.random.default_rng(1).integers(0, 1 << 63, num_documents, dtype=np.uint64))
    known, tokens = FingerprintSet(hashes.astype("<u8").tobytes()), np.frombuffer(prompt, np.int32)
    start = time.perf_counter()
    known.candidates(tokens, CHUNK_TOKENS)
    return 1e3 * (time.perf_counter() - start)


def measure(socket_path: str, num_documents: int, repeats: int) -> list[dict[str, Any]]:
    """Register, and look for what is there and for what is not."""
    prober, finder, rng = Prober(socket_path), Finder(socket_path), random.Random(0)
    for number in range(num_documents):
        register(prober, number)
    for number in range(NUM_IN_PROMPT):
        prober.store(document(number).tobytes())
    times: dict[str, list[float]] = {"found": [], "none": [], "hashing": []}
    for repeat in range(repeats + 10):
        numbers = rng.sample(range(NUM_IN_PROMPT), NUM_IN_PROMPT)
        held, new = prompt_of(numbers, repeat), prompt_of([], repeat)
        took = {
            "found": finder.find(held, NUM_IN_PROMPT),
            "none": finder.find(new, 0),
            "hashing": hashing_ms(held, num_documents),
        }
        for name, ms in took.items():
            times[name] += [ms] if repeat >= 10 else []
    shape = {"tokens": DOCUMENT_TOKENS * NUM_IN_PROMPT, "documents": num_documents}
    return [
        row("match_documents", "cachetier-link", round(value, 3), "ms", case=name, measure=measure, **shape)
        for name, samples in times.items()
        for measure, value in (
            ("median", statistics.median(samples)),
            ("p99", sorted(samples)[len(samples) * 99 // 100]),
        )
    ]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cachetier-bench-") as folder:
        command = [sys.executable, "-m", "cachetier.cli.main", "serve", "--data-dir", f"{folder}/data"]
        command += ["--host-bytes", "256MiB", "--disk-bytes", "16GiB"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline(), "the server did not start"
            try:
                rows = measure(f"{folder}/data/cachetier.sock", options.documents, options.repeats)
            finally:
                server.terminate()
    record("blend", rows, keeps_others=True)


if __name__ == "__main__":
    main()

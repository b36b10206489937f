"""How much of the disk's bandwidth does a hit on disk reach, from the match until its last frame is ready?

A prompt lies on disk; it leaves the arena before every match, so that each match reads all of its chunks. The
yardstick is O_DIRECT reads of the same segment files into the same memory, the arena's (in a virtual machine other
memory may be half as fast, or twice), many in flight, in two patterns that disks like; the better one counts. Yardstick
and store take turns, in random order, and the medians over the rounds count. What is timed ends when the last frame is
READY, as a worker that watches the frames sees it.

    python bench/promotion.py [--dir DIR] [--mib 512] [--rounds 9] [--io-threads 4] [--object-kib 128 1024 8192]
"""

import argparse
import os
import random
import shutil
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from record import record, row

from cachetier.core.arena_format import STATE_FILLING, STATE_READY
from cachetier.core.config import MIB, ServerConfig
from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import KVLayout, frame_bytes
from cachetier.core.messages import (
    TIER_DISK,
    Commit,
    LeaseUse,
    Match,
    OpenSession,
    RegisterNamespace,
    Release,
    Reserve,
)
from cachetier.store.store import Store

CHUNK_TOKENS = 16
HEADS, LAYERS = 8, 32
READ_BYTES_MAX = 8 * MIB
RAW_PATTERNS = ((4, READ_BYTES_MAX), (16, MIB))  # threads, bytes a read
WATCH_INTERVAL_S = 0.0002
PUT_BYTES = 64 * MIB  # stored at once: less than the flusher's backlog takes


class Prompt:
    """A store in whose disk tier a prompt lies, and the engine that asks for it."""

    def __init__(self, folder: str, object_bytes: int, prompt_bytes: int, io_threads: int) -> None:
        self.num_chunks = prompt_bytes // frame_bytes(object_bytes)
        self.num_bytes = self.num_chunks * frame_bytes(object_bytes)
        self._layout = KVLayout(
            num_layers=LAYERS, num_kv_heads=HEADS, row_bytes=object_bytes // (HEADS * LAYERS * CHUNK_TOKENS)
        )
        self._object_bytes = object_bytes
        self._config = ServerConfig(
            data_dir=os.path.join(folder, "tier"),
            socket="/tmp/unused",
            host_bytes=self.num_bytes * 5 // 4 + 64 * MIB,
            disk_bytes=4 * self.num_bytes + 1024 * MIB,
            segment_bytes=256 * MIB,
            chunk_tokens=CHUNK_TOKENS,
            io_threads=io_threads,
        )
        self._tokens = b"".join(struct.pack("<i", chunk) * CHUNK_TOKENS for chunk in range(self.num_chunks))
        self._open()
        block = os.urandom(MIB)
        self._put((block * -(-object_bytes // MIB))[:object_bytes])
        self.store.close()
        self._open()

    def read(self) -> float:
        """Return the seconds until all chunks of the prompt are ready."""
        self._empty_arena()
        start = time.perf_counter()
        reply = self.store.match(Match(session=self._session, namespace=self._namespace, tokens=self._tokens))
        assert reply.tiers == bytes([TIER_DISK]) * self.num_chunks, "the prompt does not lie on disk alone"
        for offset in reply.frames:
            while self.store._arena.state(offset) == STATE_FILLING:
                time.sleep(WATCH_INTERVAL_S)
        seconds = time.perf_counter() - start
        assert all(self.store._arena.state(offset) == STATE_READY for offset in reply.frames)
        self.store.release(Release(session=self._session, uses=[LeaseUse(lease=reply.lease)]))
        return seconds

    def arena(self) -> memoryview:
        """Return as much of the arena as the prompt takes; its frames are free, but for the caller's reads."""
        self._empty_arena()
        return self.store._arena.frame(0, self.num_bytes // READ_BYTES_MAX * READ_BYTES_MAX)

    def segment_files(self) -> list[Path]:
        return sorted(Path(self._config.data_dir, "segments").iterdir())

    def _empty_arena(self) -> None:
        table = self.store._books.table
        with self.store._books.lock:
            for chunk in list(table.chunks.values()):
                table.remove(chunk)

    def _open(self) -> None:
        self.store = Store(self._config)
        self._session = self.store.open_session(OpenSession(client="bench", engine="bench", pid=os.getpid())).session
        identity = ModelIdentity(
            model="m", weights="w", kv_dtype="bfloat16", attention="full", num_layers=LAYERS, num_kv_heads=HEADS,
            k_head_size=64, v_head_size=64,
        )  # fmt: skip
        message = RegisterNamespace(session=self._session, identity=identity, layouts=[self._layout])
        self._namespace = self.store.register_namespace(message).namespace

    def _put(self, payload: bytes) -> None:
        step = max(1, PUT_BYTES // self._object_bytes)
        for first in range(0, self.num_chunks, step):
            end = min(first + step, self.num_chunks)
            reserved = self.store.reserve(
                Reserve(
                    session=self._session, namespace=self._namespace, tokens=self._tokens[: end * CHUNK_TOKENS * 4],
                    fill_from=first, tiling=[self._layout.whole()], shard=0,
                )
            )  # fmt: skip
            assert len(reserved.frames) == end - first
            for offset in reserved.frames:
                self.store._arena.frame(offset, self._object_bytes)[:] = payload
            checksums: list[int | None] = [0] * (end - first)
            self.store.commit(Commit(session=self._session, lease=reserved.lease, checksums=checksums))
            assert self.store.flush(600)


def read_raw(paths: list[Path], target: memoryview, num_threads: int, read_bytes: int) -> float:
    """Return the seconds that O_DIRECT reads of the files into `target` take, from the first file's first byte on."""
    descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    lock, places = threading.Lock(), _places(descriptors, len(target), read_bytes)

    def run() -> None:
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            descriptor, offset, at = place
            assert os.preadv(descriptor, [target[at : at + read_bytes]], offset) == read_bytes

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    for descriptor in descriptors:
        os.close(descriptor)
    return seconds


def _places(descriptors: list[int], num_bytes: int, read_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Return descriptor, offset in the file and offset in memory of every read."""
    at = 0
    for descriptor in descriptors:
        for offset in range(0, os.fstat(descriptor).st_size // read_bytes * read_bytes, read_bytes):
            if at + read_bytes > num_bytes:
                return
            yield descriptor, offset, at
            at += read_bytes


def measure(folder: str, object_kib: int, args: argparse.Namespace) -> list[dict[str, object]]:
    prompt = Prompt(folder, object_kib * 1024, args.mib * MIB, args.io_threads)
    rates: dict[str, list[float]] = {}
    first = prompt.num_bytes / prompt.read() / MIB  # into an arena of which no page was touched
    contenders = {f"{threads} x {size // MIB} MiB": (threads, size) for threads, size in RAW_PATTERNS}
    for number in range(args.rounds + 1):
        for name in random.sample(["cachetier", *contenders], len(contenders) + 1):
            if name == "cachetier":
                rate = prompt.num_bytes / prompt.read()
            else:
                target = prompt.arena()
                rate = len(target) / read_raw(prompt.segment_files(), target, *contenders[name])
            if number:  # the first round touches all memory
                rates.setdefault(name, []).append(rate)
    prompt.store.close()
    medians = {name: statistics.median(values) / MIB for name, values in rates.items()}
    ours = medians.pop("cachetier")
    parameters = {"object_kib": object_kib, "io_threads": args.io_threads}
    rows = [row("promote", "cachetier", round(ours), "MiB/s", **parameters)]
    rows.append(row("promote into a new arena", "cachetier", round(first), "MiB/s", **parameters))
    rows += [
        row("promote", "raw O_DIRECT", round(rate), "MiB/s", pattern=name, **parameters)
        for name, rate in medians.items()
    ]
    rows.append(row("promote", "cachetier / raw", round(100 * ours / max(medians.values()), 1), "%", **parameters))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write: decides which disk is measured (default: the temporary folder)")
    parser.add_argument("--mib", type=int, default=512, help="size of a prompt's KV")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--io-threads", type=int, default=ServerConfig().io_threads)
    parser.add_argument("--object-kib", type=int, nargs="+", default=[128, 1024, 8192])
    args = parser.parse_args()
    rows = []
    for object_kib in args.object_kib:
        folder = tempfile.mkdtemp(dir=args.dir)
        try:
            rows += measure(folder, object_kib, args)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    record("promotion", rows)


if __name__ == "__main__":
    main()

"""Does a lookup get slower as the index grows, and how long does a tier take to open after a crash?

Fills an index with 100 thousand, 1 million and 10 million chunks (page by page, seven rows in each, as a well filled
table has them), appends one real group, kills the process without closing anything, and times in a new process: opening
the tier with the index in the page cache and with its pages dropped from it; then looking up 512 chunks one after the
other, as a match does, at random places. Needs about 12 GB of disk for 10 million:

    python bench/index_scale.py [--dir DIR] [--rows N ...]
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from record import record, row

from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.core.layout import Shard, frame_bytes
from cachetier.storage.disk import ChunkToWrite, DiskChunk, DiskTier
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import _ROW, Index, IndexSettings, SegmentEntry
from cachetier.storage.namespaces import NamespaceTable
from cachetier.storage.records import pack_body
from cachetier.storage.segment_log import SegmentLog
from cachetier.storage.segments import aligned_buffer

ROWS_A_PAGE = 7
SEGMENT_BYTES = 1 << 20
NUM_SEGMENTS = 4
SEQUENCE = 1
MATCH_CHUNKS = 512
NUM_MATCHES = 200


def shape(num_rows: int) -> IndexSettings:
    pages = num_rows // ROWS_A_PAGE + 3
    return IndexSettings(
        limit_bytes=pages * 8192, segment_bytes=SEGMENT_BYTES, num_segments=NUM_SEGMENTS, chunk_tokens=64
    )


def chunk(key: bytes) -> DiskChunk:
    return DiskChunk(
        key=ChainKey(key),
        parent=ChainKey(bytes(16)),
        namespace=NamespaceId(bytes(16)),
        position=7,
        group=0,
        content=random.Random(key).randbytes(256),
        tiling=(Shard(0, 8, 0, 32),),
        object_bytes=(65536,),
        checksums=(1,),
    )


def key_in(bucket: int, number: int, num_buckets: int) -> bytes:
    """Return a key whose first page is `bucket`."""
    return (bucket + number * num_buckets).to_bytes(8, "little") + number.to_bytes(8, "little")


def fill(folder: str, num_rows: int) -> None:
    """Write the index, then die while the tier is open."""
    settings = shape(num_rows)
    for name in ("index", "segments"):
        os.makedirs(os.path.join(folder, name))
    index = Index(os.path.join(folder, "index", "chunks.idx"), settings, FileLayer())
    num_buckets = settings.num_pages - settings.first_bucket
    body = pack_body(chunk(bytes(16)))[16:]
    for bucket in range(num_buckets):
        keys = [key_in(bucket, number, num_buckets) for number in range(1, ROWS_A_PAGE + 1)]
        index._stage(settings.first_bucket + bucket, {key: _ROW.pack(SEQUENCE, 0) + key + body for key in keys})
        if bucket % 20_000 == 0:
            index.commit()
    index.stage_table([SegmentEntry(SEQUENCE, 0, num_rows), *[SegmentEntry()] * (NUM_SEGMENTS - 1)], {0})
    index.commit()
    index.close()
    descriptor = os.open(os.path.join(folder, "segments", "00000001.seg"), os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(descriptor, 0, SEGMENT_BYTES)
    tier = open_tier(folder, num_rows)
    group = [chunk(random.Random(number).randbytes(16)) for number in range(8)]
    assert all(tier.append([ChunkToWrite(chunk=c, frames=[aligned_buffer(frame_bytes(65536))]) for c in group]))
    os.kill(os.getpid(), signal.SIGKILL)


def open_tier(folder: str, num_rows: int) -> DiskTier:
    log = SegmentLog(folder, shape(num_rows), FileLayer(), lambda key: False, lambda key: False)
    return DiskTier(log, NamespaceTable(folder, FileLayer()), 1 << 50)


def drop_cache(folder: str) -> None:
    descriptor = os.open(os.path.join(folder, "index", "chunks.idx"), os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(folder: str, num_rows: int) -> dict[str, float]:
    """Time opening and lookups; runs in a process of its own."""
    start = time.perf_counter()
    tier = open_tier(folder, num_rows)
    open_s = time.perf_counter() - start
    rng = random.Random(num_rows)
    num_buckets = shape(num_rows).num_pages - shape(num_rows).first_bucket
    times = []
    for _ in range(NUM_MATCHES):
        keys = [
            ChainKey(key_in(rng.randrange(num_buckets), rng.randrange(1, ROWS_A_PAGE + 1), num_buckets))
            for _ in range(MATCH_CHUNKS)
        ]
        start = time.perf_counter()
        found = [tier.lookup(key) for key in keys]
        times.append(time.perf_counter() - start)
        assert None not in found
    return {"open_s": open_s, "median_ms": statistics.median(times) * 1e3, "chunks": tier.num_chunks}


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, __file__, *arguments], check=False, text=True, stdout=subprocess.PIPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to put the indexes (default: the temporary folder)")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, folder, num_rows = args.step
        print(json.dumps({"fill": fill, "measure": measure}[step](folder, int(num_rows))))
        return
    rows = []
    for num_rows in args.rows:
        folder = tempfile.mkdtemp(dir=args.dir)
        try:
            assert child("--step", "fill", folder, str(num_rows)).returncode == -signal.SIGKILL
            warm = json.loads(child("--step", "measure", folder, str(num_rows)).stdout)
            again = json.loads(child("--step", "measure", folder, str(num_rows)).stdout)
            drop_cache(folder)
            cold = json.loads(child("--step", "measure", folder, str(num_rows)).stdout)
        finally:
            shutil.rmtree(folder)
        question = "open after a crash"
        rows.append(row(question, "index in the page cache", round(warm["open_s"], 4), "s", chunks=num_rows))
        rows.append(row(question, "index not cached", round(cold["open_s"], 4), "s", chunks=num_rows))
        question = "look up a match of 512 chunks"
        rows.append(row(question, "index in the page cache", round(again["median_ms"], 3), "ms", chunks=num_rows))
        rows.append(row(question, "index not cached", round(cold["median_ms"], 3), "ms", chunks=num_rows))
    record("index_scale", rows)


if __name__ == "__main__":
    main()

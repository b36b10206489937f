"""A real server as a child process, and a small engine that stores and reads through the real client."""

import os
import random
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import cachetier
from cachetier.client import ArenaView, Client, Session
from cachetier.core.checksum import checksum_of, digests_match, page_digests
from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import DIGEST_BYTES, KVLayout, digests_offset, frame_bytes, num_pages
from cachetier.core.messages import (
    RESERVE_FILL,
    Commit,
    LeaseUse,
    Match,
    MatchReply,
    RegisterNamespace,
    Release,
    Reserve,
)

SOURCE_ROOT = str(Path(cachetier.__file__).parents[1])
CHUNK_TOKENS = 64
TIMEOUT_S = 10.0
LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, row_bytes=64)
OBJECT_BYTES = LAYOUT.object_bytes(LAYOUT.whole(), CHUNK_TOKENS)
SMALL = ("--host-bytes", "16MiB", "--disk-bytes", "64MiB")


def identity(weights: str = "w") -> ModelIdentity:
    """Return the identity of a tiny model."""
    return ModelIdentity(
        model="tiny",
        weights=weights,
        kv_dtype="bfloat16",
        attention="full",
        num_layers=LAYOUT.num_layers,
        num_kv_heads=LAYOUT.num_kv_heads,
        k_head_size=LAYOUT.row_bytes // 4,
        v_head_size=LAYOUT.row_bytes // 4,
    )


def tokens_of(seed: int, num_chunks: int) -> bytes:
    """Return the tokens of `num_chunks` chunks of a random text."""
    rng = random.Random(seed)
    count = num_chunks * CHUNK_TOKENS
    return struct.pack(f"<{count}i", *(rng.randrange(32_000) for _ in range(count)))


def payload_of(key: bytes) -> bytes:
    """Return the bytes that stand for the KV of the chunk with `key`."""
    return random.Random(key).randbytes(OBJECT_BYTES)


class RunningServer:
    """`cachetier serve` in a child process; ready when constructed.

    Attributes:
        ready_line: what it printed.
        log_path: its standard error.
    """

    def __init__(self, data_dir: Path, *options: str) -> None:
        self.socket_path = str(data_dir / "cachetier.sock")
        self.log_path = Path(f"{data_dir}.log")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                serve_command(data_dir, *options), env=environment(), stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline().rstrip()
        if not self.ready_line:
            self.process.wait()
            raise AssertionError(f"the server did not start: {self.log_path.read_text()}")

    def stop(self) -> int:
        """Stop it in order and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        code = self.process.wait(15)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.stop()


def serve_command(data_dir: Path, *options: str) -> list[str]:
    """Return the command line of a server."""
    return [sys.executable, "-m", "cachetier.cli.main", "serve", "--data-dir", str(data_dir), *(options or SMALL)]


def environment() -> dict[str, str]:
    """Return an environment in which a child finds the package."""
    return os.environ | {"PYTHONPATH": SOURCE_ROOT}


def run_cli(*arguments: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "cachetier.cli.main", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False)


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process without what it shares (the arena)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found
    return int(found[1]) << 10


class TinyEngine:
    """An engine with one rank: a session, a namespace and the mapped arena."""

    def __init__(self, socket_path: str, weights: str = "w", salt: str = "") -> None:
        self.socket_path = socket_path
        self.client = Client(socket_path)
        self.session = Session(self.client, "test", "engine", TIMEOUT_S)
        self.arena = ArenaView.attach(self.session.server.arena_path)
        self.salt = salt
        message = RegisterNamespace(session=self.session.id, identity=identity(weights), layouts=[LAYOUT])
        self.namespace = self.client.call(message, TIMEOUT_S).namespace

    def reserve(self, tokens: bytes) -> Reserve:
        """Return the message that asks for frames for all of `tokens`."""
        return Reserve(
            session=self.session.id,
            namespace=self.namespace,
            tokens=tokens,
            tiling=[LAYOUT.whole()],
            shard=0,
            salt=self.salt,
        )

    def store(self, tokens: bytes) -> int:
        """Store the chunks of `tokens` that are not there yet, and return how many were accepted."""
        reply = self.client.call(self.reserve(tokens), TIMEOUT_S)
        keys = [reply.keys[start : start + 16] for start in range(0, len(reply.keys), 16)]
        to_fill = [key for key, outcome in zip(keys, reply.outcomes, strict=True) if outcome == RESERVE_FILL]
        if not reply.lease:
            return 0
        checksums: list[int | None] = []
        for key, offset in zip(to_fill, reply.frames, strict=True):
            frame = self.arena.frame(offset, frame_bytes(OBJECT_BYTES))
            digests = page_digests(memoryview(payload_of(key)))
            frame[:OBJECT_BYTES] = payload_of(key)
            start = digests_offset(OBJECT_BYTES)
            frame[start : start + len(digests)] = digests
            checksums.append(checksum_of(digests))
        return self.client.call(
            Commit(session=self.session.id, lease=reply.lease, checksums=checksums), TIMEOUT_S
        ).accepted

    def match(self, tokens: bytes, *, lease: bool = True) -> MatchReply:
        """Match `tokens`."""
        message = Match(session=self.session.id, namespace=self.namespace, tokens=tokens, salt=self.salt, lease=lease)
        return self.client.call(message, TIMEOUT_S)

    def release(self, reply: MatchReply, host_tokens: int = 0) -> None:
        """Give the lease of a match back, as good for `host_tokens`."""
        if reply.lease:
            use = LeaseUse(lease=reply.lease, host_tokens=host_tokens)
            self.client.call(Release(session=self.session.id, uses=[use]), TIMEOUT_S)

    def holds_right_bytes(self, reply: MatchReply) -> bool:
        """Tell whether every frame of a match has the right payload, digests and checksum."""
        for number, offset in enumerate(reply.frames):
            frame = self.arena.frame(offset, frame_bytes(OBJECT_BYTES))
            start = digests_offset(OBJECT_BYTES)
            digests = frame[start : start + num_pages(OBJECT_BYTES) * DIGEST_BYTES]
            if not digests_match(digests, OBJECT_BYTES, reply.checksums[number]):
                return False
            if bytes(frame[:OBJECT_BYTES]) != payload_of(reply.keys[16 * number : 16 * number + 16]):
                return False
        return True

    def close(self) -> None:
        """End the session."""
        self.session.close()
        self.arena.close()
        self.client.close()

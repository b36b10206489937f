"""The contenders: how each is configured and started, and one way to ask any of them."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

from bench.gpu.engine_process import REPLY_FD
from bench.gpu.setting import GIB, Setting
from tests.e2e.harness import PYTHONPATH, ROOT, Server

ENGINE_START_S = 300
SERVER_START_S = 120
ASK_S = 120
ENVIRONMENT = os.environ | {
    "PYTHONPATH": PYTHONPATH,
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "LMCACHE_TRACK_USAGE": "false",
    "PYTHONHASHSEED": "0",
}
CACHETIER = {"kv_connector": "CachetierConnector", "kv_connector_module_path": "cachetier_connector"}


class ContenderError(Exception):
    """A contender did not start, died or did not answer; the text holds the end of its log."""


class MissError(Exception):
    """A contender did not find what it must hold; it goes on with the other questions."""


class Contender:
    """One vLLM engine, and the server beside it if it needs one of its own."""

    def __init__(self, name: str, setting: Setting, connector: dict[str, Any] | None, **arguments: Any) -> None:
        """Start nothing yet; `connector` is vLLM's `kv_transfer_config` but for the role, `arguments` win."""
        self.name, self._setting = name, setting
        self._log = setting.folder / f"{name}.log"
        self._options = setting.engine_arguments() | arguments
        if connector is not None:
            self._options["kv_transfer_config"] = {"kv_role": "kv_both"} | connector
        self.is_eager = bool(self._options["enforce_eager"])
        self.environment: dict[str, str] = {}  # of its engine, besides
        self.asked: list[dict[str, Any]] = []  # all answers, with the prompts' lengths as "tokens"
        self._processes: list[subprocess.Popen[str]] = []
        self._engine: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start everything; return before the engine is ready."""
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", "bench.gpu.engine_process", json.dumps(self._options)]
        self._engine = self._spawn(command, self.environment | {REPLY_FD: str(write_end)}, write_end)
        os.close(write_end)
        self._replies = os.fdopen(read_end)
        self._started_s = time.monotonic()

    def wait_until_ready(self) -> float:
        """Return how many seconds the engine took to start.

        Raises:
            ContenderError: it did not.
        """
        if self._read(ENGINE_START_S - (time.monotonic() - self._started_s)) != "ready":
            raise ContenderError(f"{self.name}: unexpected reply")
        return time.monotonic() - self._started_s

    def call(self, name: str, timeout_s: float = ASK_S, **arguments: Any) -> Any:
        """Call a method of the engine's `Driver`.

        Raises:
            ContenderError: it failed.
        """
        assert self._engine is not None
        assert self._engine.stdin
        try:
            self._engine.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            self._engine.stdin.flush()
        except OSError as error:
            raise ContenderError(f"{self.name} is gone: {error}{self._tail()}") from error
        reply = self._read(timeout_s)
        if "error" in reply:
            raise ContenderError(f"{self.name}: {reply['error']}{self._tail()}")
        if name == "ask":
            lengths = [sum(length for _, length in prompt["parts"]) for prompt in arguments["prompts"]]
            self.asked += [answer | {"tokens": length} for answer, length in zip(reply["value"], lengths, strict=True)]
        return reply["value"]

    def log_text(self) -> str:
        """Return what it has logged."""
        return self._log.read_text(errors="replace")

    def computed_tokens(self) -> int:
        """Return of how many prompt tokens it did not find the KV, and so was to store it, since it started."""
        return sum(answer["tokens"] - answer["cached"] for answer in self.asked)

    def ask(self, *parts: tuple[int, int], **params: Any) -> dict[str, Any]:
        """Ask one prompt, of `parts` (seed, length), for one token."""
        return self.call("ask", prompts=[{"parts": parts, "params": params or None}])[0]

    def reset(self) -> None:
        """Empty vLLM's own prefix cache.

        Raises:
            ContenderError: something still held blocks after ten seconds.
        """
        if not self.call("reset"):
            raise ContenderError(f"{self.name} cannot empty the GPU's prefix cache")

    def settle(self) -> None:
        """Wait until what was computed is stored."""
        time.sleep(self._setting.settle_s)

    def counters(self) -> dict[str, Any]:
        """Return what the contender counts itself, if anything."""
        return {}

    def process_ids(self) -> list[int]:
        """Return the ids of all its processes."""
        import psutil

        roots = [psutil.Process(process.pid) for process in self._processes]
        return [each.pid for root in roots for each in (root, *root.children(recursive=True))]

    def stop(self) -> None:
        """Stop everything, and kill what does not stop."""
        for process in self._processes:
            with contextlib.suppress(OSError):
                assert process.stdin
                process.stdin.close()  # an engine ends in order
                if process is not self._engine:
                    process.terminate()
        deadline_s = time.monotonic() + 20
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _spawn(self, command: list[str], extra: dict[str, str], *descriptors: int) -> "subprocess.Popen[str]":
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                env=ENVIRONMENT | self._setting.environment | extra,
                start_new_session=True,
                cwd=ROOT,
                text=True,
            )
        self._processes.append(process)
        return process

    def _read(self, timeout_s: float) -> Any:
        ready, _, _ = select.select([self._replies], [], [], max(0.0, timeout_s))
        line = self._replies.readline() if ready else ""
        if not line:
            what = "died" if ready else f"did not answer within {timeout_s:.0f} s"
            raise ContenderError(f"{self.name} {what}{self._tail()}")
        return json.loads(line)

    def _tail(self) -> str:
        return ":\n" + self.log_text()[-3000:]


class Lmcache(Contender):
    """LMCache with its server in another process, as its documentation recommends."""

    def __init__(self, setting: Setting, **arguments: Any) -> None:
        self._port, self._http_port = free_ports(2)
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self._port}
        connector = {"kv_connector": "LMCacheMPConnector", "kv_connector_extra_config": extra}
        super().__init__("lmcache", setting, connector, **arguments)

    def start(self) -> None:
        size_gib = str(self._setting.host_bytes // GIB)
        self._spawn(
            [
                *(sys.executable, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1"),
                *("--port", str(self._port), "--http-host", "127.0.0.1", "--http-port", str(self._http_port)),
                *("--l1-size-gb", size_gib, "--l1-init-size-gb", size_gib),  # all of it now, not while it is measured
                *("--eviction-policy", "LRU", "--eviction-trigger-watermark", "0.95"),
            ],
            {},
        )
        self._wait_for_server()
        super().start()

    def _wait_for_server(self) -> None:
        deadline_s = time.monotonic() + SERVER_START_S
        while True:
            if self._processes[0].poll() is not None or time.monotonic() > deadline_s:
                raise ContenderError(f"LMCache's server did not start{self._tail()}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}/healthcheck", timeout=1).close()
                return
            time.sleep(0.2)


class Cachetier(Contender):
    """This project's connector, on a server that others may share."""

    def __init__(
        self,
        setting: Setting,
        server: Server,
        name: str = "cachetier",
        connector: dict[str, Any] = CACHETIER,
        extra: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        self.server = server
        config = {"server": f"unix:{server.socket}"} | setting.connector_settings | (extra or {})
        super().__init__(name, setting, connector | {"kv_connector_extra_config": config}, **arguments)

    def settle(self) -> None:
        super().settle()
        self.server.wait_for(lambda stats: stats["leases"] == stats["chunks_pending"] == 0, 30)

    def counters(self) -> dict[str, Any]:
        return self.server.peek()

    def process_ids(self) -> list[int]:
        return [*super().process_ids(), self.server.process.pid]


def native(setting: Setting, **arguments: Any) -> Contender:
    """Return vLLM's own offloading to host memory."""
    extra = {"cpu_bytes_to_use": setting.host_bytes}
    connector = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}
    return Contender("vllm-native", setting, connector, **arguments)


def start_server(setting: Setting, folder: str, disk_bytes: int) -> Server:
    """Start cachetier's server at the one socket that all of its engines know."""
    data = setting.folder / folder
    data.mkdir(exist_ok=True)
    socket_path = setting.folder / "server.sock"
    return Server(data, host=str(setting.host_bytes), disk=str(disk_bytes), socket=socket_path)


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]

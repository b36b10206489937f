"""Starts real engines and servers for tests, and stops or kills them."""

import contextlib
import importlib.metadata
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cachetier.client import Client
from cachetier.storage.data_dir import DataDir

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "model"
# As in an environment where nothing of this project is installed, and perhaps vLLM itself stands on the path.
PYTHONPATH = os.pathsep.join(
    [*map(str, (ROOT, ROOT / "connector", ROOT / "blend")), *filter(None, [os.environ.get("PYTHONPATH")])]
)
START_S = 240
REPLY_S = 120
# For who counts hits: a machine that stands still for seconds must not turn any into a miss.
PATIENT = dict.fromkeys(("match_deadline_ms", "load_deadline_ms", "store_deadline_ms"), 60_000)


class Engine:
    """A vLLM engine in another process."""

    def __init__(
        self,
        log: Path,
        connector: dict | None = None,
        probe_dir: Path | None = None,
        kv_role: str = "kv_both",
        connector_class: str = "",
        **arguments,
    ) -> None:
        """Start it.

        Args:
            log: where its output goes.
            connector: `kv_connector_extra_config`, or None for a plain engine.
            probe_dir: where the KV of every request goes, if anywhere.
            kv_role: what the connector may do.
            connector_class: a connector for tests, `module.Class`, instead of cachetier's own.
            arguments: vLLM's engine arguments.
        """
        options = {
            "model": str(MODEL),
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 4096,
            "seed": 0,
        } | arguments
        if connector is not None:
            if probe_dir:
                connector_class = "tests.e2e.probe_connector.ProbeConnector"
            module, _, name = connector_class.rpartition(".")
            options["kv_transfer_config"] = {
                "kv_connector": name or "CachetierConnector",
                "kv_connector_module_path": module or _connector_module(),
                "kv_role": kv_role,
                "kv_connector_extra_config": connector,
            }
        read_end, write_end = os.pipe()
        environment = os.environ | {
            "CACHETIER_TEST_REPLY_FD": str(write_end),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "CACHETIER_TEST_DUMP_DIR": str(probe_dir or ""),
            "PYTHONPATH": PYTHONPATH,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [sys.executable, "-m", "tests.e2e.engine_process", json.dumps(options)]
        if options.get("tensor_parallel_size", 1) == 2:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
            command = ["nice", "-n", "5", *command]  # two ranks keep two cores busy; the server must get its turn
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[write_end],
                env=environment,
                start_new_session=True,
                cwd=ROOT,
                text=True,
            )
        os.close(write_end)
        self._replies = os.fdopen(read_end)
        self.is_busy = False
        try:
            assert self._read(START_S) == "ready"
        except BaseException:
            self.kill()
            raise

    def call(self, name: str, **arguments):
        """Call a function of `engine_process` and return its reply."""
        self.start(name, **arguments)
        return self._read(REPLY_S)

    def start(self, name: str, **arguments) -> None:
        """Start a call; `finish` returns its reply. Until then the engine is busy."""
        self.is_busy = True
        self.process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self.process.stdin.flush()

    def finish(self):
        """Return the reply of the call that was started."""
        return self._read(REPLY_S)

    def generate(self, prompts: list[dict], **arguments) -> list[dict]:
        """Complete `prompts` one after the other, unless told `at_once`."""
        return self.call("generate", prompts=prompts, **({"at_once": False} | arguments))

    def reset(self, **arguments) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.call("reset", **arguments)

    def stop(self) -> None:
        """Stop it in order."""
        self.process.stdin.close()
        try:
            self.process.wait(40)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill all its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._replies.close()

    def _read(self, timeout_s: float):
        ready, _, _ = select.select([self._replies], [], [], timeout_s)
        line = self._replies.readline() if ready else ""
        if not line:
            tail = self.log.read_text(errors="replace")[-4000:]
            raise AssertionError(f"the engine {'died' if ready else f'did not answer within {timeout_s} s'}:\n{tail}")
        self.is_busy = False
        return json.loads(line)


def _connector_module() -> str | None:
    """Return where vLLM finds the connector: None, through the entry point, where this project is installed."""
    try:
        importlib.metadata.distribution("cachetier")
    except importlib.metadata.PackageNotFoundError:
        return "cachetier_connector"
    return None


class Server:
    """`cachetier serve` in another process; may be stopped or killed, and started again on the same data."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        host: str = "256MiB",
        disk: str = "1GiB",
        socket: Path | None = None,
        program: Sequence[str] = ("cachetier.cli.main",),
        prefix: Sequence[str] = (),
    ) -> None:
        """Start it; `prefix` stands before the command, to run it in a network namespace."""
        self.folder, self.data_dir, self.socket = folder, folder / "data", socket or folder / "server.sock"
        self._program, self._prefix = program, prefix
        self._options = ["--host-bytes", host, "--disk-bytes", disk, *options]
        self.start()

    def start(self) -> None:
        """Start it and wait until it is ready."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*self._prefix, sys.executable, "-m", *self._program, "serve", "--data-dir", str(self.data_dir)),
                    *("--socket", str(self.socket), *self._options),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": PYTHONPATH},
            )
        line = self.process.stdout.readline()
        assert line.startswith("cachetier ready"), (self.folder / "server.log").read_text()[-3000:]

    def stop(self) -> None:
        """SIGTERM: it flushes and exits with 0."""
        self.process.terminate()
        assert self.process.wait(15) == 0

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def clear(self) -> None:
        """Remove the arena that a killed server leaves to the next one."""
        data_dir = DataDir(os.path.realpath(self.data_dir), -1)
        Path(data_dir.arena_path()).unlink(missing_ok=True)

    def restart_with(self, data_dir: Path) -> None:
        """Stop it and start one with another data directory at the same socket."""
        self.stop()
        self.data_dir = data_dir
        self.start()

    def stats(self) -> dict:
        """Return what `cachetier stats --json` says."""
        command = [sys.executable, "-m", "cachetier.cli.main", "stats", "--socket", str(self.socket), "--json"]
        environment = os.environ | {"PYTHONPATH": PYTHONPATH}
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr + (self.folder / "server.log").read_text()[-3000:]
        return json.loads(done.stdout)

    def peek(self) -> dict:
        """Return the same as `stats`, in a millisecond."""
        client = Client(str(self.socket))
        try:
            return json.loads(client.get("/v1/stats", 5))
        finally:
            client.close()

    def wait_for(self, condition, timeout_s: float = 15) -> dict:
        """Return the first stats for which `condition` holds."""
        deadline = time.monotonic() + timeout_s
        while not condition(stats := self.peek()):
            assert time.monotonic() < deadline, f"still {stats}"
            time.sleep(0.02)
        return stats

    def wait_until_durable(self) -> dict:
        """Wait until everything stored is on disk."""
        return self.wait_for(lambda stats: stats["chunks"] and stats["chunks_durable"] >= stats["chunks"])


@contextlib.contextmanager
def running(*parts: Engine | Server) -> Iterator[None]:
    """Kill `parts` at the end, whatever happened."""
    try:
        yield
    finally:
        for part in parts:
            part.kill()
            if isinstance(part, Server):
                part.clear()


def prompts_with_shared_prefixes(count: int, seed: int = 0, longest: int = 3000) -> list[dict]:
    """Return prompts of 3 to `longest` tokens, of which many start like another one, for an odd number of tokens."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for number in range(count):
        length = longest if number == 1 else max(3, int(longest * rng.random() ** 2))
        start = []
        if prompts and number % 2:
            other = rng.choice(prompts)
            start = other[: rng.randrange(1, len(other) + 1) | 1]
        tokens = start[:length] + [rng.randrange(20, 4000) for _ in range(length - len(start))]
        prompts.append(tokens)
    return [{"id": f"p{number}", "tokens": tokens} for number, tokens in enumerate(prompts)]


def difference(score: float, other: float) -> float:
    """Return how far two log-probabilities are apart, the less the more unlikely they are.

    Logits are bf16: the further from zero, the coarser. Below a probability of e**-4 that is what differs most.
    """
    return abs(score - other) / max(1.0, -min(score, other) / 4)


def assert_same_answers(found: list[dict], expected: list[dict], noise: float) -> None:
    """Tokens agree until a near tie; log-probabilities agree within `noise`."""
    for answer, plain in zip(found, expected, strict=True):
        steps = zip(answer["tokens"], plain["tokens"], answer["logprobs"], plain["logprobs"], strict=True)
        for token, plain_token, scores, plain_scores in steps:
            for name in scores.keys() & plain_scores.keys():
                assert difference(scores[name], plain_scores[name]) <= noise
            if token != plain_token:
                ranked = sorted(plain_scores.values(), reverse=True)
                assert ranked[0] - ranked[1] <= 2 * noise, "the tokens differ where it was no near tie"
                break


def logprob_distance(some: list[dict], others: list[dict]) -> float:
    """Return the largest difference of log-probabilities at equal tokens of equal texts."""
    worst = 0.0
    for one, other in zip(some, others, strict=True):
        for step, other_step, token, other_token in zip(
            one["logprobs"], other["logprobs"], one["tokens"], other["tokens"], strict=True
        ):
            common = step.keys() & other_step.keys()
            worst = max([worst, *(difference(step[name], other_step[name]) for name in common)])
            if token != other_token:
                break
    return worst


def dumped_kv(folder: Path, name: str, row: int = 128) -> np.ndarray:
    """Return the KV that a request's blocks held: uint16 `[tokens, heads, layers, elements]`, rows of `row` bytes."""
    [kv] = dumped_kv_of_ranks(folder, name, [(4, 4)], row)
    return kv


def dumped_kv_of_ranks(folder: Path, name: str, shapes: list[tuple[int, int]], row: int = 128) -> list[np.ndarray]:
    """Return the same for each rank, which has the heads and layers that `shapes` says.

    It is written by the step after the request's last one.
    """
    deadline = time.monotonic() + 10
    while len(paths := sorted(folder.glob(f"{name}.?.npy"))) < len(shapes):
        assert time.monotonic() < deadline, f"nothing was dumped for {name}"
        time.sleep(0.05)
    ranks = []
    for path, (heads, layers) in zip(paths, shapes, strict=True):
        grains = np.load(path).view(np.uint16).reshape(-1, heads, layers, 16, row // 2).transpose(0, 3, 1, 2, 4)
        ranks.append(grains.reshape(-1, *grains.shape[2:]))
    return ranks


def as_float(kv: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits as float32."""
    return (kv.astype(np.uint32) << 16).view(np.float32)

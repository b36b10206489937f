"""Hits from memory and from disk on a real vLLM: what `make demo` runs.

Starts `cachetier serve` and a vLLM OpenAI server, asks a few prompts cold, again from host memory (vLLM's own prefix
cache emptied), then kills the engine, restarts the server, starts a new engine and asks again: from disk. Prints a
table and leaves nothing behind. Exit code 0 if every answer was the same and every hit was counted.
"""

import argparse
import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
START_S = 600
NEAR_TIE = 0.15
ENVIRONMENT = os.environ | {
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
    "VLLM_SERVER_DEV_MODE": "1",  # allows POST /reset_prefix_cache
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Answer(NamedTuple):
    """What came back for a prompt: tokens, the top two log-probabilities of each, and the time to the first token."""

    tokens: list[str]
    top: list[list[float]]
    first_token_ms: float


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "tests" / "model"), help="Hugging Face name or folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 3584], help="prompt lengths")
    parser.add_argument("--answer-tokens", type=int, default=24, help="tokens to generate for each prompt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cachetier-demo-") as folder:
        return run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> int:
    """Ask everything three times; return the exit code."""
    connector = {
        "kv_connector": "CachetierConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"server": f"unix:{folder}/cachetier.sock"},
    }
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(started(server_command(folder), folder / "server.log"))
        with engine(options, connector, folder) as port:
            prompts = make_prompts(port, options.tokens)
            warm_up(port, prompts)
            cold = ask_all(port, prompts, options.answer_tokens, "cold")
            wait_until_durable(folder)
            reset_prefix_cache(port)
            host = ask_all(port, prompts, options.answer_tokens, "from memory")
            host_stats = stats(folder)
            print("\nkill -9 of the engine, restart of the server\n")
        server.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0, "the server did not stop in order"
        stack.enter_context(started(server_command(folder), folder / "server.log"))
        with engine(options, connector, folder) as port:
            warm_up(port, prompts)
            disk = ask_all(port, prompts, options.answer_tokens, "from disk")
            disk_stats = stats(folder)
    return report(prompts, (cold, host, disk), host_stats, disk_stats)


def report(prompts: list[list[int]], runs: tuple[list[Answer], ...], host_stats: Any, disk_stats: Any) -> int:
    """Print the table and what the counters say; return the exit code."""
    print(f"\n{'prompt tokens':>13}  {'cold':>9}  {'from memory':>16}  {'from disk':>16}  same answer")
    all_same = True
    for prompt, cold, host, disk in zip(prompts, *runs, strict=True):
        same = is_same(cold, host) and is_same(cold, disk)
        all_same &= same
        times = [run.first_token_ms for run in (cold, host, disk)]
        faster = [f"{each:6.0f} ms {times[0] / each:4.1f}x" for each in times[1:]]
        print(f"{len(prompt):>13}  {times[0]:6.0f} ms  {faster[0]:>16}  {faster[1]:>16}  {'yes' if same else 'NO'}")
    from_host, from_disk = host_stats["tokens"]["hit"]["host"], disk_stats["tokens"]["hit"]["disk"]
    print("\ntime to first token; the answers are compared token by token, up to near ties")
    print(f"counted by the server: {from_host} tokens hit in memory, {from_disk} on disk after the restart")
    print("\nwhere to look next: README.md, docs/structure.md (one request's life), `cachetier --help`, make test")
    return 0 if all_same and from_host and from_disk else 1


def is_same(one: Answer, other: Answer) -> bool:
    """Tell whether two greedy answers agree up to the first near tie."""
    for token, other_token, top in zip(one.tokens, other.tokens, one.top, strict=False):
        if token != other_token:
            return abs(top[0] - top[1]) < NEAR_TIE
    return len(one.tokens) == len(other.tokens)


def server_command(folder: Path) -> list[str]:
    """Return the command that starts the tier."""
    return [
        *(sys.executable, "-m", "cachetier.cli.main", "serve", "--data-dir", f"{folder}/data"),
        *("--socket", f"{folder}/cachetier.sock", "--host-bytes", "1GiB", "--disk-bytes", "4GiB"),
    ]


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the server and wait until it says that it is ready."""
    print("$", shown(command))
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    print(line or log.read_text()[-2000:])
    try:
        assert line, "the server did not start"
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def engine(options: argparse.Namespace, connector: dict[str, Any], folder: Path) -> Iterator[int]:
    """Start vLLM on a free port and kill it at the end: nothing may depend on its stopping in order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    longest = max(options.tokens) + options.answer_tokens
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(-(-longest // 128) * 128)),
        *("--enforce-eager", "--kv-transfer-config", json.dumps(connector)),
    ]
    print("$", shown(command))
    log = folder / "engine.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=ENVIRONMENT, start_new_session=True, cwd=ROOT
        )
    try:
        wait_until_healthy(process, port, log)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Show progress until the engine answers."""
    started_s = time.monotonic()
    with tqdm(desc="vLLM starts", bar_format="{desc} {elapsed}", leave=False, disable=None) as bar:
        while time.monotonic() - started_s < START_S:
            bar.refresh()
            with contextlib.suppress(OSError, http.client.HTTPException):
                if request(port, "GET", "/health")[0] == 200:
                    print(f"vLLM is ready after {time.monotonic() - started_s:.0f} s")
                    return
            if process.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")


def make_prompts(port: int, lengths: list[int]) -> list[list[int]]:
    """Return one prompt of each length, of which no two start alike, from this repository's own documents."""
    text = "\n\n".join(path.read_text() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
    status, body = request(port, "POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert status == 200, body
    tokens = json.loads(body)["tokens"]
    while len(tokens) < 2 * max(lengths):
        tokens += tokens
    return [tokens[number * 97 : number * 97 + length] for number, length in enumerate(lengths)]


def ask_all(port: int, prompts: list[list[int]], answer_tokens: int, name: str) -> list[Answer]:
    """Ask all prompts, one after the other."""
    bar = tqdm(prompts, desc=name, unit="prompt", leave=False, disable=None)
    return [ask(port, prompt, answer_tokens) for prompt in bar]


def warm_up(port: int, prompts: list[list[int]]) -> None:
    """Send what the tier does not hold: the first requests of an engine are slow for reasons of its own."""
    for start in (1, 2):
        ask(port, prompts[-1][start::7], 2)


def ask(port: int, prompt: list[int], answer_tokens: int) -> Answer:
    """Complete a prompt greedily, streaming."""
    body = {
        "prompt": prompt,
        "max_tokens": answer_tokens,
        "temperature": 0,
        "logprobs": 2,
        "stream": True,
        "ignore_eos": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"vLLM answered {response.status}: {response.read().decode()}")
    tokens: list[str] = []
    top: list[list[float]] = []
    first_token_ms = 0.0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        first_token_ms = first_token_ms or (time.perf_counter() - begin) * 1000
        logprobs = json.loads(line[6:])["choices"][0]["logprobs"]
        tokens += logprobs["tokens"]
        top += [sorted(scores.values(), reverse=True)[:2] for scores in logprobs["top_logprobs"]]
    connection.close()
    return Answer(tokens, top, first_token_ms)


def reset_prefix_cache(port: int) -> None:
    """Have vLLM forget what it holds itself."""
    status, body = request(port, "POST", "/reset_prefix_cache")
    assert status == 200, body


def stats(folder: Path) -> Any:
    """Return what `cachetier stats --json` says."""
    command = [sys.executable, "-m", "cachetier.cli.main", "stats", "--socket", f"{folder}/cachetier.sock", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def wait_until_durable(folder: Path) -> None:
    """Wait until all that was stored is on disk."""
    deadline_s = time.monotonic() + 60
    while (now := stats(folder))["chunks_durable"] < now["chunks"] or now["chunks_pending"] or not now["chunks"]:
        assert time.monotonic() < deadline_s, f"not durable: {now}"
        time.sleep(0.2)


def request(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Send one HTTP request to the engine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    response = connection.getresponse()
    result = response.status, response.read()
    connection.close()
    return result


def shown(command: list[str]) -> str:
    """Return a command as a person would type it."""
    words = ["cachetier" if word == "cachetier.cli.main" else word for word in command]
    words = words[2:] if words[2] == "cachetier" else ["python", *words[1:]]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())

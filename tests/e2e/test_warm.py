"""`cachetier warm` against a real vLLM OpenAI server: what it sent is hit afterwards, by whoever may."""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.harness import MODEL, ROOT, Server, running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHUNK = 64


class OpenAIServer:
    """vLLM's own server, with the connector found through the plugin's entry point."""

    def __init__(self, folder: Path, server: Server) -> None:
        connector = {
            "kv_connector": "CachetierConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"server": f"unix:{server.socket}"},
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--enforce-eager"),
            *("--served-model-name", "small", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--kv-transfer-config", json.dumps(connector), "--no-enable-prefix-caching"),
        ]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.log = folder / "vllm.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True, cwd=ROOT
            )
        deadline = time.monotonic() + 240
        while not self._is_healthy():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def complete(self, **body) -> dict:
        """Complete one token greedily."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        fields = {"model": "small", "max_tokens": 1, "temperature": 0} | body
        connection.request("POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        assert response.status == 200, text
        return json.loads(text)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _is_healthy(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def warm(url: str, server: Server, *inputs: Path) -> subprocess.CompletedProcess:
    command = [
        *(sys.executable, "-m", "cachetier.cli.main", "warm", "--url", url, "--socket", str(server.socket)),
        *("--concurrency", "4", *map(str, inputs)),
    ]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)


def hit(server: Server) -> int:
    return server.wait_for(lambda stats: stats["leases"] == 0)["tokens"]["hit"]["host"]


def test_what_was_warmed_is_hit_by_whoever_may(tmp_path):
    rng = random.Random(7)
    prompts = [[rng.randrange(20, 4000) for _ in range(length)] for length in (130, 700, 1500)]
    lines = [{"token_ids": prompt} for prompt in prompts] + [{"token_ids": prompts[1], "cache_salt": "tenant"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "texts").mkdir()
    text = (ROOT / "docs" / "goals.md").read_text()[:3000]
    (tmp_path / "texts" / "goals.md").write_text(text)
    server = Server(tmp_path)
    engine = OpenAIServer(tmp_path, server)
    with running(server, engine):
        engine.complete(prompt=list(range(40, 60)))
        done = warm(engine.url, server, tmp_path / "prompts.jsonl", tmp_path / "texts")
        assert done.returncode == 0, done.stderr
        stats = server.wait_for(lambda stats: stats["chunks_pending"] == 0)
        chunks = sum(len(line["token_ids"]) // CHUNK for line in lines)
        assert stats["tokens"]["stored"] >= chunks * CHUNK
        assert hit(server) == 0

        engine.complete(prompt=prompts[2])
        assert hit(server) == 1500 // CHUNK * CHUNK
        before = hit(server)
        engine.complete(prompt=text)
        assert hit(server) >= before + 5 * CHUNK
        for salt, tokens in (("tenant", 700 // CHUNK * CHUNK), ("another", 0)):
            before = hit(server)
            engine.complete(prompt=prompts[1], cache_salt=salt)
            assert hit(server) == before + tokens
        before = hit(server)
        engine.complete(prompt=prompts[0], kv_transfer_params={"cachetier": {"load": False}})
        assert hit(server) == before

        again = warm(engine.url, server, tmp_path / "prompts.jsonl")
        assert again.returncode == 0, again.stderr
        assert hit(server) == before + chunks * CHUNK

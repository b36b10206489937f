"""vLLM's own OpenAI servers and the router, as processes, and a client for either."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tests.e2e.harness import MODEL, PATIENT, PYTHONPATH, ROOT, Server

START_S = 240


class OpenAIClient:
    """Asks whoever speaks OpenAI's interface at `url`; any thread."""

    def __init__(self, url: str) -> None:
        self.url = url

    def complete(self, **body) -> dict:
        """Complete one token greedily."""
        return self.post("/v1/completions", {"max_tokens": 1, "temperature": 0} | body)[0]

    def tokens(self, text: str, *, is_first: bool = False) -> list[int]:
        """Return the tokens of a part of a prompt."""
        return self.post("/tokenize", {"prompt": text, "add_special_tokens": is_first})[0]["tokens"]

    def post(self, path: str, body: dict) -> tuple[dict, http.client.HTTPMessage]:
        """Send a request, and return its answer and the headers of that."""
        status, text, headers = self.exchange("POST", path, {"model": "small"} | body)
        assert status == 200, text
        return json.loads(text), headers

    def exchange(self, method: str, path: str, body: object = None) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Send a request, and return status, body and headers of its answer."""
        with self.opened(method, path, body) as response:
            return response.status, response.read(), response.headers

    @contextlib.contextmanager
    def opened(self, method: str, path: str, body: object = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the answer can be read as it comes."""
        address = urlsplit(self.url)
        with contextlib.closing(http.client.HTTPConnection(address.hostname, address.port, timeout=90)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            yield connection.getresponse()

    def is_healthy(self) -> bool:
        """Tell whether it says that it is."""
        try:
            return self.exchange("GET", "/health")[0] == 200
        except OSError:
            return False


class OpenAIServer(OpenAIClient):
    """vLLM's own server, with the connector found through the plugin's entry point."""

    def __init__(
        self,
        folder: Path,
        server: Server,
        *arguments: str,
        name: str = "vllm",
        role: str = "kv_both",
        model: Path = MODEL,
        is_alone: bool = True,
        **settings: object,
    ) -> None:
        """Start it; `settings` are the connector's, `arguments` are vLLM's. `wait_until_healthy` before it is used.

        One that is not alone computes with one thread: several would wait for each other, at every layer, while other
        engines have their cores.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.name = name
        own = {"server": f"unix:{server.socket}", "name": name, "url": self.url}
        connector = {
            "kv_connector": "CachetierConnector",
            "kv_role": role,
            "kv_connector_extra_config": own | PATIENT | settings,
        }
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--enforce-eager"),
            *("--served-model-name", "small", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--kv-transfer-config", json.dumps(connector), "--no-enable-prefix-caching", *arguments),
        ]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if not is_alone:
            environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True, cwd=ROOT
            )

    def wait_until_healthy(self) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + START_S
        while not self.is_healthy():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill all its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Router(OpenAIClient):
    """`cachetier route` for the engines of a server."""

    def __init__(self, folder: Path, server: Server, *options: str) -> None:
        """Start it; it knows the engines that the server lists by then."""
        self.log = folder / "router.log"
        command = [sys.executable, "-m", "cachetier.cli.main", "route", "--listen", "127.0.0.1:0"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--socket", str(server.socket), *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": PYTHONPATH},
            )
        self.ready_line = self.process.stdout.readline()
        assert self.ready_line.startswith("cachetier route ready: http://"), self.log.read_text()[-3000:]
        super().__init__(self.ready_line.split()[3].rstrip(","))

    def engines(self) -> dict[str, dict]:
        """Return what it knows of engines, by name."""
        return {engine["name"]: engine for engine in json.loads(self.exchange("GET", "/engines")[1])}

    def metric(self, name: str) -> float:
        """Return a metric's value."""
        lines = self.exchange("GET", "/metrics")[1].decode().splitlines()
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name + " "))

    def wait_for(self, condition, timeout_s: float = 15) -> None:
        """Wait until `condition` holds for the engines."""
        deadline = time.monotonic() + timeout_s
        while not condition(engines := self.engines()):
            assert time.monotonic() < deadline, f"still {engines}"
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGTERM: it lets answers end, and exits with 0."""
        self.process.terminate()
        assert self.process.wait(35) == 0

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

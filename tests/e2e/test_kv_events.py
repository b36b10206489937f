"""A real engine publishes what its node's tier stores and evicts, so that a router knows what a match would find."""

import json
from collections.abc import Iterator

import pytest
import zmq

from tests.connector.router import Router
from tests.connector.servers import eventually
from tests.e2e.harness import MODEL, PATIENT, Engine, Server, running
from tests.e2e.stand import prompt_of, whole_chunks
from tests.service.test_app import UnixConnection

pytestmark = pytest.mark.engine

BLOCK = 32  # half a chunk
WAIT_S = 30


class Listening:
    """A router that is subscribed to an engine's events, and the engine."""

    def __init__(self, folder, server: Server) -> None:
        endpoint = f"ipc://{folder}/events"
        self.router, self.server = Router(BLOCK), server
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.subscribe("kv@")
        self.engine = Engine(
            folder / "engine.log",
            {"server": f"unix:{server.socket}", **PATIENT},
            block_size=BLOCK,
            kv_events_config={"enable_kv_cache_events": True, "endpoint": endpoint, "topic": "kv@pod@model"},
        )
        self.num_asked = 0

    def ask(self, prompt: dict) -> None:
        """Have the engine answer a prompt; its tier is up to date when this returns."""
        self.num_asked += 1
        self.engine.generate([prompt | {"id": f"r{self.num_asked}"}])
        self.server.wait_for(lambda stats: not stats["chunks_pending"] and not stats["flush_backlog_bytes"])

    def listen(self) -> Router:
        """Have the engine make some steps, for it publishes in steps, and hear what it published."""
        self.ask({"tokens": list(range(50, 60))})
        while self.socket.poll(200):
            _, _, payload = self.socket.recv_multipart()
            self.router.hear(payload)
        return self.router

    def close(self) -> None:
        self.socket.close(0)
        self.engine.kill()


@pytest.fixture
def listening(tmp_path) -> Iterator[Listening]:
    server = Server(tmp_path, host="4MiB", disk="16MiB")
    with running(server):
        made = Listening(tmp_path, server)
        try:
            yield made
        finally:
            made.close()


def match(server: Server, prompt: dict) -> dict:
    """Ask the server in JSON what it holds of a prompt."""
    connection = UnixConnection(str(server.socket))
    question = {"model": str(MODEL), "token_ids": prompt["tokens"]}
    status, body = connection.ask("POST", "/v1/match", json.dumps(question), {"Content-Type": "application/json"})
    connection.close()
    assert status == 200, body
    return json.loads(body)["tokens"]


def test_a_router_knows_what_a_match_would_find_through_stores_and_evictions(listening):
    first = prompt_of(1, 300)
    listening.ask(first)
    eventually(lambda: listening.listen().held(first["tokens"], "STORAGE") == whole_chunks(300), WAIT_S)
    assert listening.router.held(first["tokens"], "CPU") == whole_chunks(300)
    assert listening.router.held(first["tokens"], "GPU") == 300 // BLOCK * BLOCK, "vLLM's own blocks, by the same hash"

    secret = prompt_of(2, 200, salt="tenant")
    listening.ask(secret)
    prompts = [first, *(prompt_of(seed, 900, first["tokens"][: 64 * (seed % 3)]) for seed in range(10, 22))]
    for prompt in prompts[1:]:
        listening.ask(prompt)
    stats = listening.server.peek()
    assert stats["host_evicted"] > 30
    assert stats["disk"]["evicted"] > 10

    def agrees() -> bool:
        router, found = listening.listen(), [match(listening.server, prompt)["held"] for prompt in prompts]
        return [router.held(prompt["tokens"], "CPU", "STORAGE") for prompt in prompts] == found

    eventually(agrees, WAIT_S)
    assert len({match(listening.server, prompt)["held"] for prompt in prompts}) > 2, "all, some and nothing is held"
    assert listening.router.held(secret["tokens"], "CPU", "STORAGE") == 0, "a tenant's texts are nobody else's business"

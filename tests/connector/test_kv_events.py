"""What routers are told: from the events alone, and from tokens, they know what of a text the node's tier holds."""

import dataclasses
import shutil
from typing import Any

import pytest

from cachetier_connector import kv_events
from cachetier_connector.kv_events import TierEvents
from tests.connector.blends import facts_of
from tests.connector.router import Router
from tests.connector.servers import (
    BLOCK,
    CHUNK,
    LAYOUT,
    Blocks,
    Tier,
    blocks_for,
    connect,
    eventually,
    identity,
    stats_of,
    store_op,
    tokens_of,
)  # fmt: skip
from tests.service.running import SMALL, RunningServer


class Publisher:
    """An engine's scheduler half as far as its events go, and a router that listens to it."""

    def __init__(self, server: RunningServer, weights: str, **changes: Any) -> None:
        facts = dataclasses.replace(facts_of(), **({"publishes_events": True, "layout": LAYOUT} | changes))
        self.link, self.router = connect(server), Router(facts.block_tokens)
        self.events = TierEvents(self.link, facts, identity(weights))

    def step(self) -> list[Any]:
        """Let the link thread and then the scheduler have their turns; return what was published."""
        for _ in range(4):
            self.events.ask()
        taken = self.events.take()
        self.router.learn(taken)
        return taken

    def wait_until_held(self, tokens: list[int], medium: str = "STORAGE") -> None:
        """Go on until the router knows that all complete chunks of a text are held."""
        eventually(lambda: self.step() is not None and self.router.held(tokens, medium) == len(tokens) // CHUNK * CHUNK)


@pytest.fixture
def publisher(server, request):
    made = Publisher(server, request.node.name)
    yield made
    made.link.close()


def on_disk(server: RunningServer) -> bool:
    stats = stats_of(server)
    return bool(stats["chunks_durable"] >= stats["chunks"])


def test_what_is_stored_is_published_once_in_blocks_of_the_engines_size(server, tier, publisher):
    assert publisher.step() == []
    tokens = tokens_of(1, 3 * CHUNK + 5)
    tier.store(tokens)
    publisher.wait_until_held(tokens)
    assert publisher.router.held(tokens, "CPU") == 3 * CHUNK
    assert publisher.step() == []
    other = tokens[: 2 * CHUNK] + tokens_of(2, CHUNK)
    assert publisher.router.held(other, "CPU") == 2 * CHUNK


def test_consecutive_chunks_are_one_event(server, tier, publisher):
    publisher.step()
    tokens = tokens_of(3, 4 * CHUNK)
    tier.store(tokens)
    [event] = [event for event in eventually(publisher.step) if event.medium == "CPU"]
    assert event.token_ids == tokens
    assert event.parent_block_hash is None
    assert len(set(event.block_hashes)) == 4 * CHUNK // BLOCK


def test_who_starts_on_a_full_tier_publishes_what_it_holds(server, tier, publisher):
    tokens = tokens_of(4, 3 * CHUNK)
    tier.store(tokens)
    eventually(lambda: on_disk(server))
    publisher.step()
    assert [publisher.router.held(tokens, medium) for medium in ("CPU", "STORAGE")] == [3 * CHUNK] * 2


def test_when_the_server_is_replaced_routers_learn_what_is_left(tmp_path):
    tokens = tokens_of(5, 2 * CHUNK)
    with RunningServer(tmp_path / "data") as server:
        publisher = Publisher(server, "w")
        Tier(server).store(tokens)
        eventually(lambda: on_disk(server))
        publisher.step()
        assert publisher.router.held(tokens, "CPU") == 2 * CHUNK
    with RunningServer(tmp_path / "data"):
        published = eventually(publisher.step)  # once it has found the connection gone, and the server back
        published += publisher.step()
        assert publisher.router.held(tokens, "CPU") == 0, "memory does not survive"
        assert publisher.router.held(tokens, "STORAGE") == 2 * CHUNK
        assert not any(type(event).__name__ == "AllBlocksCleared" for event in published)
        publisher.link.close()


def test_a_server_with_other_chunks_leaves_nothing_of_the_former_behind(tmp_path):
    tokens = tokens_of(7, 2 * CHUNK)
    with RunningServer(tmp_path / "data") as server:
        publisher = Publisher(server, "w")
        Tier(server).store(tokens)
        publisher.wait_until_held(tokens, "CPU")
    shutil.rmtree(tmp_path / "data")
    with RunningServer(tmp_path / "data", "--chunk-tokens", "32", *SMALL):
        eventually(publisher.step)
        assert publisher.router.held(tokens, "CPU", "STORAGE") == 0
        assert not any(publisher.router.media.values())
        publisher.link.close()


def test_weights_of_another_generation_have_nothing_yet(server, tier, publisher):
    tokens = tokens_of(6, 2 * CHUNK)
    tier.store(tokens)
    publisher.step()
    assert publisher.router.held(tokens, "CPU") == 2 * CHUNK
    publisher.events.start_generation(7)
    publisher.step()
    assert publisher.router.held(tokens, "CPU") == publisher.router.held(tokens, "STORAGE") == 0


def test_an_engine_without_steps_lets_few_events_wait_and_catches_up(server, tier, publisher, monkeypatch):
    monkeypatch.setattr(kv_events, "WAITING_MAX", 3)
    publisher.step()
    texts = [tokens_of(10 + number, CHUNK) for number in range(20)]
    for text in texts:
        tier.store(text)
        publisher.events.ask()
    assert len(publisher.events._waiting) < 8
    eventually(lambda: on_disk(server))
    publisher.step()
    publisher.step()
    assert all(publisher.router.held(text, "STORAGE") == CHUNK for text in texts)


def test_what_follows_an_image_is_not_published_for_routers_could_not_place_it(server, tier, publisher):
    publisher.step()
    tokens, before = tokens_of(30, 2 * CHUNK), stats_of(server)["chunks_durable"]
    storer = tier.storer(Blocks(LAYOUT.whole()).engine)
    storer.submit(store_op(tier.namespace, tokens, blocks_for(len(tokens)), extras=[(0, b"image")]))
    eventually(lambda: stats_of(server)["chunks_durable"] == before + 2)
    assert publisher.step() == []
    storer.stop()


def test_blocks_larger_than_chunks_are_published_as_chunks(server, tier, request):
    publisher = Publisher(server, request.node.name, block_tokens=2 * CHUNK)
    publisher.router.block_tokens = CHUNK
    tokens = tokens_of(40, 3 * CHUNK)
    tier.store(tokens)
    publisher.step()
    assert publisher.router.held(tokens, "CPU") == 3 * CHUNK
    publisher.link.close()


@pytest.mark.parametrize("publishes_events", [False, True])
def test_a_thread_asks_where_events_are_published_and_only_there(server, tier, request, publishes_events):
    publisher = Publisher(server, request.node.name, publishes_events=publishes_events)
    tokens = tokens_of(41, 2 * CHUNK)
    tier.store(tokens)
    publisher.events.start()
    if publishes_events:
        eventually(lambda: len(publisher.events._waiting) > 0)
        publisher.router.learn(publisher.events.take())
        assert publisher.router.held(tokens, "CPU") == 2 * CHUNK
    assert publisher.events._thread.is_alive() == publishes_events
    publisher.events.stop()
    assert not publisher.events._thread.is_alive()
    assert publisher.link.is_up != publishes_events, "it closes its link"
    publisher.link.close()


@pytest.mark.parametrize(("setting", "kind"), [("1", int), ("0", bytes)])
def test_hashes_have_the_form_that_vllm_is_set_to(monkeypatch, setting, kind):
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", setting)
    hashes = kv_events.block_hashes(b"k" * 16, 1024)
    assert len(set(hashes)) == 1024
    assert all(isinstance(each, kind) for each in hashes)
    assert hashes[-1] == kv_events.block_hashes(b"k" * 16, 1)[0], "the parent of the next chunk"

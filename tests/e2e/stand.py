"""One engine with one server, asked with and without the tier, and counted: what the tests of features stand on."""

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.harness import PATIENT, Engine, Server, assert_same_answers

CHUNK = 64
# The model computes logits in bfloat16: from 8 to 16 they are multiples of 1/16, and another batch shape moves some by
# one. Another prompt's KV moves them by far more, as a test shows.
NOISE = 0.1
PLAIN = {"cachetier": {"load": False, "store": False}}

FEW_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 4, reason="two ranks spin, and leave two cores none for others")


class Counts(NamedTuple):
    """Tokens counted by the server."""

    stored: int
    host: int
    disk: int


def whole_chunks(num_tokens: int) -> int:
    """Return how many of `num_tokens` tokens stand in complete chunks."""
    return num_tokens // CHUNK * CHUNK


def loadable(prompt: dict) -> int:
    """Return how much of a prompt that was stored can be loaded."""
    return min(whole_chunks(len(prompt["tokens"])), len(prompt["tokens"]) - 1)


def storable(prompt: dict, num_output: int = 8) -> int:
    """Return how much of a prompt and its answer is stored: the last token is sampled, and never computed."""
    return whole_chunks(len(prompt["tokens"]) + num_output - 1)


def prompt_of(seed: int, length: int, start: list[int] = (), **more) -> dict:
    """Return a prompt of `length` tokens that begins with `start` and goes on at random."""
    rng = random.Random(seed)
    return {"tokens": [*start, *(rng.randrange(20, 4000) for _ in range(length - len(start)))], **more}


class Stand:
    """An engine and its server."""

    def __init__(self, folder: Path, settings: Mapping[str, object] = PATIENT, **arguments) -> None:
        """Start both; `settings` are the connector's, `arguments` are the engine's."""
        self.server = Server(folder)
        try:
            self.connector = {"server": f"unix:{self.server.socket}", **settings}
            self.engine = Engine(folder / "engine.log", self.connector, **arguments)
            self.engine.generate([{"id": "first", "tokens": list(range(50, 90))}])  # one-off costs
        except BaseException:
            self.server.kill()
            raise
        self._num_asked = 0

    @property
    def last_id(self) -> str:
        """The id of the prompt that was asked last."""
        return self.last_ids(1)[0]

    def last_ids(self, count: int) -> list[str]:
        """Return the ids of the prompts that were asked last, in their order."""
        return [f"r{self._num_asked - before}" for before in reversed(range(count))]

    def stop(self) -> None:
        """Stop both in order, after a check that nothing was left behind or went wrong on the way."""
        stats = self.settled()
        assert stats["leases"] == stats["checksum_failures"] == stats["loads_failed"] == stats["stores_dropped"] == 0
        self.engine.stop()
        self.server.stop()

    def kill(self) -> None:
        """Kill both."""
        self.engine.kill()
        self.server.kill()

    def settled(self) -> dict:
        """Return the server's statistics once nothing is on its way to or from it."""
        return self.server.wait_for(lambda stats: stats["leases"] == 0 and stats["chunks_pending"] == 0)

    def counts(self) -> Counts:
        """Return what was counted so far."""
        tokens = self.settled()["tokens"]
        return Counts(tokens["stored"], tokens["hit"]["host"], tokens["hit"]["disk"])

    def wait_until_stored(self, before: Counts, num_tokens: int) -> None:
        """Wait until exactly `num_tokens` more tokens than `before` are stored."""
        self.server.wait_for(lambda stats: stats["tokens"]["stored"] - before.stored >= num_tokens)
        assert self.counts().stored - before.stored == num_tokens

    def ask(self, prompts: list[dict], *, keep: bool = False, **arguments) -> list[dict]:
        """Complete `prompts`, with vLLM's own prefix cache emptied before unless told to `keep` it."""
        if not keep:
            self.engine.reset()
        named = []
        for prompt in prompts:
            self._num_asked += 1
            named.append(prompt | {"id": f"r{self._num_asked}"})
        return self.engine.generate(named, **arguments)

    def plain(self, prompts: list[dict], **arguments) -> list[dict]:
        """Complete `prompts` without the tier."""
        before = self.counts()
        answers = self.ask([prompt | {"params": PLAIN} for prompt in prompts], **arguments)
        assert self.counts() == before, "a request that wants nothing of the tier was counted"
        return answers

    def assert_hits(self, prompts: list[dict], **arguments) -> list[dict]:
        """Ask `prompts`: all that can be loaded is loaded, from memory, and nothing is stored again; return answers."""
        before = self.counts()
        answers = self.ask(prompts, **arguments)
        after = self.counts()
        assert [answer["cached"] for answer in answers] == [loadable(prompt) for prompt in prompts]
        assert after.host - before.host == sum(loadable(prompt) for prompt in prompts)
        assert after.stored == before.stored
        return answers

    def assert_no_hits(self, prompts: list[dict], **arguments) -> list[dict]:
        """Ask `prompts`: nothing is loaded; return answers."""
        before = self.counts()
        answers = self.ask(prompts, **arguments)
        after = self.counts()
        assert [answer["cached"] for answer in answers] == [0] * len(prompts)
        assert (after.host, after.disk) == (before.host, before.disk)
        return answers

    def assert_stored_then_hit(self, prompts: list[dict], num_output: int = 8, **arguments) -> None:
        """Ask `prompts`, which share nothing, plainly, cold and warm: the same answers, and exactly what is due is
        stored and loaded."""
        expected = self.plain(prompts, max_tokens=num_output, **arguments)
        before = self.counts()
        cold = self.assert_no_hits(prompts, max_tokens=num_output, **arguments)
        self.wait_until_stored(before, sum(storable(prompt, num_output) for prompt in prompts))
        warm = self.assert_hits(prompts, max_tokens=num_output, **arguments)
        assert_same_answers(cold, expected, NOISE)
        assert_same_answers(warm, expected, NOISE)


def standing(name: str, **arguments):
    """Return a fixture: a `Stand` for the tests of one module, stopped in order and checked when they are done."""

    @pytest.fixture(scope="module", name=name)
    def make(tmp_path_factory):
        stand = Stand(tmp_path_factory.mktemp(name), **arguments)
        try:
            yield stand
            stand.stop()
        finally:
            stand.kill()

    return make

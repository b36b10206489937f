"""A consumer loads a prompt while a producer still computes it: with real engines that share a server."""

import itertools
import os
import time
from pathlib import Path

import pytest

from tests.e2e.harness import PATIENT, Engine, Server, assert_same_answers, running
from tests.e2e.stand import CHUNK, FEW_CORES, NOISE, loadable, prompt_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PRODUCER = "the-producer"
# No test waits for so long: where a wait is to end, something else than its deadline has to end it.
DEADLINES = PATIENT | {"wait_deadline_ms": 60_000}
SOON_S = 30
# Every step of a prompt that is called "paced" takes 30 ms or more, and a prompt takes many.
PACED = {"connector_class": "tests.e2e.paced_connector.PacedConnector", "max_num_batched_tokens": 128}


class Pair:
    """A producer and a consumer with one server."""

    def __init__(self, folder: Path, producer: dict[str, int], consumer: dict[str, int]) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self.server = Server(folder)
        self.parts: list[Engine | Server] = [self.server]
        try:
            self.producer = self.start(PRODUCER, "kv_producer", **PACED, **producer)
            self.consumer = self.start("the-consumer", "kv_consumer", **consumer)
        except BaseException:
            self.kill()
            raise

    def start(self, name: str, kv_role: str, **arguments) -> Engine:
        """Start another engine."""
        settings = {"server": f"unix:{self.server.socket}", "name": name} | DEADLINES
        with pytest.MonkeyPatch.context() as patch:  # a core for each, or one stops where the threads of another spin
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(len(self.parts) % (os.cpu_count() or 1)))
            engine = Engine(self._folder / f"{name}.log", settings, kv_role=kv_role, **arguments)
        self.parts.append(engine)
        engine.generate([{"id": "first", "tokens": list(range(50, 90))}])  # one-off costs
        return engine

    def kill(self) -> None:
        """Kill all."""
        with running(*self.parts):
            pass

    def prefill(self, prompt: dict, producer: Engine | None = None) -> None:
        """Have a producer start to compute a prompt."""
        prompts = [prompt | {"id": f"paced{next(self._numbers)}"}]
        (producer or self.producer).start("generate", prompts=prompts, max_tokens=1)

    def decode(self, prompt: dict, **params: object) -> None:
        """Have the consumer start to answer it, with nothing in vLLM's own cache."""
        self.consumer.reset()
        prompts = [prompt | {"id": f"r{next(self._numbers)}", "params": {"cachetier": params}}]
        self.consumer.start("generate", prompts=prompts)

    def answer_of(self, prompt: dict, **params: object) -> dict:
        """Return the consumer's answer."""
        self.decode(prompt, **params)
        return self.consumer.finish()[0]

    def settled(self) -> dict:
        """Return what was counted once nobody reads or stores any more."""
        return self.server.wait_for(lambda stats: stats["leases"] == stats["chunks_pending"] == 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"), {}, {})
    yield pair
    pair.kill()


def assert_handed_over(pair: Pair, prompt: dict) -> None:
    """Both get the prompt at once: the consumer computes what comes after the last chunk, and answers right."""
    plain, before = pair.answer_of(prompt, load=False), pair.settled()
    pair.prefill(prompt)
    answer = pair.answer_of(prompt, prefill=PRODUCER)
    pair.producer.finish()
    after = pair.settled()
    assert_same_answers([answer], [plain], NOISE)
    assert answer["cached"] == loadable(prompt)
    assert after["tokens"]["hit"]["host"] - before["tokens"]["hit"]["host"] == loadable(prompt)
    assert after["tokens"]["waited"] - before["tokens"]["waited"] == loadable(prompt)
    assert after["tokens"]["stored"] - before["tokens"]["stored"] == loadable(prompt)
    assert after["loads_failed"] == before["loads_failed"]
    assert after["checksum_failures"] == 0


def test_a_consumer_loads_what_a_producer_is_computing_and_computes_only_the_rest(pair):
    assert_handed_over(pair, prompt_of(1, 1500))


def test_what_was_held_is_loaded_with_what_is_waited_for(pair):
    first = prompt_of(2, 700)
    assert_handed_over(pair, first)
    longer, before = prompt_of(3, 1400, start=first["tokens"]), pair.settled()["tokens"]
    plain = pair.answer_of(longer, load=False)
    pair.prefill(longer)
    answer = pair.answer_of(longer, prefill=PRODUCER)
    pair.producer.finish()
    after = pair.settled()["tokens"]
    assert_same_answers([answer], [plain], NOISE)
    assert answer["cached"] == loadable(longer)
    assert after["waited"] - before["waited"] == loadable(longer) - loadable(first)


def test_a_request_whose_producer_is_unknown_or_does_nothing_is_computed(pair):
    for seed, name in ((4, "nobody"), (5, PRODUCER)):
        prompt = prompt_of(seed, 500)
        plain, before = pair.answer_of(prompt, load=False), pair.settled()["tokens"]
        answer = pair.answer_of(prompt, prefill=name)
        assert_same_answers([answer], [plain], NOISE)
        assert answer["seconds"] < SOON_S
        assert pair.settled()["tokens"]["hit"] == before["hit"]


def test_when_the_producer_is_killed_the_consumer_computes_the_rest_at_once(pair):
    prompt = prompt_of(6, 3000)
    plain = pair.answer_of(prompt, load=False)
    victim = pair.start("the-victim", "kv_producer", **PACED)
    before = pair.settled()
    pair.prefill(prompt, victim)
    pair.decode(prompt, prefill="the-victim")
    pair.server.wait_for(lambda stats: stats["tokens"]["stored"] - before["tokens"]["stored"] >= 5 * CHUNK)
    victim.kill()
    killed_s = time.monotonic()
    answer = pair.consumer.finish()[0]
    assert time.monotonic() - killed_s < SOON_S
    assert_same_answers([answer], [plain], NOISE)
    after = pair.settled()
    assert 5 * CHUNK <= after["tokens"]["waited"] - before["tokens"]["waited"] < loadable(prompt)
    assert after["loads_failed"] == before["loads_failed"] + 1


def test_an_aborted_request_leaves_nothing_behind(pair):
    prompt, other = prompt_of(7, 3000), prompt_of(8, 900)
    plain, before = [pair.answer_of(each, load=False) for each in (prompt, other)], pair.settled()
    pair.prefill(prompt)
    pair.consumer.reset()
    waiting = prompt | {"id": "aborted", "params": {"cachetier": {"prefill": PRODUCER}}}
    pair.consumer.start("abort_after", prompt=waiting, seconds=0.4)
    pair.server.wait_for(lambda stats: stats["leases"] == 1)
    pair.consumer.finish()
    stats = pair.server.wait_for(lambda stats: stats["leases"] == 0)
    assert stats["tokens"]["stored"] - before["tokens"]["stored"] < loadable(prompt), "it was not in the middle"
    answer = pair.answer_of(other)
    pair.producer.finish()
    assert_same_answers([answer], plain[1:], NOISE)
    pair.settled()
    again = pair.answer_of(prompt)
    assert_same_answers([again], plain[:1], NOISE)
    assert again["cached"] == loadable(prompt)


@FEW_CORES
@pytest.mark.parametrize(
    ("producer", "consumer"),
    [
        ({"tensor_parallel_size": 2, "block_size": 32}, {"block_size": 128}),
        ({"block_size": 128}, {"tensor_parallel_size": 2, "block_size": 32}),
    ],
    ids=["two ranks to one", "one rank to two"],
)
def test_producer_and_consumer_may_differ_in_ranks_and_blocks(tmp_path, producer, consumer):
    pair = Pair(tmp_path, producer, consumer)
    try:
        assert_handed_over(pair, prompt_of(9, 900))
    finally:
        pair.kill()

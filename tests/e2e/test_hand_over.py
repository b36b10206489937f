"""A consumer loads a prompt while a producer still computes it: with real engines that share a server."""

import time

import pytest

from tests.e2e.harness import PATIENT, Engine, Server, assert_same_answers, running
from tests.e2e.stand import NOISE, loadable, prompt_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PRODUCER = "the-producer"
# Every step of a prompt that is called "paced" takes 30 ms or more, so that a prompt takes many steps and half a second.
PACED = {"connector_class": "tests.e2e.paced_connector.PacedConnector", "max_num_batched_tokens": 128}
PREFILLED = {"cachetier": {"prefill": PRODUCER}}


class Pair:
    """A producer and a consumer with one server."""

    def __init__(self, folder, producer: dict | None = None, consumer: dict | None = None) -> None:
        self.server = Server(folder)
        settings = {"server": f"unix:{self.server.socket}"} | PATIENT
        self.parts: list[Engine | Server] = [self.server]
        self.producer = self._start(
            folder / "producer.log", settings | {"name": PRODUCER}, kv_role="kv_producer", **(PACED | (producer or {}))
        )
        self.consumer = self._start(folder / "consumer.log", settings, kv_role="kv_consumer", **(consumer or {}))
        self._numbers = iter(range(1_000_000))

    def _start(self, *arguments, **settings) -> Engine:
        with pytest.MonkeyPatch.context() as patch:
            if settings.get("tensor_parallel_size", 1) == 1:  # or each would stop where the other's threads spin
                patch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(len(self.parts) % 2))
            engine = Engine(*arguments, **settings)
        self.parts.append(engine)
        engine.generate([{"id": "first", "tokens": list(range(50, 90))}])  # one-off costs
        return engine

    def prefill(self, prompt: dict) -> None:
        """Have the producer start to compute a prompt."""
        self.producer.start("generate", prompts=[prompt | {"id": f"paced{next(self._numbers)}"}], max_tokens=1)

    def decode(self, prompt: dict, **more) -> dict:
        """Have the consumer answer it."""
        self.consumer.reset()
        return self.consumer.generate([prompt | {"id": f"r{next(self._numbers)}"} | more])[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    with running(*pair.parts):
        yield pair


def test_a_consumer_loads_what_a_producer_is_computing_and_computes_only_the_rest(pair):
    prompt = prompt_of(1, 1500)
    plain = pair.decode(prompt, params={"cachetier": {"load": False}})
    before = pair.server.peek()
    pair.prefill(prompt)
    answer = pair.decode(prompt, params=PREFILLED)
    prefilled = pair.producer.finish()[0]
    stats = pair.server.wait_for(lambda stats: stats["leases"] == 0)
    print(answer["first_token_s"], prefilled["first_token_s"], answer["cached"], stats["tokens"])
    assert_same_answers([answer], [plain], NOISE)
    assert answer["cached"] == loadable(prompt)
    assert stats["tokens"]["hit"]["host"] - before["tokens"]["hit"]["host"] == loadable(prompt)
    assert stats["tokens"]["waited"] - before["tokens"]["waited"] == loadable(prompt)
    assert stats["tokens"]["stored"] - before["tokens"]["stored"] == loadable(prompt)
    assert stats["loads_failed"] == before["loads_failed"]

"""`cachetier route` with real vLLM servers: right answers whatever comes and goes, and little left to compute.

Two producers and two consumers serve all tests of this module. The later ones kill some of them, and work with those
that are left, whichever these are.
"""

import concurrent.futures
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachetier.cli.main import main
from tests.e2e.harness import MODEL, Server, assert_same_answers, running
from tests.e2e.openai_servers import OpenAIClient, OpenAIServer, Router
from tests.e2e.stand import NOISE, PLAIN, loadable, prompt_of, storable

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MIN_PREFILL_TOKENS = 128
VLLM = ("--max-num-batched-tokens", "256", "--enable-prompt-tokens-details", "--max-num-seqs", "16")


class Answer(NamedTuple):
    """What came back, in the form of `assert_same_answers`, and who made it."""

    tokens: dict
    consumer: str
    producer: str


def body_of(prompt: dict, **more) -> dict:
    return {"model": "small", "prompt": prompt["tokens"], "temperature": 0, "max_tokens": 8, "ignore_eos": True} | more


def ask(client: OpenAIClient, prompt: dict, **more) -> Answer:
    """Complete a prompt greedily."""
    form = {"logprobs": 4, "return_tokens_as_token_ids": True}
    answer, headers = client.post("/v1/completions", body_of(prompt, **form) | more)
    scores = answer["choices"][0]["logprobs"]
    details = answer["usage"]["prompt_tokens_details"] or {}
    tokens = {"tokens": scores["tokens"], "logprobs": scores["top_logprobs"], "cached": details.get("cached_tokens", 0)}
    return Answer(tokens, headers.get("X-Cachetier-Consumer", ""), headers.get("X-Cachetier-Producer", ""))


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    assert_same_answers([each.tokens for each in answers], [each.tokens for each in expected], NOISE)


class RoutedStand:
    """Engines that share a server, and the router in front of them."""

    def __init__(self, folder: Path) -> None:
        """Start the server."""
        self.folder, self.model = folder, folder / "model"
        self.model.symlink_to(MODEL)
        self.server = Server(folder)
        self.engines: dict[str, OpenAIServer] = {}
        self.router: Router | None = None

    def open(self) -> None:
        """Start engines and router, and wait until they serve."""
        for name, role in (("p1", "producer"), ("p2", "producer"), ("c1", "consumer"), ("c2", "consumer")):
            self.start(name, role)
        for engine in self.engines.values():
            engine.wait_until_healthy()
            ask(engine, prompt_of(0, 40), kv_transfer_params=PLAIN)  # one-off costs
        self.router = Router(self.folder, self.server, "--min-prefill-tokens", str(MIN_PREFILL_TOKENS))

    def start(self, name: str, role: str, **settings: object) -> OpenAIServer:
        """Start an engine, and wait for nothing."""
        engine = OpenAIServer(
            self.folder, self.server, *VLLM, name=name, role=f"kv_{role}", model=self.model, is_alone=False, **settings
        )
        self.engines[name] = engine
        return engine

    def kill(self, name: str) -> None:
        """Kill an engine."""
        self.engines.pop(name).kill()

    def kill_all(self) -> None:
        """Kill whatever is left."""
        for part in (*self.engines.values(), *filter(None, [self.router])):
            part.kill()
        with running(self.server):
            pass

    def only(self, first_letter: str) -> OpenAIServer:
        """Return an engine of a kind."""
        return next(engine for name, engine in self.engines.items() if name.startswith(first_letter))

    def plain(self, prompts: list[dict], engine: OpenAIServer | None = None) -> list[Answer]:
        """Complete prompts without router and tier."""
        return [ask(engine or self.only("c"), prompt, kv_transfer_params=PLAIN) for prompt in prompts]

    def routed(self, prompts: list[dict], **more) -> list[Answer]:
        return [ask(self.router, prompt, **more) for prompt in prompts]

    def stored(self) -> int:
        """Return how many tokens were stored once nothing is on its way."""
        stats = self.server.wait_for(lambda stats: stats["leases"] == 0 and stats["chunks_pending"] == 0)
        return int(stats["tokens"]["stored"])

    def wait_until_stored(self, before: int, prompts: list[dict]) -> None:
        """Wait until the producers' part of `prompts` is in the tier."""
        count = sum(storable(prompt, num_output=1) for prompt in prompts)
        self.server.wait_for(lambda stats: stats["tokens"]["stored"] >= before + count)
        assert self.stored() == before + count

    def computed(self) -> int:
        """Return how many tokens of prompts the consumers have computed."""
        pattern = r'^vllm:prompt_tokens_by_source_total\{.*source="local_compute"\} ([\d.]+)$'
        texts = [
            engine.exchange("GET", "/metrics")[1].decode() for name, engine in self.engines.items() if name[0] == "c"
        ]
        return sum(int(float(value)) for text in texts for value in re.findall(pattern, text, re.MULTILINE))


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoutedStand]:
    stand = RoutedStand(tmp_path_factory.mktemp("route"))
    try:
        stand.open()
        yield stand
        stand.router.stop()
    finally:
        stand.kill_all()


def test_two_producers_and_two_consumers_answer_like_one_plain_engine(stand):
    prompts = [prompt_of(600 + n, length) for n, length in enumerate((700, 650, 333, 1000, 512, 600, 900, 130))]
    expected, before = stand.plain(prompts), stand.stored()
    first = stand.routed(prompts)
    assert_same(first, expected)
    assert {each.producer for each in first} == {"p1", "p2"}
    assert {each.consumer for each in first} == {"c1", "c2"}
    stand.wait_until_stored(before, prompts)

    computed = stand.computed()
    again = stand.routed(prompts)
    assert_same(again, expected)
    assert [each.tokens["cached"] for each in again] == [loadable(prompt) for prompt in prompts]
    assert stand.computed() - computed == sum(len(prompt["tokens"]) - loadable(prompt) for prompt in prompts)

    [shorter] = stand.routed([prompt_of(620, MIN_PREFILL_TOKENS - 1)])
    assert shorter.producer == ""


def test_what_one_producer_stored_any_consumer_loads_in_a_stream_too(stand):
    prompt = prompt_of(630, 700)
    [expected], before = stand.plain([prompt]), stand.stored()
    [first] = stand.routed([prompt], kv_transfer_params={"cachetier": {"prefill": "p2"}})
    assert first.producer == "p2"
    stand.wait_until_stored(before, [prompt])
    for name in ("c1", "c2"):
        direct = ask(stand.engines[name], prompt)
        assert direct.tokens["cached"] == loadable(prompt)
        assert_same([direct], [expected])
    with stand.router.opened("POST", "/v1/completions", body_of(prompt, stream=True)) as response:
        events = [line[6:] for line in response.read().splitlines() if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    whole, _ = stand.only("c").post("/v1/completions", body_of(prompt))
    assert text == whole["choices"][0]["text"]


def test_one_producer_serves_three_consumers_once_the_other_is_given_that_role(stand):
    def give(role: str) -> None:
        assert main(["role", "p2", role, "--socket", str(stand.server.socket)]) == 0
        stand.router.wait_for(lambda engines: engines["p2"]["role"] == role, timeout_s=3)
        time.sleep(1.1)  # the engine itself is told within a second

    give("consumer")
    prompts = [prompt_of(640 + n, 400) for n in range(6)]
    expected, before = stand.plain(prompts), stand.stored()
    answers = stand.routed(prompts)
    assert_same(answers, expected)
    assert {each.producer for each in answers} == {"p1"}
    assert {each.consumer for each in answers} == {"c1", "c2", "p2"}
    stand.wait_until_stored(before, prompts)
    again = stand.routed(prompts)
    assert_same(again, expected)
    assert [each.tokens["cached"] for each in again] == [loadable(prompt) for prompt in prompts]
    give("producer")


def test_a_producer_killed_in_the_middle_of_a_prefill_costs_no_request(stand):
    prompt = prompt_of(650, 3900)
    [expected] = stand.plain([prompt])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, stand.router, prompt, kv_transfer_params={"cachetier": {"prefill": "p1"}})
        pattern = re.compile(rb"^vllm:num_requests_running\{.*\} 1.0$", re.MULTILINE)
        deadline = time.monotonic() + 20
        while not pattern.search(stand.engines["p1"].exchange("GET", "/metrics")[1]):
            assert time.monotonic() < deadline, "the producer was never seen to compute"
        stand.kill("p1")
        started = time.monotonic()
        answer = asked.result(60)
    assert time.monotonic() - started < 30
    assert_same([answer], [expected])
    stand.router.wait_for(lambda engines: "p1" not in engines)
    assert stand.router.metric('cachetier_route_failures_total{engine="p1",work="prefill"}') == 1
    [after] = stand.routed([prompt_of(651, 400)])
    assert after.producer == "p2"


def test_a_consumer_killed_in_the_middle_of_a_stream_is_an_error_at_once(stand):
    body = body_of(prompt_of(660, 300), stream=True, max_tokens=3500)
    with stand.router.opened("POST", "/v1/completions", body) as response:
        consumer = response.headers["X-Cachetier-Consumer"]
        for _ in range(6):
            assert response.readline()
        stand.kill(consumer)
        started = time.monotonic()
        rest = response.read()
    assert time.monotonic() - started < 5
    events = [line[6:] for line in rest.splitlines() if line.startswith(b"data: ")]
    error = json.loads(events[-1])["error"]
    assert (error["code"], error["type"]) == (502, "BadGatewayError")
    stand.router.wait_for(lambda engines: consumer not in engines)
    prompts = [prompt_of(661 + n, 300) for n in range(3)]
    answers = stand.routed(prompts)
    assert_same(answers, stand.plain(prompts))
    assert {each.consumer for each in answers} == {stand.only("c").name}


def other_weights(folder: Path) -> Path:
    """Make a model of the same name and shape that answers something else."""
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    changed = {name: value + 0.3 * value.float().std() * torch.randn(value.shape) for name, value in weights.items()}
    same_type = {name: value.to(weights[name].dtype).contiguous() for name, value in changed.items()}
    save_file(same_type, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def telling(stand: RoutedStand, old: OpenAIServer, new: OpenAIServer) -> tuple[list[dict], dict[str, list[Answer]]]:
    """Return 20 prompts that `old` and `new` answer so differently that the comparison tells, and their plain answers.

    They are shorter than what the router remembers the beginnings of, so that it sends them to either in turn.
    """
    prompts: list[dict] = []
    expected: dict[str, list[Answer]] = {"old": [], "new": []}
    for number in range(60):
        prompt = prompt_of(700 + number, 250)
        [one], [other] = stand.plain([prompt], old), stand.plain([prompt], new)
        try:
            assert_same([one], [other])
        except AssertionError:
            prompts.append(prompt)
            expected["old"].append(one)
            expected["new"].append(other)
        if len(prompts) == 20:
            return prompts, expected
    raise AssertionError(f"only {len(prompts)} of 60 prompts tell the weights apart")


def test_an_upgrade_under_load_mixes_no_weights(stand):
    """Of 200 requests the first come before the new engines are added, the last after the old ones were taken out."""
    replacement = stand.folder / "replacement"
    replacement.symlink_to(other_weights(stand.folder / "new-weights"))
    os.replace(replacement, stand.model)
    old, old_consumer = list(stand.engines), stand.only("c")
    new = [stand.start("p3", "producer", url=""), stand.start("c3", "consumer", url="")]
    for engine in new:
        engine.wait_until_healthy()
    prompts, expected = telling(stand, old_consumer, new[1])

    def call(method: str, path: str, body: object = None) -> None:
        status, text, _ = stand.router.exchange(method, path, body)
        assert status in (200, 201), text

    def ask_one(number: int) -> Answer:
        if number == 60:
            for engine, role in zip(new, ("producer", "consumer"), strict=True):
                call("POST", "/engines", {"name": engine.name, "role": role, "url": engine.url})
        if number == 140:
            for name in old:
                call("DELETE", f"/engines/{name}")
        return ask(stand.router, prompts[number % len(prompts)])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask_one, range(200)))
    ages = {"c3": "new", old_consumer.name: "old"}
    for number, answer in enumerate(answers):
        assert_same([answer], [expected[ages[answer.consumer]][number % len(prompts)]])
    assert {each.consumer for each in answers[:50]} == {old_consumer.name}
    assert {each.consumer for each in answers[70:130]} == {old_consumer.name, "c3"}
    assert {each.consumer for each in answers[-50:]} == {"c3"}
    pairs = {(each.producer, each.consumer) for each in answers if each.producer}
    assert pairs == {("p2", old_consumer.name), ("p3", "c3")}
    assert {ages[each.consumer] for each in answers if each.tokens["cached"]} == {"old", "new"}

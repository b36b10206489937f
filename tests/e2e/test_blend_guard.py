"""The guard on a real engine: what it finds is what log-probabilities show, and it leaves nothing behind."""

import math

import pytest

from tests.e2e.blending import BLENDING, DOCUMENTS, QUESTION, BlendStand, blended, joined
from tests.e2e.harness import assert_same_answers
from tests.e2e.stand import FEW_CORES, NOISE, PLAIN, prompt_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

# The model goes on with what it has seen, so the answer depends on what documents of so few tokens tell each other.
REPEATED, CYCLE, SHORT_CYCLE = [300] * 256, list(range(300, 364)) * 4, list(range(400, 408)) * 32
DEPENDENT = [*CYCLE, *REPEATED, *SHORT_CYCLE, *REPEATED, *REPEATED[:20]]
INDEPENDENT = [*prompt_of(50, 37)["tokens"], *CYCLE, *CYCLE, *CYCLE[:20]]
ALL_SCORES = {"logprobs": -1}


class GuardStand(BlendStand):
    """A stand that checks every blended request that it may."""

    def __init__(self, folder, **arguments) -> None:
        super().__init__(folder, BLENDING | {"blend_guard": 1.0}, max_logprobs=-1, **arguments)

    def checks(self) -> dict:
        """Return what checks have found so far."""
        return self.server.peek()["blend"]

    def checked(self, prompt: list[int], **wishes) -> tuple[dict, float, int]:
        """Return the answer to a blended request and what its check finds: the divergence, and 1 if both agree."""
        before = self.checks()
        [answer] = self.ask([{"tokens": prompt, "params": blended(**wishes)} | ALL_SCORES], max_tokens=2)
        after = self.server.wait_for(lambda stats: stats["blend"]["checked"] > before["checked"])["blend"]
        assert after["checked"] == before["checked"] + 1
        self.engine.reset()  # fails while a block is in use
        return answer, after["kl"] - before["kl"], after["agreed"] - before["agreed"]

    def assert_divergence_found(self, prompt: list[int]) -> float:
        """Blend `prompt` as it is: its check finds the divergence from a plain request that log-probabilities show."""
        [full] = self.plain([{"tokens": prompt} | ALL_SCORES], max_tokens=2)
        answer, kl, agrees = self.checked(prompt, select="none")
        assert kl == pytest.approx(divergence(full, answer), rel=0.1, abs=0.002)
        assert agrees == (full["tokens"][0] == answer["tokens"][0])
        return kl


def divergence(full: dict, other: dict) -> float:
    """Return the Kullback-Leibler divergence of the first token of `other` from that of `full`, in nats."""
    scores, others = full["logprobs"][0], other["logprobs"][0]
    assert len(scores) == len(others) == 4096, "not all tokens have a log-probability"
    return sum(math.exp(score) * (score - others[token]) for token, score in scores.items())


# Tests with engines of their own come first: the engine that the others share stays until the end.


@FEW_CORES
def test_ranks_compute_a_check_together(tmp_path):
    stand = GuardStand(tmp_path, tensor_parallel_size=2)
    try:
        stand.register({"repeated": REPEATED, "cycle": CYCLE, "short cycle": SHORT_CYCLE})
        assert stand.assert_divergence_found(DEPENDENT) > 1
        stand.stop()
    finally:
        stand.kill()


def test_a_preempted_request_is_not_checked(tmp_path):
    """33 blocks of 32 tokens, for two requests that begin with 15 and would end with 61: the later one has to wait."""
    stand = GuardStand(tmp_path, block_size=32, num_gpu_blocks_override=34, max_model_len=1024, async_scheduling=True)
    try:
        stand.register({"b": DOCUMENTS["b"]})
        prompt = joined(prompt_of(51, 90)["tokens"], "b", QUESTION)
        asked = {"tokens": prompt, "params": blended(), "max_tokens": 600}
        num_before = stand.engine.call("preemptions")
        stand.ask([prompt_of(52, 100, params=PLAIN, max_tokens=900), asked], at_once=True)
        assert stand.engine.call("preemptions") > num_before
        assert stand.blend_counts()[0] == 1
        stand.checked(prompt)
        assert stand.checks()["checked"] == 1, "the blocks of the first one hold what vLLM computed"
        stand.stop()
    finally:
        stand.kill()


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    stand = GuardStand(tmp_path_factory.mktemp("guard"))
    try:
        stand.register({"repeated": REPEATED, "cycle": CYCLE, "short cycle": SHORT_CYCLE})
        yield stand
        stand.stop()
    finally:
        stand.kill()


def test_a_check_finds_the_divergence_that_log_probabilities_show(stand):
    """In three pieces, and in one that begins in the middle of a block."""
    assert stand.assert_divergence_found(DEPENDENT) > 1
    assert stand.assert_divergence_found(INDEPENDENT) < 0.1


def test_a_check_of_what_is_computed_anyway_finds_nothing(stand):
    _, kl, agrees = stand.checked(DEPENDENT, select="query", budget=1.0)
    assert kl < 0.01
    assert agrees == 1


def test_an_aborted_request_is_not_checked(stand):
    num_before, num_blended = stand.checks()["checked"], stand.blend_counts()[0]
    prompt = {"tokens": DEPENDENT, "params": blended(), "id": "aborted", "max_tokens": 3000}
    stand.engine.call("abort_after", prompt=prompt, seconds=2)
    stand.engine.reset()
    assert stand.blend_counts()[0] == num_blended + 1
    stand.checked(DEPENDENT)
    assert stand.checks()["checked"] == num_before + 1


def test_plain_requests_beside_and_after_a_check_are_answered_as_ever(stand):
    """Also with the same prompt: nobody finds the blocks that the check changed."""
    num_before, beside = stand.checks()["checked"], prompt_of(53, 300, params=PLAIN, max_tokens=60)
    after = {"tokens": DEPENDENT, "params": PLAIN}
    expected = stand.plain([beside, after])
    [_, answer] = stand.ask([{"tokens": DEPENDENT, "params": blended(), "max_tokens": 1}, beside], at_once=True)
    stand.server.wait_for(lambda stats: stats["blend"]["checked"] == num_before + 1)
    [same] = stand.ask([after], keep=True)
    assert same["cached"] == len(CYCLE), "at the beginning it is exact"
    assert_same_answers([answer, same], expected, NOISE)

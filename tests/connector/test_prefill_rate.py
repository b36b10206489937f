"""What a prompt costs to compute is learnt from the times of steps, whoever shares them, whatever went wrong once."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier_connector.prefill_rate import (
    STEP_TOKENS_MIN,
    STEPS_REMEMBERED,
    STEPS_UNDER_WAY_MAX,
    PrefillModel,
    PrefillRate,
    PrefillWork,
    work_of,
)
from tests.connector.engines import step_of

H200 = PrefillModel(22e-6, 9e-10)  # an 8B model: 32k tokens in 1.2 s


def stretch(start: int, end: int) -> PrefillWork:
    return PrefillWork(end - start, (end * end - start * start) / 2)


def teach(rate: PrefillRate, truth: PrefillModel, stretches: list[tuple[int, int]], slower: float = 1.0) -> None:
    for start, end in stretches:
        rate.learn(stretch(start, end), slower * truth.seconds(start, end))


def test_nothing_is_known_before_a_long_step():
    assert PrefillRate().model is None


def test_a_model_costs_what_its_stretches_cost_together():
    assert H200.seconds(0, 32_768) == pytest.approx(1.2, rel=0.01)
    assert H200.seconds(0, 1000) + H200.seconds(1000, 5000) == pytest.approx(H200.seconds(0, 5000))
    assert H200.seconds(30_000, 31_000) > H200.seconds(0, 1000)


@given(
    s_per_token=st.floats(1e-7, 1e-2),
    share_of_pairs=st.floats(0, 5),
    lengths=st.lists(st.integers(20_000, 60_000), min_size=1, max_size=20),
)
def test_both_costs_are_found_and_predict_other_lengths(s_per_token, share_of_pairs, lengths):
    """`share_of_pairs` is what pairs add to the time of the first 16k tokens."""
    truth = PrefillModel(s_per_token, share_of_pairs * s_per_token / 8192)
    rate = PrefillRate()
    chunk = 8192
    for length in lengths:
        teach(rate, truth, [(start, min(start + chunk, length)) for start in range(0, length, chunk)])
    longest = max(lengths)
    assert rate.model.seconds(0, longest) == pytest.approx(truth.seconds(0, longest), rel=0.1)
    assert rate.model.s_per_token >= 0
    assert rate.model.s_per_pair >= 0


def test_a_long_prompt_is_predicted_from_its_own_steps():
    rate = PrefillRate()
    teach(rate, H200, [(0, 16_384), (16_384, 32_768)])
    for start, end in [(0, 8192), (0, 65_536), (30_000, 32_768)]:
        assert rate.model.seconds(start, end) == pytest.approx(H200.seconds(start, end), rel=0.05)


def test_steps_that_are_all_alike_predict_their_like():
    rate = PrefillRate()
    teach(rate, H200, [(0, 4096)] * 5)
    assert rate.model.seconds(0, 4096) == pytest.approx(H200.seconds(0, 4096), rel=0.01)
    assert rate.model.s_per_pair < 1e-15, "nothing told the two costs apart"


def test_first_steps_that_were_slow_leave_no_trace():
    rate = PrefillRate()
    teach(rate, H200, [(0, 16_384), (16_384, 32_768)], slower=50)
    teach(rate, H200, [(0, 8192), (0, 16_384), (16_384, 30_000), (0, 5000), (0, 12_000)])
    assert rate.model.seconds(0, 32_768) == pytest.approx(1.2, rel=0.1)


def test_many_short_steps_do_not_tell_what_a_long_one_costs():
    """A step costs something by itself, which a short one mostly consists of."""
    rate = PrefillRate()
    teach(rate, H200, [(0, 16_384), (16_384, 32_768)])
    for tokens in range(300, 500, 10):
        rate.learn(stretch(0, tokens), 0.03 + H200.seconds(0, tokens))
    assert rate.model.seconds(0, 32_768) == pytest.approx(H200.seconds(0, 32_768), rel=0.05)


def test_an_engine_that_has_become_slower_is_known_to_be():
    rate = PrefillRate()
    teach(rate, H200, [(0, 8192), (8192, 16_384)] * 16)
    teach(rate, H200, [(0, 8192), (8192, 16_384)] * (STEPS_REMEMBERED * 3 // 8), slower=3)
    assert rate.model.seconds(0, 16_384) == pytest.approx(3 * H200.seconds(0, 16_384), rel=0.05)


def test_a_step_lasts_from_its_plan_to_its_output():
    rate = PrefillRate()
    rate.begin(1, stretch(0, 1000), now=10.0)
    rate.end(1, now=10.5)
    assert rate.model.seconds(0, 1000) == pytest.approx(0.5)


def test_a_step_planned_while_another_runs_lasts_from_the_end_of_that_one():
    """As with asynchronous scheduling; the other one need not be a long one."""
    rate = PrefillRate()
    rate.begin(1, None, now=10.0)
    rate.begin(2, stretch(0, 1000), now=10.1)
    rate.end(1, now=12.0)
    rate.end(2, now=12.5)
    assert rate.model.seconds(0, 1000) == pytest.approx(0.5)


def test_outputs_that_never_come_are_forgotten():
    rate = PrefillRate()
    for step in range(10 * STEPS_UNDER_WAY_MAX):
        rate.begin(step, stretch(0, 1000), now=float(step))
    assert len(rate._under_way) == STEPS_UNDER_WAY_MAX
    rate.end(3, now=1e6)
    assert rate.model is None


def test_a_shared_step_counts_the_tokens_and_pairs_of_all_its_requests():
    step = step_of({"new": ([1], 100, 900)}, {"chunked": ([2], 2000, 500), "decoding": ([], 4000, 1)})
    expected = [stretch(100, 1000), stretch(2000, 2500), stretch(4000, 4001)]
    assert work_of(step) == PrefillWork(1401, sum(work.pairs for work in expected))


def test_a_step_in_which_nobody_computes_much_tells_nothing():
    decoding = {str(number): ([], 1000, 1) for number in range(2 * STEP_TOKENS_MIN)}
    assert work_of(step_of(running=decoding)) is None
    assert work_of(step_of({"r": ([1], 0, STEP_TOKENS_MIN - 1)})) is None
    assert work_of(SimpleNamespace(num_scheduled_tokens={})) is None

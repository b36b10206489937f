"""Stores that read paged blocks long after the step, as on a GPU: vLLM keeps the blocks, and takes them back after."""

import pytest

from tests.e2e.harness import assert_same_answers
from tests.e2e.stand import FEW_CORES, NOISE, Stand, prompt_of, storable

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

BATCH_NOISE = 0.25  # what is stored was computed in batches with other requests, and decoded


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=FEW_CORES)])
def test_blocks_are_kept_until_they_were_read_also_when_requests_are_preempted_or_aborted(tmp_path, num_ranks):
    """24 blocks of 32 tokens."""
    stand = Stand(
        tmp_path,
        connector_class="tests.e2e.lazy_connector.LazyConnector",
        async_scheduling=True,
        block_size=32,
        num_gpu_blocks_override=24,
        max_model_len=512,
        enable_prefix_caching=False,
        tensor_parallel_size=num_ranks,
    )
    try:
        ask_one_after_the_other(stand, num_ranks)
        ask_until_some_are_preempted(stand, num_ranks)
        for number in range(5):
            aborted = prompt_of(600 + number, 400)
            stand.engine.call("abort_after", prompt={**aborted, "id": f"abort{number}"}, seconds=0.05 * number)
            stand.engine.reset()
        stats = stand.settled()
        assert stats["leases"] == stats["checksum_failures"] == stats["loads_failed"] == 0
        stand.engine.stop()
        stand.server.stop()
    finally:
        stand.kill()


def ask_one_after_the_other(stand: Stand, num_ranks: int) -> None:
    """Two prompts do not fit: each takes the blocks of the one before, whose chunks have all yet to be read."""
    prompts = [prompt_of(700 + number, 400) for number in range(8)]
    expected = stand.plain(prompts)
    before = stand.counts()
    stand.ask(prompts, max_tokens=1, at_once=True)
    num_stored = sum(storable(prompt, 1) for prompt in prompts)
    assert_stored_and_right(stand, prompts, expected, before, num_stored, num_ranks, NOISE)


def ask_until_some_are_preempted(stand: Stand, num_ranks: int) -> None:
    """Six requests grow to nine blocks each."""
    prompts = [prompt_of(500 + number, 150 + 5 * number) for number in range(6)]
    expected = stand.plain(prompts, max_tokens=120, at_once=True)
    before, num_before = stand.counts(), stand.engine.call("preemptions")
    cold = stand.ask(prompts, max_tokens=120, at_once=True)
    assert stand.engine.call("preemptions") > num_before
    assert_same_answers(cold, expected, BATCH_NOISE)
    follow_ups = [
        {"tokens": prompt["tokens"] + answer["tokens"] + [30 + number]}
        for number, (prompt, answer) in enumerate(zip(prompts, cold, strict=True))
    ]
    num_stored = sum(storable(prompt, 120) for prompt in prompts)
    assert_stored_and_right(stand, follow_ups, stand.plain(follow_ups), before, num_stored, num_ranks, BATCH_NOISE)


def assert_stored_and_right(stand, prompts, expected, before, num_stored: int, num_ranks: int, noise: float) -> None:
    """All was stored, and what is loaded is the KV of its tokens.

    Two ranks on a small machine let calls time out, and what one of them has dropped is not held: they may find less.
    """
    stand.engine.reset()  # fails while a block is kept
    if num_ranks == 1:
        stand.wait_until_stored(before, num_stored)
    warm = stand.assert_hits(prompts) if num_ranks == 1 else stand.ask(prompts)
    assert_same_answers(warm, expected, noise)

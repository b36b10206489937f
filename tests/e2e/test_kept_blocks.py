"""Stores that read paged blocks long after the step, as on a GPU: vLLM keeps the blocks, and takes them back after."""

import pytest

from tests.e2e.harness import assert_same_answers
from tests.e2e.stand import Stand, prompt_of, storable

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

BATCH_NOISE = 0.25  # what is stored was computed in batches with other requests, and decoded


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_blocks_are_kept_until_they_were_read_also_when_requests_are_preempted_or_aborted(tmp_path, num_ranks):
    """24 blocks of 32 tokens: of six requests that grow to nine blocks each, some are preempted.

    What one of two ranks has dropped is not held, even if the other one stored it: only a single rank's stores are
    counted.
    """
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
        prompts = [prompt_of(500 + number, 150 + 5 * number) for number in range(6)]
        expected = stand.plain(prompts, max_tokens=120, at_once=True)
        before, num_before = stand.counts(), stand.engine.call("preemptions")
        cold = stand.ask(prompts, max_tokens=120, at_once=True)
        assert stand.engine.call("preemptions") > num_before
        assert_same_answers(cold, expected, BATCH_NOISE)
        stand.engine.reset()  # fails while a block is kept
        if num_ranks == 1:
            stand.wait_until_stored(before, sum(storable(prompt, 120) for prompt in prompts))
        assert stand.counts().stored > before.stored

        follow_ups = [
            {"tokens": prompt["tokens"] + answer["tokens"] + [30 + number]}
            for number, (prompt, answer) in enumerate(zip(prompts, cold, strict=True))
        ]
        expected = stand.plain(follow_ups)
        warm = stand.assert_hits(follow_ups) if num_ranks == 1 else stand.ask(follow_ups)
        assert sum(answer["cached"] for answer in warm) > 0
        assert_same_answers(warm, expected, BATCH_NOISE)

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

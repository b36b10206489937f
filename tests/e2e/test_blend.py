"""Blending on a real engine: what is loaded and what is computed is right, and is never taken for exact."""

import itertools
import random

import pytest

from tests.e2e.blending import (
    DOCUMENTS,
    QUESTION,
    BlendStand,
    assert_loaded,
    blended,
    joined,
    largest_difference,
    num_tokens,
    offset_of,
    planned,
)
from tests.e2e.harm import SharedArena
from tests.e2e.harness import assert_same_answers
from tests.e2e.stand import FEW_CORES, NOISE, PLAIN, prompt_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TAMPERED = "tests.e2e.tampered_connector.TamperedConnector"
BF16_ERROR = 0.02  # of KV that was computed in other batches, by a model of four layers
HEAD = prompt_of(20, 37)["tokens"]


# Tests with engines of their own come first: the engine that the others share stays until the end.


@pytest.mark.parametrize(
    "arguments",
    [
        {"enforce_eager": True},
        {"enforce_eager": False},
        pytest.param({"enforce_eager": True, "tensor_parallel_size": 2}, marks=FEW_CORES),
    ],
    ids=["eager", "compiled", "two ranks"],
)
def test_recomputing_everything_gives_the_plain_engines_kv_and_answers(tmp_path, arguments):
    """In pieces of at most 512 tokens and 4 runs, alone and with two requests in flight."""
    num_ranks = arguments.get("tensor_parallel_size", 1)
    probe = {"probe_dir": tmp_path} if num_ranks == 1 else {}  # answers show it for both
    stand = BlendStand(tmp_path, max_num_batched_tokens=512, max_num_seqs=4, **probe, **arguments)
    try:
        stand.register(DOCUMENTS)
        long_start = prompt_of(50, 600)["tokens"]  # in several steps, the first while documents are being loaded
        orders = {"acb": joined(HEAD, "a", "c", "b", QUESTION), "ba": joined(HEAD[:5], "b", HEAD, "a", QUESTION[:9])}
        orders["ac"] = joined(long_start, "a", HEAD, "c", QUESTION)
        prompts = list(orders.values())
        expected = stand.plain([{"tokens": prompt} for prompt in prompts], max_tokens=24)
        plain_ids = stand.last_ids(3)
        asked = [{"tokens": prompt, "params": blended(select="query", budget=1.0)} for prompt in prompts]
        for at_once in (False, True):
            answers = stand.ask(asked, max_tokens=24, at_once=at_once)
            assert [answer["cached"] for answer in answers] == [len(prompt) - 1 for prompt in prompts]
            assert_same_answers(answers, expected, NOISE)
            for name, plain in zip(stand.last_ids(3), plain_ids, strict=True) if probe else ():
                assert largest_difference(tmp_path, name, plain) < BF16_ERROR
        loaded = 2 * sum(num_tokens(planned(prompt, order).loads) for order, prompt in orders.items())
        stand.server.wait_for(lambda stats: stats["requests"]["blended"] >= 6)
        assert stand.blend_counts()[:2].tolist() == [6, loaded]
        stand.stop()
    finally:
        stand.kill()


def test_preempted_blends_leave_nothing_that_a_plain_request_finds(tmp_path):
    """37 blocks of 32 tokens, for three requests that begin with 11 and end with 15."""
    engine = {"block_size": 32, "num_gpu_blocks_override": 38, "max_model_len": 512, "async_scheduling": True}
    stand = BlendStand(tmp_path, **engine)
    try:
        stand.register({"b": DOCUMENTS["b"]})
        prompts = [joined(prompt_of(30 + number, 90)["tokens"], "b", QUESTION) for number in range(3)]
        expected = stand.plain([{"tokens": prompt} for prompt in prompts])
        num_before = stand.engine.call("preemptions")
        asked = [{"tokens": prompt, "params": blended()} for prompt in prompts]
        answers = stand.ask(asked, max_tokens=140, at_once=True)
        assert stand.engine.call("preemptions") > num_before
        assert stand.blend_counts()[0] >= 1
        later = [{"tokens": prompt + answer["tokens"][:-1]} for prompt, answer in zip(prompts, answers, strict=True)]
        for prompt in later:  # up to the first token that was loaded, 106, all is exact
            [answer] = stand.ask([prompt], keep=True, max_tokens=1)
            assert answer["cached"] <= 96
        assert_same_answers(stand.ask([{"tokens": prompt} for prompt in prompts], keep=True), expected, NOISE)
        stand.stop()
    finally:
        stand.kill()


def test_a_model_that_turns_keys_otherwise_than_it_says_is_not_blended(tmp_path):
    stand = BlendStand(tmp_path, connector_class=TAMPERED)
    try:
        stand.register({"b": DOCUMENTS["b"]})
        prompt = {"tokens": joined(HEAD, "b", QUESTION)}
        expected = stand.plain([prompt])
        answers = stand.assert_no_hits([prompt | {"params": blended()}])
        assert_same_answers(answers, expected, NOISE)
        assert stand.blend_counts()[0] == 0
        assert "rotated keys differ by" in stand.engine.log.read_text()
        stand.stop()
    finally:
        stand.kill()


@pytest.fixture(scope="module")
def stand_and_ids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    stand = BlendStand(folder, probe_dir=folder)
    try:
        yield stand, stand.register(DOCUMENTS)
        stand.kill()
    finally:
        stand.kill()


@pytest.fixture
def stand(stand_and_ids):
    return stand_and_ids[0]


@pytest.mark.parametrize("order", ["".join(names) for names in itertools.permutations("abc")])
def test_documents_are_found_in_any_order_and_loaded_where_they_stand(stand_and_ids, order):
    stand, ids = stand_and_ids
    prompt = joined(HEAD[: random.Random(order).randrange(1, 37)], *order, QUESTION)
    stand.blend(prompt, order)
    for load, name in zip(planned(prompt, order).loads, order, strict=True):
        shift = offset_of(prompt, DOCUMENTS[name])
        assert_loaded(stand.server.folder, stand.last_id, ids[name], shift=shift, start=load.start, end=load.end)


def test_a_plain_request_finds_nothing_of_a_blended_one(stand):
    """Neither in vLLM's prefix cache nor in the tier, not of its prompt and not of its answer."""
    prompt = joined(HEAD[:20], "c", HEAD, "a", QUESTION)
    counts = stand.counts()
    [answer] = stand.ask([{"tokens": prompt, "params": blended()}], max_tokens=150)
    plan = planned(prompt, "ca")
    assert answer["cached"] == plan.end
    later = {"tokens": prompt + answer["tokens"]}
    [plain] = stand.ask([later | {"params": PLAIN}], keep=True)
    assert plain["cached"] <= plan.approximate_from  # what stands before was computed exactly
    assert stand.counts() == counts
    [cold] = stand.ask([later | {"params": PLAIN}])
    assert_same_answers([plain], [cold], NOISE)
    stand.assert_no_hits([later])


def test_what_stands_before_the_first_document_is_exact_and_is_stored(stand):
    start = prompt_of(41, 150)["tokens"]
    before = stand.counts()
    stand.ask([{"tokens": joined(start, "b", QUESTION), "params": blended()}])
    stand.wait_until_stored(before, 128)
    stand.assert_hits([{"tokens": start}])


def test_a_prefix_and_documents_are_loaded_for_one_prompt(stand):
    start = prompt_of(42, 200)["tokens"]
    before = stand.counts()
    stand.ask([{"tokens": start}])
    stand.wait_until_stored(before, 192)
    stand.blend(joined(start, "b", "a", QUESTION), "ba", exact_end=192)


def test_a_document_at_the_beginning_is_an_exact_prefix(stand):
    stand.blend(joined("a", "c", QUESTION), "c", exact_end=256)
    stand.assert_hits([{"tokens": DOCUMENTS["a"], "params": blended()}])


def test_a_document_that_stands_there_twice_is_loaded_twice(stand_and_ids):
    stand, ids = stand_and_ids
    prompt = joined(HEAD, "b", "b", QUESTION)
    stand.blend(prompt, "bb")
    for load in planned(prompt, "bb").loads:
        shift = load.start - 16
        assert_loaded(stand.server.folder, stand.last_id, ids["b"], shift=shift, start=load.start, end=load.end)


def test_without_asking_or_with_another_salt_nothing_is_blended(stand):
    prompt = {"tokens": joined(HEAD[:7], "c", QUESTION)}
    before = stand.blend_counts()
    stand.assert_no_hits([prompt | {"params": blended(), "salt": "another"}])
    stand.assert_no_hits([prompt])
    assert (stand.blend_counts() == before).all()


def test_blends_that_are_aborted_leave_no_leases_and_no_blocks_behind(stand):
    prompt = joined(HEAD, "c", "a", "b", QUESTION)
    for number in range(10):
        asked = {"tokens": prompt, "params": blended(), "id": f"abort{number}"}
        stand.engine.call("abort_after", prompt=asked, seconds=number * 0.004)
        stand.engine.reset()  # fails while a block is in use
    stand.settled()
    stand.blend(prompt, "cab")


def test_a_document_that_is_damaged_between_match_and_load_is_computed(stand):
    """The last test of this module: what it damages is gone."""
    prompt = joined(HEAD, "c", "a", QUESTION)
    expected = stand.plain([{"tokens": prompt}])
    arena, before = SharedArena(stand.server), stand.settled()
    frames = arena.ready_frames()
    stand.engine.reset()
    with arena.held(frames):
        stand.engine.start("generate", prompts=[{"tokens": prompt, "params": blended(), "id": "damaged"}])
        stand.server.wait_for(lambda stats: stats["leases"], timeout_s=20)
        for frame in frames:
            arena.flip_bit(random.Random(frame), frame, "object")
    answers = stand.engine.finish()
    stand.server.wait_for(lambda stats: stats["requests"]["blended"] > before["requests"]["blended"])
    after = stand.settled()
    assert_same_answers(answers, expected, NOISE)
    assert after["checksum_failures"] == before["checksum_failures"] + 2, "each load stops at its first bad chunk"
    assert after["loads_failed"] == before["loads_failed"] + 1
    assert after["tokens"]["blend"]["computed"] - before["tokens"]["blend"]["computed"] == answers[0]["cached"]

"""The tier works with what else vLLM does: every test asks one real engine with and without the tier, and counts."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.e2e.harness import MODEL, Engine, assert_same_answers, logprob_distance
from tests.e2e.stand import CHUNK, NOISE, Stand, loadable, prompt_of, standing, storable, whole_chunks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

# Over a hundred steps in other batches, logits beyond 16 differ by one or two units in their last place, 1/8.
BATCH_NOISE = 0.25

# Tests with engines of their own come first: the engine that the others share stays until the end.


def test_preempted_requests_store_and_load_right_kv(tmp_path):
    """24 blocks of 32 tokens: of six requests that grow to nine blocks each, some are preempted."""
    arguments = {"block_size": 32, "num_gpu_blocks_override": 24, "max_model_len": 512, "enable_prefix_caching": False}
    stand = Stand(tmp_path, async_scheduling=True, **arguments)
    try:
        prompts = [prompt_of(200 + number, 150 + 5 * number) for number in range(6)]
        expected = stand.plain(prompts, max_tokens=120, at_once=True)
        before, num_before = stand.counts(), stand.engine.call("preemptions")
        cold = stand.ask(prompts, max_tokens=120, at_once=True)
        assert stand.engine.call("preemptions") > num_before
        stand.wait_until_stored(before, sum(storable(prompt, 120) for prompt in prompts))
        assert_same_answers(cold, expected, BATCH_NOISE)

        follow_ups = [
            {"tokens": prompt["tokens"] + answer["tokens"] + [30 + number]}
            for number, (prompt, answer) in enumerate(zip(prompts, cold, strict=True))
        ]
        expected = stand.plain(follow_ups)
        assert_same_answers(stand.assert_hits(follow_ups), expected, NOISE)

        num_before = stand.engine.call("preemptions")  # loaded, preempted, and loaded again
        warm = stand.ask(follow_ups, max_tokens=80, at_once=True)
        assert stand.engine.call("preemptions") > num_before
        assert_same_answers([first_tokens(answer, 8) for answer in warm], expected, BATCH_NOISE)
        stand.stop()
    finally:
        stand.kill()


def first_tokens(answer: dict, count: int) -> dict:
    return {"tokens": answer["tokens"][:count], "logprobs": answer["logprobs"][:count]}


def test_a_compiled_producer_stores_what_an_eager_consumer_without_chunked_prefill_loads(tmp_path):
    prompts = [prompt_of(300, 500), prompt_of(301, 90), prompt_of(302, 1200)]
    stand = Stand(tmp_path, kv_role="kv_producer", enforce_eager=False)
    try:
        expected = stand.plain(prompts)
        before = stand.counts()
        assert_same_answers(stand.assert_no_hits(prompts), expected, NOISE)
        stand.wait_until_stored(before, sum(storable(prompt) for prompt in prompts))
        assert_same_answers(stand.assert_no_hits(prompts), expected, NOISE)
        stand.engine.stop()
        assert "Warming up model for the compilation" in stand.engine.log.read_text()

        stand.engine = Engine(
            tmp_path / "consumer.log",
            stand.connector,
            kv_role="kv_consumer",
            enable_chunked_prefill=False,
            max_num_batched_tokens=4096,
        )
        stand.engine.generate([{"id": "first", "tokens": list(range(50, 90))}])
        assert_same_answers(stand.assert_hits(prompts), expected, NOISE)
        before = stand.counts()
        stand.assert_no_hits([prompt_of(303, 300)])
        assert stand.counts() == before
        stand.stop()
    finally:
        stand.kill()


def write_adapter(folder, seed: int, rank: int = 8) -> None:
    """Write a LoRA adapter with random weights for the attention of the test model, as PEFT does."""
    model = json.loads((MODEL / "config.json").read_text())
    hidden, head_size = model["hidden_size"], model["head_dim"]
    width = {
        "q_proj": (hidden, model["num_attention_heads"] * head_size),
        "k_proj": (hidden, model["num_key_value_heads"] * head_size),
        "v_proj": (hidden, model["num_key_value_heads"] * head_size),
    }
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        for name, (inputs, outputs) in width.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, 0.1, (rank, inputs)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.1, (outputs, rank)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(width), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_adapters_separate(tmp_path):
    for number in (1, 2):
        write_adapter(tmp_path / f"adapter{number}", number)
    stand = Stand(tmp_path, enable_lora=True, max_lora_rank=8, max_loras=2)
    try:
        prompt = prompt_of(400, 300)
        without, one, other = (
            prompt | {"adapter": adapter}
            for adapter in (None, ("a", 1, str(tmp_path / "adapter1")), ("b", 2, str(tmp_path / "adapter2")))
        )
        for variant in (without, one, other):
            stand.assert_stored_then_hit([variant])
        answers = stand.assert_hits([without, one, other])
        for some, others in ((0, 1), (0, 2), (1, 2)):
            assert logprob_distance([answers[some]], [answers[others]]) > 2 * NOISE, "the adapters do nothing"
        stand.stop()
    finally:
        stand.kill()


# Prompts are computed 256 tokens a step, so most of these tests also test chunked prefill.
stand_fixture = standing("stand", block_size=32, max_num_batched_tokens=256, async_scheduling=False)


def test_prompts_computed_in_pieces_are_stored_and_hit(stand):
    stand.assert_stored_then_hit([prompt_of(1, 1000), prompt_of(2, 1537), prompt_of(3, 300)])


@pytest.mark.parametrize("length", [64, 65, 127, 128, 256, 320])
def test_the_last_token_is_computed_even_if_chunks_hold_it(stand, length):
    prompt = prompt_of(length, length)
    stand.assert_stored_then_hit([prompt], num_output=2)
    assert loadable(prompt) == length - (length % CHUNK or 1)


def test_decoded_tokens_are_stored_and_hit_by_the_prompt_that_continues_them(stand):
    prompt = prompt_of(10, 40)
    before = stand.counts()
    answer = stand.assert_no_hits([prompt], max_tokens=150)[0]["tokens"]
    stand.wait_until_stored(before, 128)
    follow_up = {"tokens": [*prompt["tokens"], *answer, 77, 78, 79]}
    expected = stand.plain([follow_up])
    before = stand.counts()
    found = stand.ask([follow_up])
    assert found[0]["cached"] == 128
    assert stand.counts().host - before.host == 128
    assert_same_answers(found, expected, NOISE)


@pytest.mark.parametrize(("num_output", "num_stored"), [(4, 0), (5, 64)])
def test_a_decoded_chunk_is_stored_once_its_last_token_was_computed(stand, num_output, num_stored):
    prompt = prompt_of(20 + num_output, 60)
    before = stand.counts()
    stand.assert_no_hits([prompt], max_tokens=num_output)
    stand.assert_no_hits([prompt_of(30 + num_output, 64)], max_tokens=1)  # stored after whatever came before it
    stand.wait_until_stored(before, num_stored + 64)


def test_salts_separate(stand):
    prompt = prompt_of(40, 300)
    one, other = prompt | {"salt": "one"}, prompt | {"salt": "other"}
    stand.assert_stored_then_hit([one])
    stand.assert_stored_then_hit([other])
    stand.assert_stored_then_hit([prompt])
    stand.assert_hits([one, other, prompt])


def test_requests_that_share_a_prefix_at_once_store_it_once_and_all_hit_it(stand):
    start = prompt_of(50, 500)["tokens"]
    prompts = [prompt_of(51 + number, 530 + 40 * number, start) for number in range(6)]
    expected = stand.plain(prompts, at_once=True)
    before = stand.counts()
    cold = stand.ask(prompts, at_once=True)
    shared = whole_chunks(len(start))
    stand.wait_until_stored(before, shared + sum(storable(prompt) - shared for prompt in prompts))
    before = stand.counts()
    warm = stand.ask(prompts, at_once=True)
    after = stand.counts()
    assert [answer["cached"] for answer in warm] == [loadable(prompt) for prompt in prompts]
    # Who comes after the first one's load finds the start in vLLM's own cache, to the block and not to the chunk.
    assert after.host - before.host >= sum(loadable(prompt) - len(start) for prompt in prompts) + shared
    assert after.stored == before.stored
    assert_same_answers(cold, expected, NOISE)
    assert_same_answers(warm, expected, NOISE)


def test_a_prefix_that_vllm_still_holds_is_not_loaded(stand):
    prompt = prompt_of(60, 700)
    stand.assert_stored_then_hit([prompt])
    stand.ask([{"tokens": prompt["tokens"][:200]}])  # loads 192 tokens, six blocks, into an empty prefix cache
    before = stand.counts()
    answer = stand.ask([prompt], keep=True)[0]
    assert answer["cached"] == 640
    assert stand.counts().host - before.host == 640 - 192


def test_a_request_says_whether_it_loads_and_stores(stand):
    prompt = prompt_of(70, 300)
    before = stand.counts()
    stand.assert_no_hits([prompt | {"params": {"cachetier": {"store": False}}}])
    assert stand.counts() == before
    stand.assert_no_hits([prompt | {"params": {"cachetier": {"load": False}}}])
    stand.wait_until_stored(before, 256)
    stand.assert_no_hits([prompt | {"params": {"cachetier": {"load": False}}}])
    stand.assert_hits([prompt | {"params": {"cachetier": {"store": False}}}])


def test_log_probabilities_of_the_prompt_are_computed_not_loaded(stand):
    prompt = prompt_of(80, 300)
    stand.assert_stored_then_hit([prompt])
    answer = stand.assert_no_hits([prompt | {"prompt_logprobs": 1}])[0]
    assert answer["prompt_logprobs"] == 300


def test_emptying_vllms_cache_keeps_the_tier_and_emptying_the_connectors_starts_anew(stand):
    prompt = prompt_of(90, 300)
    stand.assert_stored_then_hit([prompt])
    stand.engine.reset()
    stand.assert_hits([prompt], keep=True)
    stand.engine.reset(connector=True)
    before = stand.counts()
    stand.assert_no_hits([prompt])
    stand.wait_until_stored(before, 256)
    stand.assert_hits([prompt])


def test_a_request_in_flight_when_the_connector_is_reset_stores_nothing_more(stand):
    prompt = prompt_of(100, 100)
    expected = stand.plain([prompt], max_tokens=150)
    before = stand.counts()
    answers = stand.ask([prompt], max_tokens=150, reset_connector_in_flight=True)
    assert_same_answers(answers, expected, NOISE)
    assert stand.counts().stored - before.stored <= 128 < storable(prompt, 150)
    follow_up = {"tokens": prompt["tokens"] + answers[0]["tokens"]}
    stand.assert_stored_then_hit([follow_up])


def test_an_aborted_request_leaves_nothing_wrong_behind(stand):
    prompt = prompt_of(110, 1000)
    expected = stand.plain([prompt])
    for number, seconds in enumerate((0.02, 0.05, 0.1)):
        stand.engine.call("abort_after", prompt=prompt | {"id": f"aborted{number}"}, seconds=seconds)
    assert_same_answers(stand.ask([prompt]), expected, NOISE)
    stand.counts()
    assert_same_answers(stand.assert_hits([prompt]), expected, NOISE)


def test_the_comparison_would_notice_other_kv(stand):
    """The noise allowed is far below what any other prompt's KV would cause."""
    some, others = prompt_of(120, 300), prompt_of(121, 300)
    ending = prompt_of(122, 3)["tokens"]
    prompts = [{"tokens": some["tokens"] + ending}, {"tokens": others["tokens"] + ending}]
    one, other = stand.plain(prompts)
    assert logprob_distance([one], [other]) > 2 * NOISE

"""What the router reads from a request, and what it makes of it."""

import json
from typing import Any

import pytest

from cachetier.route.openai_request import CHAT, COMPLETIONS, PART_TOKENS, OpenAIRequest, read_request


def read(path: str = COMPLETIONS, **fields: Any) -> OpenAIRequest:
    return read_request(path, json.dumps({"model": "m"} | fields).encode())


def chat(*contents: Any, **fields: Any) -> OpenAIRequest:
    return read(CHAT, messages=[{"role": "user", "content": content} for content in contents], **fields)


def num_shared(one: OpenAIRequest, other: OpenAIRequest) -> int:
    """Return how many leading blocks are the same."""
    same = [a == b for a, b in zip(one.blocks, other.blocks, strict=False)]
    return [*same, False].index(False)


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [
        ("x" * 4000, 1000),
        ([5] * 700, 700),
        (["x" * 400, "y" * 800], 200),
        ([[1, 2], [3] * 50], 50),
        ("", 0),
        ([], 0),
        (None, 0),
        (7, 0),
        ([None], 1),
        ([-1, "x"], 2),
    ],
)
def test_length_is_exact_for_token_ids_and_of_the_longest_prompt(prompt: Any, num_tokens: int) -> None:
    assert read(prompt=prompt).num_tokens == num_tokens


def test_a_chat_has_the_length_of_its_texts_tools_and_parts() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:" + "x" * 9000}}
    asked = chat("x" * 400, [{"type": "text", "text": "y" * 40}, picture], None)
    assert asked.num_tokens == 100 + 10 + PART_TOKENS
    assert chat("x" * 400, tools=[{"type": "function", "function": {"name": "z" * 400}}]).num_tokens > 200
    assert read(CHAT, messages="no list").num_tokens == read(CHAT).num_tokens == 0


def test_prompts_share_the_blocks_of_their_common_beginning() -> None:
    common = "".join(map(str, range(2000)))
    one, other = read(prompt=common + "a" * 3000), read(prompt=common + "b" * 3000)
    assert num_shared(one, other) == len(common) // 1024
    assert num_shared(read(prompt=list(range(1000))), read(prompt=list(range(900)))) == 900 // 256
    assert num_shared(chat(common), chat(common, "an answer", "and more")) == len(common) // 1024
    assert len(set(read(prompt="x" * 5000).blocks)) == 4, "a block's hash covers what stands before it"
    for change in ({"model": "other"}, {"cache_salt": "tenant"}):
        assert num_shared(one, read(**({"prompt": common} | change))) == 0


@pytest.mark.parametrize("body", [b"", b"no json", b"[1]", b'{"model": NaN}', b"\xff"])
def test_what_cannot_be_read_is_passed_on_as_it_is(body: bytes) -> None:
    asked = read_request(COMPLETIONS, body)
    assert asked.for_consumer() == body
    assert not asked.may_hand_over


@pytest.mark.parametrize("params", [[1], "x", {"cachetier": 5}, {"cachetier": [1]}])
def test_parameters_that_make_no_sense_are_left_to_the_engine(params: Any) -> None:
    asked = read(prompt="x" * 9000, kv_transfer_params=params)
    assert not asked.may_hand_over
    assert json.loads(asked.for_consumer())["kv_transfer_params"] == params


def test_a_request_without_a_hand_over_stays_as_it_is_byte_by_byte() -> None:
    body = b'{ "prompt":"x",  "temperature": 1.0,"kv_transfer_params":{"cachetier":{"load":true}} }'
    assert read_request(COMPLETIONS, body).for_consumer() == body


@pytest.mark.parametrize(
    ("given", "understood"), [("p", "p"), (None, "none"), ("none", "none"), (False, "none"), (7, "7")]
)
def test_a_wish_for_the_prefill_is_the_routers_alone(given: Any, understood: str) -> None:
    params = {"other": 1, "cachetier": {"prefill": given, "blend": True}}
    asked = read(prompt="x" * 40, kv_transfer_params=params)
    assert asked.wants_prefill == understood
    assert json.loads(asked.for_consumer())["kv_transfer_params"] == {"other": 1, "cachetier": {"blend": True}}
    told = json.loads(asked.for_consumer("p2"))
    assert told["kv_transfer_params"] == {"other": 1, "cachetier": {"blend": True, "prefill": "p2"}}
    assert json.loads(asked.for_producer())["kv_transfer_params"] == {"other": 1, "cachetier": {"blend": True}}


@pytest.mark.parametrize("params", [None, {}, {"cachetier": None}, {"other": 1}])
def test_the_consumer_is_told_whatever_else_stands_there(params: Any) -> None:
    asked = read(prompt="x" * 40, kv_transfer_params=params)
    told = json.loads(asked.for_consumer("p"))
    assert told["kv_transfer_params"] == (params or {}) | {"cachetier": {"prefill": "p"}}


def test_a_prefill_computes_one_token_for_nobody() -> None:
    given = {"max_completion_tokens": 99, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
    given |= {"min_tokens": 5, "logprobs": True, "top_logprobs": 3, "response_format": {"type": "json_object"}}
    kept = {"model": "m", "tools": [], "cache_salt": "s", "priority": 2, "temperature": 0.5}
    sent = json.loads(chat("hello", **given, **kept).for_producer())
    limits = {"max_tokens": 1, "max_completion_tokens": 1, "n": 1, "stream": False}
    assert sent == kept | limits | {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"logprobs": 3}, True),
        ({"echo": False}, True),
        ({"echo": True}, False),
        ({"prompt_logprobs": 0}, False),
        ({"kv_transfer_params": {"cachetier": {"load": False}}}, False),
        ({"kv_transfer_params": {"cachetier": {"store": False}}}, False),
        ({"kv_transfer_params": {"cachetier": {"document": "d"}}}, False),
    ],
)
def test_some_prompts_must_be_computed_where_they_are_answered(fields: dict[str, Any], may: bool) -> None:
    asked = read(prompt="x" * 4000, **fields)
    assert asked.may_hand_over is may
    assert asked.is_document is ("document" in str(fields))


def test_other_paths_only_say_which_model_they_want() -> None:
    asked = read("/v1/embeddings", prompt="x" * 4000)
    assert (asked.model, asked.num_tokens, asked.may_hand_over) == ("m", 0, False)

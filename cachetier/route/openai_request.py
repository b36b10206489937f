"""A request of the OpenAI interface, read as far as the router needs it, and the two requests that it becomes.

Pure. The router has no tokenizer, so it estimates lengths from characters and compares texts instead of tokens. What it
cannot read it passes on as it came: the engine says what is wrong with it.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import xxhash

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BLOCK_BYTES = 1024  # about 256 tokens of text, and 256 token ids
TOKEN_CHARACTERS = 4  # of English text; other languages have more tokens, which errs towards no hand-over
PART_TOKENS = 256  # of an image or a sound, whose length nobody can tell from here
NO_PREFILL = "none"

# What a prefill does without: it computes the prompt and one token, for nobody to read.
_FOR_ANSWERS_ALONE = (
    *("stream_options", "min_tokens", "best_of", "logprobs", "top_logprobs", "logprob_token_ids", "stop"),
    *("response_format", "structured_outputs", "use_beam_search"),
)


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """A request.

    Attributes:
        body: as it came.
        fields: the same as an object; None: it is none.
        model: the model's name; None: the engine's only one.
        num_tokens: of its longest prompt, estimated from text, exact for token ids; 0: no prompt was found.
        blocks: hashes of the prompt's leading blocks, each over all that stands before it too.
        wants_prefill: what it says itself: the name of the engine that prefills; `NO_PREFILL`; None: nothing.
        is_document: it registers its prompt as a document.
        may_hand_over: nothing in it speaks against a prefill elsewhere.
    """

    body: bytes
    fields: dict[str, Any] | None = None
    model: str | None = None
    num_tokens: int = 0
    blocks: tuple[int, ...] = ()
    wants_prefill: str | None = None
    is_document: bool = False
    may_hand_over: bool = False

    def for_producer(self) -> bytes:
        """Return the body with which a producer computes the prompt, and nothing more than it must."""
        fields = {name: value for name, value in self._bare().items() if name not in _FOR_ANSWERS_ALONE}
        fields |= {"max_tokens": 1, "n": 1, "stream": False}
        if "messages" in fields:
            fields["max_completion_tokens"] = 1
        return msgspec.json.encode(fields)

    def for_consumer(self, producer: str = "") -> bytes:
        """Return the body with which a consumer answers; `producer` names who prefills the prompt for it."""
        if not producer:
            return self.body if self.wants_prefill is None else msgspec.json.encode(self._bare())
        fields = self._bare()
        params = fields.get("kv_transfer_params") or {}
        wishes = (params.get("cachetier") or {}) | {"prefill": producer}
        return msgspec.json.encode(fields | {"kv_transfer_params": params | {"cachetier": wishes}})

    def _bare(self) -> dict[str, Any]:
        """Return the fields without what was meant for the router."""
        assert self.fields is not None
        if self.wants_prefill is None:
            return self.fields
        params = self.fields["kv_transfer_params"]
        wishes = {name: value for name, value in params["cachetier"].items() if name != "prefill"}
        return self.fields | {"kv_transfer_params": params | {"cachetier": wishes}}


def read_request(path: str, body: bytes) -> OpenAIRequest:
    """Return what `body`, sent to `path`, is."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return OpenAIRequest(body)
    if not isinstance(fields, dict):
        return OpenAIRequest(body)
    model = fields.get("model")
    if not isinstance(model, str):
        model = None
    if path not in (COMPLETIONS, CHAT):
        return OpenAIRequest(body, fields, model)
    text, num_tokens = _prompt(fields) if path == COMPLETIONS else _conversation(fields)
    params = fields.get("kv_transfer_params") or {}
    given = params.get("cachetier") or {} if isinstance(params, dict) else None
    wishes = given if isinstance(given, dict) else {}
    prefill = (wishes["prefill"] or NO_PREFILL) if "prefill" in wishes else None
    is_refused = given is not wishes or wishes.get("load") is False or wishes.get("store") is False
    # Log-probabilities of the prompt's own tokens need a prefill where the answer is made.
    scores_prompt = fields.get("prompt_logprobs") is not None or fields.get("echo")
    return OpenAIRequest(
        body,
        fields,
        model,
        num_tokens,
        _blocks(f"{model}\0{fields.get('cache_salt') or ''}\0", text),
        str(prefill) if prefill is not None else None,
        "document" in wishes,
        num_tokens > 0 and not (is_refused or scores_prompt or "document" in wishes),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _prompt(fields: dict[str, Any]) -> tuple[bytes, int]:
    """Return the first of a completion's prompts as bytes, and the tokens of the longest one."""
    prompt = fields.get("prompt")
    prompts: Sequence[Any] = [prompt]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompts = prompt
    texts = [
        (each.encode("utf-8", "replace"), len(each) // TOKEN_CHARACTERS) for each in prompts if isinstance(each, str)
    ]
    texts += [(_packed(each), len(each)) for each in prompts if isinstance(each, list)]
    return (texts[0][0], max(num_tokens for _, num_tokens in texts)) if texts else (b"", 0)


def _packed(tokens: list[Any]) -> bytes:
    try:
        return array("I", tokens).tobytes()
    except (TypeError, OverflowError):  # no token ids: the engine will say so
        return b""


def _conversation(fields: dict[str, Any]) -> tuple[bytes, int]:
    """Return a chat's tools and messages as bytes of which a longer chat's begin the same, and its estimated tokens."""
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return b"", 0
    tools = msgspec.json.encode(fields.get("tools") or [])
    num_tokens = len(tools) // TOKEN_CHARACTERS + sum(_tokens_of(_mapping(each).get("content")) for each in messages)
    return tools + msgspec.json.encode(messages)[:-1], num_tokens


def _tokens_of(content: Any) -> int:
    if isinstance(content, str):
        return len(content) // TOKEN_CHARACTERS
    parts = content if isinstance(content, list) else []
    texts = (_mapping(part).get("text") for part in parts)
    return sum(len(text) // TOKEN_CHARACTERS if isinstance(text, str) else PART_TOKENS for text in texts)


def _blocks(seed: str, text: bytes) -> tuple[int, ...]:
    blocks, block = [], xxhash.xxh3_64_intdigest(seed.encode("utf-8", "replace"))
    for end in range(BLOCK_BYTES, len(text) + 1, BLOCK_BYTES):
        block = xxhash.xxh3_64_intdigest(text[end - BLOCK_BYTES : end], seed=block)
        blocks.append(block)
    return tuple(blocks)
